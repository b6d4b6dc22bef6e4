"""The parts of ``bench.py``: our own measurements, each with the measurement that bounds it.

A part yields rows of the table. Our steps and the other's alternate, and a ratio is the median of
the ratios of neighbours. The bound of an image step is mlx-lm's Llama body with two rows, plus the
image head's and the image adaptor's own time. The bound of an answering step is mlx-lm's
``generate_step``. Both loops queue the next step before they return a token; here each waits for
that step, so that it does not burden the other.
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
from mlx_janus.decode.image import DrawOptions, draw_tokens, text_rows
from mlx_janus.decode.text import TextOptions, answer_tokens
from mlx_janus.decode.window import MEAN_ACCEPTED, time_passes
from mlx_janus.evaluation.drawing import TASKS, drawing_prompts
from mlx_janus.memory import available_memory, materialize
from mlx_janus.models.janus import JanusModel
from mlx_janus.pipeline import JanusPipeline
from mlx_janus.processing.prompts import Prompts
from mlx_janus.weights.sources import TINY

PROMPT = 32  # tokens
_LARGEST = 1_000_000_000  # bytes of the array that measures bandwidth


@dataclass(frozen=True)
class Setup:
    """The model to measure, and the number of measurements."""

    model: JanusModel  # with lazy weights
    steps: int  # steps of each kind
    repeats: int  # runs of the other measurements: first tokens, decodings

    @property
    def dtype(self) -> mx.Dtype:
        """The type in which the language model computes."""
        return getattr(mx, self.model.config.dtype)


@dataclass(frozen=True)
class Row:
    """A row of the table. The ratio is ours over the other, of times unless ``what`` differs."""

    what: str
    ratio: float | None = None
    ours: str = ""
    other: str = ""


def drawing(setup: Setup) -> Iterator[Row]:
    """Compare our image steps with mlx-lm's body, our head and our adaptor."""
    materialize(setup.model.drawing_arrays().values())
    steps = compare(lambda: draw(setup.model, 1, setup.steps), lambda: _bare_drawing(setup))
    yield step_row(
        "drawing step", steps, "mlx-lm's Llama, two rows, with our image head and adaptor"
    )


def answering(setup: Setup) -> Iterator[Row]:
    """Compare our answering steps with mlx-lm's own loop and model."""
    materialize(setup.model.answering_arrays().values())
    yield step_row(
        "answering step",
        compare(lambda: answer(setup), lambda: _bare_answering(setup)),
        "mlx-lm's own",
    )


def batch(setup: Setup) -> Iterator[Row]:
    """Compare four images in a batch with four single images."""
    materialize(setup.model.drawing_arrays().values())
    four = float(np.median(list(draw(setup.model, 4, setup.steps))))
    one = float(np.median(list(draw(setup.model, 1, setup.steps))))
    yield Row(
        "step of four images",
        four / (4 * one),
        seconds(four),
        f"four steps of one, {seconds(one)} each",
    )


def first_token(setup: Setup) -> Iterator[Row]:
    """Compare the first token of an answer, with and without an image, with mlx-lm's.

    mlx-lm reads a text prompt of the same number of tokens.
    """
    model = setup.model
    materialize(model.answering_arrays().values())
    patches = model.config.understanding.tokens

    def ours(length: int, pixels: mx.array | None) -> Iterator[float]:
        """Yield the seconds to our first token, with an image at the first positions, if any."""
        for _ in range(setup.repeats):
            started = time.perf_counter()
            embeddings = model.embed_text(mx.arange(length)[None] % 100)[0]
            if pixels is not None:
                embeddings[:patches] = model.understand(pixels)[0].astype(embeddings.dtype)
            yield _first(answer_tokens(model, embeddings, TextOptions(max_tokens=1)), started)

    def bare(length: int) -> Iterator[float]:
        """Yield the seconds to mlx-lm's first token."""
        for _ in range(setup.repeats):
            yield _first(generate_step(mx.arange(length) % 100, model.language_model, max_tokens=1))

    length = 2 * PROMPT
    times = compare(lambda: ours(length, None), lambda: bare(length))
    yield step_row(f"first token of an answer, {length} positions of text", times, "mlx-lm's own")
    materialize(model.encoding_arrays().values())
    side = model.config.understanding.image_size
    pixels = mx.zeros((1, side, side, 3))
    length += patches
    times = compare(lambda: ours(length, pixels), lambda: bare(length))
    yield step_row(
        f"first token of an answer, one image and text, {length} positions, encoder included",
        times,
        "mlx-lm's own, same number of tokens",
    )


