"""Divergences between two models' predictions, from their logits: (..., V) -> (...).

p = softmax(reference) and q = softmax(other); sums run over the V tokens. Compared with a score of
generated images, these need few positions to detect small changes.
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
    return (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def overlap(reference: mx.array, other: mx.array) -> mx.array:
    """Return 1 - TV(p, q) = sum min(p, q), from 0 to 1: the share of samples that can stay."""
    return mx.exp(mx.minimum(_log_softmax(reference), _log_softmax(other))).sum(axis=-1)


def top1_agreement(reference: mx.array, other: mx.array) -> mx.array:
    """Return 1.0 where both models have the same top-1 token, else 0.0."""
    return (reference.argmax(axis=-1) == other.argmax(axis=-1)).astype(mx.float32)


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
    rows = []
    for reference, other in pairs:
        measures = (kl_divergence, overlap, top1_agreement)
        columns = [np.array(measure(reference, other)).reshape(-1) for measure in measures]
        rows.append(np.stack(columns, axis=1))
    kl, shared, top1 = np.concatenate(rows).astype(np.float64).mean(axis=0)
    return Divergence(float(kl), float(shared), float(top1))


def _log_softmax(logits: mx.array) -> mx.array:
    """Return log-probabilities over the last axis."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
