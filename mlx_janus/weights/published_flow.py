"""Reading what only JanusFlow has: the U-ViT's sizes, and the autoencoder of another repository.

Unusual here: the classes of DeepSeek's code have other defaults than the published config, so a
size that is absent is an error. Stable Diffusion 1's autoencoder has the shapes of SDXL's; only
``scaling_factor`` in its config tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import FlowGenerationConfig, UViTConfig, VAEConfig, read_model_json
from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from ..sections import shorten
from .published_values import (
    errors_about,
    refuse_others,
    required,
    section_params,
    tuple_if_list,
)

VAE_FILE = "diffusion_pytorch_model.safetensors"
"""The weights of an autoencoder in diffusers' layout."""
VAE_ADVICE = "give the folder or the Hub id of stabilityai/sdxl-vae"
_SCALING_FACTOR = 0.13025  # of SDXL
_OLDER_SCALING_FACTOR = 0.18215  # of Stable Diffusion 1 and 2, and diffusers' default
SDXL_VAE = VAEConfig(
    kind="autoencoder_kl",
    z_channels=4,
    level_channels=(128, 256, 512, 512),
    num_res_blocks=2,
    norm_groups=32,
    scaling_factor=_SCALING_FACTOR,
)
"""The sizes of ``stabilityai/sdxl-vae``."""


def read_flow_generation(
    data: Mapping[str, Any], image_size: int, vae: VAEConfig
) -> FlowGenerationConfig:
    """Read the config of image generation from JanusFlow's ``config.json``.

    Args:
        data: the content of the file.
        image_size: pixels per side of an image.
        vae: the autoencoder.

    Raises:
        ConfigError: an entry is missing or impossible.
        UnsupportedModelError: an option is not supported, or the autoencoder's latents have another
            number of channels.
    """
    encoder = section_params(data, "vision_gen_enc_config", "ShallowUViTEncoder")
    decoder = section_params(data, "vision_gen_dec_config", "ShallowUViTDecoder")
    channels = _only_level(encoder)
    patch_size = required(encoder, "kernel_size")
    hidden_size = required(encoder, "hidden_size")
    norm_eps = encoder.get("norm_eps", 1e-6)
    _refuse_other_uvit(encoder, decoder)
    for part, key in ((encoder, "input_channels"), (decoder, "out_channels")):
        if required(part, key) != vae.z_channels:
            raise UnsupportedModelError(
                f"moves latents of {shorten(part[key])} channels, and the autoencoder has "
                f"{vae.z_channels}: {VAE_ADVICE}"
            )
    return FlowGenerationConfig(
        kind="flow",
        image_size=image_size,
        uvit=UViTConfig(
            kind="shallow_uvit",
            channels=channels,
            encoder_blocks=required(encoder, "layers_in_middle"),
            decoder_blocks=required(decoder, "layers_in_middle"),
            patch_size=patch_size,
            hidden_size=hidden_size,
            norm_eps=norm_eps,
        ),
        vae=vae,
    )


def _refuse_other_uvit(encoder: Mapping[str, Any], decoder: Mapping[str, Any]) -> None:
    """Refuse a U-ViT with unsupported options, or whose encoder and decoder do not fit together.

    Raises:
        ConfigError: an entry is missing or impossible.
        UnsupportedModelError: an option is not supported, or a size that the encoder and decoder
            share differs.
    """
    channels = _only_level(encoder)
    patch_size = required(encoder, "kernel_size")
    upsamples = required(decoder, "upsamples")
    refuse_others(encoder, "stride", (patch_size,), "U-ViT")  # patches do not overlap
    refuse_others(encoder, "padding", (0,), "U-ViT")
    if type(upsamples) is not int or not 0 <= upsamples <= 6:
        raise ConfigError(f"upsamples must be a whole number from 0 to 6, got {shorten(upsamples)}")
    # Each upsampling doubles the sides. Together they undo the encoder's patches.
    refuse_others(encoder, "kernel_size", (2**upsamples,), "U-ViT")
    for part in (encoder, decoder):
        refuse_others(part, "use_mid_block", (True,), "U-ViT")
        refuse_others(part, "use_bias", (True,), "U-ViT")
        refuse_others(part, "elementwise_affine", (True,), "U-ViT")
    shared = {
        "in_channels": channels,
        "hidden_size": required(encoder, "hidden_size"),
        "norm_eps": encoder.get("norm_eps", 1e-6),
    }
    for key, value in shared.items():
        refuse_others(decoder, key, (value,), "U-ViT's decoder")
    if _only_level(decoder) != channels:
        raise UnsupportedModelError("has a U-ViT whose two halves differ in block_out_channels")


