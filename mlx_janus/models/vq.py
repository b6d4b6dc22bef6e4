"""VQ-GAN codec, the generation tokenizer (reference: ``janus/models/vq_model.py``).

What is unusual: codebook rows are L2-normalised whenever they are looked up, and the encoder's output is normalised
before the search; downsampling pads right and bottom only; attention stands at the lowest resolution alone, one head
over all channels; GroupNorm groups consecutive channels, as PyTorch does and MLX by default does not, eps 1e-6.
Run it in float32: half precision overflows.
"""

from __future__ import annotations

import math
from itertools import pairwise

import mlx.core as mx
from mlx import nn

from ..config import VQConfig
from .convolution import Conv2d


class GroupNorm(nn.GroupNorm):
    """GroupNorm over consecutive channels, as PyTorch's, with sums taken row by row.

    MLX's CPU adds a group's values one after the other, and over a flat region, thousands of times the same value,
    the rounding errors all point the same way: the variance comes out wrong by 1e-5. Rows first, then their means.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) -> (B, H, W, C)."""
        B, H, W, C = x.shape
        x = x.reshape(B, H, W, self.num_groups, C // self.num_groups)
        x = x - mean_by_rows(x)
        x = x * mx.rsqrt(mean_by_rows(x * x) + self.eps)
        return x.reshape(B, H, W, C) * self.weight + self.bias


def mean_by_rows(x: mx.array) -> mx.array:
    """(B, H, W, G, c) -> (B, 1, 1, G, 1)."""
    return x.mean(2, keepdims=True).mean(1, keepdims=True).mean(4, keepdims=True)


def group_norm(channels: int, config: VQConfig) -> GroupNorm:
    return GroupNorm(config.norm_groups, channels, eps=config.norm_eps)


class ResnetBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, config: VQConfig):
        super().__init__()
        self.norm1 = group_norm(channels_in, config)
        self.conv1 = Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(channels_out, config)
        self.conv2 = Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = Conv2d(channels_in, channels_out, 1)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.conv1(nn.silu(self.norm1(x)))
        h = self.conv2(nn.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if "nin_shortcut" in self else x)


class AttnBlock(nn.Module):
    """Self-attention over positions, one head."""

    def __init__(self, channels: int, config: VQConfig):
        super().__init__()
        self.norm = group_norm(channels, config)
        self.q = Conv2d(channels, channels, 1)
        self.k = Conv2d(channels, channels, 1)
        self.v = Conv2d(channels, channels, 1)
        self.proj_out = Conv2d(channels, channels, 1)

    def __call__(self, x: mx.array) -> mx.array:
        B, H, W, C = x.shape
        h = self.norm(x)
        q, k, v = (conv(h).reshape(B, 1, H * W, C) for conv in (self.q, self.k, self.v))
        h = mx.fast.scaled_dot_product_attention(q, k, v, scale=C**-0.5)
        return x + self.proj_out(h.reshape(B, H, W, C))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        B, H, W, C = x.shape
        x = mx.broadcast_to(x[:, :, None, :, None, :], (B, H, 2, W, 2, C))
        return self.conv(x.reshape(B, 2 * H, 2 * W, C))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Level(nn.Module):
    """The blocks of one resolution, with attention after each where asked, and the change to the next."""

    def __init__(
        self, channels_in: int, channels_out: int, blocks: int, attention: bool, config: VQConfig
    ):
        super().__init__()
        sizes = [channels_in] + [channels_out] * blocks
        self.res = [ResnetBlock(a, b, config) for a, b in pairwise(sizes)]
        if attention:
            self.attn = [AttnBlock(channels_out, config) for _ in range(blocks)]

    def __call__(self, x: mx.array) -> mx.array:
        for i, block in enumerate(self.res):
            x = block(x)
            if "attn" in self:
                x = self.attn[i](x)
        if "downsample" in self:
            return self.downsample(x)
        if "upsample" in self:
            return self.upsample(x)
        return x


def middle(channels: int, config: VQConfig) -> list[nn.Module]:
    return [
        ResnetBlock(channels, channels, config),
        AttnBlock(channels, config),
        ResnetBlock(channels, channels, config),
    ]


class Encoder(nn.Module):
    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = Conv2d(3, config.ch, 3, padding=1)
        self.conv_blocks = []
        for i, (before, width) in enumerate(zip([config.ch, *widths], widths, strict=False)):
            level = Level(before, width, config.num_res_blocks, i == last, config)
            if i != last:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
        self.mid = middle(widths[-1], config)
        self.norm_out = group_norm(widths[-1], config)
        self.conv_out = Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """(N, H, W, 3) -> (N, H / 2**levels, W / 2**levels, z_channels)."""
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(nn.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """The encoder's mirror, with one residual block more per level; levels go from low to high resolution."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [config.ch * m for m in reversed(config.ch_mult)]
        last = len(widths) - 1
        self.conv_in = Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], config)
        self.conv_blocks = []
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            level = Level(before, width, config.num_res_blocks + 1, i == 0, config)
            if i != last:
                level.upsample = Upsample(width)
            self.conv_blocks.append(level)
        self.norm_out = group_norm(widths[-1], config)
        self.conv_out = Conv2d(widths[-1], 3, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """(N, h, w, z_channels) -> (N, H, W, 3)."""
        x = self.conv_in(x)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(nn.silu(self.norm_out(x)))


class VectorQuantizer(nn.Module):
    def __init__(self, config: VQConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)

    def look_up(self, ids: mx.array) -> mx.array:
        """(...) indices -> (..., codebook_dim) unit vectors."""
        return normalize(self.embedding(ids))

    def nearest(self, z: mx.array) -> mx.array:
        """(..., codebook_dim) -> (...) indices of the nearest rows; both sides normalised, first of equals."""
        # Between unit vectors |z - e|^2 = 2 - 2 z.e, but codebooks may hold zero rows, so the norms stay in.
        z, codebook = normalize(z), normalize(self.embedding.weight)
        distance = (
            (z * z).sum(-1, keepdims=True) + (codebook * codebook).sum(-1) - 2 * (z @ codebook.T)
        )
        return mx.argmin(distance, axis=-1)


def normalize(x: mx.array) -> mx.array:
    """Unit length along the last axis, as torch's ``F.normalize`` (eps 1e-12)."""
    return x / mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class VQModel(nn.Module):
    def __init__(self, config: VQConfig):
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config)
        self.quant_conv = Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = Conv2d(config.codebook_dim, config.z_channels, 1)

    @staticmethod
    def drawing_parts() -> tuple[str, ...]:
        """The children that drawing needs: everything but the encoder's side."""
        return ("decoder", "quantize", "post_quant_conv")

    def decode_code(self, ids: mx.array, grid: tuple[int, int] | None = None) -> mx.array:
        """(N, h * w) indices, row by row -> (N, H, W, 3), nominally in [-1, 1] but not clipped.

        Args:
            ids: token indices.
            grid: rows and columns; a square by default.
        """
        h, w = grid or (math.isqrt(ids.shape[1]),) * 2
        if h * w != ids.shape[1]:
            raise ValueError(f"{ids.shape[1]} tokens do not fill a {h} x {w} grid")
        z = self.quantize.look_up(ids).reshape(ids.shape[0], h, w, -1)
        return self.decoder(self.post_quant_conv(z))

    def encode(self, pixels: mx.array) -> mx.array:
        """(N, H, W, 3) in [-1, 1] -> (N, h * w) indices."""
        z = self.quant_conv(self.encoder(pixels))
        return self.quantize.nearest(z).reshape(pixels.shape[0], -1)
