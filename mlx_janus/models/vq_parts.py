"""The networks of the VQ pathway: a codec, an embedding of image tokens with its adaptor, and a head over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx import nn

from ..config import JanusConfig, VQGenerationConfig
from ..errors import UnsupportedModelError
from .backbone import cache_bytes
from .layers import ADAPTORS, GenHead
from .parts import GenerationParts
from .vq import VQModel

CODECS: dict[str, Any] = {"vq": VQModel}
HEADS: dict[str, Callable[[Any], nn.Module]] = {"vision_head": GenHead}


def _build(config: JanusConfig) -> dict[str, nn.Module]:
    own = token_config(config)
    return {
        "gen_vision_model": CODECS[own.codec.kind](own.codec),
        "gen_aligner": ADAPTORS[own.aligner.kind](own.aligner),
        "gen_head": HEADS[own.head.kind](own.head),
        "gen_embed": nn.Embedding(own.codec.codebook_size, own.aligner.input_dim),
    }


def token_config(config: JanusConfig) -> VQGenerationConfig:
    """Return the config's section of the VQ pathway."""
    if not isinstance(config.generation, VQGenerationConfig):
        raise UnsupportedModelError("this model does not generate image tokens")
    return config.generation


def _pixels(config: JanusConfig) -> tuple[str, ...]:
    return tuple(
        f"gen_vision_model.{name}"
        for name in CODECS[token_config(config).codec.kind].drawing_parts()
    )


def _image_bytes(config: JanusConfig, prompt_tokens: int, rows: int, itemsize: int) -> int:
    """Sum the KV cache and, four times over, the float32 logits of a step."""
    own = token_config(config)
    cache = cache_bytes(config.language, rows, prompt_tokens + own.tokens, itemsize)
    return cache + 4 * 4 * rows * own.codec.codebook_size


def _pixel_bytes(config: JanusConfig) -> int:
    """Estimate the decoder's activations, counted in its widest one.

    13 is what ``benchmarks/bench.py`` measured on a CPU, rounded up. The 12 of a GPU is an estimate.
    """
    own = token_config(config)
    widest = 4 * own.image_size**2 * own.codec.ch
    return widest * (13 if mx.default_device().type == mx.DeviceType.cpu else 12)


VQ_PARTS = GenerationParts(
    build=_build,
    step=("gen_head", "gen_aligner", "gen_embed"),
    pixels=_pixels,
    keeps_type=("gen_vision_model",),
    careful=("gen_head", "gen_aligner"),
    image_bytes=_image_bytes,
    pixel_bytes=_pixel_bytes,
)