def _only_level(params: Mapping[str, Any]) -> Any:
    """Return the channels of a U-ViT's only level, an unchecked JSON value.

    Raises:
        ConfigError: they are missing, not a list, or an empty list.
        UnsupportedModelError: there are several levels.
    """
    channels = required(params, "block_out_channels")
    if not isinstance(channels, list) or not channels:
        raise ConfigError(f"block_out_channels must be a list, got {shorten(channels)}")
    if len(channels) > 1:
        raise UnsupportedModelError("has a U-ViT of several levels; only one is supported")
    return channels[0]


def read_vae(folder: Path) -> VAEConfig:
    """Read the sizes of an autoencoder from its folder, in diffusers' layout.

    Raises:
        CheckpointError: there is no such folder, or it has no ``config.json``.
        ConfigError: an entry is missing or impossible.
        UnsupportedModelError: it is no ``AutoencoderKL``, has options that are not supported, or is
            not SDXL's.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no autoencoder (config.json): {VAE_ADVICE}")
    data = read_model_json(path)
    with errors_about(path):
        if data.get("_class_name") != "AutoencoderKL":
            found = shorten(data.get("_class_name"))
            raise UnsupportedModelError(f"is of {found}, not of an AutoencoderKL: {VAE_ADVICE}")
        _refuse_other_vae(data)
        levels = tuple_if_list(required(data, "block_out_channels"))
        return VAEConfig(
            kind="autoencoder_kl",
            z_channels=required(data, "latent_channels"),
            level_channels=levels,
            num_res_blocks=required(data, "layers_per_block"),
            norm_groups=data.get("norm_num_groups", 32),
            scaling_factor=data.get("scaling_factor", _OLDER_SCALING_FACTOR),
        )


def _refuse_other_vae(data: Mapping[str, Any]) -> None:
    """Refuse an autoencoder that is not SDXL's, by its ``config.json``.

    Raises:
        UnsupportedModelError: its latents have another scale, or it has options that are not
            supported.
    """
    scale = data.get("scaling_factor")
    if scale is None:
        scale = _OLDER_SCALING_FACTOR
    is_float = type(scale) is float  # an int is never close, and may be too large for a float
    if not is_float or not math.isclose(scale, _SCALING_FACTOR, rel_tol=1e-4):
        family = "not SDXL's"
        if is_float and math.isclose(scale, _OLDER_SCALING_FACTOR, rel_tol=1e-4):
            family = "that of Stable Diffusion 1 and not SDXL's"
        raise UnsupportedModelError(
            f"is of an autoencoder with scaling_factor {shorten(scale)}, {family} "
            f"({_SCALING_FACTOR}): {VAE_ADVICE}"
        )
    place = "autoencoder"
    refuse_others(data, "act_fn", ("silu", "swish"), place)
    refuse_others(data, "out_channels", (3,), place)
    refuse_others(data, "mid_block_add_attention", (True,), place)
    refuse_others(data, "use_post_quant_conv", (True,), place)
    refuse_others(data, "shift_factor", (0,), place)
    refuse_others(data, "latents_mean", ([],), place)
    refuse_others(data, "latents_std", ([],), place)
    blocks = data.get("up_block_types")
    if isinstance(blocks, list) and set(map(str, blocks)) - {"UpDecoderBlock2D"}:
        raise UnsupportedModelError(
            f"has blocks {shorten(blocks)}; only 'UpDecoderBlock2D' is supported"
        )
