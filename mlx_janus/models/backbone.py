"""The language model: mlx-lm's Llama with Janus's sizes, and its KV caches.

Unusual: the head is never tied to the embedding. Generating images uses the body without
``lm_head``.
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
"""A cache whose rows hold different numbers of positions."""


def build_llama(config: LlamaConfig) -> Llama:
    """Return mlx-lm's Llama with these sizes and random weights."""
    sizes = config.to_dict()
    sizes["model_type"] = sizes.pop("kind")
    sizes["tie_word_embeddings"] = False
    args = ModelArgs.from_dict(sizes)
    return Llama(args)


def make_cache(config: LlamaConfig, positions: int | None = None) -> Cache:
    """Return an empty KV cache, one entry a layer.

    Args:
        config: the sizes.
        positions: positions to allocate at the first pass; None: 256 at a time as the cache grows.
    """
    cache = []
    for _ in range(config.num_hidden_layers):
        layer = KVCache()
        layer.step = positions or KVCache.step  # positions allocated at a time
        cache.append(layer)
    return cache


def take_rows(cache: Cache, rows: Sequence[int]) -> Cache:
    """Copy these rows of a cache that is not empty, in this order; a row may be repeated."""
    taken = []
    places = mx.array(list(rows))
    for layer in cache:
        copy = KVCache()
        copy.step = layer.step
        keys = layer.keys[places]
        values = layer.values[places]
        copy.state = (keys, values, layer.offset)
        taken.append(copy)
    return taken


def make_ragged_cache(config: LlamaConfig, rows: int) -> RaggedCache:
    """Return an empty cache of ``rows`` rows; ``add_rows`` and ``keep_rows`` change the rows."""
    cache = []
    for _ in range(config.num_hidden_layers):
        padding = [0] * rows  # positions of padding at the left of each row
        cache.append(BatchKVCache(padding))
    return cache


def keep_rows(cache: RaggedCache, rows: Sequence[int]) -> None:
    """Keep only these rows of a cache, in this order; a row may be repeated."""
    places = mx.array(list(rows))
    for layer in cache:
        layer.filter(places)


def add_rows(cache: RaggedCache, other: RaggedCache) -> None:
    """Append the rows of another cache to a cache."""
    for layer, other_layer in zip(cache, other, strict=True):
        layer.extend(other_layer)


def fill_cache(
    cache: Cache,
    config: LlamaConfig,
    rows: int,
    positions: int,
    dtype: mx.Dtype,
) -> None:
    """Fill an empty cache with zeros for ``positions`` positions, to time the next pass."""
    heads = config.num_key_value_heads
    for layer in cache:  # whole steps, as passes would have allocated them
        steps = -(-positions // layer.step)  # rounded up
        room = steps * layer.step
        shape = (rows, heads, room, config.head_dim)
        keys = mx.zeros(shape, dtype)
        values = mx.zeros(shape, dtype)
        layer.state = (keys, values, positions)


def trim_cache(cache: Cache, positions: int) -> None:
    """Remove the last ``positions`` positions from a cache."""
    for layer in cache:
        layer.trim(positions)


def cache_arrays(cache: Cache | RaggedCache) -> Sequence[mx.array]:
    """Return all key and value arrays; evaluate them to finish a prefill."""
    arrays = []
    for layer in cache:
        arrays += [layer.keys, layer.values]
    return arrays


def cache_bytes(config: LlamaConfig, rows: int, positions: int, itemsize: int) -> int:
    """Return the bytes of a KV cache, in steps of 256 positions as mlx-lm allocates it."""
    steps = -(-positions // KVCache.step)  # rounded up
    allocated = steps * KVCache.step
    width = config.num_key_value_heads * config.head_dim
    keys = rows * allocated * config.num_hidden_layers * width * itemsize
    return 2 * keys  # and values
