"""The window for one image, timed once and stored in the cache folder."""

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
from ..files import write_atomically
from ..limits import MAX_WINDOW
from ..models.janus import JanusModel
from ..weights.sources import cache_folder

WINDOWS_FILE = "windows.json"


def find_window(model: JanusModel, rows: int) -> int:
    """Return the fastest window, the positions read in one pass, to generate one image.

    The window is timed once for each model, device and precision, and stored in ``windows.json`` in
    the cache folder. Remove that file to time again.

    Args:
        model: the weights.
        rows: rows of the batch, 2 with guidance and 1 without.
    """
    path = cache_folder() / WINDOWS_FILE
    key = _key(model, rows)
    known = _read(path)
    window = known.get(key)
    if isinstance(window, int) and 1 <= window <= MAX_WINDOW:
        return window
    window = best_window(time_passes(model, rows))
    # Read the file again: another process may have stored its windows during the timing.
    _write(path, _read(path) | {key: window})
    return window


def _key(model: JanusModel, rows: int) -> str:
    """Return a hash of everything that the timing depends on.

    The arrays of the first layer show the dtype and the quantization as loaded.
    """
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


def _read(path: Path) -> dict[str, Any]:
    """Return the stored windows by key; none if the file is missing or damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, known: dict[str, Any]) -> None:
    """Write the file atomically; if that fails, the next process times again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(known, indent=1))