def turns(setup: Setup) -> Iterator[Row]:
    """Compare the first token on turn 5 of a conversation about an image with turn 1."""
    model = setup.model
    tiny = JanusConfig.load(TINY / "config.json")
    prompts = Prompts.load(TINY, tiny.prompt, image_tokens=model.config.understanding.tokens)
    times = []
    for _ in range(setup.repeats):
        talk = JanusPipeline(model, prompts, name="random").conversation()
        image = Image.new("RGB", (400, 300), "navy")
        answers = [
            talk.send("How many shapes are there?", images, max_tokens=8)
            for images in ([image], [], [], [], [])
        ]
        times.append([answer.first_token_seconds for answer in answers])
    first, *_, fifth = np.median(times, axis=0).tolist()
    ratio = float(np.median([each[-1] / each[0] for each in times]))
    yield Row(
        "first token on turn 5 of a conversation about an image",
        ratio,
        seconds(fifth),
        f"turn 1, {seconds(first)}",
    )


def bytes_read(setup: Setup) -> Iterator[Row]:
    """Compare the bandwidth of a pass in the middle of an image with the device's."""
    model = setup.model
    materialize(model.drawing_arrays().values())
    weights = sum(a.nbytes for name, a in model.drawing_arrays().items() if "embed" not in name)
    cache = _cache_bytes(setup, model.config.generation.tokens // 2)
    rate = (weights + cache) / time_passes(model, 2)[1]
    fastest = bandwidth()
    yield Row(
        f"bandwidth of an image pass, which reads {weights / 1e9:.3f} GB of weights "
        f"and, in the middle of an image, {cache / 1e9:.3f} GB of KV cache",
        rate / fastest,
        f"{rate / 1e9:.1f} GB/s",
        f"{fastest / 1e9:.1f} GB/s, the faster of summing a large array and multiplying it by a "
        "vector",
    )


def memory(setup: Setup) -> Iterator[Row]:
    """Measure the memory of generating an image, without the weights and one KV cache."""
    materialize(setup.model.drawing_arrays().values())
    held = _settle()
    for _ in draw(setup.model, 1, setup.steps):
        pass
    cache = _cache_bytes(setup, PROMPT + setup.model.config.generation.tokens)
    over = mx.get_peak_memory() - held - cache
    yield Row(
        "memory of an image above the weights",
        None,
        megabytes(over),
        f"not counting one KV cache, {megabytes(cache)}",
    )


def vq_decode(setup: Setup) -> Iterator[Row]:
    """Measure the codec: the tokens of one image to pixels."""
    model = setup.model
    times = []
    materialize(model.decoding_arrays().values())
    codec = sum(array.nbytes for array in model.decoding_arrays().values())
    held = _settle()
    for _ in range(setup.repeats):
        started = time.perf_counter()
        tokens = mx.zeros((1, model.config.generation.tokens), dtype=mx.int32)
        mx.eval(model.decode_image_tokens(tokens))
        times.append(time.perf_counter() - started)
    peak = megabytes(mx.get_peak_memory() - held)
    side = model.config.image_size
    yield Row(
        f"decoding one image's tokens, {side} x {side}",
        None,
        f"{seconds(float(np.median(times)))}, {peak} above the weights",
        f"not counting the codec's weights, {megabytes(codec)}",
    )


def passes(setup: Setup) -> Iterator[Row]:
    """Compare passes of several positions with a pass of one, in the middle of an image."""
    materialize(setup.model.drawing_arrays().values())
    times = time_passes(setup.model, 2)
    for width in MEAN_ACCEPTED:
        if width in times and width > 1:
            yield Row(
                f"pass of {width} positions, two rows",
                times[width] / times[1],
                seconds(times[width]),
                f"a pass of one, {seconds(times[1])}",
            )


def windows(setup: Setup) -> Iterator[Row]:
    """Count the passes of an image of Janus-Tiny at every window."""
    texts = [
        wanted.prompt
        for task in TASKS
        for wanted in drawing_prompts(task, max(setup.steps // 4, 1), 0)
    ]
    first, *others = janus_tiny.measure(mlx_janus.load(TINY), texts, rounds=1)
    for drawn in others:
        yield Row(
            f"passes for an image of Janus-Tiny, window {drawn.width}",
            drawn.passes / first.passes,
            f"{drawn.passes:.1f} passes, {seconds(drawn.seconds)}",
            f"{first.passes:.0f} passes, {seconds(first.seconds)}, window 1",
        )


def bandwidth() -> float:
    """Measure the bytes a second that MLX reads from one large array, the faster of two ways."""
    rows = min(_LARGEST, int(available_memory()) // 4) // (4 * 4096)
    array = mx.arange(rows * 4096, dtype=mx.float32).reshape(rows, 4096)
    vector = mx.ones(4096)
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
    """Time both in turns; return the median ratio of neighbours, and both medians in seconds."""
    pairs = np.array(list(zip(ours(), other(), strict=True)))
    return float(np.median(pairs[:, 0] / pairs[:, 1])), *map(float, np.median(pairs, axis=0))


def step_row(what: str, times: tuple[float, float, float], other: str) -> Row:
    """Return a row with the result of ``compare``."""
    return Row(what, times[0], seconds(times[1]), f"{seconds(times[2])}, {other}")


def seconds(value: float) -> str:
    """Format seconds."""
    return f"{value:.4f} s"


def megabytes(value: float) -> str:
    """Format bytes in megabytes."""
    return f"{value / 1e6:.0f} MB"


def draw(model: JanusModel, images: int, steps: int) -> Iterator[float]:
    """Yield the seconds of each of our image steps, without the prompt's."""
    ids = list(range(1, PROMPT + 1))
    jobs = [(0, seed) for seed in range(images)]
    return _timed(
        draw_tokens(model, [text_rows(ids, ids, DrawOptions())], jobs, DrawOptions()), steps
    )


def answer(setup: Setup) -> Iterator[float]:
    """Yield the seconds of each of our answering steps."""
    embeddings = setup.model.embed_text(mx.arange(PROMPT)[None])[0]
    options = TextOptions(max_tokens=setup.steps + 2)
    return _timed(answer_tokens(setup.model, embeddings, options), setup.steps)


def _bare_answering(setup: Setup) -> Iterator[float]:
    """Yield the seconds of each step of mlx-lm's own loop."""
    loop = generate_step(mx.arange(PROMPT), setup.model.language_model, max_tokens=setup.steps + 2)
    return _timed(loop, setup.steps)


def _bare_drawing(setup: Setup) -> Iterator[float]:
    """Yield the seconds of mlx-lm's body with two rows and its own cache, plus head and adaptor."""
    model = setup.model
    body = model.language_model.model
    cache = model.make_cache()
    mx.eval(body(mx.ones((2, PROMPT), dtype=mx.int32), cache))
    one = mx.ones((2, 1), dtype=mx.int32)
    code = mx.ones((2, 1), dtype=mx.int32)
    hidden = mx.ones((2, 1, model.config.language.hidden_size), dtype=setup.dtype)
    for _ in range(setup.steps):
        started = time.perf_counter()
        mx.eval(body(one, cache))
        mx.eval(model.gen_head(hidden))
        mx.eval(model.gen_aligner(model.gen_embed(code)))
        yield time.perf_counter() - started


def _timed(stream: Any, steps: int) -> Iterator[float]:
    """Yield the seconds of each of ``steps`` items of a stream, its queued work included.

    The first item is not timed, because it includes the prompt.
    """
    next(stream)
    mx.synchronize()
    for _ in range(steps):
        started = time.perf_counter()
        next(stream)
        mx.synchronize()
        yield time.perf_counter() - started
    stream.close()


def _first(stream: Any, started: float | None = None) -> float:
    """Time the first item of a stream; wait for its queued work before returning."""
    started = started or time.perf_counter()
    next(stream)
    spent = time.perf_counter() - started
    stream.close()
    mx.synchronize()
    return spent


def _cache_bytes(setup: Setup, positions: int) -> int:
    """Return the bytes of the keys and values of two rows."""
    llama = setup.model.config.language
    values = llama.num_hidden_layers * llama.num_key_value_heads * llama.head_dim
    return 2 * 2 * positions * values * setup.dtype.size


def _settle() -> int:
    """Return the bytes held now, and reset the peak."""
    mx.clear_cache()
    mx.reset_peak_memory()
    return int(mx.get_active_memory())
