"""``models`` and ``doctor``, short names, and uploads of converted folders."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlx_janus
from mlx_janus import memory
from mlx_janus.__main__ import main as group
from mlx_janus.commands import diagnosis
from mlx_janus.commands import models as at_hand
from mlx_janus.errors import HubError, OutputError
from mlx_janus.weights import cache
from mlx_janus.weights.atomic_folder import MARK_FILE
from mlx_janus.weights.cache import ModelEntry, find_models, freed_bytes, list_models, remove_model
from mlx_janus.weights.convert import Source
from mlx_janus.weights.sources import (
    SHORT_NAMES,
    TINY,
    find_converted,
    find_source,
    resolve_short_name,
)
from mlx_janus.weights.upload import model_card, upload_converted
from tests.support.fake_hub import TOKEN, FakeHub, Repo
from tests.support.golden import FIXTURES
from tests.support.programs import call, error_line, run

PRO = FIXTURES / "deepseek-pro-bin"
SAFETENSORS = FIXTURES / "deepseek-janus-safetensors"
ID = "someone/Janus-Small"
CARD = "---\nlicense: mit\nlicense_name: deepseek\nlicense_link: LICENSE\n---\n# Janus\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of conversions, not there yet."""
    monkeypatch.setenv("MLX_JANUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def served(fake_hub: FakeHub, folder: Path, tmp_path: Path) -> Path:
    """A small model with a card, at ``ID`` on the Hub."""
    copy = Path(shutil.copytree(SAFETENSORS, tmp_path / "served"))
    (copy / "README.md").write_text(CARD)
    fake_hub.add(ID, copy)
    return copy


def states() -> list[tuple[str, str]]:
    return [(entry.source, entry.state) for entry in list_models()]


def one(source: str, state: str) -> ModelEntry:
    (entry,) = (entry for entry in list_models() if (entry.source, entry.state) == (source, state))
    return entry


# Short names


def test_short_names_stand_for_the_published_models_and_a_folder_here_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_short_name("Janus-Pro-7B") == "deepseek-ai/Janus-Pro-7B"
    assert (resolve_short_name("janus-1.3b"), resolve_short_name("janus-pro-1b")) == (
        SHORT_NAMES["janus-1.3b"],
        SHORT_NAMES["janus-pro-1b"],
    )
    assert resolve_short_name("someone/janus-pro-1b") == "someone/janus-pro-1b"
    (tmp_path / "tiny").write_text("a file does not win")
    assert find_converted("tiny") == TINY
    assert mlx_janus.load("tiny").name == "janus-tiny"
    (tmp_path / "tiny").unlink()
    shutil.copytree(PRO, tmp_path / "tiny")
    assert find_source("tiny").folder == Path("tiny")


def test_every_command_resolves_short_names(
    fake_hub: FakeHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_hub.add("deepseek-ai/Janus-Pro-1B", SAFETENSORS)
    assert (
        call(group, "generate", "-m", "janus-pro-1b", "--text", "-p", "Hi?", "--max-tokens", 2).code
        == 0
    )
    assert call(group, "convert", "janus-pro-1b", "here", "--bits", 8).code == 0
    assert [source for source, _ in states()] == ["deepseek-ai/Janus-Pro-1B"] * 2 + ["janus-tiny"]


# The list


def test_an_empty_machine_has_the_model_of_the_package(fake_hub: FakeHub, folder: Path) -> None:
    done = call(group, "models")
    assert (done.code, done.stderr) == (0, "")
    title, row = done.stdout.splitlines()
    assert title.split() == [
        "ID",
        "model",
        "commit",
        "state",
        "bits",
        "type",
        "size",
        "last",
        "used",
    ]
    assert row.split() == ["tiny", "janus-tiny", "in", "the", "package", "-", "float16", "8", "MB"]
    assert not folder.exists()


@pytest.mark.check
def test_the_list_tells_what_is_converted_and_downloaded(
    fake_hub: FakeHub, served: Path, folder: Path
) -> None:
    added = call(group, "models", "add", ID, "--bits", 4)
    converted = Path(added.stdout.strip())
    assert converted.parent == folder
    assert "converting: 100%" in added.stderr
    os.utime(converted / "config.json", (1_000_000_000, 1_000_000_000))
    (folder / "windows.json").write_text("{}")
    facts = {entry["state"]: entry for entry in json.loads(call(group, "models", "--json").stdout)}
    assert set(facts) == {"converted", "downloaded", "in the package"}
    ours, theirs = facts["converted"], facts["downloaded"]
    assert ours == {
        "id": converted.name[-16:-8],
        "model": ID,
        "commit": theirs["commit"],
        "state": "converted",
        "bits": 4,
        "recipe": None,
        "dtype": "bfloat16",
        "bytes": sum(file.stat().st_size for file in converted.iterdir()),
        "last_used": "2001-09-09T01:46:40Z",
        "path": str(converted),
    }
    assert (theirs["model"], theirs["bits"], theirs["id"]) == (ID, None, theirs["commit"][:8])
    assert theirs["bytes"] >= (served / "model.safetensors").stat().st_size
    line = next(line for line in call(group, "models").stdout.splitlines() if "converted" in line)
    assert line.split()[:6] == [ours["id"], ID, ours["commit"][:8], "converted", "4", "bfloat16"]


def test_a_model_is_added_by_a_recipe(folder: Path) -> None:
    assert call(group, "models", "add", PRO, "--recipe", "light").code == 0
    assert call(group, "models", "add", PRO, "--bits", 4, "--recipe", "light").code == 2
    (entry,) = (
        entry
        for entry in json.loads(call(group, "models", "--json").stdout)
        if entry["state"] == "converted"
    )
    assert (entry["bits"], entry["recipe"]) == (4, "light")
    row = next(line for line in call(group, "models").stdout.splitlines() if "converted" in line)
    assert row.split()[3] == "light"


def test_loading_a_model_is_its_last_use(folder: Path) -> None:
    converted = find_converted(PRO)
    os.utime(converted / "config.json", (1, 1))
    assert one(PRO.name, "converted").used == 1
    mlx_janus.load(PRO)
    assert one(PRO.name, "converted").used > 1_000_000_000  # type: ignore[operator]


def test_other_models_downloads_and_folders_are_not_listed(
    fake_hub: FakeHub, folder: Path, tmp_path: Path
) -> None:
    from huggingface_hub import hf_hub_download

    other = tmp_path / "other"
    other.mkdir()
    for repo, config in [
        ("a/llama", '{"model_type": "llama"}'),
        ("a/broken", "{"),
        ("a/list", "[]"),
    ]:
        (other / "config.json").write_text(config)
        fake_hub.add(repo, other)
        hf_hub_download(repo, "config.json")
    stranger = folder / "backup-0123456789abcdef"
    stranger.mkdir(parents=True)
    (stranger / "thesis.txt").write_text("x")
    (folder / "notes").mkdir()
    assert states() == [("janus-tiny", "in the package")]


def mark(path: Path) -> None:
    """Mark a hidden folder as a conversion that is under way does."""
    (path / MARK_FILE).write_text(f"mlx_janus: {path.name}: partial\n")


def test_what_is_not_whole_is_said(fake_hub: FakeHub, served: Path, folder: Path) -> None:
    from mlx_janus.weights import hub

    hub.fetch_config(hub.find(ID))
    damaged, left = (
        folder / "mine-0123456789abcdef",
        folder / ".mine-0123456789abcdef.999999999.89abcdef.partial",
    )
    running = folder / f".mine-0123456789abcdef.{os.getpid()}.00000000.partial"
    for path in (damaged, left, running):
        path.mkdir(parents=True)
        (path / "shard-0.safetensors").write_bytes(b"12345")
    for path in (left, running):
        mark(path)
    assert sorted(states()) == [
        ("janus-tiny", "in the package"),
        ("mine-0123456789abcdef", "left over"),
        ("mine-0123456789abcdef", "unreadable"),
        (ID, "partly downloaded"),
    ]
    assert [one("mine-0123456789abcdef", state).id for state in ("left over", "unreadable")] == [
        "89abcdef",
        "01234567",
    ]
    advice = next(finding.advice for finding in diagnosis.diagnose() if finding.about == "models")
    assert "mlx-janus models remove" in advice
    assert call(group, "models", "remove", "89abcdef", "--yes").code == 0
    assert (damaged.exists(), left.exists(), running.exists()) == (True, False, True)
    assert call(group, "models", "remove", "01234567", "--yes").code == 0
    assert [path.name for path in folder.iterdir()] == [running.name]


# Removing


def test_removing_a_model_names_what_goes_and_leaves_the_rest(served: Path, folder: Path) -> None:
    kept, goes = find_converted(PRO), find_converted(ID, bits=8)
    find_converted(ID)
    done = call(group, "models", "remove", goes.name[-16:-8], "--yes")
    assert (done.code, done.stdout) == (0, "")
    assert f"{ID}, converted: {goes}" in done.stderr
    assert not goes.exists()
    assert sorted(states()) == sorted(
        [
            (PRO.name, "converted"),
            (ID, "converted"),
            (ID, "downloaded"),
            ("janus-tiny", "in the package"),
        ]
    )
    assert call(group, "models", "remove", ID, "--downloads", "--yes").code == 0
    assert states() == [(PRO.name, "converted"), ("janus-tiny", "in the package")]
    assert list(folder.iterdir()) == [kept]


def test_a_download_goes_only_if_that_is_asked_for_and_shared_files_stay(
    fake_hub: FakeHub, served: Path, folder: Path
) -> None:
    find_converted(ID)
    (served / "tokenizer_config.json").write_text('{"new": 1}')  # a commit with the same weights
    find_converted(ID)
    older, newer = sorted(
        (entry for entry in list_models() if entry.is_download),
        key=lambda e: e.path.stat().st_ctime,
    )
    assert "--downloads" in error_line(call(group, "models", "remove", older.id, "--yes"))
    assert freed_bytes([older]) < older.size / 2
    assert freed_bytes([older, newer]) >= newer.size
    assert call(group, "models", "remove", older.id, "--downloads", "--yes").code == 0
    assert [entry.id for entry in list_models() if entry.is_download] == [newer.id]
    assert (newer.path / "model.safetensors").read_bytes() == (
        served / "model.safetensors"
    ).read_bytes()


def test_removing_needs_an_answer_and_something_to_remove(folder: Path) -> None:
    converted = find_converted(PRO)
    assert "pass --yes" in error_line(call(group, "models", "remove", PRO.name))
    assert "part of the package" in error_line(call(group, "models", "remove", "tiny", "--yes"))
    assert "no model 'absent' is here" in error_line(
        call(group, "models", "remove", "absent", "--yes")
    )
    assert call(group, "models", "--json", "remove", PRO.name).code == 2
    assert converted.exists()


def test_on_a_terminal_removing_asks(
    fake_hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = find_converted(PRO)
    size = memory.format_size(sum(file.stat().st_size for file in converted.iterdir()))
    monkeypatch.setattr(at_hand, "_on_terminal", lambda: True)
    for answer, code, exists in [("\n", 1, True), ("n\n", 1, True), ("y\n", 0, False)]:
        done = call(group, "models", "remove", PRO.name, stdin=answer)
        assert (done.code, converted.exists()) == (code, exists)
        assert f"Remove {size}? [y/N]" in done.stderr


def test_a_model_in_use_is_not_removed(folder: Path) -> None:
    janus = mlx_janus.load(PRO)  # which has its files open until the weights are read
    (entry,) = find_models(PRO.name)
    with pytest.raises(OutputError, match=f"in use by process {os.getpid()}"):
        remove_model(entry)
    assert entry.path.exists()
    mx.eval(janus.model.parameters())
    remove_model(entry)
    assert not entry.path.exists()


def test_a_removal_that_stops_leaves_nothing_that_looks_like_a_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = find_converted(PRO)

    def stop(path: Path) -> None:
        (path / "tokenizer.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        remove_model(one(PRO.name, "converted"))
    monkeypatch.undo()
    monkeypatch.setenv("MLX_JANUS_CACHE", str(folder))
    assert not converted.exists()
    (rest,) = folder.iterdir()
    stopped = rest.rename(
        rest.with_name(rest.name.replace(f".{os.getpid()}.", ".999999999."))
    )  # as if it had ended
    mark(stopped)
    assert one(converted.name, "left over").path == stopped
    assert find_converted(PRO) == converted
    assert list(folder.iterdir()) == [converted]


# Superseded conversions


@pytest.fixture
def superseded(folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A superseded conversion, and the one that took its place and shares its weights."""
    source = Path(shutil.copytree(PRO, tmp_path / "mine"))
    old = find_converted(source)
    (source / "generation_config.json").write_text('{"guidance_scale": 3.0}')
    return old, find_converted(source)


@pytest.mark.check
def test_superseded_conversions_are_marked_and_pruned(
    fake_hub: FakeHub, folder: Path, superseded: tuple[Path, Path]
) -> None:
    old, new = superseded
    left = folder / ".mine-0123456789abcdef.999999999.89abcdef.partial"
    left.mkdir()
    (left / "shard-0.safetensors").write_bytes(b"12345")
    mark(left)
    facts = json.loads(call(group, "models", "--json").stdout)
    assert {fact["path"]: fact["state"] for fact in facts if fact["model"] != "janus-tiny"} == {
        str(old): "superseded",
        str(new): "converted",
        str(left): "left over",
    }
    assert "models prune removes 2 old conversions" in found("models").advice
    done = call(group, "models", "prune", "--yes")
    assert (done.code, done.stdout) == (0, "")
    assert f"mine, superseded: {old}" in done.stderr
    assert f"left over: {left}" in done.stderr
    assert list(folder.iterdir()) == [new]
    mlx_janus.load(new).generate_text("Hi?", max_tokens=2)
    done = call(group, "models", "prune")
    assert (done.code, done.stderr) == (0, "There is nothing to remove.\n")
    assert found("models").status == "ok"


def test_weights_that_another_conversion_shares_free_no_space(
    superseded: tuple[Path, Path],
) -> None:
    old, new = superseded
    entries = {entry.path: entry for entry in list_models()}
    weights = (old / "model.safetensors").stat().st_size
    assert entries[old].size > weights
    assert freed_bytes([entries[old]]) < weights
    assert freed_bytes([entries[old], entries[new]]) > weights
    remove_model(entries[new])
    assert freed_bytes([entries[old]]) > weights


def test_pruning_asks_and_keeps_what_is_in_use(
    fake_hub: FakeHub, superseded: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = superseded
    assert "pass --yes" in error_line(call(group, "models", "prune"))
    monkeypatch.setattr(at_hand, "_on_terminal", lambda: True)
    done = call(group, "models", "prune", stdin="n\n")
    assert (done.code, old.exists()) == (1, True)
    janus = mlx_janus.load(old)  # which has its files open until the weights are read
    done = call(group, "models", "prune", "--yes")
    assert done.code == 0
    assert f"Kept: mine ({old.name[-16:-8]}) is in use by process {os.getpid()}" in done.stderr
    assert old.exists()
    mx.eval(janus.model.parameters())
    assert call(group, "models", "prune", stdin="y\n").code == 0
    assert (old.exists(), new.exists()) == (False, True)


def test_a_conversion_is_found_by_every_source_of_it(folder: Path, tmp_path: Path) -> None:
    one_source = Path(shutil.copytree(PRO, tmp_path / "one"))
    converted = find_converted(one_source)
    copy = Path(shutil.copytree(one_source, tmp_path / "other"))
    assert find_converted(copy) == converted
    for name in ("one", "other", str(one_source), str(copy), str(converted)):
        assert [entry.path for entry in find_models(name)] == [converted]


# Pasted addresses


def test_models_are_added_and_removed_by_address(
    fake_hub: FakeHub, served: Path, folder: Path
) -> None:
    address = f"https://huggingface.co/{ID}"
    added = call(group, "models", "add", f"{address}/tree/main")
    assert added.code == 0, added.stderr
    converted = Path(added.stdout.strip())
    commit = find_models(f"{ID}")[0].revision
    assert [entry.path for entry in find_models(f"{ID}@{commit[:7]}") if not entry.is_download] == [
        converted
    ]
    assert "no model" in error_line(call(group, "models", "remove", f"{ID}@0000000", "--yes"))
    assert "no model" in error_line(
        call(group, "models", "remove", "https://example.org/a/b", "--yes")
    )
    assert call(group, "models", "remove", address, "--yes").code == 0
    assert not converted.exists()


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--revision", "v2", "-m", f"{ID}@v1", "-p", "x"),
        ("generate", "-m", f"https://huggingface.co/{ID}/tree/v1", "--revision", "v2", "-p", "x"),
        ("convert", f"{ID}@v1", "out", "--revision", "v2"),
        ("models", "add", "--revision", "v2", f"{ID}@v1"),
    ],
)
def test_two_revisions_are_an_error_of_the_command_line(words: tuple[str, ...]) -> None:
    done = call(group, *words)
    assert done.code == 2
    assert "name says revision 'v1' and --revision says 'v2'" in done.stderr


# Models of other programs


@pytest.fixture
def lm_studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of models of another program, empty."""
    root = tmp_path / "lm-studio"
    root.mkdir()
    monkeypatch.setenv("MLX_JANUS_MODELS", str(root))
    return root


def test_models_of_other_programs_are_listed_and_never_removed(
    fake_hub: FakeHub, folder: Path, lm_studio: Path
) -> None:
    theirs = Path(shutil.copytree(PRO, lm_studio / "mlx-community" / "Small"))
    entry = one("mlx-community/Small", "elsewhere")
    assert (entry.path, entry.dtype) == (theirs, "bfloat16")
    line = error_line(call(group, "models", "remove", "mlx-community/Small", "--yes"))
    assert f"{theirs} is another program's folder: remove it there" in line
    converted = find_converted("mlx-community/Small")
    assert call(group, "models", "remove", "mlx-community/Small", "--yes").code == 0
    assert (theirs.exists(), converted.exists()) == (True, False)
    assert found("models").status == "ok"


def test_the_doctor_says_what_each_unusable_folder_lacks(
    fake_hub: FakeHub, served: Path, folder: Path, lm_studio: Path
) -> None:
    from mlx_janus.weights import hub

    hub.fetch_config(hub.find(ID))
    damaged = find_converted(PRO)
    (damaged / "model.safetensors").write_bytes(b"12345678")
    shutil.copytree(PRO, lm_studio / "a" / "partial")
    (lm_studio / "a" / "partial" / "pytorch_model-00001-of-00002.bin").unlink()
    (lm_studio / "a" / "partial" / "tokenizer.json").unlink()
    (lm_studio / "a" / "Janus-GGUF").mkdir()
    shutil.copytree(SAFETENSORS, lm_studio / "a" / "Janus-4bit")
    config = json.loads((SAFETENSORS / "config.json").read_text())
    quantized = {**config, "quantization": {"bits": 4, "group_size": 64}}
    (lm_studio / "a" / "Janus-4bit" / "config.json").write_text(json.dumps(quantized))
    shutil.copytree(PRO, lm_studio / "a" / "good")
    advice = found("models").advice.splitlines()
    lines = {line.split(" (")[0]: line for line in advice}
    assert set(lines) == {ID, damaged.name, "a/Janus-4bit", "a/Janus-GGUF", "a/partial"}
    assert "holds no weights" in lines[ID]
    assert f"models add {ID} downloads it" in lines[ID]
    assert "no whole safetensors file" in lines[damaged.name]
    assert lines[damaged.name].endswith(f"mlx-janus models remove {damaged.name[-16:-8]}")
    assert "tokenizer.json is missing" in lines["a/partial"]
    assert "pytorch_model-00001-of-00002.bin is missing" in lines["a/partial"]
    assert "config.json is missing" in lines["a/Janus-GGUF"]
    assert "another program has quantized the weights" in lines["a/Janus-4bit"]
    assert found("models").status == "warn"
    printed = call(group, "doctor").stdout
    assert printed.count("\n- models: ") == len(lines)


def test_a_download_that_is_converted_lacks_nothing(
    fake_hub: FakeHub, served: Path, folder: Path
) -> None:
    find_converted(ID)
    assert call(group, "models", "remove", ID, "--downloads", "--yes").code == 0
    find_converted(ID)
    (entry,) = (entry for entry in list_models() if entry.is_download)
    (entry.path / "model.safetensors").unlink()
    assert one(ID, "partly downloaded")
    assert found("models").status == "ok"


# Uploading


class Uploads:
    """What was uploaded: calls with their options, and files; ``error`` is raised instead."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.files: dict[str, str | int] = {}
        self.there: set[str] = set()  # repositories that are there already, public ones
        self.error: Exception | None = None


@pytest.fixture
def uploads(fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Uploads:
    """In place of the Hub's repositories that can be written; a token is there."""
    from huggingface_hub import HfApi

    uploads = Uploads()

    def create_repo(self: HfApi, repo_id: str, *, private: bool | None, **options: object) -> str:
        uploads.calls.append(
            {"token": self.token, "repo_id": repo_id, "private": private, **options}
        )
        fake_hub.repos.setdefault(repo_id, Repo()).branches["main"] = tmp_path
        fake_hub.repos[repo_id].private |= bool(private) and repo_id not in uploads.there
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self: HfApi, *, folder_path: str, **options: object) -> None:
        if uploads.error:
            raise uploads.error
        uploads.calls.append(options)
        uploads.files = {
            addition.path_in_repo: addition.upload_info.size
            for addition in additions(self, folder_path)
        }
        uploads.files["README.md"] = (Path(folder_path) / "README.md").read_text()

    def additions(api: HfApi, path: str) -> list[Any]:
        """What huggingface_hub makes of the folder."""
        return api._prepare_upload_folder_additions(path, "", ignore_patterns=[".DS_Store"])

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda *_, **__: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return uploads


def test_a_converted_folder_is_uploaded_with_a_card(
    served: Path, uploads: Uploads, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done = call(group, "convert", ID, output, "--bits", 4, "--upload", "me/small-4bit")
    assert (done.code, done.stdout) == (0, "https://huggingface.co/me/small-4bit\n")
    made, sent = uploads.calls
    assert (made["repo_id"], made["token"], made["exist_ok"]) == ("me/small-4bit", TOKEN, True)
    assert (sent["repo_id"], "*.safetensors" in sent["delete_patterns"]) == ("me/small-4bit", True)
    card = str(uploads.files.pop("README.md"))
    assert uploads.files == {file.name: file.stat().st_size for file in output.iterdir()}
    assert "README.md" not in [file.name for file in output.iterdir()]
    commit = find_source(ID).revision
    facts = card.split("---\n")[1]
    for line in (
        f"base_model: {ID}",
        "base_model_relation: quantized",
        "library_name: mlx_janus",
        "license: mit",
        "license_name: deepseek",
        f"license_link: https://huggingface.co/{ID}/blob/{commit}/LICENSE",
    ):
        assert f"{line}\n" in facts
    for words in (
        "have 4 bits, in groups of at most 64",
        f"commit {commit}",
        'load("me/small-4bit")',
        "mit, deepseek, as its",
    ):
        assert words in card
    assert call(group, "convert", ID, output, "--verify", "--upload", "me/again").code == 0
    assert uploads.calls[-1]["repo_id"] == "me/again"


def test_the_card_of_a_folders_conversion_claims_no_more_than_is_known(
    converted: dict[str, Path],
) -> None:
    card = model_card(
        converted["transformers"], Source(FIXTURES / "transformers", "transformers"), "me/mine"
    )
    assert "base_model" not in card
    assert "license:" not in card
    assert "not stated by the source" in card
    assert "Nothing is quantized. Float weights are in the source's types." in card


def test_the_records_of_the_cache_are_not_uploaded(
    served: Path, folder: Path, uploads: Uploads
) -> None:
    """They name folders of this machine."""
    converted = find_converted(ID)
    assert list(converted.glob("source-*.json"))
    done = call(group, "convert", ID, converted, "--verify", "--upload", "hf.co/me/small")
    assert (done.code, done.stdout) == (0, "https://huggingface.co/me/small\n")
    assert set(uploads.files) == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}


def test_nothing_is_uploaded_unasked_or_without_a_token(
    served: Path, uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(group, "convert", ID, tmp_path / "out").code == 0
    assert uploads.calls == []
    assert call(group, "convert", ID, tmp_path / "other", "--upload", "no-owner").code == 2
    monkeypatch.delenv("HF_TOKEN")
    line = error_line(call(group, "convert", ID, tmp_path / "other", "--upload", "me/mine"))
    assert "hf auth login" in line
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in error_line(
        call(group, "convert", ID, tmp_path / "other", "--upload", "me/mine")
    )
    assert uploads.calls == []
    assert not (tmp_path / "other").exists()


def test_a_private_upload_never_ends_in_a_public_repository(
    served: Path, uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("convert", ID, tmp_path / "out")
    assert call(group, *words, "--upload", "me/open").code == 0
    assert uploads.calls[0]["private"] is None  # the account's default
    again = (*words, "--verify", "--private", "--upload")
    assert call(group, *again, "me/closed").code == 0
    assert uploads.calls[2]["private"] is True
    uploads.there, uploads.files = {"me/there"}, {}
    assert "me/there is public: make it private" in error_line(call(group, *again, "me/there"))
    assert uploads.files == {}


def test_the_card_of_a_recipe_names_it(served: Path, uploads: Uploads, tmp_path: Path) -> None:
    done = call(
        group, "convert", ID, tmp_path / "out", "--recipe", "faithful", "--upload", "me/small"
    )
    assert done.code == 0, done.stderr
    assert "Quantized by the recipe `faithful` of mlx_janus" in str(uploads.files["README.md"])
    assert "head 8 bits" not in str(uploads.files["README.md"])


def test_an_upload_that_fails_says_how_to_go_on(
    served: Path, uploads: Uploads, tmp_path: Path
) -> None:
    uploads.error = OSError("the line is dead")
    line = error_line(call(group, "convert", ID, tmp_path / "out", "--upload", "me/mine"))
    assert "(the line is dead): try again with --verify --upload me/mine" in line
    uploads.error = None
    assert call(group, "convert", ID, tmp_path / "out", "--verify", "--upload", "me/mine").code == 0
    assert "model.safetensors" in uploads.files


def test_a_repository_that_may_not_be_written_asks_for_another_token(
    fake_hub: FakeHub, converted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fake_hub.status = 403
    with pytest.raises(HubError, match=r"HTTP 403.*may write"):
        upload_converted(
            converted["transformers"], Source(FIXTURES / "transformers", "transformers"), "me/mine"
        )


# The doctor


def found(about: str) -> diagnosis.Finding:
    return next(finding for finding in diagnosis.diagnose() if finding.about == about)


@pytest.mark.check
def test_the_doctor_tells_every_section_on_a_line(fake_hub: FakeHub, folder: Path) -> None:
    done = call(group, "doctor")
    assert (done.code, done.stderr) == (0, "")
    lines, advice = done.stdout.split("\nWhat to do:\n")
    sections = ["versions", "package", "device", "memory", "wired limit", "BLAS", "disk", "models"]
    sections.append("roles")
    for line, section in zip(lines.splitlines(), sections, strict=True):
        assert re.match(rf"{section} +(ok|warn)  +\S", line)
    assert f"mlx_janus {mlx_janus.__version__}, Python 3." in lines
    assert re.search(r"^device +warn  CPU only", lines, re.MULTILINE)
    assert "- device: the CPU is slow" in advice
    facts = json.loads(call(group, "doctor", "--json").stdout)
    assert [fact["about"] for fact in facts] == sections
    assert set(facts[0]) == {"about", "status", "text", "advice"}
    assert not folder.exists()


def test_the_doctor_tells_the_roles_of_every_model(served: Path) -> None:
    assert found("roles").text == "<|User|> and <|Assistant|> for janus-tiny"
    find_converted(PRO)
    find_converted(ID)
    roles = found("roles")
    first, second = sorted(roles.text.split("; "))
    assert re.fullmatch(r"<\|User\|> and <\|Assistant\|> for [\w-]+, janus-tiny", first)
    assert second == f"User and Assistant for {ID}"
    # The fixture's signs contradict each other.
    assert roles.status == "warn"
    assert roles.advice == (
        f"{ID}: the roles are User and Assistant (processor_config.json says deepseek_old), but "
        "special_tokens_map.json has <|User|>: pass --roles pro for the others"
    )


def test_the_doctor_skips_downloads_that_cannot_be_converted(served: Path) -> None:
    find_source(ID)
    download = one(ID, "downloaded").path
    for name in ("tokenizer.json", "processor_config.json"):
        (download / name).unlink()
        (download / name).write_text("{")
    assert found("roles").text == "<|User|> and <|Assistant|> for janus-tiny"


def test_adding_a_model_tells_doubts_in_flags(
    served: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert call(group, "models", "add", ID).code == 0
    assert caplog.messages[-1].endswith(": pass --roles pro for the others")


@pytest.mark.skipif(sys.platform != "linux", reason="the BLAS of MLX's Linux wheel")
def test_the_doctor_sees_which_blas_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "from mlx_janus.commands.diagnosis import _blas; print(_blas().status, _blas().text)"
    first = run("-c", f"import mlx.core; {program}").stdout
    after = run("-c", f"import mlx_janus, mlx.core; {program}").stdout
    if "libopenblas0" in found("BLAS").advice:
        pytest.skip("OpenBLAS is not installed")
    assert "MLX was imported before OpenBLAS" in first
    assert after.startswith("ok OpenBLAS")
    monkeypatch.setattr(diagnosis.ctypes, "CDLL", fail(OSError("no such library")))
    assert found("BLAS").advice == "sudo apt-get install libopenblas0"


def fail(error: Exception) -> Any:
    def raising(*_: object, **__: object) -> None:
        raise error

    return raising


def test_the_doctor_sees_a_full_disk_and_what_does_not_fit(
    folder: Path, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda _: usage(9, 1, 4_900_000_000))
    assert found("disk").status == "warn"
    assert "4.9 GB free for" in found("disk").text
    assert "MLX_JANUS_CACHE" in found("disk").advice
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    assert "--bits" in found("memory").advice
    assert "janus-tiny needs" in found("memory").text


def test_the_doctor_tells_how_to_raise_the_wired_limit(
    folder: Path, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "_on_metal", lambda: True)
    monkeypatch.setattr(diagnosis, "_wired_limit_setting", lambda: "0")
    size = namedtuple("size", "total available")
    monkeypatch.setattr("psutil.virtual_memory", lambda: size(24 << 30, 24 << 30))
    monkeypatch.setattr(memory, "device_memory", lambda: 16 << 30)
    assert (found("wired limit").status, found("memory").status) == ("ok", "ok")
    assert "17.2 GB of 25.8 GB (iogpu.wired_limit_mb=0)" in found("wired limit").text
    monkeypatch.setattr(memory, "device_memory", lambda: 1000)
    assert found("wired limit").status == "warn"
    assert found("wired limit").advice.endswith("sudo sysctl iogpu.wired_limit_mb=20480")


def test_a_broken_package_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, fake_hub: FakeHub, folder: Path
) -> None:
    monkeypatch.setattr(
        "mlx_janus.weights.folder.open_converted", fail(ImportError("no libmlx.so"))
    )
    done = call(group, "doctor")
    assert done.code == 1
    assert re.search(r"^package +fail  ImportError: no libmlx.so$", done.stdout, re.MULTILINE)
    assert "- package: install mlx_janus again" in done.stdout
