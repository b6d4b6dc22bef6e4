"""The cache of conversions: equal weights are converted once, and old conversions are known."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlx_janus
from mlx_janus.config import JanusConfig
from mlx_janus.errors import CheckpointError, ConfigError, OutputError
from mlx_janus.weights import conversions, hub, sources
from mlx_janus.weights.cache import list_models
from mlx_janus.weights.convert import ConvertOptions, Source
from mlx_janus.weights.folder import source_hashes
from mlx_janus.weights.sources import find_converted
from mlx_janus.weights.verify import verify_conversion
from tests.support.fake_hub import FakeHub
from tests.support.golden import FIXTURES

SOURCE = FIXTURES / "deepseek-janus-safetensors"
TRANSFORMERS = FIXTURES / "transformers"
ID = "someone/Janus-Small"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of conversions, not there yet."""
    monkeypatch.setenv("MLX_JANUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(cache: Path, tmp_path: Path) -> Path:
    """A PyTorch folder that a test may change."""
    return Path(shutil.copytree(SOURCE, tmp_path / "src"))


@pytest.fixture
def conversions_made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders for which weights were converted, in order."""
    made: list[Path] = []
    convert = sources.convert_checkpoint

    def noted(source: Source, output: Path, *arguments: Any) -> object:
        made.append(output)
        return convert(source, output, *arguments)

    monkeypatch.setattr(sources, "convert_checkpoint", noted)
    return made


def touch(path: Path) -> None:
    """Give a file a new modification time."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))


def edit_json(path: Path, **entries: object) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**data, **entries}))


def states() -> dict[Path, str]:
    return {entry.path: entry.state for entry in list_models() if entry.place == "cache"}


def inode(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_ino


# One conversion


def test_files_that_conversion_does_not_read_change_nothing(
    source: Path, cache: Path, conversions_made: list[Path]
) -> None:
    first = find_converted(source)
    (source / "notes.json").write_text("{}")
    (source / "trainer_state.json").write_text('{"steps": 3}')
    (source / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "b.bin"}}')
    (source / "README.md").write_text("x")
    for path in source.iterdir():
        touch(path)
    edit_json(source / "tokenizer_config.json", added_by_another_tool=True)
    data = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(data, indent=8, sort_keys=True))
    assert find_converted(source) == first
    assert conversions_made == [first]
    assert list(cache.iterdir()) == [first]


def test_a_touched_or_rewritten_tokenizer_changes_nothing(
    source: Path, conversions_made: list[Path]
) -> None:
    first = find_converted(source)
    data = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").write_text(json.dumps(data, indent=1))
    assert find_converted(source) == first
    assert conversions_made == [first]


def test_weights_that_are_touched_moved_copied_or_renamed_are_not_converted_again(
    source: Path, tmp_path: Path, cache: Path, conversions_made: list[Path]
) -> None:
    first = find_converted(source)
    touch(source / "model.safetensors")
    assert find_converted(source) == first
    moved = source.rename(tmp_path / "moved")
    assert find_converted(moved) == first
    (moved / "model.safetensors").rename(moved / "model-00001-of-00001.safetensors")
    assert find_converted(moved) == first
    assert conversions_made == [first]
    assert list(cache.iterdir()) == [first]
    assert verify_conversion(Source(moved, "moved"), first) > 0
    # Each of these states is known afterwards, and nothing is hashed again.
    assert find_converted(moved, progress=lambda *_: pytest.fail("hashed")) == first


def test_a_read_only_cache_needs_no_record(source: Path) -> None:
    first = find_converted(source)
    for record in first.glob("source-*.json"):
        record.unlink()
    first.chmod(0o500)
    try:
        assert find_converted(source, progress=lambda *_: pytest.fail("hashed")) == first
    finally:
        first.chmod(0o700)


def test_bits_and_casts_have_conversions_of_their_own(
    source: Path, conversions_made: list[Path]
) -> None:
    folders = {find_converted(source), find_converted(source, bits=4)}
    folders |= {find_converted(source, recipe="light"), find_converted(source, bits=8)}
    assert len(folders) == len(conversions_made) == 4
    touch(source / "model.safetensors")
    assert find_converted(source, bits=4) in folders
    assert len(conversions_made) == 4
    assert set(states().values()) == {"converted"}


