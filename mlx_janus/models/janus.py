"""Janus: a language model between an encoder that reads images and a pathway that generates them.

arXiv 2410.13848, figure 2. Parts are looked up by the kinds that the config names. Attributes have
the checkpoint's names; those of the pathway come from its ``GenerationParts``.
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
    """Return the record of the networks of the config's image pathway."""
    return GENERATION[config.generation.kind]


def keeps_type(config: JanusConfig, name: str) -> bool:
    """Return whether conversion keeps the type of a weight, instead of casting it.

    Such a weight is cast to float32 when it is loaded.

    Args:
        config: the model's config.
        name: the weight's name, such as ``gen_vision_model.quantize.embedding.weight``.
    """
    part = name.partition(".")[0]  # the network that the weight belongs to
    return part in generation_parts(config).keeps_type


class JanusModel(nn.Module):
    """The entire network.

    Images are (N, H, W, 3) floats in [-1, 1]; hidden states are (B, L, hidden).
    """

    def __init__(self, config: JanusConfig):
        super().__init__()
        self.config = config

        build_encoder = UNDERSTANDING[config.understanding.kind]
        self.vision_model = build_encoder(config.understanding)

        build_aligner = ADAPTORS[config.aligner.kind]
        self.aligner = build_aligner(config.aligner)

        parts = generation_parts(config)
        image_networks = parts.build(config)
        for name, network in image_networks.items():
            setattr(self, name, network)

        build_language = LANGUAGE[config.language.kind]
        self.language_model = build_language(config.language)

    @property
    def dtype(self) -> mx.Dtype:
        """The type of hidden states and KV caches."""
        norm = self.language_model.model.norm
        return norm.weight.dtype

    def understand(self, pixels: mx.array) -> mx.array:
        """Encode images for the language model: (N, H, W, 3) -> (N, tokens, hidden)."""
        features = self.vision_model(pixels)
        return self.aligner(features)

    def embed_text(self, ids: mx.array) -> mx.array:
        """Embed token ids: (B, L) -> (B, L, hidden)."""
        body = self.language_model.model
        return body.embed_tokens(ids)

    def make_cache(self, positions: int | None = None) -> Cache:
        """Return an empty KV cache for ``hidden_states``.

        Args:
            positions: allocate memory for this many positions at once; None: allocate it in parts,
                as the cache grows.
        """
        return make_cache(self.config.language, positions)

    def make_ragged_cache(self, rows: int) -> RaggedCache:
        """Return an empty KV cache for ``hidden_states``; rows can be added and removed."""
        return make_ragged_cache(self.config.language, rows)

    def hidden_states(
        self,
        embeddings: mx.array,
        cache: Cache | RaggedCache | None = None,
    ) -> mx.array:
        """Run the language model up to its final norm: (B, L, hidden) -> (B, L, hidden).

        ``cache`` holds the positions before the embeddings, and grows by L positions. Without a
        cache, the embeddings are the entire sequence.
        """
        body = self.language_model.model
        return body(None, cache, embeddings)  # None: the embeddings replace token ids

    def text_logits(self, hidden: mx.array) -> mx.array:
        """Return the logits of text tokens: (..., hidden) -> (..., vocabulary), float32."""
        logits = self.language_model.lm_head(hidden)
        return logits.astype(mx.float32)

    # Only for a model that generates image tokens

    def embed_image_tokens(self, ids: mx.array) -> mx.array:
        """Embed image tokens: (B, L) -> (B, L, hidden).

        The embedding table is not the codec's codebook.
        """
        embeddings = self.gen_embed(ids)
        return self.gen_aligner(embeddings)

    def image_logits(self, hidden: mx.array) -> mx.array:
        """Return the logits of image tokens: (..., hidden) -> (..., codebook size), float32."""
        logits = self.gen_head(hidden)
        return logits.astype(mx.float32)

    def decode_image_tokens(
        self,
        ids: mx.array,
        grid: tuple[int, int] | None = None,
    ) -> mx.array:
        """Decode image tokens to pixels: (N, tokens) -> (N, H, W, 3).

        The pixels are not clipped to [-1, 1].

        Args:
            ids: image tokens in raster order.
            grid: rows and columns of tokens; None: the tokens form a square.
        """
        return self.gen_vision_model.decode_code(ids, grid)

    def encode_image_tokens(self, pixels: mx.array) -> mx.array:
        """Encode pixels as image tokens: (N, H, W, 3) -> (N, tokens)."""
        return self.gen_vision_model.encode(pixels)

    # The weights of each task

    def drawing_arrays(self) -> dict[str, mx.array]:
        """Return the weights that are used at every step of generating an image."""
        parts = generation_parts(self.config)
        return self._arrays_of("language_model.model", *parts.step_parts)

    def decoding_arrays(self) -> dict[str, mx.array]:
        """Return the weights that turn a finished image into pixels."""
        parts = generation_parts(self.config)
        paths = parts.pixel_paths(self.config)
        return self._arrays_of(*paths)

    def tokenizing_arrays(self) -> dict[str, mx.array]:
        """Return the weights that turn pixels into image tokens, and embed these."""
        return self._arrays_of("gen_vision_model", "gen_aligner", "gen_embed")

    def encoding_arrays(self) -> dict[str, mx.array]:
        """Return the weights that encode an image for the language model."""
        return self._arrays_of("vision_model", "aligner")

    def answering_arrays(self) -> dict[str, mx.array]:
        """Return the weights that answer a prompt, without those that encode its images."""
        return self._arrays_of("language_model")

    def _arrays_of(self, *paths: str) -> dict[str, mx.array]:
        """Return the weights of the modules at the given paths, by their names in this model."""
        arrays: dict[str, mx.array] = {}
        for path in paths:
            module = attrgetter(path)(self)
            weights = tree_flatten(module.parameters())
            for name, array in weights:
                arrays[f"{path}.{name}"] = array
        return arrays
