"""The stamps of a converted folder's files, and verifying a folder whose config is off."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_janus.errors import CheckpointError, UnsupportedModelError
from mlx_janus.weights import convert as convert_module
from mlx_janus.weights.convert import ConvertOptions, Source, convert_checkpoint
from mlx_janus.weights.folder import open_converted
from mlx_janus.weights.load import load_model
from mlx_janus.weights.verify import verify_conversion
from tests.support.golden import FIXTURES

SOURCE = FIXTURES / "deepseek-pro-bin"


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A converted folder of several shards."""
    monkeypatch.setattr(convert_module, "SHARD_BYTES", 600_000)
    convert_checkpoint(Source(SOURCE, "one"), tmp_path / "out")
    return tmp_path / "out"


def rewrite(path: Path, stamp: dict[str, str], **more: mx.array) -> None:
    """Change the stamp of a weight file, and add arrays."""
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    mx.save_safetensors(str(path), {**arrays, **more}, stamp)


def test_shards_of_two_conversions_are_refused(shards: Path) -> None:
    """Their arrays may have equal shapes, so nothing else would tell them apart."""
    _, stamp = open_converted(shards)
    second = sorted(shards.glob("model-*.safetensors"))[1]
    rewrite(second, {**stamp, "source": "other"})
    with pytest.raises(CheckpointError, match=r"model-00002.* are of two conversions") as caught:
        load_model(shards)
    assert "model-00001" in str(caught.value)
    rewrite(second, stamp)
    load_model(shards)


def test_an_array_in_two_shards_is_refused(shards: Path) -> None:
    arrays, stamp = open_converted(shards)
    second = sorted(shards.glob("model-*.safetensors"))[1]
    name = min(mx.load(str(sorted(shards.glob("model-*.safetensors"))[0])))
    rewrite(second, stamp, **{name: arrays[name]})
    with pytest.raises(CheckpointError, match="which another file of its folder holds too"):
        load_model(shards)


@pytest.mark.parametrize(
    "entries", [{"bits": 5}, {"bits": 4, "group_size": 16}, {"recipe": "nvfp4", "bits": 4}]
)
def test_verifying_a_quantization_that_no_option_gives(
    tmp_path: Path, entries: dict[str, object]
) -> None:
    convert_checkpoint(Source(SOURCE, "x"), tmp_path / "out", ConvertOptions(bits=4))
    path = tmp_path / "out" / "config.json"
    data = json.loads(path.read_text())
    data["quantization"].update(entries)
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="convert again") as caught:
        verify_conversion(Source(SOURCE, "x"), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_an_unknown_format_version_names_all_that_are_read(tmp_path: Path) -> None:
    convert_checkpoint(Source(SOURCE, "x"), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    good = path.read_text()
    path.write_text(good.replace('"format_version": 2', '"format_version": 9'))
    with pytest.raises(UnsupportedModelError, match="format version 9, this release reads 1 and 2"):
        load_model(tmp_path / "out")
    path.write_text(good)
    rewrite(tmp_path / "out" / "model.safetensors", {"mlx_janus_format": "9"})
    with pytest.raises(CheckpointError, match="stamp of format 1 or 2"):
        load_model(tmp_path / "out")


def test_a_source_whose_name_is_no_text(tmp_path: Path) -> None:
    convert_checkpoint(Source(SOURCE, "bad\udcffname"), tmp_path / "out")
    assert open_converted(tmp_path / "out")[1]["source"] == "bad?name"


def test_a_pointer_in_a_converted_folder_is_named(tmp_path: Path) -> None:
    convert_checkpoint(Source(SOURCE, "x"), tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    shutil.copy(weights, tmp_path / "kept")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n")
    with pytest.raises(CheckpointError, match="is a Git LFS pointer"):
        load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("dtype", "shape", "words"),
    [
        ("F64", [1], "unsupported dtype F64"),
        ("F4", [16], "unsupported dtype F4"),
        ("F32", [0, 2**40], "a side that is too long"),
    ],
)
def test_a_stamped_file_that_mlx_does_not_read_is_refused(
    tmp_path: Path, dtype: str, shape: list[int], words: str
) -> None:
    size = 0 if 0 in shape else 8
    header = {
        "__metadata__": {"mlx_janus_format": "2"},
        "w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]},
    }
    content = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content + bytes(size))
    with pytest.raises(CheckpointError, match=words) as caught:
        open_converted(tmp_path)
    assert str(path) in str(caught.value)
