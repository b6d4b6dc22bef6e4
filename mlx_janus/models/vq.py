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


class GroupNorm(nn.GroupNorm):
    """GroupNorm over consecutive channels, as PyTorch's, with means taken row by row.

    MLX's CPU backend adds a group's values one after the other. Over a flat region it adds the same
    value thousands of times, so that all rounding errors have one sign and the variance is wrong by
    1e-5. Averaging each row first avoids this.
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
    """Average each group, row by row first: (B, H, W, G, c) -> (B, 1, 1, G, 1).

    G is the number of groups, c the number of channels in a group.
    """
    rows = x.mean(2, keepdims=True)
    channels = rows.mean(1, keepdims=True)
    return channels.mean(4, keepdims=True)


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
        h = self.norm1(x)
        h = nn.silu(h)
        h = self.conv1(h)
        h = self.norm2(h)
        h = nn.silu(h)
        h = self.conv2(h)
        if "nin_shortcut" in self:  # only a block that changes the number of channels has one
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
        one_head = (B, 1, H * W, C)
        h = self.norm(x)
        q = self.q(h).reshape(one_head)
        k = self.k(h).reshape(one_head)
        v = self.v(h).reshape(one_head)
        scale = C**-0.5
        h = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
        h = h.reshape(B, H, W, C)
        return x + self.proj_out(h)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """Upsample: (B, H, W, C) -> (B, 2 * H, 2 * W, C)."""
        B, H, W, C = x.shape
        x = x[:, :, None, :, None, :]
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
        widths = [
            (0, 0),
            (0, 1),
            (0, 1),
            (0, 0),
        ]
        padded = mx.pad(x, widths)
        return self.conv(padded)


class Level(nn.Module):
    """The blocks of one resolution, and the change to the next.

    With ``attention``, an attention block follows each residual block. The encoder or decoder sets
    ``downsample`` or ``upsample``, except on the last level.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        blocks: int,
        attention: bool,
        config: VQConfig,
    ):
        super().__init__()
        self.res = []
        before = channels_in
        for _ in range(blocks):
            block = ResnetBlock(before, channels_out, config)
            self.res.append(block)
            before = channels_out
        if attention:
            self.attn = [AttnBlock(channels_out, config) for _ in range(blocks)]

    def __call__(self, x: mx.array) -> mx.array:
        """Run the blocks, then the change of resolution, if the level has one."""
        for i, block in enumerate(self.res):
            x = block(x)
            if "attn" in self:  # a module is a dict of its parts
                x = self.attn[i](x)
        if "downsample" in self:
            return self.downsample(x)
        if "upsample" in self:
            return self.upsample(x)
        return x


def middle(channels: int, config: VQConfig) -> list[nn.Module]:
    """Return the blocks after the encoder's levels and before the decoder's."""
    return [
        ResnetBlock(channels, channels, config),
        AttnBlock(channels, config),
        ResnetBlock(channels, channels, config),
    ]


class Encoder(nn.Module):
    """The network from pixels to latents; levels are in order from high to low resolution."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        blocks = config.num_res_blocks
        last = len(widths) - 1
        self.conv_in = Conv2d(3, config.ch, 3, padding=1)
        self.conv_blocks = []
        before = config.ch
        for i, width in enumerate(widths):
            attention = i == last
            level = Level(before, width, blocks, attention, config)
            if i != last:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
            before = width
        width = widths[-1]
        self.mid = middle(width, config)
        self.norm_out = group_norm(width, config)
        self.conv_out = Conv2d(width, config.z_channels, 3, padding=1)

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
    """The mirror of the encoder, with one more residual block in each level.

    Levels are in order from low to high resolution.
    """

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [config.ch * m for m in reversed(config.ch_mult)]
        blocks = config.num_res_blocks + 1
        last = len(widths) - 1
        before = widths[0]
        self.conv_in = Conv2d(config.z_channels, before, 3, padding=1)
        self.mid = middle(before, config)
        self.conv_blocks = []
        for i, width in enumerate(widths):
            attention = i == 0
            level = Level(before, width, blocks, attention, config)
            if i != last:
                level.upsample = Upsample(width)
            self.conv_blocks.append(level)
            before = width
        width = widths[-1]
        self.norm_out = group_norm(width, config)
        self.conv_out = Conv2d(width, 3, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """Decode latents: (N, h, w, z_channels) -> (N, H, W, 3)."""
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

    def nearest(self, z: mx.array) -> mx.array:
        """Return the index of each latent's nearest row: (..., codebook_dim) -> (...).

        Latents and rows are normalised; the first of equally near rows wins.
        """
        z = normalize(z)
        codebook = normalize(self.embedding.weight)
        # |z - e|^2 = |z|^2 + |e|^2 - 2 z.e. The norms are not all 1: a codebook may have zero rows.
        latent_norms = (z * z).sum(-1, keepdims=True)
        row_norms = (codebook * codebook).sum(-1)
        products = z @ codebook.T
        distance = latent_norms + row_norms - 2 * products
        return mx.argmin(distance, axis=-1)


def normalize(x: mx.array) -> mx.array:
    """Scale to unit length along the last axis, as torch's ``F.normalize`` does (eps 1e-12)."""
    norm = mx.linalg.norm(x, axis=-1, keepdims=True)
    length = mx.maximum(norm, 1e-12)
    return x / length


class VQModel(nn.Module):
    """The codec: images to tokens and back.

    Each level except the last halves or doubles the size: H = h * 2 ** (levels - 1); W likewise.
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
        """Return the names of the children that decode tokens."""
        return ("decoder", "quantize", "post_quant_conv")

    def decode_code(self, ids: mx.array, grid: tuple[int, int] | None = None) -> mx.array:
        """Decode tokens: (N, h * w) -> (N, H, W, 3), nominally in [-1, 1] but not clipped.

        Args:
            ids: image tokens in raster order.
            grid: rows and columns; a square by default.

        Raises:
            ValueError: the tokens do not fill the grid.
        """
        N, count = ids.shape
        side = math.isqrt(count)
        h, w = grid or (side, side)
        if h * w != count:
            raise ValueError(f"{count} tokens do not fill a {h} x {w} grid")
        z = self.quantize.look_up(ids)
        z = z.reshape(N, h, w, -1)
        z = self.post_quant_conv(z)
        return self.decoder(z)

    def encode(self, pixels: mx.array) -> mx.array:
        """Encode pixels in [-1, 1] as tokens in raster order: (N, H, W, 3) -> (N, h * w)."""
        latents = self.encoder(pixels)
        z = self.quant_conv(latents)
        ids = self.quantize.nearest(z)
        N = pixels.shape[0]
        return ids.reshape(N, -1)