def test_changed_weights_are_converted_and_the_old_conversion_is_superseded(
    source: Path, conversions_made: list[Path]
) -> None:
    first = find_converted(source)
    quantized = find_converted(source, bits=8)
    arrays = mx.load(str(source / "model.safetensors"))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    name = "language_model.model.norm.weight"
    mx.save_safetensors(str(source / "model.safetensors"), {**arrays, name: arrays[name] + 1})
    second = find_converted(source)
    assert conversions_made == [first, quantized, second]
    assert states() == {first: "superseded", quantized: "converted", second: "converted"}
    assert verify_conversion(Source(source, "src"), second) > 0
    with pytest.raises(CheckpointError, match="is not the file"):
        verify_conversion(Source(source, "src"), first)


def test_weights_that_do_not_fit_a_changed_config_are_refused(
    source: Path, cache: Path, tmp_path: Path
) -> None:
    find_converted(source)
    other = Path(shutil.copytree(source, tmp_path / "other"))
    data = json.loads((other / "config.json").read_text())
    data["language_config"]["vocab_size"] = 641
    (other / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="has the shape"):
        find_converted(other)
    data["language_config"]["vocab_size"] = 640
    (other / "config.json").write_text(json.dumps(data))
    arrays = mx.load(str(other / "model.safetensors"))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    arrays.pop("gen_embed.weight")
    mx.save_safetensors(str(other / "model.safetensors"), arrays)
    with pytest.raises(CheckpointError, match=r"lacks 'gen_embed\.weight'"):
        find_converted(other)
    assert len(list(cache.iterdir())) == 1


# The same weights with another config


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("generation_config.json", {"guidance_scale": 3.0}),
        ("preprocessor_config.json", {"min_size": 20}),
        ("tokenizer_config.json", {"eos_token": "<|User|>"}),
    ],
)
def test_another_config_takes_the_weights_over(
    source: Path, conversions_made: list[Path], name: str, entries: dict[str, Any]
) -> None:
    first = find_converted(source)
    before = JanusConfig.load(first / "config.json")
    edit_json(source / name, **entries)
    second = find_converted(source)
    assert second != first
    assert JanusConfig.load(second / "config.json") != before
    assert JanusConfig.load(first / "config.json") == before
    assert conversions_made == [first]
    assert inode(first) == inode(second)
    assert states() == {first: "superseded", second: "converted"}
    assert verify_conversion(Source(source, "src"), second) > 0
    with pytest.raises(CheckpointError, match="does not say what"):
        verify_conversion(Source(source, "src"), first)
    mlx_janus.load(source).generate_text("Hi?", max_tokens=2)


def test_going_back_to_the_old_config_takes_the_old_conversion(source: Path) -> None:
    first = find_converted(source)
    edit_json(source / "generation_config.json", guidance_scale=3.0)
    second = find_converted(source)
    (source / "generation_config.json").unlink()
    os.utime(next(second.glob("source-*.json")), (1, 1))  # the clock may be coarse
    assert find_converted(source) == first
    assert states() == {first: "converted", second: "superseded"}


def test_another_tokenizer_takes_the_weights_over(
    source: Path, conversions_made: list[Path]
) -> None:
    first = find_converted(source)
    data = json.loads((source / "tokenizer.json").read_text())
    last = data["added_tokens"][-1]
    data["added_tokens"].append({**last, "id": last["id"] + 1, "content": "<one_more>"})
    (source / "tokenizer.json").write_text(json.dumps(data))
    second = find_converted(source)
    assert "<one_more>" in (second / "tokenizer.json").read_text()
    assert "<one_more>" not in (first / "tokenizer.json").read_text()
    assert inode(first) == inode(second)
    assert conversions_made == [first]


