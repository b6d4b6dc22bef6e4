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
    pathway = token_config(config)
    build_codec = CODECS[pathway.codec.kind]
    build_aligner = ADAPTORS[pathway.aligner.kind]
    build_head = HEADS[pathway.head.kind]
    return {
        "gen_vision_model": build_codec(pathway.codec),
        "gen_aligner": build_aligner(pathway.aligner),
        "gen_head": build_head(pathway.head),
        "gen_embed": nn.Embedding(pathway.codec.codebook_size, pathway.aligner.input_dim),
    }


def token_config(config: JanusConfig) -> VQGenerationConfig:
    """Return the section of the config that describes the VQ pathway.

    Raises:
        UnsupportedModelError: the model's image pathway is not VQ.
    """
    if not isinstance(config.generation, VQGenerationConfig):
        raise UnsupportedModelError("this model does not generate image tokens")
    return config.generation


def _pixel_paths(config: JanusConfig) -> tuple[str, ...]:
    """Return the paths of the codec's modules that decode tokens. Its encoder is left out."""
    codec_class = CODECS[token_config(config).codec.kind]
    return tuple(f"gen_vision_model.{name}" for name in codec_class.decoding_parts())


def _image_bytes(config: JanusConfig, prompt_tokens: int, rows: int, itemsize: int) -> int:
    """Estimate the bytes of one image while it is generated: its KV cache and its logits.

    Logits are counted four times, since guidance and sampling hold several arrays of them at once.

    Args:
        config: the model's config.
        prompt_tokens: tokens of the image's prompt.
        rows: rows of the batch for the image, 2 with guidance and 1 without.
        itemsize: bytes of a number in the cache.
    """
    pathway = token_config(config)
    positions = prompt_tokens + pathway.tokens
    kv_bytes = cache_bytes(config.language, rows, positions, itemsize)
    logits_bytes = mx.float32.size * rows * pathway.codec.codebook_size
    return kv_bytes + 4 * logits_bytes


def _pixel_bytes(config: JanusConfig) -> int:
    """Estimate the bytes of the codec's activations while it decodes one image.

    They are a multiple of the bytes of one activation at full resolution. On a CPU, the factor is
    13: ``benchmarks/bench.py`` measured it, and it is rounded up. On a GPU, it is estimated as 12.
    """
    pathway = token_config(config)
    # In float32, for a square image, with the base number of channels.
    activation_bytes = mx.float32.size * pathway.image_size**2 * pathway.codec.ch
    factor = 13 if mx.default_device().type == mx.DeviceType.cpu else 12
    return activation_bytes * factor


VQ_PARTS = GenerationParts(
    build=_build,
    step_parts=("gen_head", "gen_aligner", "gen_embed"),  # computed at every image token
    pixel_paths=_pixel_paths,
    keeps_type=("gen_vision_model",),  # not cast by conversion, computed in float32
    sensitive=("gen_head", "gen_aligner"),  # quantized to at least 8 bits
    image_bytes=_image_bytes,
    pixel_bytes=_pixel_bytes,
)
