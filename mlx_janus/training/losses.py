"""The two losses of Janus: cross-entropy of answers and of image tokens.

They are those of the paper (arXiv 2410.13848, section 3.3). B is the batch size, L the number of
positions, M the number of selected positions, n the number of image tokens.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from ..models.janus import JanusModel


def select_positions(hidden: mx.array, positions: mx.array) -> mx.array:
    """Select some positions of every row: (B, L, hidden), (B, M) -> (B, M, hidden)."""
    B, M = positions.shape
    width = hidden.shape[-1]
    indices = positions[..., None]
    indices = mx.broadcast_to(indices, (B, M, width))
    return mx.take_along_axis(hidden, indices, axis=1)


def weighted_cross_entropy(
    logits: mx.array,
    targets: mx.array,
    weights: mx.array,
) -> tuple[mx.array, mx.array]:
    """Return the weighted mean cross-entropy in nats, and the weighted share of right top-1 tokens.

    Args:
        logits: (B, M, vocabulary).
        targets: (B, M) token ids.
        weights: (B, M), 0 for padding; not all 0.
    """
    total = weights.sum()
    losses = nn.losses.cross_entropy(logits, targets)
    weighted_losses = losses * weights
    loss = weighted_losses.sum() / total
    best = logits.argmax(-1)
    weighted_hits = (best == targets) * weights
    right = weighted_hits.sum() / total
    return loss, right


def image_token_loss(
    model: JanusModel,
    hidden: mx.array,
    tokens: mx.array,
) -> tuple[mx.array, mx.array]:
    """Return the mean cross-entropy of image tokens in nats, and the share of right top-1 tokens.

    Args:
        model: its image head predicts the tokens.
        hidden: (B, n, hidden) from ``image_token_states``.
        tokens: (B, n).
    """
    logits = model.image_logits(hidden)  # (B, n, codes)
    losses = nn.losses.cross_entropy(logits, tokens)
    best = logits.argmax(-1)
    hits = best == tokens
    return losses.mean(), hits.mean()


def image_token_states(
    model: JanusModel,
    ids: mx.array,
    starts: mx.array,
    tokens: mx.array,
) -> mx.array:
    """Run the model on captions followed by their images' tokens -> (B, n, hidden).

    State ``k`` of a row is the one from which token ``k`` is predicted: it has read the caption and
    the correct tokens before ``k`` (teacher forcing).

    Args:
        model: the language model and its drawing parts.
        ids: (B, L) captions, padded at the end.
        starts: (B,) positions of begin-of-image, where each row's image begins.
        tokens: (B, n) image tokens.
    """
    B, n = tokens.shape
    offsets = mx.arange(n)
    positions = starts[:, None] + offsets  # (B, n); token k is predicted at positions[:, k]
    text = model.embed_text(ids)
    width = text.shape[-1]
    room = mx.zeros((B, n - 1, width))  # enough for the image after the longest caption
    embeddings = mx.concatenate([text, room], axis=1)

    # Captions differ in length: write each row's image over its padding, right after its start.
    inputs = tokens[:, :-1]  # the last token is predicted, but nothing is predicted from it
    image = model.embed_image_tokens(inputs)
    places = positions[:, 1:, None]
    places = mx.broadcast_to(places, image.shape)
    embeddings = mx.put_along_axis(embeddings, places, image, axis=1)
    hidden = model.hidden_states(embeddings)
    return select_positions(hidden, positions)
