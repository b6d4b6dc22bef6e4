"""The part "speed": bandwidth, a step, passes and tokens a pass; and forecasts of published models.

A step of a large model reads all its weights once, so its time is at least their bytes divided by
the bandwidth. The forecast is this floor and a fixed time a step, which a small model shows.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..decode.image import DrawOptions, draw_tokens, text_rows
from ..decode.window import time_passes
from ..memory import available_memory, format_size
from ..models.janus import JanusModel
from ..models.vq_parts import token_config
from .findings import Check, Status, on_device

PART = "speed"
_LARGEST = 1 << 30  # bytes of the array whose reading is timed
_CPU_LARGEST = 1 << 28  # the same on a CPU, which takes longer
_PROMPT = 32  # tokens of the prompt
_TIMED_STEPS = 48  # most image steps whose time is measured
_COUNTED_PASSES = 64  # most passes whose accepted tokens are counted
_COLUMNS = 4096  # columns of the matrix whose reading is timed


@dataclass(frozen=True)
class Speed:
    """Measured speeds of a device."""

    device: str
    bandwidth: float  # bytes per second that a product with a large matrix reads
    step: float  # seconds of a step of the measured model
    step_bytes: int  # bytes of weights that its step reads
    passes: dict[int, float]  # seconds of a pass, by window
    tokens_per_pass: float  # of window 8

    @property
    def overhead(self) -> float:
        """Seconds of a step that are not the reading of weights."""
        return max(self.step - self.step_bytes / self.bandwidth, 0.0)


@dataclass(frozen=True)
class Published:
    """The sizes of a published model that decide its speed and memory."""

    name: str
    body: float  # parameters of the language model that an image step reads
    heads: float  # parameters of the image head and its adaptor
    text: float  # parameters of the token embeddings, and as many of ``lm_head``
    others: float  # bytes of the vision encoder and its adaptor in bfloat16, and of the codec
    cache: float  # bytes of KV cache of one row and position in bfloat16
    layers: int


PUBLISHED = (
    Published("Janus-1.3B", 1.233e9, 0.042e9, 0.21e9, 0.85e9, 196_608, 24),
    Published("Janus-Pro-1B", 1.233e9, 0.042e9, 0.21e9, 0.85e9, 196_608, 24),
    Published("Janus-Pro-7B", 6.071e9, 0.101e9, 0.419e9, 0.85e9, 491_520, 30),
    Published("Janus-4o-7B", 6.071e9, 0.101e9, 0.419e9, 0.85e9, 491_520, 30),
)
_IMAGE_TOKENS = 576
_BITS = {"bfloat16": 16.0, "8 bits": 8.5, "4 bits": 4.5}  # bits a weight, with scales
_CPU_BITS = {"float32": 32.0}  # half precision and quantized products are slow on a CPU


def measure(model: JanusModel, device: str) -> Speed:
    """Measure a model's image steps and passes, and the device's bandwidth.

    Args:
        model: the model, loaded on the device.
        device: "cpu" or "gpu", which must be the default device.
    """
    weights = model.drawing_arrays().items()
    # A step reads only one row of an embedding table.
    step_bytes = sum(array.nbytes for name, array in weights if "embed" not in name)
    positions = token_config(model.config).tokens
    ids = list(range(1, _PROMPT + 1))
    options = DrawOptions()
    times = []
    prompt = text_rows(ids, ids, options)
    image = (0, 0)  # index of its prompt, and its seed
    stream = draw_tokens(model, [prompt], [image], options)
    next(stream)  # reads the prompt
    for _ in range(min(positions - 1, _TIMED_STEPS)):
        started = time.perf_counter()
        next(stream)
        times.append(time.perf_counter() - started)
    stream.close()  # type: ignore[attr-defined]
    mx.synchronize()
    passes = time_passes(model, options.rows)
    return Speed(
        device=device,
        bandwidth=measure_bandwidth(device),
        step=float(np.median(times)),
        step_bytes=step_bytes,
        passes=passes,
        tokens_per_pass=_tokens_per_pass(model, ids),
    )


def _tokens_per_pass(model: JanusModel, ids: list[int]) -> float:
    """Return the mean number of tokens that a pass of 8 positions accepts, in one image."""
    passes = 0
    tokens = 0
    options = DrawOptions()
    prompt = text_rows(ids, ids, options)
    image = (0, 1)  # index of its prompt, and its seed
    stream = draw_tokens(model, [prompt], [image], options, window=8)
    for accepted in itertools.islice(stream, _COUNTED_PASSES):
        passes += 1
        tokens += accepted.shape[1]
    return tokens / passes


def measure_bandwidth(device: str) -> float:
    """Measure the bytes per second that a product of a large matrix and a vector reads."""
    largest = _CPU_LARGEST if device == "cpu" else _LARGEST
    matrix_bytes = min(largest, int(available_memory()) // 4)  # at most a quarter of the memory
    rows = matrix_bytes // (mx.float32.size * _COLUMNS)
    matrix = mx.ones((rows, _COLUMNS))
    vector = mx.ones(_COLUMNS)
    mx.eval(matrix, vector)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        mx.eval(matrix @ vector)
        times.append(time.perf_counter() - started)
    return matrix.nbytes / min(times)


def speed_checks(speed: Speed, name: str) -> Iterator[Check]:
    """Yield the measured speeds as checks; ``name`` is the measured model's."""
    device = speed.device
    yield Check(
        PART, "bandwidth", device, "", "ok", f"{speed.bandwidth / 1e9:.1f} GB/s of large arrays"
    )
    text = f"{speed.step * 1e3:.2f} ms of {name}, {speed.overhead * 1e3:.2f} ms without the reading"
    yield Check(PART, "image step", device, "", "ok", text)
    shortest = speed.passes[1]  # of window 1
    ratios = [f"{window}: {seconds / shortest:.2f}" for window, seconds in speed.passes.items()]
    text = f"{shortest * 1e3:.2f} ms; relative to it by window, {', '.join(ratios)}"
    yield Check(PART, "image pass", device, "", "ok", text)
    text = f"{speed.tokens_per_pass:.2f} tokens of {name} with window 8"
    yield Check(PART, "tokens a pass", device, "", "ok", text)


