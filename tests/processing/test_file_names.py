"""Names of files: addresses with ``file://`` are the paths that they stand for."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from mlx_janus.errors import ImageError
from mlx_janus.processing.file_names import local_path, names_folder
from mlx_janus.processing.images import open_image
from mlx_janus.processing.saved_images import read_metadata
from tests.support.golden import FIXTURES

PICTURE = FIXTURES / "picture.png"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("file:///a/b.png", "/a/b.png"),
        ("FILE:///a/b.png", "/a/b.png"),
        ("file://localhost/a/b.png", "/a/b.png"),
        (f"file://{socket.gethostname()}/a/b.png", "/a/b.png"),
        ("file:/a/b.png", "/a/b.png"),
        ("file:///a%20b/%C3%A4%25.png", "/a b/ä%.png"),
        ("file:///a%E9.png", "/a\udce9.png"),  # a name that is not UTF-8
        ("file:///a/100% #1?.png", "/a/100% #1?.png"),  # as typed by hand
        ("file:a.png", "file:a.png"),
        ("a/file:///b.png", "a/file:///b.png"),
        ("https://a.org/b.png", "https://a.org/b.png"),
        ("", ""),
    ],
)
def test_addresses_are_paths_and_other_names_stay(name: str, path: str) -> None:
    assert local_path(name) == path


@pytest.mark.parametrize(
    "address", ["file://", "file://b.png", "file://~/b.png", "file://host.example/b.png"]
)
def test_addresses_of_other_machines(address: str) -> None:
    with pytest.raises(ImageError, match=f"^{address} is no file of this machine: write file://"):
        local_path(address)


def test_the_library_opens_addresses(tmp_path: Path) -> None:
    photo = tmp_path / "a b ä.png"
    shutil.copy(PICTURE, photo)
    assert photo.as_uri().endswith("a%20b%20%C3%A4.png")
    assert open_image(photo.as_uri()) == open_image(PICTURE)
    assert read_metadata(photo.as_uri()) == read_metadata(PICTURE)
    with pytest.raises(ImageError, match=r"^file:///absent%20b\.png does not exist"):
        open_image("file:///absent%20b.png")
    with pytest.raises(ImageError, match="cannot be opened"):
        open_image("file:///nul%00.png")


def test_names_of_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in (tmp_path, str(tmp_path), "new/", f"{tmp_path}/file/", "."):
        assert names_folder(name)
    for file in ("new", tmp_path / "file", "nul\0", "x" * 5000):
        assert not names_folder(file)
