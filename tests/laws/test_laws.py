"""What must hold whatever the weights: caching, batching, chunking, guidance, noise, stopping."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_janus.inference.image_generation
from mlx_janus import memory
from mlx_janus.config import (
    GenHeadConfig,
    ImageConfig,
    JanusConfig,
    LlamaConfig,
    MLPConfig,
    PromptConfig,
    SiglipConfig,
    VQConfig,
    VQGenerationConfig,
)
from mlx_janus.decode import image as draw_module
from mlx_janus.decode.image import DrawOptions, draw_tokens, text_rows
from mlx_janus.decode.sampling import choose, guide, gumbel_noise, position_keys
from mlx_janus.decode.text import StopStrings, TextOptions, answer_tokens, draft_tokens
from mlx_janus.decode.window import best_window, time_passes
from mlx_janus.inference import window_timing as tuning
from mlx_janus.models.backbone import take_rows
from mlx_janus.models.janus import JanusModel
from mlx_janus.processing.prompts import Turn
from mlx_janus.weights.sources import cache_folder
from tests.support.golden import FIXTURES, golden, rms_error

pytestmark = pytest.mark.check
Janus = mlx_janus.JanusPipeline
PROMPT = "a lighthouse in a storm"


def test_cached_is_uncached(pro: Janus) -> None:
    embeddings = pro.model.embed_text(golden("deepseek-pro-bin")["text.input_ids"])
    whole = pro.model.hidden_states(embeddings)
    cache = pro.model.make_cache()
    stepped = [
        pro.model.hidden_states(embeddings[:, i : i + 1], cache) for i in range(embeddings.shape[1])
    ]
    assert rms_error(mx.concatenate(stepped, axis=1), whole) < 1e-5


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_chunked_prefill_is_whole(pro: Janus, chunk: int) -> None:
    ids = pro.prompts.answering(
        [Turn("user", "Tell me a long story about lighthouses and storms.")]
    )
    embeddings = pro.model.embed_text(mx.array(ids))
    options = TextOptions(max_tokens=12)
    whole = list(answer_tokens(pro.model, embeddings, options))
    assert list(answer_tokens(pro.model, embeddings, options, prefill_step_size=chunk)) == whole


def test_chunked_prefill_draws_the_same(pro: Janus, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pro.generate_images(PROMPT, n=2, seed=3)
    monkeypatch.setattr(mlx_janus.decode.image, "PREFILL_STEP", 5)
    for image, again in zip(whole, pro.generate_images(PROMPT, n=2, seed=3), strict=True):
        assert np.array_equal(image.tokens, again.tokens)


def test_a_temperature_near_zero_is_argmax() -> None:
    logits = mx.array([[0.0, 3.0, 1.0]])
    for temperature in (0, 1e-300, 1e-38, 1e-20):
        assert choose(logits, position_keys([1], 1)[:, 0], temperature).tolist() == [1]


def test_taken_rows_of_a_cache_go_on(pro: Janus) -> None:
    embeddings = mx.random.normal((2, 7, 32), key=mx.random.key(0))
    following = mx.random.normal((2, 1, 32), key=mx.random.key(1))
    cache = pro.model.make_cache()
    pro.model.hidden_states(embeddings, cache)
    copies = take_rows(cache, [0, 0, 0, 1, 1, 1])
    many = pro.model.hidden_states(mx.repeat(following, 3, axis=0), copies)
    once = pro.model.hidden_states(following, cache)
    assert rms_error(many, mx.repeat(once, 3, axis=0)) < 1e-5


def test_a_picture_is_the_same_alone_and_in_any_batch(janus: Janus) -> None:
    together = janus.generate_images(PROMPT, n=5, seed=40)
    assert [image.seed for image in together] == [40, 41, 42, 43, 44]
    for image in together:
        alone = janus.generate_images(PROMPT, seed=image.seed)[0]
        assert np.array_equal(alone.tokens, image.tokens)
        assert alone.image == image.image
    assert len({tuple(image.tokens) for image in together}) == 5


def test_exact_and_memory_bound_groups_draw_the_same(
    pro: Janus, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pro.generate_images(PROMPT, n=4, seed=1)
    monkeypatch.setattr(
        mlx_janus.inference.image_generation, "available_memory", lambda: 9_540_000
    )  # room for a few pictures
    steps = list(pro.stream_images(PROMPT, n=4, seed=1))
    groups = steps[-1].total // pro.config.generation.tokens
    assert 1 < groups <= 4
    split = [image for step in steps for image in step.images]
    exact = pro.generate_images(PROMPT, n=4, seed=1, exact=True)
    for image, other, third in zip(whole, split, exact, strict=True):
        assert np.array_equal(image.tokens, other.tokens)
        assert np.array_equal(image.tokens, third.tokens)


def test_one_prefill_for_any_n(pro: Janus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt goes through the language model in two rows, however many pictures are drawn."""
    shapes = []
    hidden_states = type(pro.model).hidden_states

    def spy(self: object, embeddings: mx.array, cache: object = None) -> mx.array:
        shapes.append(embeddings.shape[:2])
        return hidden_states(self, embeddings, cache)  # type: ignore[arg-type]

    monkeypatch.setattr(type(pro.model), "hidden_states", spy)
    pro.generate_images(PROMPT, n=3, seed=0)
    length = len(pro.prompts.drawing(PROMPT))
    assert shapes[0] == (2, length)
    assert shapes[1:] == [(6, 1)] * (pro.config.generation.tokens - 1)
    shapes.clear()
    pro.generate_images(PROMPT, n=3, seed=0, cfg_weight=1)
    assert shapes == [(1, length)] + [(3, 1)] * (pro.config.generation.tokens - 1)


