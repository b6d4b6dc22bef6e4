"""The language model: mlx-lm's Llama with Janus's sizes, and its KV caches.

Unusual: the head is never tied to the embedding. Generating images uses the body without
``lm_head``.
"""

from __future__ import annotations

from .. import open_files  # noqa: F401  before mlx_lm

# isort: split
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
    """Return mlx-lm's Llama with the config's sizes and random weights."""
    fields = config.to_dict()
    fields["model_type"] = fields.pop("kind")  # mlx-lm has another name for this field
    fields["tie_word_embeddings"] = False
    args = ModelArgs.from_dict(fields)
    return Llama(args)


def make_cache(config: LlamaConfig, positions: int | None = None) -> Cache:
    """Return an empty KV cache, one ``KVCache`` per layer.

    Args:
        config: the language model's sizes.
        positions: positions for which the first pass allocates memory; None: memory is allocated
            for 256 positions at a time, as the cache grows.
    """
    cache = []
    for _ in range(config.num_hidden_layers):
        layer = KVCache()
        layer.step = positions or KVCache.step  # positions allocated at a time
        cache.append(layer)
    return cache


def take_rows(cache: Cache, rows: Sequence[int]) -> Cache:
    """Return a new cache with copies of the given batch rows, in the given order.

    Args:
        cache: a cache that holds at least one position.
        rows: indices of the rows; an index may be repeated.
    """
    copied_layers = []
    indices = mx.array(list(rows))
    for layer in cache:
        copy = KVCache()
        copy.step = layer.step
        keys = layer.keys[indices]
        values = layer.values[indices]
        copy.state = (keys, values, layer.offset)
        copied_layers.append(copy)
    return copied_layers


def make_ragged_cache(config: LlamaConfig, rows: int) -> RaggedCache:
    """Return an empty cache of ``rows`` rows, which ``add_rows`` and ``keep_rows`` can change."""
    cache = []
    for _ in range(config.num_hidden_layers):
        left_padding = [0] * rows  # positions of padding in each row
        cache.append(BatchKVCache(left_padding))
    return cache


def keep_rows(cache: RaggedCache, rows: Sequence[int]) -> None:
    """Replace a cache's rows by the rows at the given indices; an index may be repeated."""
    indices = mx.array(list(rows))
    for layer in cache:
        layer.filter(indices)


def add_rows(cache: RaggedCache, other: RaggedCache) -> None:
    """Append the rows of ``other`` to ``cache``."""
    for layer, other_layer in zip(cache, other, strict=True):
        layer.extend(other_layer)


def fill_cache(
    cache: Cache,
    config: LlamaConfig,
    rows: int,
    positions: int,
    dtype: mx.Dtype,
) -> None:
    """Fill an empty cache with zeros for ``positions`` positions, so that a pass can be timed."""
    heads = config.num_key_value_heads
    for layer in cache:
        # Passes allocate memory in steps, so round the positions up to entire steps.
        steps = -(-positions // layer.step)
        allocated = steps * layer.step
        shape = (rows, heads, allocated, config.head_dim)
        keys = mx.zeros(shape, dtype)
        values = mx.zeros(shape, dtype)
        layer.state = (keys, values, positions)


def trim_cache(cache: Cache, positions: int) -> None:
    """Remove the last ``positions`` positions from a cache."""
    for layer in cache:
        layer.trim(positions)


def cache_arrays(cache: Cache | RaggedCache) -> Sequence[mx.array]:
    """Return the key and value arrays of all layers. Evaluating them finishes a prefill."""
    arrays = []
    for layer in cache:
        arrays += [layer.keys, layer.values]
    return arrays


def cache_bytes(config: LlamaConfig, rows: int, positions: int, itemsize: int) -> int:
    """Return the bytes of a KV cache whose numbers take ``itemsize`` bytes each."""
    # mlx-lm allocates memory in steps of 256 positions, so round up to entire steps.
    steps = -(-positions // KVCache.step)
    allocated = steps * KVCache.step
    key_size = config.num_key_value_heads * config.head_dim  # numbers per position and layer
    key_bytes = rows * allocated * config.num_hidden_layers * key_size * itemsize
    return 2 * key_bytes  # the values take the same number of bytes as the keys
