"""Settings that are found by timing once, and kept beside the converted models."""

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
    """Positions to read in one pass when one picture is drawn: timed once for a model, device and precision, then read
    from ``windows.json`` in the cache folder, where removing it has it timed again.

    Args:
        model: the weights.
        rows: of the batch, 2 with guidance.
    """
    path, key = cache_folder() / WINDOWS_FILE, _key(model, rows)
    known = _read(path)
    window = known.get(key)
    if isinstance(window, int) and 1 <= window <= MAX_WINDOW:
        return window
    window = best_window(time_passes(model, rows))
    _write(path, _read(path) | {key: window})
    return window


def _key(model: JanusModel, rows: int) -> str:
    layer = model.language_model.layers[0]
    facts = [
        model.config.to_dict(),
        [(name, array.shape, str(array.dtype)) for name, array in tree_flatten(layer.parameters())],
        str(model.dtype),
        (str(mx.default_device()), platform.node(), os.cpu_count(), metadata.version("mlx"), rows),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, known: dict[str, Any]) -> None:
    """Whole or not at all; where it cannot be written, it is timed again the next time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(known, indent=1))
