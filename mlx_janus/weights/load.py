"""A converted folder becomes a model: strictly, lazily, and only if it fits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from ..config import DTYPES, Dtype, JanusConfig
from ..errors import CheckpointError, OptionError, OutOfMemoryError
from ..memory import available_memory, format_size
from ..models.backbone import cache_bytes
from ..models.janus import JanusModel
from .convert import open_converted
from .quantize import choose_rule, plan_by_rule, plan_quantization, quantize_model

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
_CODEC = "gen_vision_model."
_PROMPT_TOKENS = 256  # of a usual prompt, beside its pictures
_SMALLER: dict[str, tuple[int | None, str | None]] = {  # what to advise where memory is short, the largest first
    "--bits 8": (8, None),
    "--recipe balanced": (None, "balanced"),
    "--bits 4": (4, None),
    "--recipe light": (None, "light"),
}


def choose_dtype(config: JanusConfig, dtype: str | mx.Dtype | None) -> Dtype:
    """The type that weights are cast to: the model's own, or float32 on a CPU, whose half-precision products are slow.

    Raises:
        OptionError: not float32, bfloat16 or float16.
    """
    if dtype is None:
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        return "float32" if on_cpu else config.dtype
    name = str(dtype).removeprefix("mlx.core.")
    if name not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return name  # type: ignore[return-value]


def load_model(
    folder: Path, *, bits: int | None = None, recipe: str | None = None, dtype: str | mx.Dtype | None = None
) -> JanusModel:
    """The model of a converted folder. No weight is read before something is computed with it.

    Args:
        folder: what ``convert`` wrote.
        bits: 4 or 8 to quantize a float folder as it is read; None takes the folder as it is.
        recipe: one of ``RECIPES``, to quantize a float folder by; not with ``bits``.
        dtype: what to cast float weights to; the codec is always float32.

    Raises:
        CheckpointError: a tensor is missing, surplus or misshaped, or the stamp is not ours.
        ConfigError, UnsupportedModelError: the config cannot be used.
        OptionError: bits or a recipe of a folder that is quantized otherwise, both at once, or a bad dtype.
        OutOfMemoryError: the model does not fit.
    """
    stored = JanusConfig.load(folder / "config.json")
    config = with_bits(stored, bits, folder, recipe)
    chosen = choose_dtype(config, dtype)
    check_memory(config, chosen, folder.name, quantized=stored.quantization is not None)
    model = JanusModel(replace(config, dtype=chosen))
    arrays, _ = open_converted(folder)
    if stored.quantization:
        quantize_model(model, stored.quantization)
    _load_strictly(model, arrays, chosen, folder)
    if config.quantization and not stored.quantization:
        quantize_model(model, config.quantization)
    model.eval()
    return model


def with_bits(config: JanusConfig, bits: int | None, folder: Path, recipe: str | None = None) -> JanusConfig:
    """The config once quantized to ``bits``, or by a recipe.

    Raises:
        OptionError: neither 4 nor 8, no recipe, or the folder is quantized otherwise already.
    """
    rule = choose_rule(bits, recipe)
    if rule is None:
        return config
    stored = config.quantization
    if stored is None:
        return replace(config, quantization=plan_by_rule(config, rule, recipe))
    if (stored.recipe or stored.bits) != (recipe or bits):
        wanted = f"the recipe {recipe}" if recipe else f"{bits}"
        raise OptionError(
            f"{folder} has {stored.choice}, not {wanted}: leave bits and recipe out, or convert the original folder"
        )
    return config


def _load_strictly(model: nn.Module, arrays: dict[str, mx.array], dtype: Dtype, folder: Path) -> None:
    expected = dict(tree_flatten(model.parameters()))
    for name, wanted in expected.items():
        if name not in arrays:
            raise CheckpointError(f"{folder} lacks {name}: convert the original folder again")
        stored = arrays[name]
        if stored.shape != wanted.shape:
            raise CheckpointError(f"{folder}: {name} has the shape {stored.shape}, config.json says {wanted.shape}")
        floating = mx.issubdtype(wanted.dtype, mx.floating)
        if not mx.issubdtype(stored.dtype, mx.floating) if floating else stored.dtype != wanted.dtype:
            raise CheckpointError(f"{folder}: {name} is stored as {stored.dtype}: convert the original folder again")
    if surplus := sorted(set(arrays) - set(expected)):
        raise CheckpointError(f"{folder} holds {surplus[0]}, which config.json does not speak of")
    model.load_weights([(name, _cast(name, array, dtype)) for name, array in arrays.items()], strict=True)


def _cast(name: str, array: mx.array, dtype: Dtype) -> mx.array:
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    return array.astype(mx.float32 if name.startswith(_CODEC) else getattr(mx, dtype))


def decoding_memory(config: JanusConfig) -> int:
    """Bytes of activations while one picture is decoded, counted in the decoder's widest activation.

    13 is what ``benchmarks/steps.py`` measured on a CPU, rounded up. The 12 of a GPU is an estimate.
    """
    widest = 4 * config.image_size**2 * config.generation.ch
    return widest * (13 if mx.default_device().type == mx.DeviceType.cpu else 12)


def required_memory(config: JanusConfig, dtype: Dtype) -> dict[str, int]:
    """Bytes that drawing one picture and answering about one need: weights, KV cache, activations."""
    model = JanusModel(config)
    if config.quantization:
        quantize_model(model, config.quantization)
    itemsize = _ITEMSIZE[dtype]
    language = config.language
    return {
        "drawing": weight_bytes(model.drawing_arrays(), itemsize)
        + weight_bytes(model.decoding_arrays(), 4)
        + decoding_memory(config)
        + cache_bytes(language, 2, _PROMPT_TOKENS + config.image_tokens, itemsize),
        "answering": weight_bytes(model.answering_arrays(pictures=True), itemsize)
        + cache_bytes(language, 1, 2 * _PROMPT_TOKENS + config.understanding.tokens, itemsize),
    }


def weight_bytes(arrays: Iterable[mx.array], itemsize: int) -> int:
    """Bytes of weights, of which the floats take ``itemsize`` each and what is packed takes what it does."""
    return sum(a.size * itemsize if mx.issubdtype(a.dtype, mx.floating) else a.nbytes for a in arrays)


def check_memory(config: JanusConfig, dtype: Dtype, name: str, *, quantized: bool = False) -> None:
    """Refuse a model that cannot fit, before it is loaded.

    Args:
        config: as the model would be loaded.
        dtype: of its float weights.
        name: of the model.
        quantized: it is stored so, and can be had in no other bits.

    Raises:
        OutOfMemoryError: with what it needs, what there is, and the bits or the recipe that would fit.
    """
    needed, free = max(required_memory(config, dtype).values()), available_memory()
    if needed <= free:
        return
    advice = "close other programs, or take a smaller model"
    for flag, (bits, recipe) in {} if quantized else _SMALLER.items():
        plan = plan_quantization(config, bits, recipe=recipe)
        size = max(required_memory(replace(config, quantization=plan), dtype).values())
        if size <= free:
            advice = f"{flag} needs {format_size(size)} and fits"
            break
    raise OutOfMemoryError(f"{name} needs {format_size(needed)} of memory and {format_size(free)} are free: {advice}")
