"""What ``bench.py`` measures of ours, each beside what bounds it. A part gives rows of its table.

Steps of both kinds are taken in turns, and a ratio is the median of the ratios of neighbours. The bound of a drawing
step is mlx-lm's Llama body with two rows plus the image head's and the image adaptor's own time; that of an answering
step is mlx-lm's ``generate_step``. Both loops have the next step under way when they give a token; here each waits for
it, so that it is not the other's burden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx_janus

# isort: split
import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from PIL import Image

from benchmarks import windows as janus_tiny
from mlx_janus.config import JanusConfig
from mlx_janus.decode.image import DrawOptions, draw_tokens
from mlx_janus.decode.text import TextOptions, answer_tokens
from mlx_janus.decode.window import SETTLED, time_passes
from mlx_janus.evaluation.shapes import TASKS, drawing_prompts
from mlx_janus.memory import available_memory, materialize
from mlx_janus.models.janus import JanusModel
from mlx_janus.pipeline import JanusPipeline
from mlx_janus.processing.prompts import Prompts
from mlx_janus.weights.sources import TINY

PROMPT = 32  # tokens
_LARGEST = 1_000_000_000  # bytes of the array that bandwidth is measured with


@dataclass(frozen=True)
class Setup:
    """What is measured, and how often."""

    model: JanusModel  # weights not computed yet
    steps: int  # of each kind
    repeats: int  # of what is no step: first tokens, decodings

    @property
    def dtype(self) -> mx.Dtype:
        """The type of what the language model computes."""
        return getattr(mx, self.model.config.dtype)


@dataclass(frozen=True)
class Row:
    """A line of the table. The ratio is ours over the other, in time unless ``what`` says otherwise."""

    what: str
    ratio: float | None = None
    ours: str = ""
    other: str = ""


def drawing(setup: Setup) -> Iterator[Row]:
    """Our drawing steps beside mlx-lm's body, head and adaptor."""
    materialize(setup.model.drawing_arrays().values())
    steps = compare(lambda: draw(setup.model, 1, setup.steps), lambda: _bare_drawing(setup))
    yield step_row(
        "drawing step", steps, "mlx-lm's Llama, two rows, with our image head and adaptor"
    )


def answering(setup: Setup) -> Iterator[Row]:
    """Our answering steps beside mlx-lm's own loop and model."""
    materialize(setup.model.answering_arrays().values())
    yield step_row(
        "answering step",
        compare(lambda: answer(setup), lambda: _bare_answering(setup)),
        "mlx-lm's own",
    )


def batch(setup: Setup) -> Iterator[Row]:
    """Four pictures together beside four one by one."""
    materialize(setup.model.drawing_arrays().values())
    four, one = (float(np.median(list(draw(setup.model, n, setup.steps)))) for n in (4, 1))
    yield Row(
        "step of four pictures",
        four / (4 * one),
        seconds(four),
        f"four steps of one, {seconds(one)} each",
    )


def first_token(setup: Setup) -> Iterator[Row]:
    """The first token of an answer, with and without a picture, beside mlx-lm's of as many tokens."""
    model = setup.model
    materialize(model.answering_arrays().values())
    patches = model.config.understanding.tokens

    def ours(length: int, pixels: mx.array | None) -> Iterator[float]:
        for _ in range(setup.repeats):
            started = time.perf_counter()
            embeddings = model.embed_text(mx.arange(length)[None] % 100)[0]
            if pixels is not None:
                embeddings[:patches] = model.understand(pixels)[0].astype(embeddings.dtype)
            yield _first(answer_tokens(model, embeddings, TextOptions(max_tokens=1)), started)

    def bare(length: int) -> Iterator[float]:
        for _ in range(setup.repeats):
            yield _first(generate_step(mx.arange(length) % 100, model.language_model, max_tokens=1))

    length = 2 * PROMPT
    times = compare(lambda: ours(length, None), lambda: bare(length))
    yield step_row(f"first token of an answer, {length} positions of text", times, "mlx-lm's own")
    materialize(model.encoding_arrays().values())
    pixels, length = (
        mx.zeros((1, *[model.config.understanding.image_size] * 2, 3)),
        length + patches,
    )
    times = compare(lambda: ours(length, pixels), lambda: bare(length))
    yield step_row(
        f"first token of an answer, one picture and text, {length} positions, encoder included",
        times,
        "mlx-lm's own of as many tokens",
    )


