"""Decoder of a variational autoencoder, from latents to pixels, as diffusers' ``AutoencoderKL``.

It has the blocks of the VQ codec, but attends only before the first level. Run it in float32: half
precision overflows. The encoder is not part of it, since nothing here needs latents of an image.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from ..config import VAEConfig
from .convolution import Conv2d
from .vq import Decoder


class LatentDecoder(nn.Module):
    """The network from latents to pixels."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.scaling_factor = config.scaling_factor
        self.post_quant_conv = Conv2d(config.z_channels, config.z_channels, 1)
        self.decoder = Decoder(config, attention=False)

    def __call__(self, latents: mx.array) -> mx.array:
        """Decode latents of the flow: (N, h, w, z_channels) -> (N, H, W, 3).

        The pixels are nominally in [-1, 1], but not clipped.
        """
        latents = latents.astype(mx.float32) / self.scaling_factor
        return self.decoder(self.post_quant_conv(latents))
