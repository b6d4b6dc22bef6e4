"""Estimates of a model's memory: weights, KV caches and activations; refusing a model too large.

Estimates need only a config and a float type, so a model can be refused before it is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import mlx.core as mx

from ..config import Dtype, JanusConfig
from ..errors import OutOfMemoryError
from ..memory import available_memory, format_size
from ..models.backbone import cache_bytes
from ..models.janus import JanusModel, generation_parts
from ..threads import computing
from .quantize import plan_quantization, quantize_model

SAFE_SHARE = 0.8
"""Share of the free memory that concurrent tasks may use."""

_PROMPT_TOKENS = 256  # tokens of a typical prompt, without its images
_GUIDED_ROWS = 2  # batch rows per image with guidance
_QUANTIZATIONS: dict[str, tuple[int | None, str | None]] = {
    "bits=8": (8, None),
    'recipe="balanced"': (None, "balanced"),
    "bits=4": (4, None),
    'recipe="light"': (None, "light"),
}
"""Bits and recipe of each option that an error message may advise; the largest model is first."""


def weight_bytes(arrays: Iterable[mx.array], itemsize: int) -> int:
    """Return the bytes of weights if each of their floats takes ``itemsize`` bytes.

    Arrays of integers hold packed quantized weights, and count with their own size.
    """
    return sum(
        a.size * itemsize if mx.issubdtype(a.dtype, mx.floating) else a.nbytes for a in arrays
    )


def answering_cache_bytes(config: JanusConfig, itemsize: int) -> int:
    """Estimate the bytes of the KV cache for a typical question about an image, and its answer.

    ``itemsize`` is the number of bytes of a float.
    """
    tokens = 2 * _PROMPT_TOKENS + config.understanding.tokens  # question, answer and image
    return cache_bytes(config.language, 1, tokens, itemsize)


@computing
def task_memory(config: JanusConfig, dtype: Dtype, *, pictures: int = 1) -> dict[str, int]:
    """Estimate the bytes of memory that each task needs, by the task's name.

    The tasks are "encode" (read an image), "answer", "draw" (generate image tokens) and "decode"
    (turn image tokens into pixels). All need their weights, "answer" and "draw" also a KV cache,
    and "decode" also activations.

    Args:
        config: the model's sizes and quantized layers.
        dtype: type of the float weights, except the codec's, and of the KV caches.
        pictures: number of images whose tokens are generated together. It only affects "draw",
            since images are encoded and decoded one at a time.
    """
    model = JanusModel(config)  # its weights are lazy, so they take no memory here
    if config.quantization:
        quantize_model(model, config.quantization)
    itemsize = getattr(mx, dtype).size
    encoding = weight_bytes(model.encoding_arrays().values(), itemsize)
    answering = weight_bytes(model.answering_arrays().values(), itemsize)
    drawing = weight_bytes(model.drawing_arrays().values(), itemsize)
    # The codec is computed in float32, whatever ``dtype`` is.
    decoding = weight_bytes(model.decoding_arrays().values(), mx.float32.size)
    parts = generation_parts(config)
    per_image = parts.image_bytes(config, _PROMPT_TOKENS, _GUIDED_ROWS, itemsize)
    return {
        "encode": encoding,
        "answer": answering + answering_cache_bytes(config, itemsize),
        "draw": drawing + pictures * per_image,
        "decode": decoding + parts.pixel_bytes(config),
    }


def required_memory(
    config: JanusConfig, dtype: Dtype, *, low_memory: bool = False
) -> dict[str, int]:
    """Estimate the bytes of memory for "drawing" an image and for "answering" about an image.

    Each of the two consists of two tasks of ``task_memory``. In low-memory mode, only one task's
    weights are in memory at a time, so only the larger task counts.
    """
    tasks = task_memory(config, dtype)
    combine = max if low_memory else sum
    return {
        "drawing": combine([tasks["draw"], tasks["decode"]]),
        "answering": combine([tasks["answer"], tasks["encode"]]),
    }


def check_memory(
    config: JanusConfig,
    dtype: Dtype,
    name: str,
    *,
    low_memory: bool = False,
    quantized: bool = False,
) -> None:
    """Refuse a model that does not fit in memory, before it is loaded.

    Args:
        config: the model's config, with the quantization that it would be loaded with.
        dtype: type of its float weights in memory.
        name: the model's name, for the error message.
        low_memory: whether the weights of only one task at a time are in memory.
        quantized: whether the stored weights are quantized. They cannot be quantized again, so the
            message then advises no other bits or recipe.

    Raises:
        OutOfMemoryError: the model does not fit. The message gives the needed and the free memory,
            and options that make the model fit if there are any.
    """
    needed = max(required_memory(config, dtype, low_memory=low_memory).values())
    free = available_memory()
    if needed <= free:
        return
    advice = "close other programs, or take a smaller model"
    variants = _smaller_variants(config, low_memory=low_memory, quantized=quantized)
    for options, variant, low in variants:
        size = max(required_memory(variant, dtype, low_memory=low).values())
        if size <= free:
            advice = f"{options} needs {format_size(size)} and fits"
            break
    raise OutOfMemoryError(
        f"{name} needs {format_size(needed)} of memory and {format_size(free)} are free: {advice}"
    )


def _smaller_variants(
    config: JanusConfig, *, low_memory: bool, quantized: bool
) -> Iterator[tuple[str, JanusConfig, bool]]:
    """Yield ways to load a model in less memory, the best first.

    The arguments are those of ``check_memory``. Each way is a tuple: the options as text for a
    message, the config of the quantized model, and the value of the option ``low_memory``.
    """
    if not low_memory:
        yield "low_memory=True", config, True
    if quantized:
        return
    for options, (bits, recipe) in _QUANTIZATIONS.items():
        variant = replace(config, quantization=plan_quantization(config, bits, recipe=recipe))
        yield options, variant, low_memory
        if not low_memory:
            yield f"{options}, low_memory=True", variant, True
