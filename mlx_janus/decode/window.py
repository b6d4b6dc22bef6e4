"""How many positions one pass should read when a picture is drawn: what a pass settles against the time it takes."""

from __future__ import annotations

import time
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from ..models.backbone import fill_cache
from ..models.janus import JanusModel

SETTLED = {1: 1.0, 2: 1.4, 4: 1.8, 8: 2.3, 16: 2.6, 32: 2.7}
"""Width of a pass to the tokens that it settles on average: cautious figures, as they differ between models and prompts
(``benchmarks/windows.py`` measures them)."""
_WORTH = 1.15  # times quicker, by the figures, than a pass of one position: less is left to chance
_REPEATS = 3


def time_passes(model: JanusModel, rows: int) -> dict[int, float]:
    """Width to seconds of a pass of the language model and the head, in the middle of a picture; medians.

    Args:
        model: the weights.
        rows: of the batch: 2 for a guided picture, 1 without guidance.
    """
    positions = model.config.image_tokens
    seconds: dict[int, list[float]] = {width: [] for width in SETTLED if 2 * width <= positions}
    cache = model.make_cache(positions)
    fill_cache(cache, model.config.language, rows, positions // 2, model.dtype)
    for repeat in range(_REPEATS + 1):
        for width, timed in seconds.items():
            ids = mx.zeros((rows, width), dtype=mx.int32)
            started = time.perf_counter()
            mx.eval(model.image_logits(model.hidden_states(model.embed_image_tokens(ids), cache)))
            if repeat:  # the first one also compiles
                timed.append(time.perf_counter() - started)
            for layer in cache:
                layer.trim(width)
    return {width: float(np.median(timed)) for width, timed in seconds.items()}


def best_window(seconds: Mapping[int, float]) -> int:
    """The width that takes the least time a token; 1 where no other is clearly quicker.

    Args:
        seconds: of a pass of each width, 1 among them.
    """
    rates = {width: SETTLED[width] / spent for width, spent in seconds.items()}
    best = max(rates, key=rates.__getitem__)
    return best if rates[best] > _WORTH * rates[1] else 1
