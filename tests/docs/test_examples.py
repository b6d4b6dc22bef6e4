"""The examples, run as they are, with Janus-Tiny."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.programs import ROOT, Outcome, run

EXAMPLES = ROOT / "examples"


def example(name: str, *arguments: object, cwd: Path) -> Outcome:
    done = run(EXAMPLES / name, *arguments, cwd=cwd, transformers=name == "draw.py")
    assert done.code == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what ``draw.py`` drew."""
    folder = tmp_path_factory.mktemp("drawn")
    assert example("draw.py", cwd=folder).stdout == "\njanus.png seed 7\n\njanus_2.png seed 8\n"
    return folder


def test_answer(tmp_path: Path, drawn: Path) -> None:
    assert example("answer.py", cwd=tmp_path).stdout == "red\n"
    done = example("answer.py", drawn / "janus.png", "How many shapes are there?", cwd=tmp_path)
    assert done.stdout == "two\n"
    missing = run(EXAMPLES / "answer.py", "absent.png", cwd=tmp_path)
    assert (missing.code, missing.stderr.splitlines()[-1]) == (
        1,
        "Error: absent.png does not exist: check the path",
    )


def test_draw(drawn: Path) -> None:
    assert sorted(p.name for p in drawn.iterdir()) == [
        "janus.png",
        "janus_2.png",
        "janus_half_1.png",
        "janus_half_2.png",
    ]


def test_conversation(tmp_path: Path) -> None:
    lines = example("conversation.py", cwd=tmp_path).stdout.splitlines()
    assert lines[0].startswith("What colour is the square? blue (")
    assert lines[1].startswith("How many shapes are there? one (")
    read, total = map(int, re.findall(r"\d+", lines[1]))
    assert read < total / 2
    assert len(json.loads((tmp_path / "janus.json").read_text())["messages"]) == 5


def test_caption_folder(tmp_path: Path, drawn: Path) -> None:
    lines = [
        json.loads(line)
        for line in example("caption_folder.py", drawn, cwd=tmp_path).stdout.splitlines()
    ]
    assert [Path(line["path"]).name for line in lines] == sorted(p.name for p in drawn.iterdir())
    assert "red circle" in lines[0]["text"]


def test_async_app(tmp_path: Path) -> None:
    for _ in range(
        3
    ):  # a thread that does not end its work with MLX aborts every second process as it exits
        done = example("async_app.py", cwd=tmp_path)
        assert done.stdout == "the event loop is free\ncircle: red\nsquare: blue\nagain: red\n"
