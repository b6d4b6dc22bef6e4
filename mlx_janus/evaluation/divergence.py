"""How far apart two models' predictions are at the same positions: functions of logits, (..., V) -> (...).

With p = softmax(reference) and q = softmax(other), sums over the V tokens. Unlike a score of what was drawn, these need
few positions to tell small changes apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np


def kl_divergence(reference: mx.array, other: mx.array) -> mx.array:
    """KL(p || q) = sum p (log p - log q), in nats; 0 if the two are equal, without bound above."""
    p, q = _log_softmax(reference), _log_softmax(other)
    return (mx.exp(p) * (p - q)).sum(axis=-1)


def overlap(reference: mx.array, other: mx.array) -> mx.array:
    """1 - TV(p, q) = sum min(p, q), from 0 to 1: the share of draws that could stay the same (total variation)."""
    return mx.exp(mx.minimum(_log_softmax(reference), _log_softmax(other))).sum(axis=-1)


def top1_agreement(reference: mx.array, other: mx.array) -> mx.array:
    """1.0 where the likeliest token is the same, else 0.0."""
    return (reference.argmax(axis=-1) == other.argmax(axis=-1)).astype(mx.float32)


@dataclass(frozen=True)
class Divergence:
    """Means over positions: KL in nats, and the two shares from 0 to 1."""

    kl: float
    overlap: float
    top1: float


def mean_divergence(pairs: Iterable[tuple[mx.array, mx.array]]) -> Divergence:
    """Means over all positions of pairs (reference, other) of logits, each (..., V), float32; at least one position."""
    rows = []
    for reference, other in pairs:
        measures = (kl_divergence, overlap, top1_agreement)
        rows.append(np.stack([np.array(measure(reference, other)).reshape(-1) for measure in measures], axis=1))
    return Divergence(*map(float, np.concatenate(rows).astype(np.float64).mean(axis=0)))


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
