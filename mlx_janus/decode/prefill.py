"""Read a prompt into a KV cache in chunks. L positions at once need L x L attention scores."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from ..models.backbone import Cache, RaggedCache, cache_arrays
from ..models.janus import JanusModel


def prefill(
    model: JanusModel,
    embeddings: mx.array,
    cache: Cache | RaggedCache,
    step: int,
    *,
    unread: int = 0,
) -> Iterator[tuple[int, mx.array]]:
    """Read a prompt in chunks.

    Args:
        model: the weights.
        embeddings: (B, L, hidden).
        cache: grows by the positions read; it is evaluated when a chunk is yielded.
        step: positions in a chunk.
        unread: stop as soon as at most this many positions are unread; 0: read all.

    Yields:
        After each chunk, the number of positions read so far, and the hidden states of the last
        position read, (B, hidden), not evaluated. Nothing is yielded for a prompt of at most
        ``unread`` positions.
    """
    length = embeddings.shape[1]
    done = 0  # positions read
    while length - done > unread:
        chunk = embeddings[:, done : done + step]
        hidden = model.hidden_states(chunk, cache)[:, -1]
        mx.eval(cache_arrays(cache))
        done += chunk.shape[1]
        yield done, hidden


def prefill_all(
    model: JanusModel, embeddings: mx.array, cache: Cache | RaggedCache, step: int
) -> mx.array:
    """Read an entire prompt in chunks of ``step`` positions.

    Args:
        model: the weights.
        embeddings: (B, L, hidden), with L at least 1.
        cache: grows by L positions.
        step: positions in a chunk.

    Returns:
        The hidden states of the last position, (B, hidden), evaluated.
    """
    for _, last_hidden in prefill(model, embeddings, cache, step):
        result = last_hidden  # of the chunk's last position
    mx.eval(result)
    return result
