"""Reading is bounded; a file is written whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_janus.errors import JanusError
from mlx_janus.files import (
    FileTooLargeError,
    draft_beside,
    open_regular,
    parse_json,
    read_bounded,
    write_atomically,
)
from tests.support.programs import ROOT

LIMITED = """
import resource, sys
from pathlib import Path
from mlx_janus.files import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
try:
    write_atomically(Path(sys.argv[1]), "x" * 99)
except OSError as error:
    print(error.strerror)
"""


def test_bytes_and_text_are_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 127)  # 254 bytes: a name as long as file systems allow
    write_atomically(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    write_atomically(path, b"\0")
    assert path.read_bytes() == b"\0"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
@pytest.mark.parametrize("failure", [OSError(28, "the disk is full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(
    step: str, failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("as it was")
    write = Path.write_bytes

    def fail(self: Path, argument: bytes | Path) -> None:
        if isinstance(argument, bytes):
            write(self, argument[:4])
        raise failure

    monkeypatch.setattr(Path, step, fail)
    for path in (old, new):
        with pytest.raises(type(failure)):
            write_atomically(path, "never to be seen")
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_text() == "as it was"


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "File too large\n", done.stderr
    assert not list(tmp_path.iterdir())


def test_text_that_has_no_encoding_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "x.json", "\udc80")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "none" / "x.json", "")


def test_a_draft_is_hidden_beside_its_file(tmp_path: Path) -> None:
    with draft_beside(tmp_path / "drawn.png") as draft:
        assert (draft.parent, draft.suffix, draft.name[0]) == (tmp_path, ".tmp", ".")
        draft.touch()
    assert not list(tmp_path.iterdir())
    with draft_beside(tmp_path / "state", ".safetensors") as draft:
        assert draft.suffix == ".safetensors"
        draft.touch()
    assert not list(tmp_path.iterdir())
    with draft_beside(tmp_path / "x") as one, draft_beside(tmp_path / "x") as other:
        assert one != other


def test_only_regular_files_are_read_and_only_up_to_a_limit(tmp_path: Path) -> None:
    """Nobody writes into the pipe, and the device has no end: both would be read for ever."""
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="a pipe or a device"):
            open_regular(special)
    with pytest.raises(IsADirectoryError):
        read_bounded(tmp_path, 10)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"0123456789")
    assert read_bounded(tmp_path / "link", 10) == b"0123456789"
    with pytest.raises(FileTooLargeError, match="larger than 9 bytes"):
        read_bounded(tmp_path / "link", 9)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 101 + "1" + "]" * 101, "nested more than 100 deep"),
        ("[" * 100_000, "nested more than 100 deep"),
        ('{"width": 1' + "0" * 400 + "}", "integer beyond 64 bits"),
        (r'{"token": "\ud800"}', "half of a surrogate pair"),
        ("{", "Expecting"),
    ],
)
def test_json_that_would_break_what_reads_it_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_json(text)


@pytest.mark.parametrize("value", [[[1]] * 9, {"a": "\U0001f98a \u00e9"}, 2**63 - 1, None, 1.5])
def test_other_json_is_parsed(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


def test_an_error_is_one_printable_line() -> None:
    """A text from a file can neither change the terminal nor fill it."""
    title = "\x1b]0;owned\x07\x1b[2J\u202e\nsecond line"
    message = str(JanusError(f"config.json is of a {title} model: " + "x" * 10_000 + ": the fix"))
    assert message.isprintable()
    assert len(message) <= 400
    escaped = r"\x1b]0;owned\x07\x1b[2J\u202e second line"
    assert message.startswith(f"config.json is of a {escaped} model")
    assert message.endswith(": the fix")
    assert str(JanusError("a short one")) == "a short one"
