"""Divergences between two models' predictions, from their logits: (..., V) -> (...).

p = softmax(reference) and q = softmax(other); sums run over the V tokens. A divergence shows a
small change after few positions, where a score of generated images needs many images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np


def kl_divergence(reference: mx.array, other: mx.array) -> mx.array:
    """Return KL(p || q) = sum p (log p - log q), in nats: 0 if equal, unbounded above."""
    log_p = _log_softmax(reference)
    log_q = _log_softmax(other)
    terms = mx.exp(log_p) * (log_p - log_q)
    return terms.sum(axis=-1)


def overlap(reference: mx.array, other: mx.array) -> mx.array:
    """Return 1 - TV(p, q) = sum min(p, q), from 0 to 1: 1 if equal.

    It is the largest share of tokens that can be the same when both models are sampled.
    """
    log_p = _log_softmax(reference)
    log_q = _log_softmax(other)
    shared = mx.exp(mx.minimum(log_p, log_q))
    return shared.sum(axis=-1)


def top1_agreement(reference: mx.array, other: mx.array) -> mx.array:
    """Return 1.0 where both models have the same top-1 token, else 0.0."""
    first = reference.argmax(axis=-1)
    second = other.argmax(axis=-1)
    return (first == second).astype(mx.float32)


@dataclass(frozen=True)
class Divergence:
    """Means over positions: KL divergence in nats, and overlap and top-1 agreement from 0 to 1."""

    kl: float
    overlap: float
    top1: float


def mean_divergence(pairs: Iterable[tuple[mx.array, mx.array]]) -> Divergence:
    """Average the divergences over all positions of some batches.

    Args:
        pairs: reference and other logits, (..., V) each, float32; at least one position.
    """
    batches = []
    for reference, other in pairs:
        columns = []  # one per measure, over the batch's positions
        for measure in (kl_divergence, overlap, top1_agreement):
            values = np.array(measure(reference, other))
            columns.append(values.reshape(-1))
        batches.append(np.stack(columns, axis=1))
    rows = np.concatenate(batches).astype(np.float64)
    kl, shared, top1 = rows.mean(axis=0)
    return Divergence(
        kl=float(kl),
        overlap=float(shared),
        top1=float(top1),
    )


def _log_softmax(logits: mx.array) -> mx.array:
    """Return log-probabilities over the last axis."""
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    return logits - total
