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
    """Return KL(p || q) = sum p (log p - log q), in nats: 0 if p = q, without an upper bound."""
    log_p = _log_softmax(reference)
    log_q = _log_softmax(other)
    terms = mx.exp(log_p) * (log_p - log_q)
    return terms.sum(axis=-1)


def overlap(reference: mx.array, other: mx.array) -> mx.array:
    """Return sum min(p, q), from 0 to 1: 1 if p = q.

    This is 1 minus the total variation distance.
    """
    log_p = _log_softmax(reference)
    log_q = _log_softmax(other)
    shared = mx.exp(mx.minimum(log_p, log_q))
    return shared.sum(axis=-1)


def top1_agreement(reference: mx.array, other: mx.array) -> mx.array:
    """Return 1.0 where both models have the same top-1 token, else 0.0."""
    reference_top = reference.argmax(axis=-1)
    other_top = other.argmax(axis=-1)
    return (reference_top == other_top).astype(mx.float32)


@dataclass(frozen=True)
class Divergence:
    """Means over positions: KL divergence in nats, and overlap and top-1 agreement from 0 to 1."""

    kl: float
    overlap: float
    top1: float


def mean_divergence(pairs: Iterable[tuple[mx.array, mx.array]]) -> Divergence:
    """Average the three measures of ``Divergence`` over all positions of all batches.

    Args:
        pairs: for each batch, the reference model's logits and the other model's, each (..., V) and
            float32. All batches together have at least one position.
    """
    batches = []
    for reference, other in pairs:
        columns = []  # for each measure, its value at every position
        for measure in (kl_divergence, overlap, top1_agreement):
            values = np.array(measure(reference, other))
            columns.append(values.reshape(-1))
        batches.append(np.stack(columns, axis=1))  # (positions, measures)
    rows = np.concatenate(batches).astype(np.float64)
    mean_kl, mean_overlap, mean_top1 = rows.mean(axis=0)
    return Divergence(
        kl=float(mean_kl),
        overlap=float(mean_overlap),
        top1=float(mean_top1),
    )


def _log_softmax(logits: mx.array) -> mx.array:
    """Return log-probabilities over the last axis."""
    log_total = mx.logsumexp(logits, axis=-1, keepdims=True)
    return logits - log_total