def test_guidance_of_one_is_the_conditional_row(pro: Janus) -> None:
    """Weight 1 without the unconditional row, against both rows mixed with (almost) weight 1."""
    plain = pro.generate_images(PROMPT, n=3, seed=5, cfg_weight=1)
    mixed = pro.generate_images(PROMPT, n=3, seed=5, cfg_weight=1 + 1e-7)
    assert [image.tokens.tolist() for image in plain] == [image.tokens.tolist() for image in mixed]
    assert (
        plain[0].tokens.tolist()
        != pro.generate_images(PROMPT, seed=5, cfg_weight=5)[0].tokens.tolist()
    )


def test_guidance_formula() -> None:
    conditional, unconditional = (
        mx.array([[1.0, 2.0], [0.5, 0.0]]),
        mx.array([[0.0, 3.0], [1.0, 4.0]]),
    )
    assert guide(conditional, unconditional, 5.0).tolist() == [[5.0, -2.0], [-1.5, -16.0]]
    assert guide(conditional, unconditional, mx.array([[5.0], [1.0]])).tolist() == [
        [5.0, -2.0],
        [0.5, 0.0],
    ]
    assert mx.array_equal(guide(conditional, unconditional, 0.0), unconditional)


def test_noise_is_a_function_of_seed_and_position() -> None:
    keys = position_keys([3, 9, 2**40], 8)
    assert mx.array_equal(keys[1], position_keys([9], 8)[0])
    noise = gumbel_noise(keys[:, 4], 50)
    for row in range(3):
        assert mx.array_equal(noise[row], gumbel_noise(keys[row : row + 1, 4], 50)[0])
    assert not mx.array_equal(noise[0], gumbel_noise(keys[:, 5], 50)[0])
    assert not mx.array_equal(keys[2], position_keys([0], 8)[0])  # high bits of a seed count


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.7), (0.7, 0.9)]
)
def test_choice_follows_the_softmax(temperature: float, top_p: float) -> None:
    """Chi-square of 40,000 keyed draws against softmax(z / T) cut to the nucleus."""
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0], dtype=np.float32)
    p = np.exp(logits / temperature)
    p /= p.sum()
    above = np.cumsum(p) - p  # sorted already
    p = np.where(above < top_p, p, 0)
    p /= p.sum()
    draws = 40_000
    keys = mx.random.split(mx.random.key(17), draws)
    chosen = choose(mx.broadcast_to(mx.array(logits), (draws, 6)), keys, temperature, top_p)
    seen = np.bincount(np.array(chosen), minlength=6)
    assert seen[p == 0].sum() == 0
    expected = draws * p[p > 0]
    chi_square = float(((seen[p > 0] - expected) ** 2 / expected).sum())
    assert chi_square < 25  # 5 degrees of freedom: exceeded once in 7,000


