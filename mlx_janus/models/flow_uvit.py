"""Shallow U-ViT around the language model, in a rectified flow (arXiv 2411.07975).

Reference: ``janus/janusflow/models/uvit.py``.

Unusual: the cosines of the time come before its sines, and the time counts from 0 (noise) to 1000
(image). The blocks are those of ConvNeXt V2, scaled and shifted by the time after the residual
connection, with RMSNorm and exact GELU. ``GlobalResponseNorm`` depends on the size of the grid.
The decoder gets the encoder's output after the language model's, on the channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from mlx import nn

from ..config import UViTConfig
from .convolution import Conv2d

_KERNEL = 7  # side of the depthwise convolution
_WIDENING = 4  # channels inside a block, relative to those outside
_GRN_EPS = 1e-6
_LONGEST_PERIOD = 10_000  # of the sinusoids, in units of the time, without the factor 2 pi


def time_features(times: Sequence[float], size: int) -> mx.array:
    """Return sinusoidal time embeddings, cosines and then sines: (n, size), float32.

    The angles are computed in float32, as in the reference. Near the time 1000 an angle has a
    rounding error of up to 6e-5, so another order of the operations would give other numbers.

    Args:
        times: n times from 0 to 1000.
        size: numbers in an embedding; even.
    """
    half = size // 2
    exponents = -np.float32(math.log(_LONGEST_PERIOD)) * np.arange(half, dtype=np.float32)
    frequencies = np.exp(exponents / np.float32(half))
    angles = np.array(times, np.float32)[:, None] * frequencies
    return mx.array(np.concatenate([np.cos(angles), np.sin(angles)], axis=1))


class TimeEmbedding(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(size, width)
        self.linear_2 = nn.Linear(width, width)

    def __call__(self, features: mx.array) -> mx.array:
        """Transform the results of ``time_features``: (B, size) -> (B, width)."""
        hidden = self.linear_1(features)
        return self.linear_2(nn.silu(hidden))


class GlobalResponseNorm(nn.Module):
    """Global response normalization of ConvNeXt V2 (arXiv 2301.00808), in float32."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = mx.zeros((channels,))
        self.bias = mx.zeros((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        """Scale each channel by its norm over the grid: (B, H, W, C) -> (B, H, W, C).

        The norm is divided by the mean norm of all channels.
        """
        y = x.astype(mx.float32)
        # Sum each row and then the rows, since rounding errors are smaller in shorter sums.
        norms = mx.sqrt((y * y).sum(2, keepdims=True).sum(1, keepdims=True))  # (B, 1, 1, C)
        relative = norms / (norms.mean(-1, keepdims=True) + _GRN_EPS)
        return (self.bias + (self.weight * relative + 1) * y).astype(x.dtype)


class ConvNextBlock(nn.Module):
    """A block of ConvNeXt V2, scaled and shifted by the time."""

    def __init__(self, channels: int, config: UViTConfig):
        super().__init__()
        inner = _WIDENING * channels
        self.depthwise = nn.Conv2d(
            channels, channels, _KERNEL, padding=_KERNEL // 2, groups=channels
        )
        self.norm = nn.RMSNorm(channels, eps=config.norm_eps)
        self.channelwise_linear_1 = nn.Linear(channels, inner)
        self.channelwise_norm = GlobalResponseNorm(inner)
        self.channelwise_linear_2 = nn.Linear(inner, channels)
        self.cond_embeds_mapper = nn.Linear(config.hidden_size, 2 * channels)

    def __call__(self, x: mx.array, time: mx.array) -> mx.array:
        """Apply the block: (B, H, W, C) -> (B, H, W, C).

        Args:
            x: (B, H, W, C).
            time: embedded times, (B, hidden) or (1, hidden).
        """
        h = self.depthwise(x)
        h = self.norm(h)
        h = self.channelwise_linear_1(h)
        h = nn.gelu(h)
        h = self.channelwise_norm(h)
        h = self.channelwise_linear_2(h)
        h = h + x
        modulation = self.cond_embeds_mapper(nn.silu(time))[:, None, None]
        scale, shift = mx.split(modulation, 2, axis=-1)
        return h * (1 + scale) + shift


class Blocks(nn.Module):
    """The blocks of one resolution, which the checkpoint names ``res_blocks``."""

    def __init__(self, count: int, channels: int, config: UViTConfig):
        super().__init__()
        self.res_blocks = [ConvNextBlock(channels, config) for _ in range(count)]

    def __call__(self, x: mx.array, time: mx.array) -> mx.array:
        """Apply the blocks one after the other; the arguments are those of ``ConvNextBlock``."""
        for block in self.res_blocks:
            x = block(x, time)
        return x


class UViTEncoder(nn.Module):
    """The network from latents and a time to the language model.

    Args:
        config: the sizes.
        z_channels: channels of the latents.
    """

    def __init__(self, config: UViTConfig, z_channels: int):
        super().__init__()
        side = config.patch_size
        self.time_embed = TimeEmbedding(config.channels, config.hidden_size)
        self.in_conv = nn.Conv2d(z_channels, config.channels, side, stride=side)
        self.mid_block = Blocks(config.encoder_blocks, config.channels, config)

    def __call__(self, z: mx.array, time: mx.array) -> mx.array:
        """Encode latents: (B, h, w, z_channels) -> (B, H, W, channels).

        H and W count patches.

        Args:
            z: latents.
            time: embedded times, (B, hidden) or (1, hidden).
        """
        return self.mid_block(self.in_conv(z), time)


class Unpatch(nn.Module):
    """The last layer: from patches to latents."""

    def __init__(self, config: UViTConfig, z_channels: int):
        super().__init__()
        channels = 2 * config.channels
        self.patch_size = config.patch_size
        self.norm = nn.RMSNorm(channels, eps=config.norm_eps)
        self.unpatch_conv = Conv2d(channels, z_channels * config.patch_size**2, 1)

    def __call__(self, x: mx.array) -> mx.array:
        """Return latents: (B, H, W, 2 * channels) -> (B, h, w, z_channels).

        The convolution gives z_channels * patch_size * patch_size numbers for each patch, in the
        order channel, row, column.
        """
        x = self.unpatch_conv(self.norm(x))
        B, H, W, _ = x.shape
        side = self.patch_size
        x = x.reshape(B, H, W, -1, side, side).transpose(0, 1, 4, 2, 5, 3)
        return x.reshape(B, H * side, W * side, -1)


class UViTDecoder(nn.Module):
    """The network from the language model to a velocity of the latents.

    Args:
        config: the sizes.
        z_channels: channels of the latents.
    """

    def __init__(self, config: UViTConfig, z_channels: int):
        super().__init__()
        self.input_norm = nn.RMSNorm(config.channels, eps=config.norm_eps)
        self.mid_block = Blocks(config.decoder_blocks, 2 * config.channels, config)
        self.out_convs = [Unpatch(config, z_channels)]  # a list of one, as in the checkpoint

    def __call__(self, x: mx.array, skip: mx.array, time: mx.array) -> mx.array:
        """Return velocities: (B, H, W, channels) -> (B, h, w, z_channels).

        Args:
            x: the language model's output for each patch.
            skip: the encoder's output, (B, H, W, channels).
            time: embedded times, (B, hidden) or (1, hidden).
        """
        x = mx.concatenate([self.input_norm(x), skip], axis=-1)
        x = self.mid_block(x, time)
        for layer in self.out_convs:
            x = layer(x)
        return x
