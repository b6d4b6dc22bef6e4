"""Janus: one language model between an encoder that reads images and a pathway that generates them.

arXiv 2410.13848, figure 2. Parts are looked up by the kinds that the config names. Attributes keep the checkpoint's
names; those of the pathway come from its ``GenerationParts``.
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
from .layers import ADAPTORS
from .parts import GenerationParts
from .siglip import SiglipVisionTower
from .vq_parts import VQ_PARTS

UNDERSTANDING: dict[str, Callable[[Any], nn.Module]] = {"siglip": SiglipVisionTower}
LANGUAGE: dict[str, Callable[[Any], nn.Module]] = {"llama": build_llama}
GENERATION: dict[str, GenerationParts] = {"vq": VQ_PARTS}


def generation_parts(config: JanusConfig) -> GenerationParts:
    """Return the record of the networks that a config's pathway adds."""
    return GENERATION[config.generation.kind]


def keeps_type(config: JanusConfig, name: str) -> bool:
    """Return whether a weight is never cast to half precision: it is stored as it was, and computed in float32."""
    return name.partition(".")[0] in generation_parts(config).keeps_type


class JanusModel(nn.Module):
    """The whole network. Images are (N, H, W, 3) floats in [-1, 1]; hidden states are (B, L, hidden)."""

    def __init__(self, config: JanusConfig):
        super().__init__()
        self.config = config
        self.vision_model = UNDERSTANDING[config.understanding.kind](config.understanding)
        self.aligner = ADAPTORS[config.aligner.kind](config.aligner)
        for name, part in generation_parts(config).build(config).items():
            setattr(self, name, part)
        self.language_model = LANGUAGE[config.language.kind](config.language)

    @property
    def dtype(self) -> mx.Dtype:
        """The type of hidden states and KV caches."""
        return self.language_model.model.norm.weight.dtype

    def understand(self, pixels: mx.array) -> mx.array:
        """Encode images for the language model: (N, H, W, 3) -> (N, tokens, hidden)."""
        return self.aligner(self.vision_model(pixels))

    def embed_text(self, ids: mx.array) -> mx.array:
        """(B, L) -> (B, L, hidden)."""
        return self.language_model.model.embed_tokens(ids)

    def make_cache(self, positions: int | None = None) -> Cache:
        """An empty KV cache for ``hidden_states``, with memory for so many positions; None: as it grows."""
        return make_cache(self.config.language, positions)

    def make_ragged_cache(self, rows: int) -> RaggedCache:
        """An empty KV cache for ``hidden_states``, whose rows come and go."""
        return make_ragged_cache(self.config.language, rows)

    def hidden_states(
        self, embeddings: mx.array, cache: Cache | RaggedCache | None = None
    ) -> mx.array:
        """(B, L, hidden) -> (B, L, hidden): causal, after the final norm; the cache, if any, grows by L."""
        return self.language_model.model(None, cache, embeddings)

    def text_logits(self, hidden: mx.array) -> mx.array:
        """(..., hidden) -> (..., vocabulary), float32."""
        return self.language_model.lm_head(hidden).astype(mx.float32)

    # Of a model that generates image tokens

    def embed_image_tokens(self, ids: mx.array) -> mx.array:
        """Embed image tokens: (B, L) -> (B, L, hidden). The table is its own, not the codec's codebook."""
        return self.gen_aligner(self.gen_embed(ids))

    def image_logits(self, hidden: mx.array) -> mx.array:
        """Return the logits of image tokens: (..., hidden) -> (..., codebook size), float32."""
        return self.gen_head(hidden).astype(mx.float32)

    def decode_image_tokens(self, ids: mx.array, grid: tuple[int, int] | None = None) -> mx.array:
        """Decode image tokens to pixels: (N, tokens) -> (N, H, W, 3), as the decoder gives them, not clipped.

        Args:
            ids: token indices, row by row.
            grid: rows and columns; a square by default.
        """
        return self.gen_vision_model.decode_code(ids, grid)

    def encode_image_tokens(self, pixels: mx.array) -> mx.array:
        """Encode pixels as image tokens: (N, H, W, 3) -> (N, tokens)."""
        return self.gen_vision_model.encode(pixels)

    # The weights of each task

    def drawing_arrays(self) -> dict[str, mx.array]:
        """Return the weights that a step of an image needs, by name; no encoder, no ``lm_head``."""
        return self._arrays("language_model.model", *generation_parts(self.config).step)

    def decoding_arrays(self) -> dict[str, mx.array]:
        """Return the weights that turn a finished image into pixels."""
        return self._arrays(*generation_parts(self.config).pixels(self.config))

    def encoding_arrays(self) -> dict[str, mx.array]:
        """Return the weights that read an image."""
        return self._arrays("vision_model", "aligner")

    def answering_arrays(self) -> dict[str, mx.array]:
        """Return the weights that answering needs besides those that read images."""
        return self._arrays("language_model")

    def _arrays(self, *paths: str) -> dict[str, mx.array]:
        arrays: dict[str, mx.array] = {}
        for path in paths:
            parameters = tree_flatten(attrgetter(path)(self).parameters())
            arrays |= {f"{path}.{name}": array for name, array in parameters}
        return arrays
