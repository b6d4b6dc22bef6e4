"""The reference's numbers: fixture folders, golden files, and how close is equal."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors import safe_open

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDERS = ("deepseek-pro-bin", "deepseek-janus-safetensors", "transformers")
TOLERANCE = 1e-5
"""Relative rms in float32. Looser bounds miss a wrong eps (4e-5) and tanh GELU (1.2e-4)."""


@cache
def golden(folder: str) -> dict[str, mx.array]:
    """Inputs and outputs of the reference for a fixture folder; layouts are torch's (NCHW)."""
    arrays = mx.load(str(_path(folder)))
    assert isinstance(arrays, dict)
    return arrays


@cache
def golden_facts(folder: str) -> dict[str, str]:
    """Prompts, ids and texts, from the golden file's header."""
    with safe_open(str(_path(folder)), framework="numpy") as file:
        return dict(file.metadata())


def _path(folder: str) -> Path:
    """Return the golden file of a folder; transformers' folder has the weights of the pro one."""
    name = "deepseek-pro-bin" if folder == "transformers" else folder
    return FIXTURES / f"{name}.golden.safetensors"


def rms_error(ours: mx.array | np.ndarray, reference: mx.array | np.ndarray) -> float:
    """rms(ours - reference) / rms(reference)."""
    a, b = (np.array(x).astype(np.float64) for x in (ours, reference))
    assert a.shape == b.shape
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


def assert_close(ours: mx.array | np.ndarray, reference: mx.array | np.ndarray) -> None:
    assert rms_error(ours, reference) <= TOLERANCE


def nhwc(x: mx.array) -> mx.array:
    return x.transpose(0, 2, 3, 1)


def nchw(x: mx.array) -> mx.array:
    return x.transpose(0, 3, 1, 2)