def test_temperature_zero_is_argmax_whatever_the_seed(pro: Janus) -> None:
    a, b = (pro.generate_images(PROMPT, seed=seed, temperature=0)[0] for seed in (1, 2))
    assert np.array_equal(a.tokens, b.tokens)
    assert not np.array_equal(a.tokens, pro.generate_images(PROMPT, seed=1)[0].tokens)


def test_answers_repeat_with_their_seed_and_do_not_depend_on_length(pro: Janus) -> None:
    draw = [
        pro.generate_text("Hello?", temperature=1.0, top_p=0.95, seed=s, max_tokens=20)
        for s in (7, 7, 8)
    ]
    assert draw[0].tokens == draw[1].tokens != draw[2].tokens
    shorter = pro.generate_text("Hello?", temperature=1.0, top_p=0.95, seed=7, max_tokens=5)
    assert shorter.tokens == draw[0].tokens[:5]


def test_drawing_does_not_disturb_the_callers_random_state(pro: Janus) -> None:
    mx.random.seed(4)
    expected = mx.random.uniform(shape=(3,)).tolist()
    mx.random.seed(4)
    pro.generate_images(PROMPT, seed=1)
    pro.generate_text("Hello?", temperature=1.0, seed=1, max_tokens=3)
    assert mx.random.uniform(shape=(3,)).tolist() == expected


