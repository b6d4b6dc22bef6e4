"""The language model: mlx-lm's Llama with Janus's sizes, and its KV caches.

What is unusual: the head is never tied to the embedding, and drawing calls the body alone, never ``lm_head``.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache
from mlx_lm.models.llama import Model as Llama
from mlx_lm.models.llama import ModelArgs

from ..config import LlamaConfig

Cache = list[KVCache]
RaggedCache = list[BatchKVCache]
"""One whose rows have read different numbers of positions."""


def build_llama(config: LlamaConfig) -> Llama:
    """mlx-lm's Llama of these sizes; weights random until loaded."""
    sizes = config.to_dict()
    sizes["model_type"] = sizes.pop("kind")
    return Llama(ModelArgs.from_dict(sizes | {"tie_word_embeddings": False}))


def make_cache(config: LlamaConfig, positions: int | None = None) -> Cache:
    """An empty KV cache, one entry a layer, that takes memory for so many positions at once; None: as it grows."""
    cache = [KVCache() for _ in range(config.num_hidden_layers)]
    for layer in cache:
        layer.step = positions or KVCache.step
    return cache


def take_rows(cache: Cache, rows: Sequence[int]) -> Cache:
    """A cache of these rows of another, in this order; a row may be taken more than once."""
    taken, places = [], mx.array(list(rows))
    for layer in cache:
        copy = KVCache()
        copy.step = layer.step
        copy.state = (layer.keys[places], layer.values[places], layer.offset)
        taken.append(copy)
    return taken


def make_ragged_cache(config: LlamaConfig, rows: int) -> RaggedCache:
    """An empty cache of so many rows, to which others may come and from which some may go."""
    return [BatchKVCache([0] * rows) for _ in range(config.num_hidden_layers)]


def keep_rows(cache: RaggedCache, rows: Sequence[int]) -> None:
    """Make a cache that of these rows, in this order; a row may be taken more than once."""
    for layer in cache:
        layer.filter(mx.array(list(rows)))


def add_rows(cache: RaggedCache, other: RaggedCache) -> None:
    """Put another cache's rows after those of a cache."""
    for layer, beside in zip(cache, other, strict=True):
        layer.extend(beside)


def fill_cache(
    cache: Cache, config: LlamaConfig, rows: int, positions: int, dtype: mx.Dtype
) -> None:
    """Make an empty cache as long as if so many positions had been read: zeros, to time what follows."""
    for layer in cache:
        room = layer.step * -(-positions // layer.step)
        shape = rows, config.num_key_value_heads, room, config.head_dim
        layer.state = (mx.zeros(shape, dtype), mx.zeros(shape, dtype), positions)


def trim_cache(cache: Cache, positions: int) -> None:
    """Forget the last positions that were read."""
    for layer in cache:
        layer.trim(positions)


def cache_arrays(cache: Cache | RaggedCache) -> Sequence[mx.array]:
    """What to evaluate so that a prefill is done."""
    return [array for layer in cache for array in (layer.keys, layer.values)]


def cache_bytes(config: LlamaConfig, rows: int, positions: int, itemsize: int) -> int:
    """Memory of a KV cache, in whole steps of 256 positions as mlx-lm allocates it."""
    positions = -(-positions // KVCache.step) * KVCache.step
    return (
        2
        * rows
        * positions
        * config.num_hidden_layers
        * config.num_key_value_heads
        * config.head_dim
        * itemsize
    )
