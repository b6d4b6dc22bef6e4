"""The reference in the package: a small model, and the numbers of DeepSeek's code for it.

``docs/write_selfcheck.py`` writes both from the fixtures of the tests.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors import safe_open

from ..config import Dtype, JanusConfig
from ..memory import materialize
from ..models.janus import JanusModel
from ..weights.load import read_model
from ..weights.quantize import plan_quantization

FOLDER = Path(__file__).parent.parent / "assets" / "check"
_NUMBERS = FOLDER / "reference.safetensors"


@dataclass(frozen=True)
class Precision:
    """The type of float weights, and the bits of quantized ones."""

    dtype: Dtype
    bits: int | None = None  # 4 or 8; None: not quantized

    @property
    def name(self) -> str:
        """Its name in reports: "float16", or "4 bits, float16"."""
        return f"{self.bits} bits, {self.dtype}" if self.bits else self.dtype


@cache
def reference_numbers() -> dict[str, np.ndarray]:
    """Return the inputs and outputs of the reference by name; layouts are torch's (NCHW)."""
    with safe_open(_NUMBERS, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@cache
def recorded_groups(model: str, bits: int) -> dict[str, list[int]]:
    """Return the recorded bits and group size of every quantized layer, by its path.

    Args:
        model: "check", the model of this module, or "tiny", Janus-Tiny.
        bits: 4 or 8.
    """
    with safe_open(_NUMBERS, framework="numpy") as file:
        groups: dict[str, list[int]] = json.loads(file.metadata()[f"{model}.{bits}"])
    return groups


def load_at(folder: Path, precision: Precision) -> JanusModel:
    """Load a converted folder on the default device, and read its weights.

    The folder must not be quantized. The memory is not checked.
    """
    config = JanusConfig.load(folder / "config.json")
    plan = plan_quantization(config, precision.bits)
    model = read_model(folder, replace(config, dtype=precision.dtype, quantization=plan))
    materialize(_arrays(model))
    return model


def _arrays(model: JanusModel) -> list[mx.array]:
    """Return all weights of a model."""
    from mlx.utils import tree_flatten

    return [array for _, array in tree_flatten(model.parameters())]


def relative_rms(ours: mx.array | np.ndarray, reference: mx.array | np.ndarray) -> float:
    """Return rms(ours - reference) / rms(reference).

    Raises:
        ValueError: the shapes differ.
    """
    a = _as_float64(ours)
    b = _as_float64(reference)
    if a.shape != b.shape:
        raise ValueError(f"the shape is {a.shape}, the reference's is {b.shape}")
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


def _as_float64(values: mx.array | np.ndarray) -> np.ndarray:
    """Return numbers as a numpy array of float64."""
    if isinstance(values, mx.array):
        values = np.array(values.astype(mx.float32))  # numpy knows no bfloat16
    return values.astype(np.float64)
