"""Janus: two encoders, two adaptors, two heads, one language model (arXiv 2410.13848, figure 2).

Parts are looked up by the kind that the config names: another encoder is one file of its own, a dataclass in
``config.py`` and an entry in the tables below. Attributes keep the checkpoint's names.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from ..config import JanusConfig
from .backbone import Cache, RaggedCache, build_llama, make_cache, make_ragged_cache
from .layers import GenHead, MLPProjector
from .siglip import SiglipVisionTower
from .vq import VQModel

UNDERSTANDING: dict[str, Callable[[Any], nn.Module]] = {"siglip": SiglipVisionTower}
GENERATION: dict[str, Callable[[Any], nn.Module]] = {"vq": VQModel}
ADAPTORS: dict[str, Callable[[Any], nn.Module]] = {"mlp_gelu": MLPProjector}
GEN_HEADS: dict[str, Callable[[Any], nn.Module]] = {"vision_head": GenHead}
LANGUAGE: dict[str, Callable[[Any], nn.Module]] = {"llama": build_llama}


class JanusModel(nn.Module):
    """The whole network. Pictures are (N, H, W, 3) floats in [-1, 1]; hidden states are (B, L, hidden)."""

    def __init__(self, config: JanusConfig):
        super().__init__()
        self.config = config
        self.vision_model = UNDERSTANDING[config.understanding.kind](config.understanding)
        self.aligner = ADAPTORS[config.aligner.kind](config.aligner)
        self.gen_vision_model = GENERATION[config.generation.kind](config.generation)
        self.gen_aligner = ADAPTORS[config.gen_aligner.kind](config.gen_aligner)
        self.gen_head = GEN_HEADS[config.gen_head.kind](config.gen_head)
        self.gen_embed = nn.Embedding(config.generation.codebook_size, config.gen_aligner.input_dim)
        self.language_model = LANGUAGE[config.language.kind](config.language)

    @property
    def dtype(self) -> mx.Dtype:
        """The type of hidden states and KV caches."""
        return self.language_model.model.norm.weight.dtype

    def understand(self, pixels: mx.array) -> mx.array:
        """(N, H, W, 3) -> (N, tokens, hidden): what a picture looks like to the language model."""
        return self.aligner(self.vision_model(pixels))

    def embed_text(self, ids: mx.array) -> mx.array:
        """(B, L) -> (B, L, hidden)."""
        return self.language_model.model.embed_tokens(ids)

    def embed_image_tokens(self, ids: mx.array) -> mx.array:
        """(B, L) -> (B, L, hidden). The table is its own, not the codec's codebook."""
        return self.gen_aligner(self.gen_embed(ids))

    def make_cache(self, positions: int | None = None) -> Cache:
        """An empty KV cache for ``hidden_states``, with memory for so many positions; None: as it grows."""
        return make_cache(self.config.language, positions)

    def make_ragged_cache(self, rows: int) -> RaggedCache:
        """An empty KV cache for ``hidden_states``, whose rows come and go."""
        return make_ragged_cache(self.config.language, rows)

    def hidden_states(self, embeddings: mx.array, cache: Cache | RaggedCache | None = None) -> mx.array:
        """(B, L, hidden) -> (B, L, hidden): causal, after the final norm; the cache, if any, grows by L."""
        return self.language_model.model(None, cache, embeddings)

    def text_logits(self, hidden: mx.array) -> mx.array:
        """(..., hidden) -> (..., vocabulary), float32."""
        return self.language_model.lm_head(hidden).astype(mx.float32)

    def image_logits(self, hidden: mx.array) -> mx.array:
        """(..., hidden) -> (..., codebook size), float32."""
        return self.gen_head(hidden).astype(mx.float32)

    def decode_image_tokens(self, ids: mx.array, grid: tuple[int, int] | None = None) -> mx.array:
        """(N, tokens) -> (N, H, W, 3), as the decoder gives it: not clipped.

        Args:
            ids: token indices, row by row.
            grid: rows and columns; a square by default.
        """
        return self.gen_vision_model.decode_code(ids, grid)

    def encode_image_tokens(self, pixels: mx.array) -> mx.array:
        """(N, H, W, 3) -> (N, tokens)."""
        return self.gen_vision_model.encode(pixels)

    def drawing_arrays(self) -> dict[str, mx.array]:
        """The weights that drawing tokens needs, by name: neither encoder, nor ``lm_head``, nor the codec."""
        return self._arrays("language_model.model", "gen_head", "gen_aligner", "gen_embed")

    def decoding_arrays(self) -> dict[str, mx.array]:
        """The weights that turn image tokens into pixels."""
        return self._arrays(*(f"gen_vision_model.{name}" for name in self.gen_vision_model.drawing_parts()))

    def encoding_arrays(self) -> dict[str, mx.array]:
        """The weights that read a picture."""
        return self._arrays("vision_model", "aligner")

    def answering_arrays(self) -> dict[str, mx.array]:
        """The weights that answering needs beside those that read its pictures: none of the drawing parts."""
        return self._arrays("language_model")

    def _arrays(self, *paths: str) -> dict[str, mx.array]:
        return {f"{path}.{name}": a for path in paths for name, a in tree_flatten(attrgetter(path)(self).parameters())}
