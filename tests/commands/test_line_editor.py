"""Lines from a person: how they are read, what the Tab key completes, and names of files."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from mlx_janus.commands import chat, line_editor
from mlx_janus.commands.line_editor import (
    Vocabulary,
    dropped_files,
    expand_home,
    line_reader,
    opens_quotes,
    split_paths,
    typed_path,
    without_quotes,
)
from mlx_janus.errors import JanusError

VOCABULARY = Vocabulary(
    ("/image", "/set", "/quit"), files_after=("/image",), words_after={"/set": ("seed", "top_p")}
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, also the home, with files whose names need quotes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a b.png", "it's.png", "c.png"):
        (tmp_path / name).touch()
    return tmp_path


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def completions(text: str) -> list[str]:
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    found = line_editor._completer(VOCABULARY).get_completions(Document(text), CompleteEvent())
    return [completion.text for completion in found]


def test_commands_files_and_words_are_completed_each_in_its_place() -> None:
    pytest.importorskip("prompt_toolkit")
    assert completions("/") == ["/image", "/set", "/quit"]
    assert completions("/set ") == ["seed", "top_p"]
    assert completions("/set to") == ["top_p"]
    assert completions("/image c.") == ["png"]
    assert completions("/quit ") == []
    assert completions("What is") == []


def test_the_chat_completes_its_own_commands_and_settings() -> None:
    vocabulary = chat._VOCABULARY
    assert {"/image", "/draw", "/help", "/quit"} <= set(vocabulary.commands)
    assert {*vocabulary.files_after, *vocabulary.words_after} <= set(vocabulary.commands)
    assert "cfg_weight" in vocabulary.words_after["/set"]


def test_a_closed_stdin_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(JanusError, match="no input"):
        line_reader(VOCABULARY)


def test_piped_lines_are_read_without_a_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nnext\n"), encoding="utf-8")
    )
    read = line_reader(VOCABULARY)
    assert [read(), read()] == ["caf\ufffd", "next"]
    with pytest.raises(EOFError):
        read()
    assert tuple(capsys.readouterr()) == ("", "")


def test_a_terminal_beside_a_pipe_is_prompted_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("Hello?\n"))
    assert line_reader(VOCABULARY)() == "Hello?"
    assert tuple(capsys.readouterr()) == ("", "> ")


def test_a_plain_terminal_is_not_edited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stdin", Terminal("Hello?\n"))
    stdout = Terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    assert line_reader(VOCABULARY)() == "Hello?"
    assert stdout.getvalue() == "> "
    with line_editor.without_echo():  # which no termios is asked for
        pass


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("a b.png", ["a b.png"]),
        ("it's.png", ["it's.png"]),
        ("'a b.png' c.png", ["a b.png", "c.png"]),
        ("a\\ b.png", ["a b.png"]),
        ("absent.png c.png", ["absent.png", "c.png"]),
        ("~/c.png", ["~/c.png"]),
        ("", []),
    ],
)
def test_names_are_split_as_people_type_them(text: str, paths: list[str]) -> None:
    assert split_paths(text) == paths


def test_quotes_that_do_not_match() -> None:
    with pytest.raises(JanusError, match=r"it's gone\.png does not exist: quote names"):
        split_paths("it's gone.png")


def test_a_dropped_file_is_a_full_path_and_nothing_else(here: Path) -> None:
    one, other = str(here / "c.png"), str(here / "a b.png")
    assert dropped_files(one) == [one]
    assert dropped_files(other) == [other]
    assert dropped_files(f"'{other}' {one}") == [other, one]
    assert dropped_files(other.replace(" ", "\\ ")) == [other]
    for line in (
        "c.png",
        f"{one} is what?",
        "/absent.png",
        f"{one} 'x",
        "/" + "a" * 5000,
        "/\0",
        "",
    ):
        assert dropped_files(line) == []


def test_a_dropped_address_is_a_file_and_nothing_else(here: Path) -> None:
    one, other = (here / "c.png").as_uri(), (here / "a b.png").as_uri()
    assert dropped_files(f"{one} '{other}'") == [one, other]
    for line in (f"{one} is what?", "file:///absent.png", "file://elsewhere/c.png", "file:c.png"):
        assert dropped_files(line) == []


def test_typed_names_are_paths(here: Path) -> None:
    assert typed_path("~/c.png") == str(here / "c.png")
    assert typed_path((here / "a b.png").as_uri()) == str(here / "a b.png")
    assert split_paths("file:///a%20b.png") == ["file:///a%20b.png"]


@pytest.mark.parametrize(
    ("text", "is_open"),
    [
        ('"""', True),
        ('"""one', True),
        ('  """one\ntwo', True),
        ('/draw """one', True),
        ('/draw\t"""', True),
        ('"""one"""', False),
        ('"""one""" two', False),
        ('"""one\ntwo"""', False),
        ('""""""', False),
        ('one """two', False),
        ('/a """b""" """', False),
        ('""', False),
        ("", False),
    ],
)
def test_texts_that_open_quotes(text: str, is_open: bool) -> None:
    assert opens_quotes(text) is is_open


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ('"""one"""', "one"),
        ('"""\n  one\n\ntwo\n"""', "  one\n\ntwo"),
        ('""""""', ""),
        ('"""', None),
        ('"""""', None),
        ('"""one""" two', None),
        ('"""one""" and """two"""', None),
        ("one", None),
    ],
)
def test_the_content_of_quotes(text: str, content: str | None) -> None:
    assert without_quotes(text) == content


def test_lines_in_quotes_are_prompted_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-D before the closing quotes leaves, as it does elsewhere on a terminal."""
    monkeypatch.setattr(sys, "stdin", Terminal('"""one\ntwo"""\n"""three\n'))
    read = line_reader(VOCABULARY)
    assert read() == '"""one\ntwo"""'
    with pytest.raises(EOFError):
        read()
    assert capsys.readouterr().err == "> ... > ... "


def test_a_home(here: Path) -> None:
    assert expand_home("~/c.png") == os.fspath(here / "c.png")
    assert expand_home("~nobody-of-that-name/c.png") == "~nobody-of-that-name/c.png"
