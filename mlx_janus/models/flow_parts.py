"""The networks of the flow pathway: U-ViT, its adaptors to the language model, and the decoder."""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from ..config import FlowGenerationConfig, JanusConfig
from ..errors import UnsupportedModelError
from .backbone import cache_bytes
from .flow_uvit import UViTDecoder, UViTEncoder
from .flow_vae import LatentDecoder
from .parts import GenerationParts


def _build(config: JanusConfig) -> dict[str, nn.Module]:
    """Return the networks with random weights, by their attribute names in ``JanusModel``."""
    flow = flow_config(config)
    uvit = flow.uvit
    latent_channels = flow.vae.z_channels
    norm_eps = config.language.rms_norm_eps
    return {
        "vision_gen_enc_model": UViTEncoder(uvit, latent_channels),
        "vision_gen_enc_aligner": nn.Linear(uvit.channels, uvit.hidden_size),
        "vision_gen_dec_aligner_norm": nn.RMSNorm(uvit.hidden_size, eps=norm_eps),
        "vision_gen_dec_aligner": nn.Linear(uvit.hidden_size, uvit.channels),
        "vision_gen_dec_model": UViTDecoder(uvit, latent_channels),
        "vae": LatentDecoder(flow.vae),
    }


def flow_config(config: JanusConfig) -> FlowGenerationConfig:
    """Return the section of the config that describes the flow pathway.

    Raises:
        UnsupportedModelError: the model's image pathway is not a flow.
    """
    if not isinstance(config.generation, FlowGenerationConfig):
        raise UnsupportedModelError("this model does not generate images by a rectified flow")
    return config.generation


def _image_bytes(config: JanusConfig, prompt_tokens: int, rows: int, itemsize: int) -> int:
    """Estimate the bytes of one image while it is generated: its KV cache and activations.

    A pass reads all positions of the image. Its largest arrays are the scores of attention, or
    those inside a block of the decoder or of the language model. The largest is counted three times
    in float32, for the two inputs and the output of an operation.

    Args:
        config: the model's config.
        prompt_tokens: tokens of the image's prompt.
        rows: rows of the batch for the image, 2 with guidance and 1 without.
        itemsize: bytes of a number in the cache.
    """
    flow = flow_config(config)
    language = config.language
    pass_positions = flow.positions + 1  # 1: the position of the time
    length = prompt_tokens + pass_positions
    scores = language.num_attention_heads * length * pass_positions
    # The decoder has 2 * channels outside its blocks, and 4 times as many inside.
    widest = max(language.intermediate_size, 8 * flow.uvit.channels)
    largest = rows * max(scores, pass_positions * widest)  # numbers in the largest array
    kv_bytes = cache_bytes(language, rows, length, itemsize)
    return kv_bytes + 3 * mx.float32.size * largest


def _pixel_bytes(config: JanusConfig) -> int:
    """Estimate the bytes of the decoder's activations while it decodes one image.

    They are a multiple of the bytes of the largest activation: the blocks of the highest resolution
    begin with the channels of the level before. On a CPU, the multiple is 7.8 at the published size
    (``benchmarks/flow.py``), and more at smaller ones. On a GPU, it is that of the VQ codec.
    """
    flow = flow_config(config)
    # ``level_channels`` begins with the highest resolution, which the decoder computes last. The
    # first block there still gets the channels of the level before, which come second.
    channels = max(flow.vae.level_channels[:2])
    activation_bytes = mx.float32.size * flow.image_size**2 * channels
    factor = 10 if mx.default_device().type == mx.DeviceType.cpu else 12
    return activation_bytes * factor


FLOW_PARTS = GenerationParts(
    build=_build,
    step_parts=(
        "vision_gen_enc_model",
        "vision_gen_enc_aligner",
        "vision_gen_dec_aligner_norm",
        "vision_gen_dec_aligner",
        "vision_gen_dec_model",
    ),
    pixel_paths=lambda _: ("vae",),
    keeps_type=("vae",),  # not cast by conversion, computed in float32
    sensitive=(),  # 75 of the 1300 million numbers of a step: quantizing them saves little memory
    image_bytes=_image_bytes,
    pixel_bytes=_pixel_bytes,
)
