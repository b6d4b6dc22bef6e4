"""Training learns, and a run that was killed ends as one that was not."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

import mlx_janus
from mlx_janus.commands import train
from mlx_janus.errors import CheckpointError
from mlx_janus.models import convolution
from mlx_janus.models.vq import VQModel
from mlx_janus.processing.prompts import Prompts
from mlx_janus.training.loop import Learner, checkpoint_file, read_log, run_stage
from mlx_janus.training.tiny.auxiliary_heads import (
    COUNT_BITS,
    JanusWithHeads,
    encode_counts,
    first_token,
    tracking_targets,
)
from mlx_janus.training.tiny.batches import caption_batch, conversation_batch
from mlx_janus.training.tiny.codec import CodecStage
from mlx_janus.training.tiny.encoder import EncoderStage, edges, outlines, patch_labels
from mlx_janus.training.tiny.joint import JointStage, build_model
from mlx_janus.training.tiny.recipe import (
    CODEC,
    CodecRecipe,
    EncoderRecipe,
    JointRecipe,
    tiny_config,
)
from mlx_janus.training.tiny.train import average_weights
from mlx_janus.training.tiny.vocabulary import train_tokenizer
from mlx_janus.worlds import shapes
from tests.support.programs import call, environment, error_line, run
from tests.support.small_training import SMALL_CODEC, SMALL_ENCODER, small_config


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    """Compiling takes longer than these few steps."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    tokenizer = train_tokenizer(tiny_config(1000).prompt, 0)
    config = small_config(tokenizer.get_vocab_size())
    return Prompts(tokenizer, config.prompt, image_tokens=config.understanding.tokens)


def joint_stage(prompts: Prompts, steps: int, batch: int = 4) -> JointStage:
    config = small_config(prompts.tokenizer.get_vocab_size())
    codec = CodecStage(SMALL_CODEC, CodecRecipe(), 0)
    encoder = EncoderStage(SMALL_ENCODER, EncoderRecipe(), 0)
    trainee = JanusWithHeads(build_model(config, codec.state(), encoder.state(), 0))
    recipe = JointRecipe(
        steps,
        answering_batch=batch,
        drawing_batch=2 * batch,
        rate=3e-3,  # a small model learns at higher rates
        muon_rate=0.02,
        warmup=5,
    )
    return JointStage(trainee, prompts, recipe, 0)


def test_thirty_steps_lower_both_losses(prompts: Prompts, tmp_path: Path) -> None:
    run_stage(joint_stage(prompts, 30, 2), tmp_path, recipe="a test")
    first, _, last = read_log(tmp_path / "log.jsonl")
    assert last["text_loss"] < 0.6 * first["text_loss"]
    assert last["image_loss"] < first["image_loss"] - 0.3
    assert last["step"] == 30


def test_the_drawing_stage_learns_from_captions_alone(prompts: Prompts) -> None:
    whole = joint_stage(prompts, 2)
    stage = JointStage(
        whole.trainee,
        prompts,
        JointRecipe(8, answering_batch=0, drawing_batch=8, warmup=2),
        0,
        "drawing",
    )
    before = {
        name: mx.array(value)
        for name, value in nn.utils.tree_flatten(stage.trainee.janus.parameters())
    }
    measured = [stage.step(k) for k in range(8)]
    assert measured[-1]["image_loss"] < measured[0]["image_loss"] - 0.1
    assert "text_loss" not in measured[0]
    after = dict(nn.utils.tree_flatten(stage.trainee.janus.parameters()))
    for part in ("aligner.", "language_model.lm_head.", "vision_model.", "gen_vision_model."):
        assert all(
            mx.array_equal(after[name], before[name]) for name in after if name.startswith(part)
        ), part
    JointStage(stage.trainee, prompts, JointRecipe(2, answering_batch=4, drawing_batch=8), 0).step(
        0
    )
    after = dict(nn.utils.tree_flatten(stage.trainee.janus.parameters()))
    assert not mx.array_equal(
        after["language_model.lm_head.weight"], before["language_model.lm_head.weight"]
    )


