"""Files of JSON lines: what a stopped run left, and what is no such file."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_janus.commands import jsonl
from mlx_janus.commands.jsonl import JsonLines, lines_to_stdout
from mlx_janus.errors import OutputError
from tests.support.programs import finish, start

RECORDS: list[dict[str, Any]] = [
    {"id": 1, "answer": "ja, ß"},
    {"id": 2, "answer": None, "more": [1]},
]


@pytest.fixture
def lines(tmp_path: Path) -> JsonLines:
    return JsonLines(tmp_path / "out.jsonl", "scores", keys=("id", "answer"))


def write(lines: JsonLines, *records: dict[str, Any]) -> None:
    with lines.append() as add:
        for record in records:
            add(record)


def test_records_come_back_and_more_are_added(lines: JsonLines) -> None:
    assert lines.resume() == []
    assert not lines.path.exists()
    write(lines, RECORDS[0])
    assert lines.resume() == RECORDS[:1]
    write(lines, RECORDS[1])
    assert lines.resume() == RECORDS
    assert "ja, ß" in lines.path.read_text(encoding="utf-8")


def test_a_record_is_in_the_file_as_soon_as_it_is_written(lines: JsonLines) -> None:
    with lines.append() as add:
        add(RECORDS[0])
        assert json.loads(lines.path.read_text(encoding="utf-8")) == RECORDS[0]


def test_a_line_that_was_cut_is_taken_off_wherever_that_was(lines: JsonLines) -> None:
    write(lines, *RECORDS)
    whole = lines.path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(len(whole) + 1):
        lines.path.write_bytes(whole[:length])
        count = whole[:length].count(b"\n")
        assert lines.resume() == RECORDS[:count]
        assert lines.path.read_bytes() == whole[: (0, first, len(whole))[count]]


@pytest.mark.parametrize(
    "text",
    [
        "dear diary",
        "dear diary\n",
        '{"id": 1}\n',
        '["id", "answer"]\n',
        '"id answer"\n',
        '{"id": 1, "answer": 2}\n{"x',
        "[" * 100_000 + "\n",
        '{"id": 1, "answer": "\udcff"}\n',
    ],
)
def test_a_file_of_something_else_is_refused_and_stays(lines: JsonLines, text: str) -> None:
    data = text.encode(errors="surrogateescape")
    lines.path.write_bytes(data)
    with pytest.raises(
        OutputError, match=r"out\.jsonl is not a file of scores: name another with --output"
    ):
        lines.resume()
    assert lines.path.read_bytes() == data


def test_a_check_refuses_another_runs_records_before_anything_changes(lines: JsonLines) -> None:
    write(lines, *RECORDS)
    with lines.path.open("ab") as file:
        file.write(b'{"id": 3, "ans')
    before = lines.path.read_bytes()

    def check(record: dict[str, Any]) -> None:
        if record["id"] == 2:
            raise OutputError("of another run")

    with pytest.raises(OutputError, match="of another run"):
        lines.resume(check)
    assert lines.path.read_bytes() == before


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    for path, what in [
        (tmp_path, "is a folder: give the name of a file in it, such as scores.jsonl"),
        (tmp_path / "absent" / "out.jsonl", "absent is not a folder: make it first"),
    ]:
        with pytest.raises(OutputError, match=what):
            JsonLines(path, "scores", keys=("id",)).resume()


def test_a_file_that_cannot_be_read(lines: JsonLines, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without the permission to, which root does not need."""
    write(lines, *RECORDS)

    def refuse(_path: Path, _limit: int) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(jsonl, "read_bounded", refuse)
    with pytest.raises(OutputError, match=r"out\.jsonl cannot be read \(Permission denied\): name"):
        lines.resume()


FULL = """
import resource, signal, sys
from pathlib import Path
from mlx_janus.commands.jsonl import JsonLines
from mlx_janus.errors import OutputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes fail with EFBIG, like ENOSPC on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (105, 105))
try:
    with JsonLines(Path(sys.argv[1]), "scores", keys=("id",)).append() as add:
        for number in range(100):
            add({"id": number})
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file's size")
def test_a_full_disk_leaves_a_file_to_go_on_with(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    done = finish(start(FULL, path))
    assert done.stdout == f"{path} cannot be written (File too large): name another with --output\n"
    assert path.stat().st_size == 105
    assert JsonLines(path, "scores", keys=("id",)).resume() == [
        {"id": number} for number in range(10)
    ]  # the eleventh is cut


def test_stdout_gets_the_same_lines(lines: JsonLines) -> None:
    write(lines, *RECORDS)
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), lines_to_stdout() as add:
        for record in RECORDS:
            add(record)
    assert stdout.getvalue() == lines.path.read_text(encoding="utf-8")


def test_a_name_that_is_no_text_is_written_escaped(lines: JsonLines) -> None:
    record = {"id": "latin-\udce9.png", "answer": "x"}
    write(lines, record)
    assert lines.resume() == [record]
