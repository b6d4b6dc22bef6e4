"""VQ-GAN codec, the generation tokenizer (reference: ``janus/models/vq_model.py``).

Unusual: codebook rows are L2-normalised at every look-up, and the encoder's output is normalised
before the search; downsampling pads on the right and at the bottom only; attention is used at the
lowest resolution only, with one head over all channels; GroupNorm groups consecutive channels, as
PyTorch does and MLX by default does not, with eps 1e-6. Run the codec in float32: half precision
overflows.
"""

from __future__ import annotations

import math

import mlx.core as mx
from mlx import nn

from ..config import VQConfig
from .convolution import Conv2d

_PIECE = 16  # values that are added one after the other


class GroupNorm(nn.GroupNorm):
    """GroupNorm over consecutive channels, as PyTorch's, with means taken in small pieces.

    MLX's CPU backend adds a group's values one after the other. Over a flat region it adds the same
    value thousands of times, so that all rounding errors have one sign and the variance is wrong by
    1e-5. Averaging pieces of 16 values, and then their means, avoids this.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Normalise each group: (B, H, W, C) -> (B, H, W, C)."""
        B, H, W, C = x.shape
        groups = self.num_groups
        x = x.reshape(B, H, W, groups, C // groups)
        x = x - mean_by_rows(x)
        variance = mean_by_rows(x * x)
        x = x * mx.rsqrt(variance + self.eps)
        x = x.reshape(B, H, W, C)
        return x * self.weight + self.bias


def mean_by_rows(x: mx.array) -> mx.array:
    """Return the mean of each group: (B, H, W, G, c) -> (B, 1, 1, G, 1).

    G is the number of groups, c the number of channels in a group. Each row is averaged first, then
    the rows' means, then the channels' means.
    """
    for axis in (2, 1, 4):
        x = _mean_in_pieces(x, axis)
    return x


def _mean_in_pieces(x: mx.array, axis: int) -> mx.array:
    """Return the mean along an axis, whose length becomes 1.

    Pieces of neighbours are averaged first, then pieces of these means, until one mean is left.
    """
    while (count := x.shape[axis]) > 1:
        piece = _piece_of(count)
        x = x.reshape(*x.shape[:axis], count // piece, piece, *x.shape[axis + 1 :])
        x = x.mean(axis + 1)
    return x


def _piece_of(count: int) -> int:
    """Return the largest divisor of ``count`` up to ``_PIECE``; if that is 1, the next larger one.

    ``count`` is at least 2.
    """
    small = [size for size in range(2, _PIECE + 1) if count % size == 0]
    if small:
        return small[-1]
    return next(size for size in range(_PIECE + 1, count + 1) if count % size == 0)


def group_norm(channels: int, config: VQConfig) -> GroupNorm:
    """Return a ``GroupNorm`` with the config's groups and eps."""
    return GroupNorm(config.norm_groups, channels, eps=config.norm_eps)


class ResnetBlock(nn.Module):
    """Two convolutions with a residual connection."""

    def __init__(self, channels_in: int, channels_out: int, config: VQConfig):
        super().__init__()
        self.norm1 = group_norm(channels_in, config)
        self.conv1 = Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(channels_out, config)
        self.conv2 = Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = Conv2d(channels_in, channels_out, 1)

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the block: (B, H, W, channels_in) -> (B, H, W, channels_out)."""
        h = self.norm1(x)
        h = nn.silu(h)
        h = self.conv1(h)
        h = self.norm2(h)
        h = nn.silu(h)
        h = self.conv2(h)
        # An MLX module is a dict of its parts. A block that keeps the channels has no shortcut.
        if "nin_shortcut" in self:
            x = self.nin_shortcut(x)
        return h + x


class AttnBlock(nn.Module):
    """Self-attention over positions, with one head and a residual connection."""

    def __init__(self, channels: int, config: VQConfig):
        super().__init__()
        self.norm = group_norm(channels, config)
        self.q = Conv2d(channels, channels, 1)
        self.k = Conv2d(channels, channels, 1)
        self.v = Conv2d(channels, channels, 1)
        self.proj_out = Conv2d(channels, channels, 1)

    def __call__(self, x: mx.array) -> mx.array:
        """Attend: (B, H, W, C) -> (B, H, W, C)."""
        B, H, W, C = x.shape
        h = self.norm(x)
        q = self.q(h).reshape(B, H * W, C)
        k = self.k(h).reshape(B, H * W, C)
        v = self.v(h)
        scores = (q @ k.swapaxes(1, 2)) * C**-0.5  # (B, H * W, H * W)
        h = attend_by_rows(scores, v).reshape(B, H, W, C)
        return x + self.proj_out(h)


def attend_by_rows(scores: mx.array, values: mx.array) -> mx.array:
    """Return means of all pixels, weighted by softmax: (B, L, H * W), (B, H, W, C) -> (B, L, C).

    Both sums, of the weights and of the weighted pixels, are taken row by row, for the same reason
    as the means of ``GroupNorm``: over a flat region all summands are equal.
    """
    B, H, W, _ = values.shape
    highest = mx.stop_gradient(scores.max(-1, keepdims=True))  # it cancels in the quotient
    weights = mx.exp(scores - highest)
    weights = weights.reshape(B, -1, H, W)
    total = weights.sum(3).sum(2)  # (B, L)
    row_sums = weights.swapaxes(1, 2) @ values  # (B, H, L, C)
    return row_sums.sum(1) / total[..., None]


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """Upsample: (B, H, W, C) -> (B, 2 * H, 2 * W, C)."""
        B, H, W, C = x.shape
        x = x[:, :, None, :, None, :]  # (B, H, 1, W, 1, C)
        x = mx.broadcast_to(x, (B, H, 2, W, 2, C))
        x = x.reshape(B, 2 * H, 2 * W, C)
        return self.conv(x)


class Downsample(nn.Module):
    """A convolution of stride 2, padded on the right and at the bottom."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        """Downsample: (B, H, W, C) -> (B, H // 2, W // 2, C)."""
        padding = [
            (0, 0),
            (0, 1),
            (0, 1),
            (0, 0),
        ]
        padded = mx.pad(x, padding)
        return self.conv(padded)


class Level(nn.Module):
    """The blocks of one resolution, and the change to the next resolution.

    With ``attention``, an attention block follows each residual block. ``Encoder`` adds a
    ``downsample`` layer and ``Decoder`` an ``upsample`` layer, except to their last level.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        block_count: int,
        attention: bool,
        config: VQConfig,
    ):
        super().__init__()
        self.res = []
        for _ in range(block_count):
            block = ResnetBlock(channels_in, channels_out, config)
            self.res.append(block)
            channels_in = channels_out  # for the next block
        if attention:
            self.attn = [AttnBlock(channels_out, config) for _ in range(block_count)]

    def __call__(self, x: mx.array) -> mx.array:
        """Run the blocks, then the change of resolution, if the level has one."""
        for i, block in enumerate(self.res):
            x = block(x)
            if "attn" in self:  # an MLX module is a dict of its parts
                x = self.attn[i](x)
        if "downsample" in self:
            return self.downsample(x)
        if "upsample" in self:
            return self.upsample(x)
        return x


def middle_blocks(channels: int, config: VQConfig) -> list[nn.Module]:
    """Return blocks for the lowest resolution, after an encoder's levels or before a decoder's."""
    return [
        ResnetBlock(channels, channels, config),
        AttnBlock(channels, config),
        ResnetBlock(channels, channels, config),
    ]


class Encoder(nn.Module):
    """The network from pixels to latents; levels are in order from high to low resolution."""

    def __init__(self, config: VQConfig):
        super().__init__()
        level_channels = [config.ch * multiple for multiple in config.ch_mult]
        block_count = config.num_res_blocks
        last = len(level_channels) - 1
        self.conv_in = Conv2d(3, config.ch, 3, padding=1)
        self.conv_blocks = []
        channels_in = config.ch
        for i, channels_out in enumerate(level_channels):
            attention = i == last  # only the lowest resolution attends
            level = Level(channels_in, channels_out, block_count, attention, config)
            if i != last:
                level.downsample = Downsample(channels_out)
            self.conv_blocks.append(level)
            channels_in = channels_out  # for the next level
        channels = level_channels[-1]
        self.mid = middle_blocks(channels, config)
        self.norm_out = group_norm(channels, config)
        self.conv_out = Conv2d(channels, config.z_channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """Encode pixels: (N, H, W, 3) -> (N, h, w, z_channels).

        Each level except the last halves the height and the width.
        """
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
        for block in self.mid:
            x = block(x)
        x = self.norm_out(x)
        x = nn.silu(x)
        return self.conv_out(x)


class Decoder(nn.Module):
    """The network from latents to pixels; levels are in order from low to high resolution.

    It mirrors the encoder, but each level has one more residual block.
    """

    def __init__(self, config: VQConfig):
        super().__init__()
        level_channels = [config.ch * multiple for multiple in reversed(config.ch_mult)]
        block_count = config.num_res_blocks + 1
        last = len(level_channels) - 1
        channels_in = level_channels[0]
        self.conv_in = Conv2d(config.z_channels, channels_in, 3, padding=1)
        self.mid = middle_blocks(channels_in, config)
        self.conv_blocks = []
        for i, channels_out in enumerate(level_channels):
            attention = i == 0  # only the lowest resolution attends
            level = Level(channels_in, channels_out, block_count, attention, config)
            if i != last:
                level.upsample = Upsample(channels_out)
            self.conv_blocks.append(level)
            channels_in = channels_out  # for the next level
        channels = level_channels[-1]
        self.norm_out = group_norm(channels, config)
        self.conv_out = Conv2d(channels, 3, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """Decode latents: (N, h, w, z_channels) -> (N, H, W, 3).

        Each level except the last doubles the height and the width.
        """
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for level in self.conv_blocks:
            x = level(x)
        x = self.norm_out(x)
        x = nn.silu(x)
        return self.conv_out(x)


class VectorQuantizer(nn.Module):
    """The codebook: a row of ``codebook_dim`` numbers for each image token."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)

    def look_up(self, ids: mx.array) -> mx.array:
        """Return the unit vectors of image tokens: (...) -> (..., codebook_dim)."""
        rows = self.embedding(ids)
        return normalize(rows)

    def nearest(self, vectors: mx.array) -> mx.array:
        """Return the index of each vector's nearest codebook row: (..., codebook_dim) -> (...).

        Vectors and rows are normalised first. Of equally near rows, the first one wins.
        """
        vectors = normalize(vectors)
        codebook = normalize(self.embedding.weight)
        # |v - r|^2 = |v|^2 + |r|^2 - 2 v.r. The norms are not all 1: a codebook may have zero rows.
        vector_norms = (vectors * vectors).sum(-1, keepdims=True)
        row_norms = (codebook * codebook).sum(-1)
        products = vectors @ codebook.T
        squared_distances = vector_norms + row_norms - 2 * products
        return mx.argmin(squared_distances, axis=-1)


def normalize(x: mx.array) -> mx.array:
    """Scale to unit length along the last axis, as torch's ``F.normalize`` does (eps 1e-12)."""
    norm = mx.linalg.norm(x, axis=-1, keepdims=True)
    return x / mx.maximum(norm, 1e-12)


class VQModel(nn.Module):
    """The codec: images to tokens and back.

    An image of H x W pixels is a grid of h x w tokens, where H / h and W / w are 2 ** (levels - 1).
    """

    def __init__(self, config: VQConfig):
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config)
        self.quant_conv = Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = Conv2d(config.codebook_dim, config.z_channels, 1)

    @staticmethod
    def decoding_parts() -> tuple[str, ...]:
        """Return the names of the modules that decode tokens."""
        return ("decoder", "quantize", "post_quant_conv")

    def decode_code(self, ids: mx.array, grid: tuple[int, int] | None = None) -> mx.array:
        """Decode tokens: (N, h * w) -> (N, H, W, 3), nominally in [-1, 1] but not clipped.

        Args:
            ids: image tokens in raster order.
            grid: rows and columns of tokens; None: the tokens form a square.

        Raises:
            ValueError: the tokens do not fill the grid.
        """
        N, count = ids.shape
        side = math.isqrt(count)
        h, w = grid or (side, side)
        if h * w != count:
            raise ValueError(f"{count} tokens do not fill a {h} x {w} grid")
        vectors = self.quantize.look_up(ids)
        vectors = vectors.reshape(N, h, w, -1)
        latents = self.post_quant_conv(vectors)
        return self.decoder(latents)

    def encode(self, pixels: mx.array) -> mx.array:
        """Encode pixels in [-1, 1] as tokens in raster order: (N, H, W, 3) -> (N, h * w)."""
        latents = self.encoder(pixels)
        vectors = self.quant_conv(latents)  # (N, h, w, codebook_dim)
        ids = self.quantize.nearest(vectors)
        N = pixels.shape[0]
        return ids.reshape(N, -1)
