"""Names of models: the Hub's cache, folders of other programs, and names that are nearly right."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import mlx_janus
from mlx_janus.errors import CheckpointError, HubError, OptionError
from mlx_janus.weights.names import TINY, understand_name
from mlx_janus.weights.sources import find_source
from tests.support.fake_hub import FakeHub
from tests.support.golden import FIXTURES

SOURCE = FIXTURES / "deepseek-janus-safetensors"
COMMITS = ["0" * 40, "1" * 40]


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A model's folder in a cache of the Hub, with one commit and no branch."""
    folder = tmp_path / "hub" / "models--me--janus"
    shutil.copytree(SOURCE, folder / "snapshots" / COMMITS[0])
    (folder / "blobs").mkdir()
    return folder


# The Hub's cache


@pytest.mark.parametrize("part", ["", "snapshots", f"snapshots/{COMMITS[0]}", "blobs"])
def test_a_folder_of_the_hubs_cache_stands_for_its_commit(repo: Path, part: str) -> None:
    name = understand_name(repo / part)
    assert name.folder is not None
    assert name.folder.resolve() == repo / "snapshots" / COMMITS[0]
    assert (name.shown, name.revision) == ("me/janus", COMMITS[0])
    source = find_source(repo / part)
    assert (source.name, source.revision) == ("me/janus", COMMITS[0])


def test_a_model_of_the_hubs_cache_has_its_hub_id(repo: Path) -> None:
    assert mlx_janus.load(repo).name == "me/janus"
    assert mlx_janus.load(f"file://{repo}").name == "me/janus"


def test_of_several_commits_the_one_of_main_is_taken(repo: Path) -> None:
    shutil.copytree(SOURCE, repo / "snapshots" / COMMITS[1])
    with pytest.raises(CheckpointError, match="holds 2 commits: name one of them, such as"):
        understand_name(repo)
    (repo / "refs" / "pr").mkdir(parents=True)
    (repo / "refs" / "main").write_text(f"{COMMITS[1]}\n")
    (repo / "refs" / "pr" / "1").write_text(COMMITS[0])
    taken = {
        revision: understand_name(repo, revision).revision
        for revision in (None, "main", "pr/1", COMMITS[0])
    }
    assert list(taken.values()) == [COMMITS[1], COMMITS[1], COMMITS[0], COMMITS[0]]
    for absent in ("v9", "../../x", "/etc"):
        with pytest.raises(CheckpointError, match=r"holds no revision .*name the model itself"):
            understand_name(repo, absent)
    with pytest.raises(HubError, match="has no revisions"):
        understand_name(repo / "snapshots" / COMMITS[0], "main")


def test_folders_above_and_without_models(repo: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is the Hub's cache: name .* such as me/janus"):
        understand_name(repo.parent)
    for inner in ("Janus", "deepseek-ai/Janus"):
        shutil.copytree(SOURCE, tmp_path / "unpacked" / inner)
        with pytest.raises(CheckpointError, match=rf"no model itself: name .* as .*/{inner}$"):
            understand_name(tmp_path / "unpacked")
        shutil.rmtree(tmp_path / "unpacked")
    shutil.rmtree(repo / "snapshots")
    with pytest.raises(CheckpointError, match="no complete download: name the model itself, me/"):
        understand_name(repo)
    (tmp_path / "empty").mkdir()
    assert (
        understand_name(tmp_path / "empty").folder == tmp_path / "empty"
    )  # refused when it is read


# Revisions


def test_a_revision_in_the_name(fake_hub: FakeHub) -> None:
    for name in ("a/b@v1", "https://huggingface.co/a/b/tree/v1"):
        understood = understand_name(name)
        assert (understood.repo_id, understood.revision, understood.shown) == ("a/b", "v1", "a/b")
        assert understand_name(name, "v1") == understood
        with pytest.raises(OptionError, match="says revision 'v1' and the option says 'v2'"):
            understand_name(name, "v2")
    assert understand_name("janus-pro-1b@v1").repo_id == "deepseek-ai/Janus-Pro-1B"
    assert understand_name(" a/b ").repo_id == "a/b"
    fake_hub.add("a/b", SOURCE)
    commit = fake_hub.add("a/b", SOURCE, revision="v1")
    assert find_source("a/b@v1").revision == commit
    with pytest.raises(HubError, match="no revision 'v2'"):
        find_source("a/b@v2")


def test_a_folder_has_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SOURCE, "model")
    for name in ("model@main", "tiny@main"):
        with pytest.raises(HubError, match="is a folder, which has no revisions"):
            understand_name(name)
    shutil.copytree(SOURCE, "model@main")
    assert understand_name("model@main").folder == Path("model@main")
    assert understand_name("tiny").folder == TINY


# Folders of other programs


def test_a_usable_folder_of_another_program_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "lm-studio"
    folder = Path(shutil.copytree(SOURCE, root / "mlx-community" / "Janus-Small"))
    shutil.copytree(SOURCE, root / "mine")
    monkeypatch.setenv("MLX_JANUS_MODELS", f"{tmp_path / 'absent'}:{root}")
    assert understand_name("mlx-community/Janus-Small").folder == folder
    assert understand_name("mine").folder == root / "mine"
    assert mlx_janus.load("mlx-community/Janus-Small").name == "mlx-community/Janus-Small"
    assert understand_name("mlx-community/Janus-Small", "main").folder is None  # the Hub's
    (folder / "tokenizer.json").unlink()
    assert understand_name("mlx-community/Janus-Small").folder is None
    for outside in ("../lm-studio/mine", "./mine", "mlx-community/Janus-Small/.."):
        with pytest.raises(CheckpointError, match="neither a folder nor a Hub id"):
            understand_name(outside)


# Names that are nearly right


def test_a_file_in_a_model_folder_is_told_from_other_files(repo: Path, tmp_path: Path) -> None:
    folder = repo / "snapshots" / COMMITS[0]
    with pytest.raises(CheckpointError, match=f"is a file: name its folder, {folder}$"):
        understand_name(folder / "model.safetensors")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match="is a file: name a model"):
        understand_name(tmp_path / "notes.txt")


def test_a_name_without_its_owner(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.add("someone/Janus-Small", SOURCE)
    find_source("someone/Janus-Small")
    with pytest.raises(CheckpointError, match="someone/Janus-Small is on this machine, name that"):
        understand_name("janus-small")