def test_closing_a_drawing_stops_within_a_step(pro: Janus, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    embed = type(pro.model).embed_image_tokens
    monkeypatch.setattr(
        type(pro.model),
        "embed_image_tokens",
        lambda self, ids: (calls.append(1), embed(self, ids))[1],
    )
    steps = pro.stream_images(PROMPT, seed=1, window=1)
    for _ in range(4):
        next(steps)
    steps.close()
    assert len(calls) <= 5


def test_eos_ends_an_answer_and_is_not_part_of_it(
    pro: Janus, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pro.generate_text("Hello?", max_tokens=10)
    assert (whole.finish_reason, len(whole.tokens)) == ("length", 10)
    fourth = whole.tokens[3]
    at = whole.tokens.index(fourth)
    special = pro.prompts.special
    monkeypatch.setattr(pro.prompts, "special", type(special)(**{**vars(special), "eos": fourth}))
    ended = pro.generate_text("Hello?", max_tokens=10)
    assert (ended.finish_reason, ended.tokens) == ("stop", whole.tokens[:at])


@pytest.mark.parametrize("lookup", [0, 4])
def test_every_end_id_ends_an_answer(
    converted: dict[str, Path], tmp_path: Path, lookup: int
) -> None:
    """``generation_config.json`` of transformers' layout may list several."""
    source = Path(shutil.copytree(FIXTURES / "transformers", tmp_path / "source"))
    whole = mlx_janus.load(converted["transformers"]).generate_text("Hi", max_tokens=8)
    end = whole.tokens[3]
    generation = {"eos_token_id": [521, end]}
    (source / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    janus = mlx_janus.load(source)
    answer = janus.generate_text("Hi", max_tokens=8, lookup=lookup)
    assert answer.tokens == whole.tokens[: whole.tokens.index(end)]
    assert answer.finish_reason == "stop"
    talk = janus.conversation()
    talk.send("Hi", max_tokens=8)
    assert talk.send("And?", max_tokens=1).cached_tokens > 0


def test_streamed_text_is_the_whole_text(janus: Janus) -> None:
    chunks = list(
        janus.stream_text("What is in this image?", FIXTURES / "picture.png", max_tokens=40)
    )
    result = chunks[-1].result
    assert result is not None
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert result.text == janus.prompts.decode(result.tokens).lstrip()
    assert all(chunk.result is None for chunk in chunks[:-1])
    assert result.peak_memory > 0
    assert result.generation_tps > 0


def test_stop_strings_cut_the_answer(pro: Janus) -> None:
    whole = pro.generate_text("Hello?", max_tokens=30)
    stop = whole.text[6:9]
    cut = pro.generate_text("Hello?", max_tokens=30, stop=[stop, "never there"])
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert len(cut.tokens) < len(whole.tokens)


@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=3), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_in_any_pieces(pieces: list[str], stop: list[str]) -> None:
    """Text ends before the first complete stop string; no character is shown early or lost."""
    whole, shown, hit = "".join(pieces), "", False
    stream = StopStrings(stop)
    for piece in pieces:
        text, hit = stream.add(piece)
        shown += text
        if hit:
            break
    if not hit:
        shown += stream.finish()
    assert hit == any(s in whole for s in stop)
    assert whole.startswith(shown)
    assert not any(s in shown for s in stop)
    if not hit:
        assert shown == whole


def test_previews_show_every_image_of_a_group_and_decode_each_once(
    pro: Janus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those too that are complete, while others of their group are finished one by one."""
    decoded: list[int] = []
    decode = type(pro.model).decode_image_tokens
    monkeypatch.setattr(
        type(pro.model),
        "decode_image_tokens",
        lambda self, *args: (decoded.append(1), decode(self, *args))[1],
    )
    finished: list[bytes] = []
    previews: list[list[bytes]] = []
    for step in pro.stream_images("a red fox", n=3, seed=1):
        for image in step.images:
            finished.append(image.image.tobytes())
            previews.append([shown.tobytes() for shown in step.preview()])
    assert previews == [finished] * 3
    assert len(decoded) == 3


def test_preview_shows_what_is_drawn_so_far(pro: Janus) -> None:
    size, grid = pro.config.image_size, pro.config.generation.grid
    previews = {}
    for step in pro.stream_images(PROMPT, n=2, seed=3):
        previews[step.index] = step.preview()
        last = step
    assert (last.index, last.total) == (16, 16)
    assert [image.size for image in previews[5]] == [(size, size)] * 2
    grey, cell = (127, 127, 127), size // grid
    early = np.array(previews[5][0])  # one row and one token
    assert (early[cell:, cell:] == grey).all()
    assert not (early[:cell] == grey).all()
    assert not (early[cell : 2 * cell, :cell] == grey).all()
    finished = pro.generate_images(PROMPT, n=2, seed=3)
    assert [a.tobytes() for a in last.preview()] == [image.image.tobytes() for image in finished]


def test_metadata_draws_the_same_picture_again(pro: Janus, tmp_path: object) -> None:
    from pathlib import Path

    from PIL import Image

    drawn = pro.generate_images(PROMPT, cfg_weight=3.5, temperature=0.8, top_p=0.9)[0]
    path = drawn.save(Path(str(tmp_path)) / "out.png")
    with Image.open(path) as image:
        facts = dict(image.text)  # type: ignore[attr-defined]
    assert set(facts) == {
        "prompt",
        "seed",
        "cfg_weight",
        "temperature",
        "top_p",
        "model",
        "dtype",
        "version",
    }
    again = pro.generate_images(
        facts["prompt"],
        seed=int(facts["seed"]),
        **{name: float(facts[name]) for name in ("cfg_weight", "temperature", "top_p")},
    )[0]
    assert again.image == drawn.image


def test_limits_name_both_lengths(pro: Janus) -> None:
    context = pro.config.language.max_position_embeddings
    with pytest.raises(
        mlx_janus.JanusError, match=rf"is \d{{5,}} tokens long.*context length is {context}"
    ):
        pro.generate_text("lighthouse " * context)
    with pytest.raises(
        mlx_janus.JanusError,
        match=rf"is \d{{5,}} tokens long.*takes 16.*context length is {context}",
    ):
        pro.generate_images("lighthouse " * context)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"cfg_weight": float("inf")}, "cfg_weight"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 2.0}, "n"),
        ({"seed": -2}, "seed"),
        ({"seed": [1, 2]}, "seed"),
        ({"seed": []}, "seed"),
        ({"seed": [2**63]}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 2**63 - 1, "n": 2}, "seed"),
        ({"seed": True}, "seed"),
        ({"window": 0}, "window"),
    ],
)
def test_options_out_of_range(pro: Janus, arguments: dict[str, float], word: str) -> None:
    """Refused before a step is taken, with the name of the argument and what it may be."""
    with pytest.raises(ValueError, match=rf"^{word} must be "):
        pro.stream_images(PROMPT, **arguments)  # type: ignore[arg-type]


def test_text_options_out_of_range(pro: Janus) -> None:
    for arguments in (
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"top_p": -1},
        {"seed": -5},
        {"stop": [""]},
    ):
        with pytest.raises(mlx_janus.JanusError, match=next(iter(arguments))):
            pro.stream_text("Hello?", **arguments)  # type: ignore[arg-type]


def test_drawn_tokens_are_evaluated_and_in_range(pro: Janus) -> None:
    ids = pro.prompts.drawing(PROMPT)
    prompt = text_rows(ids, pro.prompts.unconditional(ids), DrawOptions())
    rows = list(draw_tokens(pro.model, [prompt], [(0, 1), (0, 2)], DrawOptions()))
    assert len(rows) == pro.config.generation.tokens
    assert all(
        row.shape == (2, 1) and int(row.max()) < pro.config.generation.codec.codebook_size
        for row in rows
    )


@pytest.mark.parametrize("weight", [1.0, 5.0])
@pytest.mark.parametrize("n", [1, 3])
def test_windows_draw_the_same_tokens(janus: Janus, weight: float, n: int) -> None:
    plain = janus.generate_images(PROMPT, n=n, seed=11, cfg_weight=weight, window=1)
    assert plain[0].passes == janus.config.generation.tokens
    for window in (2, 4, 8, 16, 32):
        drawn = janus.generate_images(PROMPT, n=n, seed=11, cfg_weight=weight, window=window)
        assert [image.tokens.tolist() for image in drawn] == [
            image.tokens.tolist() for image in plain
        ], window
        assert drawn[0].passes <= plain[0].passes


def small_model(*, side: int, patch: int, codes: int, hidden: int, layers: int) -> JanusModel:
    """Random weights; pictures of (side / 2) x (side / 2) tokens."""
    mx.random.seed(3)
    return JanusModel(
        JanusConfig(
            understanding=SiglipConfig(
                kind="siglip",
                image_size=side,
                patch_size=patch,
                width=8,
                layers=1,
                heads=1,
                mlp_width=8,
            ),
            aligner=MLPConfig(kind="mlp_gelu", input_dim=8, output_dim=hidden),
            language=LlamaConfig(
                kind="llama",
                vocab_size=10,
                hidden_size=hidden,
                intermediate_size=hidden,
                num_hidden_layers=layers,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=hidden // 2,
                max_position_embeddings=4096,
            ),
            generation=VQGenerationConfig(
                kind="vq",
                image_size=side,
                codec=VQConfig(
                    kind="vq",
                    codebook_size=codes,
                    codebook_dim=4,
                    ch=4,
                    ch_mult=(1, 1),
                    num_res_blocks=1,
                    z_channels=4,
                    norm_groups=1,
                ),
                aligner=MLPConfig(kind="mlp_gelu", input_dim=4, output_dim=hidden),
                head=GenHeadConfig(
                    kind="vision_head", input_dim=hidden, hidden_dim=hidden, output_dim=codes
                ),
            ),
            image=ImageConfig(image_size=side),
            prompt=PromptConfig(system=""),
            dtype="float32",
        )
    )


def toy_model() -> JanusModel:
    """Three codes, pictures of two by two tokens: all 81 pictures can be enumerated."""
    model = small_model(side=4, patch=2, codes=3, hidden=16, layers=2)
    model.gen_embed.weight *= 30  # so that what was drawn matters for what follows
    return model


@pytest.mark.parametrize("window", [1, 8])
@pytest.mark.parametrize("layers", [1, 4])
def test_the_cache_is_held_once(layers: int, window: int) -> None:
    """MLX copies an array on writing while a reference is held, such as a step's to a cache."""
    model = small_model(side=48, patch=16, codes=64, hidden=256, layers=layers)
    mx.eval(model.drawing_arrays())
    ids, positions = [1] * 32, model.config.generation.tokens
    cache = 2 * 2 * (len(ids) + positions) * 256 * 4 * layers
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    prompt = text_rows(ids, ids, DrawOptions())
    for _ in draw_tokens(model, [prompt], [(0, 1)], DrawOptions(), window):
        pass
    assert mx.get_peak_memory() - held < 1.2 * cache + 2_000_000


def _distance_of_drawn_pictures(window: int) -> float:
    """Return chi-square of images drawn in windows, over the likely images and all the rest."""
    model, options = toy_model(), DrawOptions(cfg_weight=2.0, temperature=0.2)
    conditional, unconditional = [1, 2, 3, 4], [1, 0, 0, 4]
    pictures = np.array(list(itertools.product(range(3), repeat=4)))
    text = model.embed_text(mx.array([conditional] * 81 + [unconditional] * 81))
    drawn = model.embed_image_tokens(mx.array(np.tile(pictures[:, :-1], (2, 1))))
    hidden = model.hidden_states(mx.concatenate([text, drawn], axis=1))[:, 3:]
    logits = (
        guide(*mx.split(model.image_logits(hidden), 2), options.cfg_weight) / options.temperature
    )
    chances = np.array(mx.softmax(logits, axis=-1), dtype=np.float64)  # (81, 4, 3)
    p = np.take_along_axis(chances, pictures[..., None], axis=-1).prod((1, 2))
    assert p.sum() == pytest.approx(1, abs=1e-4)
    draws, seen = 1500, np.zeros(81)
    for first in range(0, draws, 4):  # four rows a pass, of which each is as if alone
        rows = [(0, seed) for seed in range(first, first + 4)]
        prompt = text_rows(conditional, unconditional, options)
        blocks = list(draw_tokens(model, [prompt], rows, options, window))
        tokens = np.concatenate(blocks, axis=1)
        np.add.at(seen, tokens @ [27, 9, 3, 1], 1)
    likely = draws * p > 8
    counts, expected = (np.append(v[likely], v[~likely].sum()) for v in (seen, draws * p))
    return float(scipy.stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1))


@pytest.mark.parametrize("window", [1, 2, 4])
def test_windows_keep_the_law(window: int) -> None:
    assert _distance_of_drawn_pictures(window) > 1e-4


def test_a_guess_taken_unchecked_breaks_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above sees a planted bug."""
    monkeypatch.setattr(
        mlx_janus.decode.image, "_count_accepted", lambda chosen, _: chosen.shape[1]
    )
    assert _distance_of_drawn_pictures(4) < 1e-8


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("lookup", [1, 4, 16])
def test_lookup_answers_the_same(pro: Janus, lookup: int, temperature: float) -> None:
    question = "light house light house light house storm storm light house"
    plain = pro.generate_text(question, max_tokens=40, temperature=temperature, seed=2)
    guessed = pro.generate_text(
        question, max_tokens=40, temperature=temperature, seed=2, lookup=lookup
    )
    assert guessed.tokens == plain.tokens


def test_lookup_takes_fewer_passes_where_text_repeats(
    pro: Janus, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = pro.prompts.answering([Turn("user", "Hello?")])
    embeddings, passes = pro.model.embed_text(mx.array(ids)), []
    logits = type(pro.model).text_logits
    monkeypatch.setattr(
        type(pro.model), "text_logits", lambda self, h: (passes.append(1), logits(self, h))[1]
    )
    plain = list(answer_tokens(pro.model, embeddings, TextOptions(max_tokens=30)))
    passes.clear()
    told = list(
        answer_tokens(
            pro.model,
            embeddings,
            TextOptions(max_tokens=30, lookup=8),
            ids=[*(token.id for token in plain), *ids],
        )
    )
    assert told == plain
    assert len(passes) <= 15


def test_guesses_follow_the_latest_like_of_the_end() -> None:
    assert draft_tokens([1, 2, 3, 1, 2, 4, 1, 2], 3) == [4, 1, 2]
    assert draft_tokens([5, 1, 2, 9, 1, 2, 4, 5, 1, 2], 1) == [9]  # a longer end counts more
    assert (
        draft_tokens([1, 2, 3], 4) == draft_tokens([], 4) == draft_tokens([1, 2, 7, 1, 2], 0) == []
    )


@pytest.mark.parametrize("weight", [1.0, 5.0])
def test_compiled_choice_draws_the_same(
    pro: Janus, monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    """A GPU gets guidance, noise and choice compiled; a CPU compiles the same operations here."""
    plain = pro.generate_images("a cat", seed=3, cfg_weight=weight, top_p=0.9, window=1)[0]
    picker, asked = draw_module.make_sampler, []

    def compiled(options: DrawOptions, *, compiled: bool) -> Any:
        asked.append(compiled)
        return picker(options, compiled=True)

    monkeypatch.setattr(draw_module, "make_sampler", compiled)
    again = pro.generate_images("a cat", seed=3, cfg_weight=weight, top_p=0.9, window=1)[0]
    assert asked == [False]  # on a CPU
    np.testing.assert_array_equal(again.tokens, plain.tokens)


@pytest.mark.parametrize(
    "act",
    [lambda janus: janus.generate_images("a cat", seed=1), lambda janus: janus.generate_text("a")],
)
def test_weights_are_wired_on_apple_silicon_while_tokens_are_made(
    pro: Janus, monkeypatch: pytest.MonkeyPatch, act: Any
) -> None:
    limits: list[int] = []

    def set_limit(limit: int) -> int:
        limits.append(limit)
        return 7

    monkeypatch.setattr(memory, "is_metal", lambda: True)
    monkeypatch.setattr(memory, "device_memory", lambda: 1000)
    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    act(pro)
    assert limits == [1000, 7]


def test_the_window_is_timed_once(pro: Janus, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        tuning, "time_passes", lambda *_: calls.append(1) or {1: 1.0, 2: 1.01, 8: 1.1, 16: 5.0}
    )
    (cache_folder() / tuning.WINDOWS_FILE).unlink(missing_ok=True)
    assert [tuning.find_window(pro.model, 2) for _ in range(2)] == [8, 8]
    assert len(calls) == 1
    (cache_folder() / tuning.WINDOWS_FILE).write_text("{ broken")
    assert tuning.find_window(pro.model, 2) == 8
    assert len(calls) == 2
    tuning.find_window(pro.model, 1)
    assert len(calls) == 3
    (cache_folder() / tuning.WINDOWS_FILE).unlink()


def test_a_window_that_is_hardly_quicker_is_not_worth_it() -> None:
    assert best_window({1: 1.0, 2: 1.3, 4: 1.6}) == 1
    assert best_window({1: 1.0, 2: 1.0, 4: 1.1, 32: 9.0}) == 4


def test_timing_passes_leaves_times(pro: Janus) -> None:
    assert set(time_passes(pro.model, 2)) == {1, 2, 4, 8}
    assert all(seconds > 0 for seconds in time_passes(pro.model, 1).values())


@pytest.mark.parametrize("window", [1, 4])
def test_pictures_of_several_prompts_are_each_as_drawn_alone(pro: Janus, window: int) -> None:
    """Prompts of one length share their passes; the order is that of the prompts."""
    prompts = ["a lighthouse in a storm", "a fox", "a storm in a lighthouse", "a fox"]
    together = pro.generate_images(prompts, n=2, seed=8, window=window)
    assert [(image.prompt, image.seed) for image in together] == sorted(
        [(prompt, seed) for prompt in prompts for seed in (8, 9)],
        key=lambda p: (prompts.index(p[0]), p[1]),
    )
    for image in together:
        alone = pro.generate_images(image.prompt, seed=image.seed, window=1)[0]
        assert np.array_equal(alone.tokens, image.tokens)
    with pytest.raises(mlx_janus.JanusError, match="no prompt"):
        pro.generate_images([])


def test_exact_and_a_window_exclude_each_other(pro: Janus) -> None:
    with pytest.raises(mlx_janus.JanusError, match="leave window out"):
        pro.generate_images(PROMPT, exact=True, window=4)


def test_other_sizes_are_refused(pro: Janus) -> None:
    with pytest.raises(ValueError, match="64, 64, 3"):
        pro.model.understand(mx.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match="grid"):
        pro.model.decode_image_tokens(mx.zeros((1, 15), dtype=mx.int32))
