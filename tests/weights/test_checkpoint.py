"""Weight files as other tools leave them: shards, repeated and tied tensors, pointers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_janus.errors import CheckpointError, JanusError
from mlx_janus.weights.checkpoint import same_bits, source_tensors
from mlx_janus.weights.convert import Source, convert_checkpoint
from mlx_janus.weights.published import read_published_config
from mlx_janus.weights.safetensors_files import find_weights, read_safetensors_header
from tests.support.golden import FIXTURES

SAFETENSORS = FIXTURES / "deepseek-janus-safetensors"
BINS = FIXTURES / "deepseek-pro-bin"
TRANSFORMERS = FIXTURES / "transformers"
EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the safetensors fixture that a test may change."""
    return Path(shutil.copytree(SAFETENSORS, tmp_path / "copy"))


@pytest.fixture
def bins(tmp_path: Path) -> Path:
    """A copy of the two-shard ``.bin`` fixture that a test may change."""
    return Path(shutil.copytree(BINS, tmp_path / "bins"))


def read(path: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    return arrays


def converted(source: Path) -> dict[str, mx.array]:
    """The arrays of a folder's conversion."""
    output = source.parent / f"{source.name}-converted"
    convert_checkpoint(Source(source, source.name), output)
    arrays = read(output / "model.safetensors")
    shutil.rmtree(output)
    return arrays


def assert_same_conversion(folder: Path, original: dict[str, mx.array]) -> None:
    arrays = converted(folder)
    assert arrays.keys() == original.keys()
    assert all(same_bits(array, original[name]) for name, array in arrays.items())


def refuse(folder: Path, *words: str) -> None:
    """Check that a conversion of the folder ends with one line that holds the words."""
    with pytest.raises(JanusError) as caught:
        converted(folder)
    assert "\n" not in str(caught.value)
    for word in (str(folder), *words):
        assert word in str(caught.value)


def split(folder: Path, repeat: Callable[[mx.array], mx.array] | None = None) -> None:
    """Split ``model.safetensors`` into two shards, with one tensor in both if ``repeat`` is given.

    ``repeat`` makes the second copy of that tensor.
    """
    arrays = read(folder / "model.safetensors")
    names = sorted(arrays)
    parts = [names[:100], names[100:]]
    second = {name: arrays[name] for name in parts[1]}
    if repeat:
        second[names[0]] = repeat(arrays[names[0]])
    mx.save_safetensors(str(folder / SHARDS[0]), {name: arrays[name] for name in parts[0]})
    mx.save_safetensors(str(folder / SHARDS[1]), second)
    (folder / "model.safetensors").unlink()


# Shards and indexes


def test_shards_without_an_index_are_read(copy: Path, bins: Path) -> None:
    originals = [converted(copy), converted(bins)]
    split(copy)
    (bins / "pytorch_model.bin.index.json").unlink()
    for folder, original in zip((copy, bins), originals, strict=True):
        assert_same_conversion(folder, original)


def test_shards_that_do_not_fit_together_are_refused(copy: Path, bins: Path) -> None:
    split(copy)
    shutil.copy(copy / SHARDS[0], copy / "other-1-of-1.safetensors")
    refuse(copy, "has no index, and two sets of shards", SHARDS[0], "other-1-of-1.safetensors")
    (copy / "other-1-of-1.safetensors").unlink()
    (copy / SHARDS[1]).unlink()
    refuse(copy, f"lacks {SHARDS[1]}")
    (copy / SHARDS[0]).rename(copy / "model-00001-of-00001.safetensors")
    refuse(copy, "lacks '", "incomplete or of another model")


def test_an_index_of_the_form_that_is_not_read_does_not_matter(copy: Path) -> None:
    """A folder with a complete model.safetensors, and the old index of deleted .bin files."""
    original = converted(copy)
    leftover = {"weight_map": {EMBEDDING: "pytorch_model.bin"}}
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps(leftover))
    assert_same_conversion(copy, original)
    (copy / "pytorch_model.bin.index.json").write_text("{ broken")
    assert_same_conversion(copy, original)


def test_a_single_file_replaces_an_index_whose_files_are_gone(copy: Path) -> None:
    original = converted(copy)
    (copy / INDEX).write_text(json.dumps({"weight_map": {EMBEDDING: SHARDS[0], HEAD: SHARDS[1]}}))
    assert find_weights(copy).index is None
    assert_same_conversion(copy, original)
    (copy / "model.safetensors").unlink()
    refuse(copy, f"{SHARDS[0]} is missing, but {INDEX} lists it")


def test_weights_of_another_name_or_form_are_named(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "janus.safetensors")
    refuse(copy, "holds no weights", "rename it to model.safetensors")
    (copy / "janus.safetensors").rename(copy / "janus.gguf")
    (copy / "training_args.bin").write_bytes(b"x")
    refuse(copy, "holds no weights", "janus.gguf is of a form that is not read")


# Repeated and tied tensors


