"""The fake Hub speaks huggingface_hub's protocol: its real calls work through it."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.support.fake_hub import TOKEN, FakeHub

ID = "someone/tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "model.safetensors").write_bytes(os.urandom(100_000))
    (folder / "sub" / "picture.png").write_bytes(b"png")
    return folder


def test_model_info_names_files_with_sizes_and_hashes(fake_hub: FakeHub, folder: Path) -> None:
    sha = fake_hub.add(ID, folder)
    info = HfApi().model_info(ID, files_metadata=True)
    assert info.sha == sha
    assert info.siblings is not None
    assert {f.rfilename: f.size for f in info.siblings} == {
        "config.json": 8,
        "model.safetensors": 100_000,
        "sub/picture.png": 3,
    }
    assert [f.lfs is not None for f in info.siblings] == [False, True, False]
    assert fake_hub.requests == [f"GET /api/models/{ID}"]


def test_snapshot_holds_the_files_that_were_asked_for(fake_hub: FakeHub, folder: Path) -> None:
    sha = fake_hub.add(ID, folder)
    snapshot = Path(snapshot_download(ID, allow_patterns=["*.json", "*.safetensors"]))
    assert snapshot.name == sha
    assert sorted(p.name for p in snapshot.iterdir()) == ["config.json", "model.safetensors"]
    for name in ("config.json", "model.safetensors"):
        assert (snapshot / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(fake_hub.downloads()) == ["config.json", "model.safetensors"]
    assert snapshot.is_relative_to(constants.HF_HOME)


def test_a_branch_and_its_sha_name_the_same_commit(
    fake_hub: FakeHub, folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    fake_hub.add(ID, folder)
    sha = fake_hub.add(ID, other, revision="refs/pr/1")
    by_branch = hf_hub_download(ID, "config.json", revision="refs/pr/1")
    by_sha = hf_hub_download(ID, "config.json", revision=sha)
    assert by_branch == by_sha
    assert Path(by_sha).read_text() == "{}"
    assert HfApi().model_info(ID, revision=sha).sha == sha


def test_what_is_absent_is_refused_by_kind(fake_hub: FakeHub, folder: Path) -> None:
    fake_hub.add(ID, folder)
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("someone/absent")
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info(ID, revision="absent")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(ID, "absent.json")


def test_private_and_gated_models_need_the_token(fake_hub: FakeHub, folder: Path) -> None:
    fake_hub.add("someone/private", folder, private=True)
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("someone/private")
    assert HfApi(token=TOKEN).model_info("someone/private").private
    fake_hub.add("someone/gated", folder, gated=True)
    assert HfApi().model_info("someone/gated").gated == "manual"
    for token in (None, "hf_other"):
        with pytest.raises(GatedRepoError):
            hf_hub_download("someone/gated", "config.json", token=token)
    assert Path(hf_hub_download("someone/gated", "config.json", token=TOKEN)).exists()


def test_a_download_breaks_off_and_is_completed_later(fake_hub: FakeHub, folder: Path) -> None:
    fake_hub.add(ID, folder)
    fake_hub.fail_after_bytes = 40_000
    with pytest.raises(Exception, match=r"without sending complete message body|peer closed"):
        hf_hub_download(ID, "model.safetensors")
    fake_hub.fail_after_bytes = None
    path = Path(hf_hub_download(ID, "model.safetensors"))
    assert path.read_bytes() == (folder / "model.safetensors").read_bytes()


def test_ranges(fake_hub: FakeHub, folder: Path) -> None:
    fake_hub.add(ID, folder)
    data = (folder / "model.safetensors").read_bytes()
    request = urllib.request.Request(f"{fake_hub.url}/{ID}/resolve/main/model.safetensors")
    for header, part in (("bytes=10-19", data[10:20]), ("bytes=99990-", data[99_990:])):
        request.add_header("Range", header)
        with urllib.request.urlopen(request) as response:
            assert response.status == 206
            assert response.read() == part
            assert response.headers["Content-Range"].endswith("/100000")


def test_a_hub_that_fails_and_one_that_is_gone(fake_hub: FakeHub, folder: Path) -> None:
    fake_hub.add(ID, folder)
    fake_hub.status = 503
    with pytest.raises(HfHubHTTPError, match="503"):
        HfApi().model_info(ID)
    fake_hub.status = None
    snapshot = snapshot_download(ID)
    fake_hub.stop()
    assert snapshot_download(ID) == snapshot
    with pytest.raises(LocalEntryNotFoundError):
        snapshot_download("someone/absent")


def test_subprocesses_use_it_too(fake_hub: FakeHub, folder: Path) -> None:
    sha = fake_hub.add(ID, folder)
    code = f"from huggingface_hub import snapshot_download as s; print(s({ID!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | fake_hub.env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).name == sha
