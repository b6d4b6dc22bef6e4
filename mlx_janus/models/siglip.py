"""SigLIP vision transformer, the understanding encoder (reference: ``janus/models/siglip_vit.py``).

Unusual, compared with a plain ViT: no class token; the final norm is applied but no pooling head;
GELU is exact, without SigLIP's usual tanh approximation; every LayerNorm has eps 1e-6; q, k and v
are one matrix.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from ..config import SiglipConfig


def layer_norm(config: SiglipConfig) -> nn.LayerNorm:
    """Return a layer norm with the config's width and eps."""
    return nn.LayerNorm(config.width, eps=config.layer_norm_eps)


class Attention(nn.Module):
    """Full self-attention over the patches."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        head_width = config.width // config.heads
        self.heads = config.heads
        self.scale = head_width**-0.5
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def __call__(self, x: mx.array) -> mx.array:
        """Attend: (B, L, D) -> (B, L, D)."""
        B, L, D = x.shape
        qkv = self.qkv(x)
        qkv = qkv.reshape(B, L, 3, self.heads, -1)  # (B, L, 3, heads, D / heads)
        qkv = qkv.transpose(2, 0, 3, 1, 4)  # (3, B, heads, L, D / heads)
        q = qkv[0]
        k = qkv[1]
        v = qkv[2]
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale)
        x = x.transpose(0, 2, 1, 3)  # (B, L, heads, D / heads)
        x = x.reshape(B, L, D)
        return self.proj(x)


class MLP(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def __call__(self, x: mx.array) -> mx.array:
        """Transform each position: (B, L, D) -> (B, L, D)."""
        hidden = self.fc1(x)
        hidden = nn.gelu(hidden)
        return self.fc2(hidden)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.norm1 = layer_norm(config)
        self.attn = Attention(config)
        self.norm2 = layer_norm(config)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        """Apply attention and then the MLP, each with a residual connection."""
        h = self.norm1(x)
        x = x + self.attn(h)
        h = self.norm2(x)
        return x + self.mlp(h)


class PatchEmbed(nn.Module):
    """The embedding of an image's patches, in raster order."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        patch_side = config.patch_size  # pixels
        # The stride equals the side, so that patches do not overlap.
        self.proj = nn.Conv2d(3, config.width, patch_side, stride=patch_side)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Embed the patches of N square images: (N, side, side, 3) -> (N, patches, width)."""
        x = self.proj(pixels)
        N, H, W, D = x.shape  # H and W in patches
        return x.reshape(N, H * W, D)


class VisionTransformer(nn.Module):
    """The transformer over an image's patches."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.image_size = config.image_size
        self.pos_embed = mx.zeros((1, config.tokens, config.width))
        self.patch_embed = PatchEmbed(config)
        self.blocks = [Block(config) for _ in range(config.layers)]
        self.norm = layer_norm(config)

    def embed(self, pixels: mx.array) -> mx.array:
        """Embed patches and add position embeddings: (N, side, side, 3) -> (N, patches, width)."""
        patches = self.patch_embed(pixels)
        return patches + self.pos_embed

    def __call__(self, pixels: mx.array) -> mx.array:
        """Encode images: (N, side, side, 3) -> (N, patches, width).

        Raises:
            ValueError: the images do not have the size that the config names.
        """
        side = self.image_size
        if pixels.shape[1:] != (side, side, 3):
            raise ValueError(f"pixels must be (N, {side}, {side}, 3), got {pixels.shape}")
        pixels = pixels.astype(self.pos_embed.dtype)
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class SiglipVisionTower(nn.Module):
    """A wrapper that gives the encoder its name in the checkpoint, ``vision_tower``.

    If the config has ``pixel_mean`` and ``pixel_std``, it also normalises the pixels by them, in
    addition to the preprocessing of images.
    """

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.pixel_mean = config.pixel_mean
        self.pixel_std = config.pixel_std
        self.vision_tower = VisionTransformer(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Encode images: (N, side, side, 3) in about [-1, 1] -> (N, patches, width).

        Raises:
            ValueError: the images do not have the size that the config names.
        """
        if self.pixel_mean is not None and self.pixel_std is not None:
            pixels = (pixels - mx.array(self.pixel_mean)) / mx.array(self.pixel_std)
        return self.vision_tower(pixels)