def turns(setup: Setup) -> Iterator[Row]:
    """The first token on the fifth turn of a conversation about a picture beside that on the first."""
    model, tiny = setup.model, JanusConfig.load(TINY / "config.json")
    prompts = Prompts.load(TINY, tiny.prompt, image_tokens=model.config.understanding.tokens)
    times = []
    for _ in range(setup.repeats):
        talk = JanusPipeline(model, prompts, name="random").conversation()
        picture = Image.new("RGB", (400, 300), "navy")
        shown = [[picture], [], [], [], []]
        times.append(
            [
                talk.send("How many shapes are there?", s, max_tokens=8).first_token_seconds
                for s in shown
            ]
        )
    first, *_, fifth = np.median(times, axis=0).tolist()
    ratio = float(np.median([each[-1] / each[0] for each in times]))
    yield Row(
        "first token on turn 5 of a conversation about a picture",
        ratio,
        seconds(fifth),
        f"turn 1, {seconds(first)}",
    )


def bytes_read(setup: Setup) -> Iterator[Row]:
    """What a pass in the middle of a picture reads, against how fast this device reads."""
    model = setup.model
    materialize(model.drawing_arrays().values())
    weights = sum(a.nbytes for name, a in model.drawing_arrays().items() if "embed" not in name)
    cache = _cache_bytes(setup, model.config.generation.tokens // 2)
    rate, fastest = (weights + cache) / time_passes(model, 2)[1], bandwidth()
    yield Row(
        f"bandwidth of a drawing pass, which reads {weights / 1e9:.3f} GB of weights and, in the middle of a picture, "
        f"{cache / 1e9:.3f} GB of KV cache",
        rate / fastest,
        f"{rate / 1e9:.1f} GB/s",
        f"{fastest / 1e9:.1f} GB/s, summing a large array here or multiplying it by a vector, whichever is quicker",
    )


def memory(setup: Setup) -> Iterator[Row]:
    """What drawing holds beside the weights and one KV cache."""
    materialize(setup.model.drawing_arrays().values())
    held = _settle()
    for _ in draw(setup.model, 1, setup.steps):
        pass
    cache = _cache_bytes(setup, PROMPT + setup.model.config.generation.tokens)
    over = mx.get_peak_memory() - held - cache
    yield Row(
        "memory of drawing above the weights",
        None,
        megabytes(over),
        f"one KV cache, {megabytes(cache)}, is apart",
    )


def vq_decode(setup: Setup) -> Iterator[Row]:
    """The codec: one picture's tokens to pixels."""
    model, times = setup.model, []
    materialize(model.decoding_arrays().values())
    codec = sum(array.nbytes for array in model.decoding_arrays().values())
    held = _settle()
    for _ in range(setup.repeats):
        started = time.perf_counter()
        mx.eval(
            model.decode_image_tokens(mx.zeros((1, model.config.generation.tokens), dtype=mx.int32))
        )
        times.append(time.perf_counter() - started)
    peak = megabytes(mx.get_peak_memory() - held)
    side = model.config.image_size
    yield Row(
        f"decoding one picture's tokens, {side} x {side}",
        None,
        f"{seconds(float(np.median(times)))}, {peak} above the weights",
        f"the codec's weights, {megabytes(codec)}, are apart",
    )


def passes(setup: Setup) -> Iterator[Row]:
    """What a pass of several positions costs, in the middle of a picture."""
    materialize(setup.model.drawing_arrays().values())
    times = time_passes(setup.model, 2)
    for width in SETTLED:
        if width in times and width > 1:
            yield Row(
                f"pass of {width} positions, two rows",
                times[width] / times[1],
                seconds(times[width]),
                f"a pass of one, {seconds(times[1])}",
            )


def windows(setup: Setup) -> Iterator[Row]:
    """How many passes a picture of Janus-Tiny takes at every window."""
    texts = [
        wanted.prompt
        for task in TASKS
        for wanted in drawing_prompts(task, max(setup.steps // 4, 1), 0)
    ]
    first, *others = janus_tiny.measure(mlx_janus.load(TINY), texts, rounds=1)
    for drawn in others:
        yield Row(
            f"passes for a picture of Janus-Tiny, window {drawn.width}",
            drawn.passes / first.passes,
            f"{drawn.passes:.1f} passes, {seconds(drawn.seconds)}",
            f"{first.passes:.0f} passes, {seconds(first.seconds)}, window 1",
        )


def bandwidth() -> float:
    """Bytes a second that MLX reads from one large array on this device, by the quickest way known."""
    rows = min(_LARGEST, int(available_memory()) // 4) // (4 * 4096)
    array, vector = mx.arange(rows * 4096, dtype=mx.float32).reshape(rows, 4096), mx.ones(4096)
    mx.eval(array, vector)
    times = []
    for read in (lambda: mx.sum(array), lambda: array @ vector) * 4:
        started = time.perf_counter()
        mx.eval(read())
        times.append(time.perf_counter() - started)
    return array.nbytes / min(times)


def compare(
    ours: Callable[[], Iterator[float]], other: Callable[[], Iterator[float]]
) -> tuple[float, float, float]:
    """Seconds of both in turns: the median ratio of neighbours, and both medians."""
    pairs = np.array(list(zip(ours(), other(), strict=True)))
    return float(np.median(pairs[:, 0] / pairs[:, 1])), *map(float, np.median(pairs, axis=0))


def step_row(what: str, times: tuple[float, float, float], other: str) -> Row:
    """A row of what ``compare`` found."""
    return Row(what, times[0], seconds(times[1]), f"{seconds(times[2])}, {other}")


def seconds(value: float) -> str:
    return f"{value:.4f} s"


def megabytes(value: float) -> str:
    return f"{value / 1e6:.0f} MB"


def draw(model: JanusModel, pictures: int, steps: int) -> Iterator[float]:
    """Seconds of each of our drawing steps, the prompt's apart."""
    ids = list(range(1, PROMPT + 1))
    return _timed(
        draw_tokens(model, [ids], ids, [(0, seed) for seed in range(pictures)], DrawOptions()),
        steps,
    )


def answer(setup: Setup) -> Iterator[float]:
    """Seconds of each of our answering steps."""
    embeddings = setup.model.embed_text(mx.arange(PROMPT)[None])[0]
    return _timed(
        answer_tokens(setup.model, embeddings, TextOptions(max_tokens=setup.steps + 2)), setup.steps
    )


def _bare_answering(setup: Setup) -> Iterator[float]:
    loop = generate_step(mx.arange(PROMPT), setup.model.language_model, max_tokens=setup.steps + 2)
    return _timed(loop, setup.steps)


def _bare_drawing(setup: Setup) -> Iterator[float]:
    """Seconds of mlx-lm's body with two rows, as its own cache grows, plus head and adaptor by themselves."""
    model = setup.model
    body, cache = model.language_model.model, model.make_cache()
    mx.eval(body(mx.ones((2, PROMPT), dtype=mx.int32), cache))
    one, code = mx.ones((2, 1), dtype=mx.int32), mx.ones((2, 1), dtype=mx.int32)
    hidden = mx.ones((2, 1, model.config.language.hidden_size), dtype=setup.dtype)
    for _ in range(setup.steps):
        started = time.perf_counter()
        mx.eval(body(one, cache))
        mx.eval(model.gen_head(hidden))
        mx.eval(model.gen_aligner(model.gen_embed(code)))
        yield time.perf_counter() - started


def _timed(stream: Any, steps: int) -> Iterator[float]:
    next(stream)
    mx.synchronize()
    for _ in range(steps):
        started = time.perf_counter()
        next(stream)
        mx.synchronize()
        yield time.perf_counter() - started
    stream.close()


def _first(stream: Any, started: float | None = None) -> float:
    """Seconds to what a stream gives first; what it then has under way is waited for."""
    started = started or time.perf_counter()
    next(stream)
    spent = time.perf_counter() - started
    stream.close()
    mx.synchronize()
    return spent


def _cache_bytes(setup: Setup, positions: int) -> int:
    """Of the keys and values of two rows."""
    llama = setup.model.config.language
    values = llama.num_hidden_layers * llama.num_key_value_heads * llama.head_dim
    return 2 * 2 * positions * values * setup.dtype.size


def _settle() -> int:
    """Bytes that are held now; the peak is counted anew."""
    mx.clear_cache()
    mx.reset_peak_memory()
    return int(mx.get_active_memory())