def test_the_model_is_the_mean_of_the_last_two_stages(prompts: Prompts) -> None:
    stage = joint_stage(prompts, 2)
    model = stage.trainee.janus
    one = {name: mx.full(value.shape, 1.0) for name, value in stage.state().items()}
    average_weights(model, one, {name: 3 * value for name, value in one.items()}, 0.75)
    assert all(
        mx.allclose(value, mx.array(2.5)) for _, value in nn.utils.tree_flatten(model.parameters())
    )


def test_the_codec_starts_with_colours_and_learns_its_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = CodecRecipe(30, unquantized_steps=20, batch=4, rate=1e-3, muon_rate=2e-3)
    codec = CodecStage(SMALL_CODEC, recipe, 0)
    pixels = codec._pixels(99, 0)
    with monkeypatch.context() as patched:
        patched.setattr(codec, "_pixels", lambda *_: pixels)
        measured = [codec.step(k) for k in range(20)]
    assert measured[0]["psnr"] > 14  # a random start has about 7
    assert measured[-1]["loss"] < 0.8 * measured[0]["loss"]
    assert codec.step(20)["codes_in_use"] > 250


def test_thirty_steps_of_the_encoder_learn() -> None:
    encoder = EncoderStage(SMALL_ENCODER, EncoderRecipe(30, batch=2), 0)
    losses = [encoder.step(k)["loss"] for k in range(30)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_the_joint_stage_leaves_the_encoder_and_the_codec_as_they_are(prompts: Prompts) -> None:
    """With gradients from a few answers, the encoder would forget within a hundred steps."""
    stage = joint_stage(prompts, 2)
    before = {
        name: mx.array(value) for name, value in nn.utils.tree_flatten(stage.trainee.parameters())
    }
    stage.step(0)
    changed = {
        name.removeprefix("janus.").split(".")[0]
        for name, value in nn.utils.tree_flatten(stage.trainee.parameters())
        if not mx.array_equal(value, before[name])
    }
    assert changed == {
        "aligner",
        "gen_aligner",
        "gen_embed",
        "gen_head",
        "language_model",
        "tracking_head",
        "placing_head",
    }


def test_every_stage_trains_compiled(prompts: Prompts) -> None:
    mx.enable_compile()  # the fixture turns it off for the other tests
    codec = CodecStage(SMALL_CODEC, CodecRecipe(2, unquantized_steps=1, batch=1), 0)
    encoder = EncoderStage(SMALL_ENCODER, EncoderRecipe(1, batch=1), 0)
    trainee = joint_stage(prompts, 1, 1).trainee
    recipe = JointRecipe(1, answering_batch=1, drawing_batch=1, placing=1.0)
    places = JointStage(trainee, prompts, recipe, 0, "places")
    measured = [codec.step(0), codec.step(1), encoder.step(0), places.step(0)]
    assert all(np.isfinite(value) for one in measured for value in one.values())


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("name", ["codec", "encoder", "joint"])
def test_a_killed_and_resumed_run_equals_an_unbroken_one(
    name: str, prompts: Prompts, tmp_path: Path
) -> None:
    def stage() -> CodecStage | EncoderStage | JointStage:
        if name == "codec":
            return CodecStage(SMALL_CODEC, CodecRecipe(12, unquantized_steps=6, batch=1), 0)
        if name == "encoder":
            return EncoderStage(SMALL_ENCODER, EncoderRecipe(12, batch=1), 0)
        return joint_stage(prompts, 12, 1)

    def kill(_: str, done: int, __: int, ___: object) -> None:
        if done == 11:
            raise _Killed

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_stage(stage(), whole, recipe="a test")
    with pytest.raises(_Killed):
        run_stage(stage(), broken, recipe="a test", every=0, report=kill)
    steps: list[int] = []
    run_stage(stage(), broken, recipe="a test", report=lambda _, done, __, ___: steps.append(done))
    assert steps[0] == 11  # from the checkpoint of step 10
    one, two = (mx.load(str(checkpoint_file(folder, name))) for folder in (whole, broken))
    assert set(one) == set(two)
    assert all(mx.array_equal(one[key], two[key]) for key in one)
    logs = [
        [{k: v for k, v in line.items() if "second" not in k} for line in read_log(f / "log.jsonl")]
        for f in (whole, broken)
    ]
    assert logs[0] == logs[1]


def test_a_checkpoint_of_another_recipe_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    def stage() -> EncoderStage:
        return EncoderStage(SMALL_ENCODER, EncoderRecipe(2, batch=1), 0)

    run_stage(stage(), tmp_path, recipe="one")
    with pytest.raises(CheckpointError, match="another recipe or seed"):
        run_stage(stage(), tmp_path, recipe="two")
    path = checkpoint_file(tmp_path, "encoder")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is damaged"):
        run_stage(stage(), tmp_path, recipe="one")


def test_a_checkpoint_with_other_arrays_is_refused(tmp_path: Path) -> None:
    stage = EncoderStage(SMALL_ENCODER, EncoderRecipe(1, batch=1), 0)
    run_stage(stage, tmp_path, recipe="one")
    path = checkpoint_file(tmp_path, "encoder")
    state, metadata = mx.load(str(path), return_metadata=True)
    mx.save_safetensors(
        str(path), {f"model.{name}": value for name, value in state.items()}, metadata
    )
    with pytest.raises(CheckpointError, match="holds other arrays"):
        run_stage(stage, tmp_path, recipe="one")


TRAIN = ["-m", "mlx_janus", "train", "tiny", "--codec-steps", "12", "--checkpoint-every", "0"]
STAGES = ("codec", "merged", "encoder", "drawing", "joint", "places")
SMALL_SIZES = "from tests.support import small_training\n\nsmall_training.install()\n"


def start_training(folder: Path, processes: int) -> subprocess.Popen[str]:
    """A run of the command, of one step for every stage after the first.

    Python runs ``sitecustomize.py`` first, also in the processes that the command starts.
    """
    startup = folder / "startup"
    startup.mkdir(exist_ok=True)
    (startup / "sitecustomize.py").write_text(SMALL_SIZES)
    arguments = [*TRAIN, "--processes", str(processes), "--output", str(folder)]
    for stage in STAGES[1:]:
        arguments += [f"--{stage}-steps", "1"]
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment(startup, MLX_DISABLE_COMPILE="1", OPENBLAS_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_in(folder: Path, processes: int) -> bytes:
    """The model of a run that ends well."""
    process = start_training(folder, processes)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert out == f"{folder / 'model'}\n"
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the command trained in, with one process."""
    folder = tmp_path_factory.mktemp("trained")
    train_in(folder, processes=1)
    return folder


@pytest.mark.check
def test_the_command_trains_a_model(trained: Path) -> None:
    assert {line["stage"] for line in read_log(trained / "log.jsonl")} == set(STAGES)
    assert (trained / "model" / "model.safetensors").stat().st_size < 2_000_000  # small sizes
    assert (trained / "losses.png").stat().st_size > 1000
    janus = mlx_janus.load(trained / "model")
    assert janus.generate_images("a red circle", seed=1)[0].image.size == (64, 64)


def test_the_command_survives_a_kill(tmp_path: Path, trained: Path) -> None:
    """A run of two processes, killed in its first stage and resumed, equals a run of one."""
    process = start_training(tmp_path, processes=2)
    try:
        deadline = time.monotonic() + 300
        while not checkpoint_file(tmp_path, "codec").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    whole = (trained / "model" / "model.safetensors").read_bytes()
    assert train_in(tmp_path, processes=2) == whole


def test_wrong_use_of_the_command(tmp_path: Path) -> None:
    assert call(train.main, "tiny").code == 2
    assert "--output" in call(train.main, "tiny").stderr
    assert call(train.main, "tiny", "--output", tmp_path, "--codec-steps", "0").code == 2
    (tmp_path / "file").write_text("")
    outcome = call(train.main, "tiny", "--output", tmp_path / "file")
    assert "file" in error_line(outcome)
    assert "runs/tiny" in run("-m", "mlx_janus", "train", "tiny", "--help").stdout


def test_matrices_with_small_gradients_do_not_shrink() -> None:
    """MLX's Muon makes the whole update of its weight decay where gradients are small."""
    mx.random.seed(0)
    model = nn.Linear(16, 16)
    before = mx.linalg.norm(model.weight).item()
    learner = Learner(model, rate=1e-3, steps=200, warmup=5, muon_rate=0.01, weight_decay=0.02)
    for step in range(200):
        gradient = 1e-6 * mx.random.normal((16, 16), key=mx.random.key(step))
        learner.update({"weight": gradient, "bias": mx.zeros((16,))})
    assert mx.linalg.norm(model.weight).item() > 0.9 * before


@pytest.mark.parametrize("band", [48_000_000, 100_000])
def test_matrix_products_are_convolutions(band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions as matrix products, in bands or not, give MLX's own outputs and gradients."""
    monkeypatch.setattr(convolution, "_BAND_BYTES", band)
    mx.random.seed(0)
    model = VQModel(CODEC)
    pixels = mx.random.uniform(-1, 1, (2, 64, 64, 3))

    def loss(model: VQModel, pixels: mx.array) -> mx.array:
        return (
            model.decoder(model.post_quant_conv(model.quant_conv(model.encoder(pixels)))) * pixels
        ).mean()

    after = nn.value_and_grad(model, loss)(model, pixels)
    monkeypatch.setattr(convolution.Conv2d, "__call__", nn.Conv2d.__call__)
    before = nn.value_and_grad(model, loss)(model, pixels)
    assert before[0].item() == pytest.approx(after[0].item(), rel=1e-4, abs=1e-6)
    one, two = (dict(nn.utils.tree_flatten(gradients)) for _, gradients in (before, after))
    largest = max(float(mx.abs(g).max()) for g in one.values())
    assert set(one) == set(two)
    for name, gradient in one.items():
        assert float(mx.abs(gradient - two[name]).max()) < 1e-4 * largest, name


def test_conversations_ask_for_what_the_assistant_says(prompts: Prompts) -> None:
    batch = conversation_batch(prompts, np.random.default_rng(0), 6)
    for row in range(6):
        ids, counts = batch["ids"][row], batch["weights"][row] > 0
        assert (ids == prompts.special.image).sum() == prompts.image_tokens
        assert (ids[batch["positions"][row] + 1][counts] == batch["targets"][row][counts]).all()
        said = prompts.tokenizer.decode(
            batch["targets"][row][counts].tolist(), skip_special_tokens=False
        )
        answers = [answer.strip() for answer in said.split(prompts.config.eos)]
        assert len(answers) >= 3
        assert answers[-1] == ""  # the last one ended
        text = prompts.tokenizer.decode(ids.tolist())
        assert all(answer in text for answer in answers)


def test_about_a_tenth_of_the_captions_is_dropped(prompts: Prompts) -> None:
    batch = caption_batch(prompts, np.random.default_rng(0), 1000, 0.1)
    dropped = (batch["ids"][:, 1] == prompts.special.pad).sum()
    assert 70 < dropped < 130
    assert (batch["ids"][np.arange(1000), batch["starts"]] == prompts.special.image_start).all()
    assert (batch["ids"][:, 0] == prompts.special.bos).all()


def test_patch_labels_are_of_the_things_there() -> None:
    thing = shapes.Thing("star", "green", 24, 20, 44, 0, shapes.COLOURS["green"])
    scene = shapes.Scene((thing,))
    shape, colour, centre, right, down, size, x, y = patch_labels(scene, 8).reshape(8, 8, 8)
    assert shape[5, 2] == 1 + shapes.SHAPES.index("star")
    assert colour[5, 2] == 1 + list(shapes.COLOURS).index("green")
    assert centre.sum() == centre[5, 2] == 1
    assert shape[0].sum() == shape[:, 6:].sum() == 0
    assert (right[5, 2], down[5, 2], size[5, 2]) == (0, 0, 3)
    assert (right[4, 1], down[4, 1]) == (1, 1)
    assert (x[4, 1], y[4, 1]) == (
        -0.75,
        0.75,
    )  # where it is in the picture, not in relation to the patch
    square = shapes.Scene((shapes.Thing("square", "red", 24, 32, 32, 0, shapes.COLOURS["red"]),))
    held = edges(shapes.pixels(square)[None], 8)[0].reshape(8, 8, 4, 16).sum(2)
    assert held[4, 2].argmax() == 0  # brighter to the left, so "differs" grows to the right
    assert held[4, 5].argmax() == 8
    assert held[3, 3].sum() == 0
    cells = outlines(shapes.pixels(scene)[None], 8)[0].reshape(8, 8, 4, 4)
    assert cells[5, 2].mean() > 0.9
    assert cells[0].sum() == 0


def test_a_drawn_token_is_told_whose_it_is_and_what_has_been_begun() -> None:
    star = shapes.Thing("star", "green", 24, 20, 22, 0)  # its tip in row 1 and column 2
    square = shapes.Thing("square", "red", 16, 48, 40, 0)  # from row 4 on, in column 5
    assert first_token(star, 8) == 1 * 8 + 2
    assert first_token(square, 8) == 4 * 8 + 5
    owners, begun, ahead = tracking_targets(shapes.Scene((star, square)), 8)
    assert owners.shape == (64, 2)
    assert begun.shape == ahead.shape == (64, COUNT_BITS)
    assert owners[2 * 8 + 2].tolist() == [
        1 + shapes.SHAPES.index("star"),
        1 + list(shapes.COLOURS).index("green"),
    ]
    assert not owners[0].any()
    both, nothing = encode_counts([star, square]), encode_counts([])
    assert not nothing.any()
    for position, seen in (
        (0, []),
        (10, []),
        (11, [star]),
        (37, [star]),
        (38, [star, square]),
        (63, [star, square]),
    ):
        assert np.array_equal(begun[position], encode_counts(seen)), position
        assert np.array_equal(
            ahead[position], encode_counts([t for t in (star, square) if t not in seen])
        ), position
    assert both.sum() == 2 + 2  # one of each shape, one of each colour
    assert encode_counts([square, square]).sum() == 2 + 2


def test_a_name_is_told_where_its_thing_is(prompts: Prompts) -> None:
    batch = conversation_batch(prompts, np.random.default_rng(1), 40)
    random = np.random.default_rng(1)
    scenes = [shapes.sample_scene(random, kind) for kind in random.choice(shapes.BUSY, 40)]
    found = 0
    for scene, ids, places in zip(scenes, batch["ids"], batch["places"], strict=True):
        for at in np.flatnonzero(places[:, 2]):
            colour, shape = prompts.decode(ids[at - 1 : at + 1].tolist()).split()
            (thing,) = (
                t for t in scene.things if t.name == (shape, colour)
            )  # one alone: else it is told nothing
            assert places[at, :2] == pytest.approx([thing.x / 16 - 2, thing.y / 16 - 2], abs=1e-5)
            found += 1
        text = prompts.tokenizer.decode(ids.tolist())
        names = [t.name for t in scene.things]
        assert places[:, 2].sum() == sum(
            text.count(f" {colour} {shape}")
            for shape, colour in set(names)
            if names.count((shape, colour)) == 1
        )
    assert found > 40


def test_the_auxiliary_heads_learn_and_the_model_never_holds_them(prompts: Prompts) -> None:
    recipe = JointRecipe(
        12, answering_batch=4, drawing_batch=8, warmup=2, lookup_steps=0, placing=1.0
    )
    stage = JointStage(joint_stage(prompts, 2).trainee, prompts, recipe, 0, "places")
    measured = [stage.step(0) for _ in range(12)]  # one batch again and again
    for name in ("tracking_loss", "placing_loss"):
        assert measured[-1][name] < 0.9 * measured[0][name]
    heads = [
        name
        for name in stage.state()
        if name.startswith(("model.tracking_head.", "model.placing_head."))
    ]
    assert len(heads) == 5
    assert not {"tracking_head", "placing_head"} & set(stage.trainee.janus)


def test_the_tokenizer_reads_what_it_has_never_seen(prompts: Prompts) -> None:
    for text in ("Ein Igel im Schnee, 3 × größer 🦔", "a red circle", "<|Assistant|>"):
        assert prompts.decode(prompts.encode(text)) == text


def test_the_log_forgets_a_line_that_a_kill_cut(tmp_path: Path) -> None:
    run_stage(EncoderStage(SMALL_ENCODER, EncoderRecipe(1, batch=1), 0), tmp_path, recipe="one")
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"stage": "enc')
    run_stage(EncoderStage(SMALL_ENCODER, EncoderRecipe(1, batch=1), 0), tmp_path, recipe="one")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1]


def test_two_processes_get_the_options_of_the_command_also_zero() -> None:
    with train.tiny.make_context("tiny", ["--output", "x", "--checkpoint-every", "0"]) as context:
        words = train._option_words(context)
    assert words[words.index("--checkpoint-every") + 1] == "0.0"
    assert "--beside" not in words
    assert "None" not in words
