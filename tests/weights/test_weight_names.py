"""The choice of weight files by their names."""

from __future__ import annotations

import pytest

from mlx_janus.errors import CheckpointError
from mlx_janus.weights.weight_names import shards_without_index


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ([], []),
        (["model.safetensors", "config.json"], []),
        (
            ["b-00002-of-00002.bin", "b-00001-of-00002.bin"],
            ["b-00001-of-00002.bin", "b-00002-of-00002.bin"],
        ),
        (["m-0-of-2.safetensors", "m-1-of-2.safetensors"], None),
        (["m-1-of-1.safetensors", "m-1-of-1.bin"], ["m-1-of-1.safetensors"]),
        (["m-1-of-2.safetensors", "m-1-of-1.bin"], ["m-1-of-1.bin"]),
        (["._m-1-of-1.bin", "folder/m-1-of-1.bin"], []),
        (["m-1-of-0.bin", "m-9-of-3.bin"], []),
    ],
)
def test_a_complete_set_of_shards_is_chosen(names: list[str], chosen: list[str] | None) -> None:
    assert shards_without_index(names) == (names if chosen is None else chosen)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["m-00002-of-00002.bin"], r"^lacks m-00001-of-00002\.bin$"),
        (["m-0-of-3.bin", "m-1-of-3.bin"], r"^lacks m-2-of-3\.bin$"),
        (["m-1-of-999999.bin"], r"^lacks m-000002-of-999999\.bin$"),
        (["a-1-of-1.bin", "b-1-of-1.bin"], r"two sets of shards \(a-1-of-1\.bin and b-"),
    ],
)
def test_a_missing_shard_and_two_sets_are_named(names: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        shards_without_index(names)
