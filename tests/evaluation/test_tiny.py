"""Janus-Tiny, the model in the package: its scores, repeatable drawing, the cost of fewer bits."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

import mlx_janus
from mlx_janus.commands import chat, evaluate
from mlx_janus.evaluation import shapes, sizes
from mlx_janus.evaluation.answers import measure_attributes, measure_existence
from mlx_janus.evaluation.codec import measure_codec
from mlx_janus.evaluation.drawing import drawing_prompts
from mlx_janus.evaluation.sizes import Sizes
from mlx_janus.models.janus import JanusModel
from mlx_janus.weights.sources import TINY
from mlx_janus.worlds import judge, language
from tests.support.programs import call, error_line, run

# Shares that are right, on the small fixed set below.
EXISTENCE = 0.92
ATTRIBUTES = 0.8
DRAWING = 0.7
LOST = {8: 0.08, 4: 0.2}  # of each share, at most, with so many bits
CODEC_RIGHT, PSNR = 0.85, 27.5
NOTICE = "No model is named: this is Janus-Tiny"


def scores(janus: mlx_janus.JanusPipeline) -> dict[str, float]:
    """Shares of right answers and right pictures on a fixed set."""
    sizes = Sizes(pictures=12)
    existence = measure_existence(janus, sizes, 0, lambda *_: None)
    attributes = measure_attributes(janus, sizes, 0, lambda *_: None)
    right = []
    for task in ("single object", "colours", "colour attribution"):
        targets = drawing_prompts(task, 4, 0)
        seeds = [10 * i for i in range(len(targets))]
        drawn = janus.generate_images([one.prompt for one in targets], n=2, seed=seeds)
        for i, image in enumerate(drawn):
            right.append(targets[i // 2].is_met(judge.read(image.image)))
    return {
        "existence": float(np.mean([answers.accuracy for answers in existence.values()])),
        "attributes": float(np.mean(list(attributes.values()))),
        "drawing": float(np.mean(right)),
    }


def dequantize(model: JanusModel) -> None:
    """Put float layers, of the same rounded weights, in the place of quantized ones."""
    layers: list[tuple[str, nn.Module]] = []
    for name, layer in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        if not isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
            continue
        weight = mx.dequantize(
            layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits
        )
        rows, columns = weight.shape
        if isinstance(layer, nn.QuantizedEmbedding):
            whole: nn.Module = nn.Embedding(rows, columns)
        else:
            whole = nn.Linear(columns, rows, bias="bias" in layer)
        whole.update({name: layer[name] for name in ("bias",) if name in layer})
        whole.update({"weight": weight})
        layers.append((name, whole))
    assert layers
    model.update_modules(tree_unflatten(layers))
    mx.eval(model.parameters())


@pytest.fixture(scope="module")
def tiny() -> mlx_janus.JanusPipeline:
    return mlx_janus.load(TINY)


@pytest.fixture(scope="module")
def whole(tiny: mlx_janus.JanusPipeline) -> dict[str, float]:
    return scores(tiny)


def test_it_answers_and_draws_right(whole: dict[str, float]) -> None:
    assert whole["existence"] >= EXISTENCE
    assert whole["attributes"] >= ATTRIBUTES
    assert whole["drawing"] >= DRAWING


@pytest.mark.parametrize("bits", [8, 4])
def test_fewer_bits_cost_little(bits: int, whole: dict[str, float]) -> None:
    """Scored with the rounded weights as floats, whose products are 10 times as quick on a CPU."""
    janus = mlx_janus.load(TINY, bits=bits)
    ids = mx.array([janus.prompts.drawing("a red circle above a blue square")])

    def logits() -> mx.array:
        return janus.model.image_logits(janus.model.hidden_states(janus.model.embed_text(ids)))

    quantized = logits()
    janus.thread.call(lambda: dequantize(janus.model))
    assert mx.allclose(logits(), quantized, rtol=1e-4, atol=1e-4).item()
    fewer = scores(janus)
    assert all(fewer[part] >= whole[part] - LOST[bits] for part in whole), (fewer, whole)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("weight", [None, 1.0])
def test_every_window_draws_the_same(
    tiny: mlx_janus.JanusPipeline, weight: float | None, n: int
) -> None:
    plain = tiny.generate_images(
        "a red circle above a blue square", n=n, seed=4, cfg_weight=weight, window=1
    )
    for window in (2, 4, 8, 16, 32):
        drawn = tiny.generate_images(
            "a red circle above a blue square", n=n, seed=4, cfg_weight=weight, window=window
        )
        for image, other in zip(plain, drawn, strict=True):
            assert np.array_equal(image.tokens, other.tokens), window


def test_windows_save_passes(tiny: mlx_janus.JanusPipeline) -> None:
    """More than one token and a half a pass, on average over prompts."""
    drawn = [
        tiny.generate_images(f"a {c} circle", seed=i, window=8)[0]
        for i, c in enumerate(("red", "blue", "green"))
    ]
    assert sum(image.passes for image in drawn) < 3 * tiny.config.generation.tokens / 1.5


def test_it_is_small_and_whole() -> None:
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 8_000_000
    janus = mlx_janus.load(TINY)
    assert sum(array.size for _, array in tree_flatten(janus.model.parameters())) <= 6_000_000
    assert {file.name for file in TINY.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_the_same_seed_draws_the_same_tokens_on_every_run() -> None:
    """In processes of their own, so that nothing left over can help."""
    program = (
        "import mlx_janus; j = mlx_janus.load();"
        "print([i.tokens.tolist() for i in j.generate_images('a red circle', n=2, seed=5)])"
    )
    first, second = (run("-c", program) for _ in range(2))
    assert first.code == 0, first.stderr
    assert first.stdout == second.stdout
    drawn = mlx_janus.load(TINY).generate_images("a red circle", seed=6)[0].tokens.tolist()
    assert str(drawn) in first.stdout  # alone as with others


def test_load_without_a_name_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mlx_janus"):
        janus = mlx_janus.load()
    assert janus.name == "janus-tiny"
    assert [NOTICE in record.message for record in caplog.records] == [True]
    assert 'path_or_hub_id="deepseek-ai/Janus-Pro-1B"' in caplog.text


def test_the_commands_use_it_and_say_so(tmp_path: Path) -> None:
    drawn = run(
        "-m",
        "mlx_janus.generate",
        "--prompt",
        "a red circle above a blue square",
        "--seed",
        "1",
        cwd=tmp_path,
    )
    assert (drawn.code, drawn.stdout) == (0, "janus.png\n")
    notices = [line for line in drawn.stderr.splitlines() if NOTICE in line]
    assert [line.partition(": ")[2] for line in notices] == [
        "this is Janus-Tiny, which knows coloured shapes and nothing else. For a real one: "
        "--model deepseek-ai/Janus-Pro-1B"
    ]
    question = ("--prompt", "How many shapes are there?", "--image", "janus.png")
    asked = run("-m", "mlx_janus.generate", *question, cwd=tmp_path)
    assert asked.code == 0
    assert asked.stdout.strip() in language.NUMBERS
    assert NOTICE in asked.stderr
    talked = call(chat.main, stdin="hello\n")
    assert talked.code == 0


def test_its_drawings_answer_for_themselves(tiny: mlx_janus.JanusPipeline) -> None:
    """Drawn, then shown: it names the colour that it was asked to draw."""
    right = 0
    for seed, (shape, colour) in enumerate(
        [("circle", "red"), ("square", "blue"), ("star", "yellow")] * 2
    ):
        image = tiny.generate_images(f"a {colour} {shape}", seed=seed)[0].image
        right += tiny.generate_text(f"What color is the {shape}?", image).text == colour
    assert right >= 5


@pytest.mark.check
def test_evaluate_prints_tables_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = functools.partial(Sizes, drawn=1, reconstructed=20)  # which are no options
    monkeypatch.setattr(sizes, "Sizes", small)
    output = tmp_path / "scores.json"
    done = call(evaluate.main, "shapes", "--pictures", "2", "--prompts", "1", "--output", output)
    assert done.code == 0, done.stderr
    for part in (
        "existence",
        "attributes",
        "drawing",
        "codec",
        "adversarial",
        "colour attribution",
    ):
        assert part in done.stdout
    assert '"drawing_unguided"' in output.read_text()


def test_evaluate_refuses_a_model_of_another_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = SimpleNamespace(name="large", config=SimpleNamespace(image_size=384))
    monkeypatch.setattr(evaluate, "load_pipeline", lambda *_: large)
    assert "large draws 384 pixels a side" in error_line(call(evaluate.main, "shapes"))
    assert "is not a folder" in error_line(
        call(evaluate.main, "shapes", "--output", tmp_path / "no" / "scores.json")
    )
    for folder in (str(tmp_path), f"{tmp_path}/no/"):  # found before the measurement
        assert f"{folder} is a folder: give the name of a file in it" in error_line(
            call(evaluate.main, "shapes", "--output", folder)
        )


def test_evaluate_prints_only_json_to_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "load_pipeline", lambda *_: None)
    monkeypatch.setattr(shapes, "measure", lambda *_, **__: {"existence": 1})
    assert call(evaluate.main, "shapes", "--output", "-").stdout == '{\n  "existence": 1\n}\n'


def test_the_codec_keeps_what_the_judge_reads(tiny: mlx_janus.JanusPipeline) -> None:
    measured = measure_codec(tiny, Sizes(reconstructed=60), 0, lambda *_: None)
    assert measured["judge_right_before"] >= 0.98
    assert measured["judge_right_after"] >= CODEC_RIGHT
    assert measured["psnr"] >= PSNR
