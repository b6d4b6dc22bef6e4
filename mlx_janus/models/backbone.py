"""The language model: mlx-lm's Llama with Janus's sizes, and its KV caches.

What is unusual: the head is never tied to the embedding, and drawing calls the body alone, never ``lm_head``.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.models.cache import KVCache
from mlx_lm.models.llama import Model as Llama
from mlx_lm.models.llama import ModelArgs

from ..config import LlamaConfig

Cache = list[KVCache]


def build_llama(config: LlamaConfig) -> Llama:
    """mlx-lm's Llama of these sizes; weights random until loaded."""
    sizes = config.to_dict()
    sizes["model_type"] = sizes.pop("kind")
    return Llama(ModelArgs.from_dict(sizes | {"tie_word_embeddings": False}))


def make_cache(config: LlamaConfig) -> Cache:
    """An empty KV cache, one entry a layer."""
    return [KVCache() for _ in range(config.num_hidden_layers)]


def repeat_cache(cache: Cache, n: int) -> Cache:
    """A cache whose every row stands n times, neighbours alike: rows (a, b) become (a, a, ..., b, b, ...)."""
    copies = []
    for layer in cache:
        keys, values = layer.keys_and_values()
        copy = KVCache()
        copy.state = (mx.repeat(keys, n, axis=0), mx.repeat(values, n, axis=0), layer.offset)
        copies.append(copy)
    return copies


def cache_arrays(cache: Cache) -> Sequence[mx.array]:
    """What to evaluate so that a prefill is done."""
    return [array for layer in cache for array in (layer.keys, layer.values)]


def cache_bytes(config: LlamaConfig, rows: int, positions: int, itemsize: int) -> int:
    """Memory of a KV cache, in whole steps of 256 positions as mlx-lm allocates it."""
    positions = -(-positions // KVCache.step) * KVCache.step
    return 2 * rows * positions * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
