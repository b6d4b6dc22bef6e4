"""What a model folder lacks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mlx_janus.weights.checkup import find_faults
from mlx_janus.weights.convert import ConvertOptions, Source, convert_checkpoint
from tests.support.golden import FIXTURES, FOLDERS

SOURCE = FIXTURES / "deepseek-pro-bin"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A PyTorch folder that a test may damage."""
    return Path(shutil.copytree(SOURCE, tmp_path / "copy"))


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A converted folder that a test may damage."""
    convert_checkpoint(Source(SOURCE, "x"), tmp_path / "ours", ConvertOptions(bits=4))
    return tmp_path / "ours"


@pytest.mark.parametrize("name", FOLDERS)
def test_a_usable_folder_has_no_faults(name: str, ours: Path) -> None:
    for folder in (FIXTURES / name, ours):
        assert find_faults(folder) == find_faults(folder, headers=True) == []


def test_everything_that_is_missing_is_named(copy: Path, ours: Path) -> None:
    for name in ("config.json", "tokenizer.json", "pytorch_model-00002-of-00002.bin"):
        (copy / name).unlink()
    faults = find_faults(copy)
    assert [f"{copy / 'config.json'} is missing" in faults[0], len(faults)] == [True, 3]
    assert f"{copy / 'tokenizer.json'} is missing" in faults[1]
    assert "pytorch_model-00002-of-00002.bin is missing" in faults[2]
    (ours / "tokenizer.json").unlink()
    (ours / "model.safetensors").unlink()
    faults = find_faults(ours)
    assert ["tokenizer.json is missing" in faults[0], "holds no weights" in faults[1]] == [True] * 2
    assert len(find_faults(copy / "absent")) == 3


def test_the_headers_tell_what_names_and_sizes_do_not(copy: Path, ours: Path) -> None:
    path = copy / "pytorch_model-00002-of-00002.bin"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n")
    blob = (ours / "model.safetensors").read_bytes()
    (ours / "model.safetensors").write_bytes(blob[:-10])
    for folder, words in ((copy, "is a Git LFS pointer"), (ours, "no whole safetensors file")):
        assert find_faults(folder) == []
        (fault,) = find_faults(folder, headers=True)
        assert words in fault
    (ours / "model.safetensors").write_bytes(blob)
    (ours / "tokenizer.json").write_text("{}")
    (fault,) = find_faults(ours, headers=True)
    assert "is not a byte-level tokenizer" in fault


def test_a_model_of_another_family_is_named(copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (fault,) = find_faults(copy)
    assert "is of a llama model" in fault
