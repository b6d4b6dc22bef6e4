"""Finding and downloading models, against a fake Hub on this machine."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from mlx_janus.errors import CheckpointError, ConfigError, HubError, JanusError, OutputError
from mlx_janus.weights import hub
from tests.support.fake_hub import TOKEN, FakeHub
from tests.support.golden import FIXTURES

ID = "someone/tiny"
TEXTS = ["chat_template.jinja", "config.json", "tokenizer.json", "tokenizer.model"]
NOISE = [
    "README.md",
    "janus.png",
    "training_args.bin",
    "consolidated.pt",
    "model.onnx",
    "adapter_model.safetensors",
]
SHARDS = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]


def make_folder(
    folder: Path, *weights: str, index: str | None = None, listed: list[str] | None = None
) -> Path:
    (folder / "onnx").mkdir(parents=True)
    for name in [*TEXTS, *NOISE, *weights, "onnx/config.json"]:
        (folder / name).write_bytes(
            b"{}" + os.urandom(8) if name != "config.json" else b'{"model_type": "x"}'
        )
    if index:
        weight_map = {f"tensor.{i}": name for i, name in enumerate(listed or list(weights))}
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def served(fake_hub: FakeHub, tmp_path: Path) -> Path:
    """A small model with safetensors, at ``ID``."""
    folder = make_folder(tmp_path / "served", "model.safetensors")
    fake_hub.add(ID, folder)
    return folder


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("deepseek-ai/Janus-Pro-1B", True),
        ("a/b", True),
        ("Janus-Pro-1B", False),
        ("a/b/c", False),
        ("./a", False),
        ("../a", False),
        ("/a/b", False),
        ("a/..", False),
        ("a b/c", False),
        ("~/models", False),
        ("a/b\n", False),
        ("", False),
    ],
)
def test_hub_ids(text: str, is_id: bool) -> None:
    assert (hub.HUB_ID.fullmatch(text) is not None) == is_id


def test_find_makes_one_call(fake_hub: FakeHub, served: Path) -> None:
    model = hub.find(ID)
    assert fake_hub.requests == [f"GET /api/models/{ID}"]
    assert (model.repo_id, model.cached) == (ID, False)
    assert len(model.revision) == 40
    assert model.files == {name: (served / name).stat().st_size for name in names(served)}
    assert hub.find(ID, "main") == hub.find(ID, model.revision) == model


def test_config_comes_alone_and_first(fake_hub: FakeHub, served: Path) -> None:
    path = hub.fetch_config(hub.find(ID))
    assert path.read_bytes() == (served / "config.json").read_bytes()
    assert fake_hub.downloads() == ["config.json"]


def test_only_what_is_needed_is_downloaded(fake_hub: FakeHub, served: Path) -> None:
    folder = hub.fetch(hub.find(ID))
    assert names(folder) == sorted([*TEXTS, "model.safetensors"])
    assert sorted(fake_hub.downloads()) == sorted([*TEXTS, "model.safetensors"])
    fake_hub.requests.clear()
    assert hub.fetch(hub.find(ID)) == folder
    assert fake_hub.downloads() == []


@pytest.mark.parametrize(
    ("weights", "index", "listed", "expected"),
    [
        (["model.safetensors", "pytorch_model.bin"], None, None, ["model.safetensors"]),
        (
            ["model.safetensors", *SHARDS],
            "pytorch_model.bin.index.json",
            SHARDS,
            ["model.safetensors"],
        ),
        (["model.safetensors", "model.fp16.safetensors"], None, None, ["model.safetensors"]),
        (["pytorch_model.bin"], None, None, ["pytorch_model.bin"]),
        (SHARDS, "pytorch_model.bin.index.json", None, [*SHARDS, "pytorch_model.bin.index.json"]),
        (SHARDS, None, None, SHARDS),
        (
            ["pytorch_model.bin", SHARDS[0]],
            "pytorch_model.bin.index.json",
            SHARDS,
            ["pytorch_model.bin", "pytorch_model.bin.index.json"],  # read to see what it lists
        ),
        (
            ["model-1.safetensors", "model-2.safetensors", "pytorch_model.bin"],
            "model.safetensors.index.json",
            ["model-1.safetensors", "model-2.safetensors"],
            ["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"],
        ),
    ],
)
def test_weights_come_in_one_form(
    fake_hub: FakeHub,
    tmp_path: Path,
    weights: list[str],
    index: str | None,
    listed: list[str] | None,
    expected: list[str],
) -> None:
    fake_hub.add(ID, make_folder(tmp_path / "served", *weights, index=index, listed=listed))
    assert names(hub.fetch(hub.find(ID))) == sorted([*TEXTS, *expected])


def test_the_published_layouts_arrive_whole(fake_hub: FakeHub) -> None:
    for name in ("deepseek-janus-safetensors", "deepseek-pro-bin", "transformers"):
        if not (FIXTURES / name).is_dir():
            continue
        fake_hub.add(f"someone/{name}", FIXTURES / name)
        folder = hub.fetch(hub.find(f"someone/{name}"))
        assert names(folder) == names(FIXTURES / name)


def test_a_shard_that_is_not_there_is_named_before_the_download(
    fake_hub: FakeHub, tmp_path: Path
) -> None:
    folder = make_folder(
        tmp_path / "served", SHARDS[0], index="pytorch_model.bin.index.json", listed=SHARDS
    )
    fake_hub.add(ID, folder)
    with pytest.raises(
        CheckpointError, match=f"{SHARDS[1]}, which its pytorch_model.bin.index.json lists"
    ):
        hub.fetch(hub.find(ID))
    assert fake_hub.downloads() == ["pytorch_model.bin.index.json"]


def test_a_shard_without_an_index_that_is_not_there_is_named(
    fake_hub: FakeHub, tmp_path: Path
) -> None:
    fake_hub.add(ID, make_folder(tmp_path / "served", SHARDS[0]))
    with pytest.raises(CheckpointError, match=f"{ID} lacks {SHARDS[1]}: name another model"):
        hub.fetch(hub.find(ID))


def test_an_index_cannot_point_out_of_its_folder(fake_hub: FakeHub, tmp_path: Path) -> None:
    folder = make_folder(
        tmp_path / "served", index="model.safetensors.index.json", listed=["../../secret"]
    )
    fake_hub.add(ID, folder)
    with pytest.raises(CheckpointError, match=r"lacks \.\./\.\./secret"):
        hub.fetch(hub.find(ID))


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_map(fake_hub: FakeHub, tmp_path: Path, text: str) -> None:
    folder = make_folder(tmp_path / "served")
    (folder / "model.safetensors.index.json").write_text(text)
    fake_hub.add(ID, folder)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        hub.fetch(hub.find(ID))


def test_a_repository_without_weights_or_config(fake_hub: FakeHub, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "served")
    fake_hub.add(ID, folder)
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor pytorch_model.bin"):
        hub.fetch(hub.find(ID))
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config.json"):
        hub.fetch_config(hub.find(ID))


def one_line(error: pytest.ExceptionInfo[JanusError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_wrong_names_and_revisions(served: Path) -> None:
    for wrong in ("tiny", "../x", "a/b/c", "a/b--c..d"):
        with pytest.raises(HubError, match="owner/name"):
            hub.find(wrong)
    with pytest.raises(HubError) as error:
        hub.find("someone/absent")
    assert "someone/absent" in one_line(error)
    assert "deepseek-ai/Janus-Pro-1B" in one_line(error)
    assert "hf auth login" in one_line(error)
    with pytest.raises(HubError, match="no revision 'v9'"):
        hub.find(ID, "v9")


def test_private_and_gated(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "served", "model.safetensors")
    fake_hub.add("someone/private", folder, private=True)
    fake_hub.add("someone/gated", folder, gated=True)
    with pytest.raises(HubError, match="hf auth login"):
        hub.find("someone/private")
    model = hub.find("someone/gated")
    with pytest.raises(HubError, match=r"accept its terms at .*someone/gated.*hf auth login"):
        hub.fetch_config(model)
    with pytest.raises(HubError, match="gated"):
        hub.fetch(model)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    assert hub.fetch(hub.find("someone/private")).is_dir()
    assert hub.fetch(model).is_dir()


@pytest.mark.parametrize(
    ("status", "fix"), [(401, "hf auth login"), (403, "HF_TOKEN"), (418, "check the name")]
)
def test_a_refusal_is_not_taken_for_being_offline(
    fake_hub: FakeHub, served: Path, status: int, fix: str
) -> None:
    hub.fetch(hub.find(ID))
    fake_hub.status = status
    with pytest.raises(HubError, match=fix) as error:
        hub.find(ID)
    assert f"HTTP {status}" in one_line(error)


def test_offline_the_cache_does(fake_hub: FakeHub, served: Path) -> None:
    online = hub.find(ID)
    folder = hub.fetch(online)
    fake_hub.stop()
    model = hub.find(ID, online.revision)
    assert (model.revision, model.cached) == (online.revision, True)
    assert sorted(model.files) == names(folder)
    assert hub.fetch_config(model) == folder / "config.json"
    assert hub.fetch(model) == folder
    assert hub.fetch(online) == folder  # the network may also go away between the two


@pytest.mark.parametrize("revision", [None, "main"])
def test_offline_a_branch_is_the_commit_last_seen(
    fake_hub: FakeHub, served: Path, revision: str | None
) -> None:
    folder = hub.fetch(hub.find(ID, revision))
    (served / "config.json").write_text("{}")
    newer = hub.find(ID, revision)
    hub.fetch_config(newer)  # and no more of it
    assert newer.revision != folder.name
    fake_hub.stop()
    assert hub.fetch(hub.find(ID, revision)) == folder


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_down_counts_as_offline(fake_hub: FakeHub, served: Path, status: int) -> None:
    fake_hub.status = status
    with pytest.raises(HubError, match=f"HTTP {status}.*later"):
        hub.find(ID)
    fake_hub.status = None
    folder = hub.fetch(hub.find(ID))
    fake_hub.status = status
    assert hub.fetch(hub.find(ID)) == folder


def test_offline_without_a_cache(
    fake_hub: FakeHub, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hub.find(ID)
    fake_hub.stop()
    with pytest.raises(HubError, match="cannot be reached") as error:
        hub.find(ID)
    assert "check the connection" in one_line(error)
    for step in (hub.fetch_config, hub.fetch):
        with pytest.raises(HubError, match="cannot be reached") as error:
            step(model)
        one_line(error)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set") as error:
        hub.find(ID)
    assert "unset it" in one_line(error)


def test_offline_with_a_part_of_the_model(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.add(
        ID, make_folder(tmp_path / "served", *SHARDS, index="pytorch_model.bin.index.json")
    )
    online = hub.find(ID)
    hub.fetch_config(online)
    fake_hub.status = 503
    with pytest.raises(HubError, match=r"holds only a part .* when online"):
        hub.fetch(hub.find(ID, online.revision))
    fake_hub.status = None
    folder = hub.fetch(online)
    (folder / SHARDS[1]).unlink()
    fake_hub.stop()
    with pytest.raises(HubError, match=r"holds only a part .* when online"):
        hub.fetch(hub.find(ID, online.revision))


def test_a_broken_download_goes_on_when_run_again(fake_hub: FakeHub, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "served", *SHARDS, index="pytorch_model.bin.index.json")
    (folder / SHARDS[1]).write_bytes(os.urandom(500_000))
    fake_hub.add(ID, folder)
    fake_hub.fail_after_bytes = 200_000
    with pytest.raises(HubError, match="run the same again") as error:
        hub.fetch(hub.find(ID))
    one_line(error)
    fake_hub.fail_after_bytes = None
    whole = {name for name in names(folder) if fake_hub.downloads().count(name)} - {SHARDS[1]}
    fake_hub.requests.clear()
    assert (hub.fetch(hub.find(ID)) / SHARDS[1]).read_bytes() == (folder / SHARDS[1]).read_bytes()
    assert fake_hub.downloads().count(SHARDS[1]) == 1
    assert "pytorch_model.bin.index.json" in whole
    assert "pytorch_model.bin.index.json" not in fake_hub.downloads()


Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_seen_before_the_download(
    fake_hub: FakeHub, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (served / "model.safetensors").write_bytes(os.urandom(30_000_000))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: Usage(40_000_000, 20_000_000, 20_000_000)
    )
    model = hub.find(ID)
    with pytest.raises(OutputError, match=r"0.03 GB more .* 0.02 GB are free.*HF_HOME") as error:
        hub.fetch(model)
    one_line(error)
    assert fake_hub.downloads() == []


def test_what_is_in_the_cache_needs_no_room(
    fake_hub: FakeHub, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hub.fetch(hub.find(ID))
    (served / "config.json").write_text("{}")  # a new commit with the same weights
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 98, 2))
    model = hub.find(ID)
    assert model.revision != first.name
    assert hub._check_disk(model, ["config.json", "model.safetensors"]) is None


@pytest.mark.parametrize(
    ("number", "kind", "fix"),
    [
        (errno.ENOSPC, OutputError, "disk of .* is full"),
        (errno.EACCES, OutputError, "cannot be written"),
        (errno.EROFS, OutputError, "cannot be written"),
        (errno.EIO, HubError, "run the same again"),
    ],
)
def test_a_disk_that_fails(
    served: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_hub: FakeHub,
    number: int,
    kind: type[JanusError],
    fix: str,
) -> None:
    model = hub.find(ID)

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(kind, match=fix) as error:
        hub.fetch(model)
    one_line(error)


def test_a_cache_that_cannot_be_written(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(OutputError, match="HF_HOME"):
        hub.fetch(hub.find(ID))


def test_importing_it_does_not_import_huggingface_hub() -> None:
    code = "import sys, mlx_janus.weights.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
