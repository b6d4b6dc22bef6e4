"""Does it fit in memory? Bytes of weights, KV caches and activations, and the refusal of a model that is too large.

An estimate is a function of a config and the bytes of a float, so that it needs no weights: a model is judged before
it is downloaded.
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
from .quantize import plan_quantization, quantize_model

SAFE_SHARE = 0.8
"""Share of the free memory that work side by side may plan for."""

_PROMPT_TOKENS = 256  # of a usual prompt, besides its images
_GUIDED_ROWS = 2  # of a batch, for one image
_SMALLER: dict[
    str, tuple[int | None, str | None]
] = {  # advice, bits and recipe where memory is short; largest first
    "bits=8": (8, None),
    'recipe="balanced"': (None, "balanced"),
    "bits=4": (4, None),
    'recipe="light"': (None, "light"),
}


def weight_bytes(arrays: Iterable[mx.array], itemsize: int) -> int:
    """Sum the bytes of weights: ``itemsize`` for each float, the actual size of packed arrays."""
    return sum(
        a.size * itemsize if mx.issubdtype(a.dtype, mx.floating) else a.nbytes for a in arrays
    )


def answering_cache(config: JanusConfig, itemsize: int) -> int:
    """Estimate the KV cache of a usual question about one image, with its answer."""
    return cache_bytes(
        config.language, 1, 2 * _PROMPT_TOKENS + config.understanding.tokens, itemsize
    )


def task_memory(config: JanusConfig, dtype: Dtype, *, pictures: int = 1) -> dict[str, int]:
    """Return the bytes that each task needs by itself, with its weights: "encode", "answer", "draw" and "decode".

    Args:
        config: sizes, and which layers are quantized.
        dtype: of the float weights, and of what is computed.
        pictures: images drawn together; they are read and decoded one at a time.
    """
    model = JanusModel(config)
    if config.quantization:
        quantize_model(model, config.quantization)
    itemsize = getattr(mx, dtype).size
    encoding = weight_bytes(model.encoding_arrays().values(), itemsize)
    answering = weight_bytes(model.answering_arrays().values(), itemsize)
    drawing = weight_bytes(model.drawing_arrays().values(), itemsize)
    decoding = weight_bytes(model.decoding_arrays().values(), mx.float32.size)
    parts = generation_parts(config)
    return {
        "encode": encoding,
        "answer": answering + answering_cache(config, itemsize),
        "draw": drawing
        + pictures * parts.image_bytes(config, _PROMPT_TOKENS, _GUIDED_ROWS, itemsize),
        "decode": decoding + parts.pixel_bytes(config),
    }


def required_memory(
    config: JanusConfig, dtype: Dtype, *, low_memory: bool = False
) -> dict[str, int]:
    """Return the bytes that drawing one image and answering about one need: weights, KV cache, activations.

    With low memory the language model is held neither beside the codec nor beside the vision encoder.
    """
    tasks = task_memory(config, dtype)
    together = max if low_memory else sum
    return {
        "drawing": together([tasks["draw"], tasks["decode"]]),
        "answering": together([tasks["answer"], tasks["encode"]]),
    }


def check_memory(
    config: JanusConfig,
    dtype: Dtype,
    name: str,
    *,
    low_memory: bool = False,
    quantized: bool = False,
) -> None:
    """Refuse a model that cannot fit, before it is loaded.

    Args:
        config: as the model would be loaded.
        dtype: of its float weights.
        name: of the model.
        low_memory: whether the weights of one task at a time are held.
        quantized: it is stored so, and can be had in no other bits.

    Raises:
        OutOfMemoryError: with the bytes it needs, those that are free, and the options with which it would fit.
    """
    needed = max(required_memory(config, dtype, low_memory=low_memory).values())
    free = available_memory()
    if needed <= free:
        return
    advice = "close other programs, or take a smaller model"
    for options, form, low in _smaller_forms(config, low_memory=low_memory, quantized=quantized):
        size = max(required_memory(form, dtype, low_memory=low).values())
        if size <= free:
            advice = f"{options} needs {format_size(size)} and fits"
            break
    raise OutOfMemoryError(
        f"{name} needs {format_size(needed)} of memory and {format_size(free)} are free: {advice}"
    )


def _smaller_forms(
    config: JanusConfig, *, low_memory: bool, quantized: bool
) -> Iterator[tuple[str, JanusConfig, bool]]:
    """Yield what makes a model smaller, the best first: the options in words, its config, and ``low_memory``."""
    if not low_memory:
        yield "low_memory=True", config, True
    if quantized:
        return
    for options, (bits, recipe) in _SMALLER.items():
        form = replace(config, quantization=plan_quantization(config, bits, recipe=recipe))
        yield options, form, low_memory
        if not low_memory:
            yield f"{options}, low_memory=True", form, True