def forecasts(speed: Speed, layers: int) -> Iterator[Check]:
    """Yield forecasts for each published model: the seconds of an image, and the memory.

    Args:
        speed: the measured speeds.
        layers: layers of the measured model; the fixed time of a step grows with them.
    """
    with on_device(speed.device):
        free = available_memory()
    bits_by_precision = _CPU_BITS if speed.device == "cpu" else _BITS
    for model in PUBLISHED:
        for precision, bits in bits_by_precision.items():
            seconds = image_seconds(model, bits, speed, layers)
            memory = needed_memory(model, bits)
            status: Status = "ok" if memory <= free else "warn"
            text = f"about {seconds:.0f} s an image, {format_size(memory)} of memory"
            if memory > free:
                text += f", and {format_size(free)} are free"
            yield Check("forecasts", model.name, speed.device, precision, status, text)


def image_seconds(model: Published, bits: float, speed: Speed, layers: int) -> float:
    """Return the forecast of the seconds of one image.

    A step takes the time of reading its weights and its cache, and a fixed time for each layer.

    Args:
        model: the published model.
        bits: bits per weight of the language model. The image head and its adaptor have 8 at least.
        speed: the measured speeds.
        layers: layers of the measured model.
    """
    head_bits = max(bits, _BITS["8 bits"])
    weights = (model.body * bits + model.heads * head_bits) / 8  # bytes
    # Bytes of two rows, as guidance needs, in the middle of an image: the mean over its steps.
    cache = 2 * model.cache * (_PROMPT + _IMAGE_TOKENS / 2)
    fixed = speed.overhead * model.layers / layers
    return _IMAGE_TOKENS * ((weights + cache) / speed.bandwidth + fixed)


def needed_memory(model: Published, bits: float) -> float:
    """Return the bytes of all weights and of the KV cache of one image with guidance.

    ``bits`` are those of a weight in the language model.
    """
    head_bits = max(bits, _BITS["8 bits"])  # the image head and its adaptor have 8 bits at least
    text_bits = 16 + bits  # of a weight in the token embeddings (16), and of one in ``lm_head``
    weights = (model.body * bits + model.heads * head_bits + model.text * text_bits) / 8
    cache = 2 * model.cache * (_PROMPT + _IMAGE_TOKENS)  # two rows, because of guidance
    return weights + model.others + cache