def test_shards_are_taken_over_with_their_index(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_janus.weights.convert.SHARD_BYTES", 600_000)
    first = find_converted(source)
    edit_json(source / "generation_config.json", guidance_scale=3.0)
    second = find_converted(source)
    names = sorted(path.name for path in first.glob("model*"))
    assert len(names) > 3
    assert sorted(path.name for path in second.glob("model*")) == names
    assert mlx_janus.load(second).config.generation.cfg_weight == 3.0  # type: ignore[attr-defined]


def test_without_hard_links_the_weights_are_copied(
    source: Path, monkeypatch: pytest.MonkeyPatch, conversions_made: list[Path]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(conversions.os, "link", refuse)
    first = find_converted(source)
    edit_json(source / "generation_config.json", guidance_scale=3.0)
    second = find_converted(source)
    assert conversions_made == [first]
    assert inode(first) != inode(second)
    content = (first / "model.safetensors").read_bytes()
    assert (second / "model.safetensors").read_bytes() == content


def test_a_failure_while_weights_are_taken_over_leaves_nothing(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = find_converted(source)
    edit_json(source / "generation_config.json", guidance_scale=3.0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(JanusConfig, "dump", full)
    with pytest.raises(OutputError, match="No space left on device"):
        find_converted(source)
    assert list(cache.iterdir()) == [first]


def test_two_sources_of_one_conversion_keep_it_until_both_have_changed(
    source: Path, tmp_path: Path
) -> None:
    first = find_converted(source)
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    assert find_converted(copy) == first
    edit_json(source / "generation_config.json", guidance_scale=3.0)
    second = find_converted(source)
    assert states() == {first: "converted", second: "converted"}
    edit_json(copy / "generation_config.json", guidance_scale=3.0)
    assert find_converted(copy) == second
    assert states() == {first: "superseded", second: "converted"}


def test_damaged_conversions_and_records_do_no_harm(
    source: Path, tmp_path: Path, cache: Path, conversions_made: list[Path]
) -> None:
    first = find_converted(source)
    (cache / "x-0123456789abcdef").mkdir()
    (cache / "y-0123456789abcdef").mkdir()
    (cache / "y-0123456789abcdef" / "config.json").write_text("{ broken")
    for record in first.glob("source-*.json"):
        record.write_text("{ broken")
    assert find_converted(source) == first
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    (first / "source-0123456789abcdef.json").write_text("[]")
    assert find_converted(copy) == first
    (first / "model.safetensors").write_bytes(b"damaged")
    touch(copy / "model.safetensors")
    assert find_converted(copy) != first
    assert len(conversions_made) == 2


def test_conversions_of_an_earlier_release_are_taken_and_their_copies_superseded(
    source: Path, cache: Path, conversions_made: list[Path]
) -> None:
    first = find_converted(source)
    for record in first.glob("source-*.json"):
        record.unlink()
    old = first.rename(cache / "src-0000000000000000")  # the names had another hash
    duplicate = Path(shutil.copytree(old, cache / "src-1111111111111111"))
    found = find_converted(source)
    assert found in (old, duplicate)
    assert conversions_made == [first]
    assert states() == dict.fromkeys((old, duplicate), "superseded") | {found: "converted"}


# Names of folders


def test_a_folder_at_the_root_is_converted_into_the_cache(cache: Path) -> None:
    """Its path has one slash, as a Hub id has."""
    state = conversions.SourceState("/models", "", "models", "", (), ConvertOptions(bits=4))
    assert state.folder.parent == cache
    assert state.folder.name.startswith("models-4bit-")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("me/janus", "me--janus-"),
        ("a" * 255, "a" * 100 + "-"),
        ("ä" * 127, "ä" * 50 + "-"),
        ("x" + "ä" * 60, "x" + "ä" * 49 + "-"),
        ("bad\udcffname", "bad?name-"),
    ],
)
def test_labels_are_short_and_text(cache: Path, name: str, label: str) -> None:
    state = conversions.SourceState("/x", "", name, "", (), ConvertOptions())
    assert state.folder.name.startswith(label)
    assert conversions.CONVERSION_NAME.fullmatch(state.folder.name)
    assert len(state.folder.name.encode()) < 150


# The Hub


@pytest.fixture
def served(fake_hub: FakeHub, source: Path) -> Path:
    fake_hub.add(ID, source)
    return source


def weight_downloads(fake_hub: FakeHub) -> int:
    return sum("safetensors" in name for name in fake_hub.downloads())


def test_a_commit_with_the_same_weights_is_not_converted_again(
    fake_hub: FakeHub, served: Path, conversions_made: list[Path]
) -> None:
    first = find_converted(ID)
    (served / "README.md").write_text("# Janus")
    assert find_converted(ID) == first
    edit_json(served / "generation_config.json", guidance_scale=3.0)
    second = find_converted(ID)
    assert inode(first) == inode(second)
    assert conversions_made == [first]
    assert weight_downloads(fake_hub) == 1
    assert states() == {first: "superseded", second: "converted"}
    commit = hub.find(ID).revision
    (entry,) = (entry for entry in list_models() if entry.path == second)
    assert (entry.source, entry.revision) == (ID, commit)


def test_a_commit_with_the_same_weights_is_not_downloaded_again(
    fake_hub: FakeHub, served: Path, conversions_made: list[Path]
) -> None:
    """The download may be removed once it is converted."""
    first = find_converted(ID)
    shutil.rmtree(os.environ["HF_HUB_CACHE"])
    edit_json(served / "generation_config.json", guidance_scale=3.0)
    second = find_converted(ID)
    assert JanusConfig.load(second / "config.json").generation.cfg_weight == 3.0  # type: ignore[attr-defined]
    assert inode(first) == inode(second)
    assert weight_downloads(fake_hub) == 1
    fake_hub.stop()
    assert find_converted(ID, progress=lambda *_: pytest.fail("hashed")) == second


def test_a_revision_that_was_named_is_not_superseded_by_main(
    fake_hub: FakeHub, served: Path
) -> None:
    commit = hub.find(ID).revision
    pinned = find_converted(f"{ID}@{commit}")
    edit_json(served / "generation_config.json", guidance_scale=3.0)
    fake_hub.add(ID, Path(shutil.copytree(SOURCE, served.parent / "v1")), revision="v1")
    newest = find_converted(ID)
    assert set(states().values()) == {"converted"}
    assert find_converted(f"{ID}@v1") == pinned
    assert pinned != newest


def test_a_local_copy_of_a_download_is_not_converted_again(
    fake_hub: FakeHub, served: Path, conversions_made: list[Path]
) -> None:
    first = find_converted(ID)
    assert find_converted(served) == first
    assert find_converted(hub.fetch(hub.find(ID)).parent.parent) == first  # the Hub's folder
    assert conversions_made == [first]


def test_another_model_of_the_same_sizes_is_converted(
    fake_hub: FakeHub, served: Path, tmp_path: Path, conversions_made: list[Path]
) -> None:
    find_converted(ID)
    other = Path(shutil.copytree(served, tmp_path / "tuned"))
    arrays = mx.load(str(other / "model.safetensors"))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    name = "language_model.model.norm.weight"
    mx.save_safetensors(str(other / "model.safetensors"), {**arrays, name: arrays[name] + 1})
    fake_hub.add("someone/tuned", other)
    find_converted("someone/tuned")
    assert len(set(conversions_made)) == 2


# Verifying and hashing


def test_the_hashes_of_a_source_are_taken_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_converted(source)
    other = Path(shutil.copytree(source, tmp_path / "tuned"))
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    calls: list[Path] = []

    def counted(folder: Path, progress: Any) -> dict[str, str]:
        calls.append(folder)
        return source_hashes(folder, progress)

    monkeypatch.setattr(sources, "source_hashes", counted)
    monkeypatch.setattr("mlx_janus.weights.convert.source_hashes", counted)
    stages: list[str] = []
    folder = find_converted(other, progress=lambda stage, *_: stages.append(stage))
    assert calls == [other]
    assert stages.count("hashing") > 0
    assert verify_conversion(Source(other, "x"), folder) > 0


def test_a_damaged_config_in_the_cache_is_an_error_of_its_own(source: Path) -> None:
    folder = find_converted(source)
    (folder / "config.json").write_text("{ broken")
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        find_converted(source)
