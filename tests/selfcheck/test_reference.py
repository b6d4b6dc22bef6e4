"""The stored reference: cut from the fixtures, small, and in the wheel's folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from mlx_janus.selfcheck.numbers import PRECISIONS, check_numbers
from mlx_janus.selfcheck.reference import FOLDER, recorded_groups, reference_numbers

SCRIPT = Path(__file__).parents[2] / "docs" / "write_selfcheck.py"


@pytest.fixture(scope="module")
def script() -> Any:
    """The script that writes the reference."""
    spec = importlib.util.spec_from_file_location("write_selfcheck", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_numbers_are_those_of_the_fixtures(script: Any) -> None:
    numbers = reference_numbers()
    cut = script.cut_numbers()
    assert numbers.keys() == cut.keys()
    for name, array in cut.items():
        np.testing.assert_array_equal(numbers[name], array)
    with safe_open(FOLDER / "reference.safetensors", framework="numpy") as file:
        assert file.metadata() == script.planned_groups()


def test_the_model_is_the_converted_fixture(converted: dict[str, Path]) -> None:
    ours = mx.load(str(FOLDER / "model.safetensors"))
    fixture = mx.load(str(converted["deepseek-pro-bin"] / "model.safetensors"))
    assert isinstance(ours, dict)
    assert isinstance(fixture, dict)
    assert ours.keys() == fixture.keys()
    for name, array in fixture.items():
        assert mx.array_equal(ours[name], array), name


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 3_000_000


def test_janus_tiny_has_several_groups_in_a_row() -> None:
    """Otherwise no check could see a kernel that reads the scales of another group."""
    sizes = recorded_groups("tiny", 4)
    assert [4, 64] in sizes.values()
    assert {bits for bits, _ in sizes.values()} == {4, 8}


def test_every_precision_passes_on_the_cpu() -> None:
    halves = [precision for precision in PRECISIONS if precision.dtype != "float32"]
    checks = list(check_numbers("cpu", halves))
    assert {check.status for check in checks} == {"ok"}
    assert {check.precision for check in checks} == {"", *(each.name for each in halves)}
