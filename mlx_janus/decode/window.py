"""The choice of the window, the positions read in one pass, by timing passes of each width."""

from __future__ import annotations

import time
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from ..models.backbone import fill_cache, trim_cache
from ..models.janus import JanusModel
from ..models.vq_parts import token_config

ACCEPTED = {1: 1.0, 2: 1.4, 4: 1.8, 8: 2.3, 16: 2.6, 32: 2.7}
"""Window to the mean number of tokens that a pass accepts.

The figures are cautious, as they differ between models and prompts (``benchmarks/windows.py``
measures them).
"""
_MIN_SPEEDUP = 1.15  # over a window of 1, estimated by ``ACCEPTED``; a smaller one is uncertain
_REPEATS = 3  # timed passes of each window


def time_passes(model: JanusModel, rows: int) -> dict[int, float]:
    """Time a pass of the language model and the image head, in the middle of an image.

    Args:
        model: the model, with its weights.
        rows: rows of the batch, 2 for an image with guidance and 1 without.

    Returns:
        Window to the median seconds of a pass. Windows longer than half an image are left out.
    """
    positions = token_config(model.config).tokens
    seconds: dict[int, list[float]] = {}
    for window in ACCEPTED:  # keep the windows that fit into half an image
        if 2 * window <= positions:
            seconds[window] = []
    cache = model.make_cache(positions)
    fill_cache(cache, model.config.language, rows, positions // 2, model.dtype)
    for repeat in range(_REPEATS + 1):
        for window, timed in seconds.items():
            ids = mx.zeros((rows, window), dtype=mx.int32)
            started = time.perf_counter()
            embeddings = model.embed_image_tokens(ids)
            hidden = model.hidden_states(embeddings, cache)
            mx.eval(model.image_logits(hidden))
            elapsed = time.perf_counter() - started
            if repeat:  # the first pass also compiles
                timed.append(elapsed)
            trim_cache(cache, window)  # so that every pass reads the same number of positions
    return {window: float(np.median(timed)) for window, timed in seconds.items()}


def best_window(seconds: Mapping[int, float]) -> int:
    """Return the window with the least time per accepted token; 1 if no other is clearly faster.

    Args:
        seconds: window to the seconds of a pass; 1 must be among them.
    """
    rates = {}
    for window, spent in seconds.items():
        rates[window] = ACCEPTED[window] / spent
    best = max(rates, key=rates.__getitem__)
    return best if rates[best] > _MIN_SPEEDUP * rates[1] else 1
