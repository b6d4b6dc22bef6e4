"""The choice of the window, the number of positions read in one pass, by timing passes."""

from __future__ import annotations

import time
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from ..models.backbone import fill_cache, trim_cache
from ..models.janus import JanusModel
from ..models.vq_parts import token_config

MEAN_ACCEPTED = {1: 1.0, 2: 1.4, 4: 1.8, 8: 2.3, 16: 2.6, 32: 2.7}
"""For each window, the mean number of tokens that a pass accepts.

The figures are cautious, as they differ between models and prompts (``benchmarks/windows.py``
measures them).
"""
_MIN_SPEEDUP = 1.15  # over window 1; a smaller estimate is uncertain
_REPEATS = 3  # timed passes of each window


def time_passes(model: JanusModel, rows: int) -> dict[int, float]:
    """Time passes that read a window of positions in the middle of an image, for several windows.

    Args:
        model: the model, with its weights.
        rows: rows of the batch, 2 for an image with guidance and 1 without.

    Returns:
        The median seconds of a pass, by window. Windows longer than half an image are left out.
    """
    positions = token_config(model.config).tokens
    seconds: dict[int, list[float]] = {}
    for window in MEAN_ACCEPTED:
        if window <= positions // 2:  # passes begin in the middle of the image
            seconds[window] = []
    cache = model.make_cache(positions)
    fill_cache(cache, model.config.language, rows, positions // 2, model.dtype)
    for repeat in range(_REPEATS + 1):
        for window, timings in seconds.items():
            ids = mx.zeros((rows, window), dtype=mx.int32)
            started = time.perf_counter()
            embeddings = model.embed_image_tokens(ids)
            hidden = model.hidden_states(embeddings, cache)
            mx.eval(model.image_logits(hidden))
            elapsed = time.perf_counter() - started
            if repeat > 0:  # the first pass also compiles
                timings.append(elapsed)
            trim_cache(cache, window)  # so that every pass begins in the middle of the image
    return {window: float(np.median(timings)) for window, timings in seconds.items()}


def best_window(seconds: Mapping[int, float]) -> int:
    """Return the window that accepts the most tokens per second.

    Return 1 unless the speedup over window 1 is above ``_MIN_SPEEDUP``.

    Args:
        seconds: the seconds of a pass, by window; window 1 must be among them.
    """
    tokens_per_second = {}
    for window, pass_seconds in seconds.items():
        tokens_per_second[window] = MEAN_ACCEPTED[window] / pass_seconds
    best = max(tokens_per_second, key=tokens_per_second.__getitem__)
    return best if tokens_per_second[best] > _MIN_SPEEDUP * tokens_per_second[1] else 1