def test_a_tensor_in_two_files_is_accepted_if_it_is_equal(copy: Path) -> None:
    original = converted(copy)
    split(copy, repeat=lambda array: array)
    assert_same_conversion(copy, original)
    arrays = read(copy / SHARDS[0])
    weight_map = {name: SHARDS[int(name not in arrays)] for name in source_tensors(copy)}
    (copy / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert_same_conversion(copy, original)


@pytest.mark.parametrize(
    "change",
    [lambda array: array + 1, lambda array: array[:1], lambda array: array.astype(mx.float32)],
)
def test_a_tensor_in_two_files_is_refused_if_it_differs(
    copy: Path, change: Callable[[mx.array], mx.array]
) -> None:
    split(copy, repeat=change)
    refuse(copy, "stands in model-00001-of-00002.safetensors and, with other values", "mixes two")


def test_a_tensor_under_two_names_is_accepted_if_it_is_equal(tmp_path: Path) -> None:
    """DeepSeek's name of a tensor, next to transformers' name of the same one."""
    folder = Path(shutil.copytree(TRANSFORMERS, tmp_path / "copy"))
    original = converted(folder)
    arrays = read(folder / "model.safetensors")
    arrays[EMBEDDING] = arrays["model.language_model.embed_tokens.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    assert_same_conversion(folder, original)
    arrays[EMBEDDING] = arrays[EMBEDDING] + 1
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    refuse(folder, EMBEDDING, "under two names and with two values")


def test_equal_bits_count_and_not_equal_values() -> None:
    nan = mx.array([float("nan"), 0.0])
    assert same_bits(nan, nan)
    assert not same_bits(mx.array([0.0]), mx.array([-0.0]))
    for dtype in (mx.bool_, mx.int64, mx.uint8, mx.float16):
        assert same_bits(mx.ones(3, dtype), mx.ones(3, dtype))


def edit_config(folder: Path, *section: str, **entries: object) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    target = data
    for key in section:
        target = target[key]
    target.update(entries)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("absent", [HEAD, EMBEDDING])
@pytest.mark.parametrize("section", [("language_config",), ()])
def test_a_tied_head_of_deepseeks_layout_is_the_embedding(
    copy: Path, absent: str, section: tuple[str, ...]
) -> None:
    arrays = read(copy / "model.safetensors")
    del arrays[absent]
    mx.save_safetensors(str(copy / "model.safetensors"), arrays)
    refuse(copy, f"lacks '{absent}'")  # the config does not say that it is tied
    edit_config(copy, *section, tie_word_embeddings=True)
    result = converted(copy)
    assert same_bits(result[HEAD], result[EMBEDDING])
    # The language model's own entry decides.
    edit_config(copy, tie_word_embeddings=True)
    edit_config(copy, "language_config", tie_word_embeddings=False)
    refuse(copy, f"lacks '{absent}'")


# Git LFS pointers

POINTERS = [
    b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n",
    b"version https://git-lfs.github.com/spec/v1\r\next-0-foo sha256:a\r\noid sha256:abc\r\n",
    b"version https://hawser.github.com/spec/v1\noid sha256:abc\nsize 123\n",
    b"/annex/objects/SHA256E-s4180--abc.safetensors\n",
]


@pytest.mark.parametrize("pointer", POINTERS)
@pytest.mark.parametrize(
    ("source", "name"),
    [
        (SAFETENSORS, "model.safetensors"),
        (SAFETENSORS, "tokenizer.json"),
        (SAFETENSORS, "config.json"),
        (SAFETENSORS, "preprocessor_config.json"),
        (TRANSFORMERS, "chat_template.jinja"),
        (BINS, "pytorch_model-00002-of-00002.bin"),
        (BINS, "pytorch_model.bin.index.json"),
    ],
)
def test_git_lfs_pointers_are_named(
    tmp_path: Path, source: Path, name: str, pointer: bytes
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "clone"))
    (folder / name).write_bytes(pointer)
    refuse(folder, f"{folder / name}", "is a Git LFS pointer", "git lfs pull")


# Other programs' conversions, and unknown types


def test_weights_in_mlx_layout_are_named(copy: Path) -> None:
    arrays = read(copy / "model.safetensors")
    for name, array in arrays.items():
        if array.ndim == 4:
            arrays[name] = mx.contiguous(array.transpose(0, 2, 3, 1))
    mx.save_safetensors(str(copy / "model.safetensors"), arrays)
    refuse(copy, "is in MLX's layout already", "take the original model")


def test_values_of_an_unknown_type_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.ones(3, np.uint16), "b": np.ones(2, np.uint8)}, path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["b"]["dtype"] = "F8_E4M3"
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])
    entries, _ = read_safetensors_header(path)
    assert entries["a"].read().tolist() == [1, 1, 1]
    with pytest.raises(CheckpointError, match=r"x\.safetensors holds values of the type 'F8_E4M3'"):
        entries["b"].read()


# Configs


@pytest.mark.parametrize("value", [10**400, -(10**400), 1e308, float("nan"), True, "4", None])
@pytest.mark.parametrize("key", ["width", "mlp_ratio"])
def test_impossible_widths_of_the_vision_encoder(copy: Path, key: str, value: object) -> None:
    edit_config(copy, "vision_config", "params", **{key: value})
    refuse(copy, key if value is None else "")
    with pytest.raises(JanusError):
        read_published_config(copy)


@pytest.mark.parametrize(
    ("source", "section", "key"),
    [
        (SAFETENSORS, "language_config", "rms_norm_eps"),
        (TRANSFORMERS, "vision_config", "layer_norm_eps"),
    ],
)
def test_an_epsilon_of_0_is_refused(tmp_path: Path, source: Path, section: str, key: str) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    edit_config(folder, section, **{key: 0})
    refuse(folder, key, "from 1e-12 to 1")
