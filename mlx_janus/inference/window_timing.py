"""The fastest window (positions per pass) for one image, timed once and stored in a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..decode.window import best_window, time_passes
from ..files import MAX_JSON_FILE, parse_json, read_bounded, write_atomically
from ..limits import MAX_WINDOW
from ..models.janus import JanusModel
from ..weights.sources import cache_folder

WINDOWS_FILE = "windows.json"


def find_window(model: JanusModel, rows: int) -> int:
    """Return the fastest window (number of positions that one pass reads) to generate one image.

    Windows are timed once for each model, device and precision. The fastest is stored in
    ``windows.json`` in the cache folder. Remove that file to time them again.

    Args:
        model: the model, with its weights.
        rows: rows of the batch for one image, 2 with guidance and 1 without.
    """
    path = cache_folder() / WINDOWS_FILE
    key = _timing_key(model, rows)
    window = _read_windows(path).get(key)
    if isinstance(window, int) and 1 <= window <= MAX_WINDOW:
        return window
    seconds = time_passes(model, rows)  # of a pass, by window
    window = best_window(seconds)
    # Read the file again, because another process may have stored windows during the timing.
    _write_windows(path, _read_windows(path) | {key: window})
    return window


def _timing_key(model: JanusModel, rows: int) -> str:
    """Return a hash of everything that the time of a pass depends on."""
    # One layer is enough to tell the dtype and the quantization of the weights as loaded.
    layer = model.language_model.layers[0]
    parameters = tree_flatten(layer.parameters())
    facts = [
        model.config.to_dict(),
        [(name, array.shape, str(array.dtype)) for name, array in parameters],
        str(model.dtype),
        (str(mx.default_device()), platform.node(), os.cpu_count(), metadata.version("mlx"), rows),
    ]
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_windows(path: Path) -> dict[str, Any]:
    """Return the stored windows by timing key; an empty dict if the file is missing or damaged."""
    try:
        windows = parse_json(read_bounded(path, MAX_JSON_FILE))
    except (OSError, ValueError):
        return {}
    return windows if isinstance(windows, dict) else {}


def _write_windows(path: Path, windows: dict[str, Any]) -> None:
    """Store windows by timing key. If this fails, the next process times them again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(windows, indent=1))
