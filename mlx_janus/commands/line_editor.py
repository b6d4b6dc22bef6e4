"""Lines from a person: editing, history, completion, and file names as people type them."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import JanusError

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion

_PROMPT = "> "


@dataclass(frozen=True)
class Vocabulary:
    """Words that the Tab key completes.

    Args:
        commands: at the beginning of a line.
        files_after: those commands that take file names.
        words_after: those that take a word, with the words.
    """

    commands: tuple[str, ...]
    files_after: tuple[str, ...] = ()
    words_after: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def line_reader(vocabulary: Vocabulary) -> Callable[[], str]:
    """Return a function that reads the next line of stdin; it raises EOFError at the end.

    A terminal gets a prompt and line editing, which must not end up in a stdout that is redirected.

    Raises:
        JanusError: stdin is closed.
    """
    if sys.stdin is None:
        raise JanusError("the chat has no input: run it in a terminal, or pipe questions to it")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if not sys.stdin.isatty():
        return input
    if sys.stdout is None or not sys.stdout.isatty():
        return _read_beside_pipe
    return _line_editor(vocabulary) if _can_edit() else lambda: input(_PROMPT)


@contextlib.contextmanager
def without_echo() -> Iterator[None]:
    """Keep typed keys off the screen; the terminal holds them for the next line."""
    if not _can_edit():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    flags = before[3]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, [*before[:3], flags & ~termios.ECHO, *before[4:]])
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _can_edit() -> bool:
    """Return whether stdin and stdout are a terminal whose cursor can be moved."""
    streams = (sys.stdin, sys.stdout)
    smart = os.environ.get("TERM", "dumb") != "dumb"
    return smart and all(stream is not None and stream.isatty() for stream in streams)


def _read_beside_pipe() -> str:
    click.echo(_PROMPT, nl=False, err=True)
    return input()


def _line_editor(vocabulary: Vocabulary) -> Callable[[], str]:
    """Return prompt_toolkit's prompt, with completion and a history that is kept in a file."""
    from platformdirs import user_state_path
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    class TolerantHistory(FileHistory):
        """A history that works without its file, such as on a full disk."""

        def load_history_strings(self) -> Iterable[str]:
            try:
                return [*super().load_history_strings()]
            except OSError:
                return []

        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):
                super().store_string(string)

    file = user_state_path("mlx_janus", appauthor=False) / "chat_history"
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    session: PromptSession[str] = PromptSession(
        _PROMPT,
        history=TolerantHistory(str(file)),
        completer=_completer(vocabulary),
        complete_while_typing=False,
        enable_suspend=True,
    )
    return session.prompt


def _completer(vocabulary: Vocabulary) -> Completer:
    from prompt_toolkit.completion import Completer, PathCompleter, WordCompleter
    from prompt_toolkit.document import Document

    commands = WordCompleter(list(vocabulary.commands), sentence=True)
    files = PathCompleter(expanduser=True)
    arguments: dict[str, Completer] = dict.fromkeys(vocabulary.files_after, files)
    for command, words in vocabulary.words_after.items():
        arguments[command] = WordCompleter(list(words))

    class LineCompleter(Completer):
        """Commands at the beginning of the line, then the arguments of the command."""

        def get_completions(
            self, document: Document, complete_event: CompleteEvent
        ) -> Iterable[Completion]:
            command, space, rest = document.text_before_cursor.partition(" ")
            inner = arguments.get(command) if space else commands
            if inner is None:
                return []
            text = rest if space else command
            return inner.get_completions(Document(text, len(text)), complete_event)

    return LineCompleter()


# File names


def split_paths(text: str) -> list[str]:
    """Split file names as a shell does; a single file's name needs no quotes.

    Raises:
        JanusError: quotes do not match.
    """
    if _is_file(text):
        return [text]
    try:
        return shlex.split(text)
    except ValueError:
        raise JanusError(
            f"{text} does not exist: quote names that have spaces or quotes in them"
        ) from None


def dropped_files(line: str) -> list[str]:
    """Return the files that were dropped on the terminal, which types their full paths; [] for any other line."""
    if not line.startswith(("/", "'/", '"/')):
        return []
    if _is_file(line):
        return [line]
    try:
        words = shlex.split(line)
    except ValueError:
        return []
    return words if all(word.startswith("/") and _is_file(word) for word in words) else []


def expand_home(path: str) -> str:
    """Replace a leading "~" by the home folder; the "~" of an unknown user stays."""
    return os.path.expanduser(path)  # noqa: PTH111  pathlib's raises for an unknown user


def _is_file(text: str) -> bool:
    try:
        return bool(text) and Path(expand_home(text)).is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        return False
