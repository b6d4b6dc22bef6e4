"""The two losses of Janus: cross-entropy of answers and of image tokens.

The paper defines them (arXiv 2410.13848, section 3.3). B is the batch size, L the number of
positions, M the number of selected positions, n the number of image tokens.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from ..models.janus import JanusModel


def select_positions(hidden: mx.array, positions: mx.array) -> mx.array:
    """Select M hidden states of every row: (B, L, hidden), (B, M) -> (B, M, hidden)."""
    B, M = positions.shape
    width = hidden.shape[-1]
    indices = positions[..., None]
    indices = mx.broadcast_to(indices, (B, M, width))
    return mx.take_along_axis(hidden, indices, axis=1)


def insert_features(text: mx.array, features: mx.array, starts: mx.array) -> mx.array:
    """Put image features in the place of each row's placeholders.

    Args:
        text: (B, L, hidden), embeddings of conversations.
        features: (B, n, hidden), of one image per row.
        starts: (B,) position of each row's first placeholder.
    """
    offsets = mx.arange(features.shape[1])
    places = starts[:, None] + offsets
    places = mx.broadcast_to(places[..., None], features.shape)
    return mx.put_along_axis(text, places, features, axis=1)


def weighted_cross_entropy(
    logits: mx.array,
    targets: mx.array,
    weights: mx.array,
) -> tuple[mx.array, mx.array]:
    """Return the weighted mean cross-entropy in nats, and the weighted top-1 accuracy.

    Args:
        logits: (B, M, vocabulary).
        targets: (B, M) token ids.
        weights: (B, M), 0 for padding. At least one weight must not be 0.
    """
    total = weights.sum()
    losses = nn.losses.cross_entropy(logits, targets)
    weighted_losses = losses * weights
    loss = weighted_losses.sum() / total
    predicted = logits.argmax(-1)
    weighted_hits = (predicted == targets) * weights
    accuracy = weighted_hits.sum() / total
    return loss, accuracy


def image_token_loss(
    model: JanusModel,
    hidden: mx.array,
    tokens: mx.array,
) -> tuple[mx.array, mx.array]:
    """Return the mean cross-entropy of image tokens in nats, and the top-1 accuracy.

    Args:
        model: the model whose image head predicts the tokens.
        hidden: (B, n, hidden) from ``image_token_states``.
        tokens: (B, n), the correct tokens.
    """
    logits = model.image_logits(hidden)  # (B, n, codes)
    losses = nn.losses.cross_entropy(logits, tokens)
    predicted = logits.argmax(-1)
    hits = predicted == tokens
    return losses.mean(), hits.mean()


def image_token_states(
    model: JanusModel,
    ids: mx.array,
    starts: mx.array,
    tokens: mx.array,
) -> mx.array:
    """Return the hidden states that predict the image tokens of captions: (B, n, hidden).

    State ``k`` of a row predicts token ``k``. The model has then read the caption and the correct
    tokens before ``k`` (teacher forcing).

    Args:
        model: the model that reads the captions and the tokens.
        ids: (B, L) token ids of the captions, padded at the end.
        starts: (B,) position of each caption's last token, begin-of-image.
        tokens: (B, n) image tokens.
    """
    B, n = tokens.shape
    offsets = mx.arange(n)
    positions = starts[:, None] + offsets  # (B, n); token k is predicted at positions[:, k]
    text = model.embed_text(ids)
    width = text.shape[-1]
    space = mx.zeros((B, n - 1, width))  # enough for the image tokens after the longest caption
    embeddings = mx.concatenate([text, space], axis=1)

    # Captions differ in length. Each row's image tokens replace its padding, right after
    # begin-of-image.
    inputs = tokens[:, :-1]  # the last token is predicted, but nothing is predicted from it
    image = model.embed_image_tokens(inputs)
    input_positions = positions[:, 1:, None]
    input_positions = mx.broadcast_to(input_positions, image.shape)
    embeddings = mx.put_along_axis(embeddings, input_positions, image, axis=1)
    hidden = model.hidden_states(embeddings)
    return select_positions(hidden, positions)
