"""The networks of the VQ pathway: a codec, and the embedding, adaptor and head of its tokens."""

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
    """Return the networks with random weights, by their names in the checkpoint."""
    own = token_config(config)
    codec = CODECS[own.codec.kind]
    aligner = ADAPTORS[own.aligner.kind]
    head = HEADS[own.head.kind]
    return {
        "gen_vision_model": codec(own.codec),
        "gen_aligner": aligner(own.aligner),
        "gen_head": head(own.head),
        "gen_embed": nn.Embedding(own.codec.codebook_size, own.aligner.input_dim),
    }


def token_config(config: JanusConfig) -> VQGenerationConfig:
    """Return the config's section of the VQ pathway.

    Raises:
        UnsupportedModelError: the model has another pathway.
    """
    if not isinstance(config.generation, VQGenerationConfig):
        raise UnsupportedModelError("this model does not generate image tokens")
    return config.generation


def _pixels(config: JanusConfig) -> tuple[str, ...]:
    """Return the paths of the codec's decoding parts, which exclude its encoder."""
    codec = CODECS[token_config(config).codec.kind]
    return tuple(f"gen_vision_model.{name}" for name in codec.decoding_parts())


def _image_bytes(config: JanusConfig, prompt_tokens: int, rows: int, itemsize: int) -> int:
    """Return the bytes of an image's KV cache and of four copies of a step's float32 logits."""
    own = token_config(config)
    cache = cache_bytes(config.language, rows, prompt_tokens + own.tokens, itemsize)
    copy = 4 * rows * own.codec.codebook_size  # 4 bytes a float
    return cache + 4 * copy


def _pixel_bytes(config: JanusConfig) -> int:
    """Estimate the bytes of the decoder's activations, as a multiple of the widest.

    On a CPU, ``benchmarks/bench.py`` measured a factor of 13, rounded up. The 12 of a GPU is an
    estimate.
    """
    own = token_config(config)
    widest = 4 * own.image_size**2 * own.codec.ch
    factor = 13 if mx.default_device().type == mx.DeviceType.cpu else 12
    return widest * factor


VQ_PARTS = GenerationParts(
    build=_build,
    step=("gen_head", "gen_aligner", "gen_embed"),  # computed at every image token
    pixels=_pixels,
    keeps_type=("gen_vision_model",),  # not cast by conversion, computed in float32
    careful=("gen_head", "gen_aligner"),  # quantized to at least 8 bits
    image_bytes=_image_bytes,
    pixel_bytes=_pixel_bytes,
)
