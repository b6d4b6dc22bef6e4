"""Lines from the user: editing, history, completion, and file names as users type them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import JanusError
from ..processing.file_names import local_path

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion

QUOTES = '"""'  # begin and end a text of several lines
_PROMPT = "> "
_CONTINUATION = "... "  # the prompt for further lines of a text in quotes
_OPENING_QUOTES = re.compile(rf"\s*(?:/\S+\s+)?{QUOTES}")  # perhaps after a command


@dataclass(frozen=True)
class Vocabulary:
    """Words that the Tab key completes.

    Args:
        commands: completed at the beginning of a line.
        files_after: commands followed by file names.
        words_after: for each command, the words that may follow it; the user chooses one.
    """

    commands: tuple[str, ...]
    files_after: tuple[str, ...] = ()
    words_after: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def line_reader(vocabulary: Vocabulary) -> Callable[[], str]:
    """Return a function that reads the next line of stdin, and raises EOFError at the end.

    A text that begins with triple quotes is read to its closing quotes, over several lines. If
    piped input ends without the closing quotes, the function raises a JanusError.

    If stdin is a terminal, the function prints a prompt. If stdout is redirected, the prompt is
    printed to stderr, so that the file or pipe gets only answers. If stdin and stdout are a
    terminal with a movable cursor, lines can be edited.

    From this call on, stdin replaces bytes that are not valid text.

    Raises:
        JanusError: stdin is closed.
    """
    if sys.stdin is None:
        raise JanusError("the chat has no input: run it in a terminal, or pipe questions to it")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a wrong byte must not end the chat
    if not sys.stdin.isatty():
        return lambda: _read_with_quotes(lambda _: input())
    if sys.stdout is None or not sys.stdout.isatty():
        return lambda: _read_with_quotes(_read_with_prompt_on_stderr)
    if not _can_edit():
        return lambda: _read_with_quotes(input)
    return _line_editor(vocabulary)


def _read_with_quotes(read_line: Callable[[str], str]) -> str:
    """Read a line. If it opens triple quotes, read on to the line that closes them.

    Args:
        read_line: reads a line; its argument is the prompt.

    Raises:
        EOFError: the input has ended.
        JanusError: piped input ends before the closing quotes.
    """
    line = read_line(_PROMPT)
    lines = [line]
    is_open = opens_quotes(line)
    while is_open:
        try:
            line = read_line(_CONTINUATION)
        except EOFError:
            if sys.stdin.isatty():  # the user has left with Ctrl-D
                raise
            raise JanusError(f"the input ends before the closing {QUOTES}: add them") from None
        lines.append(line)
        is_open = QUOTES not in line
    return "\n".join(lines)


def opens_quotes(text: str) -> bool:
    """Return whether a text opens triple quotes, perhaps after a command, and never closes them."""
    opening = _OPENING_QUOTES.match(text)
    return opening is not None and QUOTES not in text[opening.end() :]


def without_quotes(text: str) -> str | None:
    """Return the content of a text in triple quotes, without line breaks at its ends.

    Returns None if the quotes do not enclose the entire text.
    """
    has_room = len(text) >= 2 * len(QUOTES)  # for separate opening and closing quotes
    if not (has_room and text.startswith(QUOTES) and text.endswith(QUOTES)):
        return None
    content = text[len(QUOTES) : -len(QUOTES)]
    return None if QUOTES in content else content.strip("\n")


@contextlib.contextmanager
def without_echo() -> Iterator[None]:
    """Hide keys typed during the context. The terminal passes them to the next line that is read.

    Does nothing unless stdin and stdout are a terminal with a movable cursor.
    """
    if not _can_edit():
        yield
        return
    import termios

    with_echo = termios.tcgetattr(sys.stdin)
    hidden = list(with_echo)
    hidden[3] &= ~termios.ECHO  # item 3: the local flags
    termios.tcsetattr(sys.stdin, termios.TCSANOW, hidden)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, with_echo)


def _can_edit() -> bool:
    """Return whether stdin and stdout are a terminal with a movable cursor."""
    streams = (sys.stdin, sys.stdout)
    movable_cursor = os.environ.get("TERM", "dumb") != "dumb"
    return movable_cursor and all(stream is not None and stream.isatty() for stream in streams)


def _read_with_prompt_on_stderr(prompt: str) -> str:
    """Print the prompt to stderr, because stdout is redirected, and read a line of stdin."""
    click.echo(prompt, nl=False, err=True)
    return input()


def _line_editor(vocabulary: Vocabulary) -> Callable[[], str]:
    """Return the function of prompt_toolkit that reads a line, with completion and a history.

    Alt-Enter, or Esc and then Enter, begins a new line of the same text. So does Enter in a text
    that opens triple quotes.

    The history is kept in a file that only this user can read. If the file cannot be written, the
    history is lost when the program ends.
    """
    from platformdirs import user_state_path
    from prompt_toolkit import PromptSession
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    class TolerantHistory(FileHistory):
        """A history that ignores errors of its file, such as on a full disk."""

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
        file.touch(mode=0o600)  # only the user may read it
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    session: PromptSession[str] = PromptSession(
        _PROMPT,
        prompt_continuation=_CONTINUATION,
        multiline=Condition(lambda: opens_quotes(session.default_buffer.text)),
        key_bindings=keys,
        history=TolerantHistory(str(file)),
        completer=_completer(vocabulary),
        complete_while_typing=False,
        enable_suspend=True,  # by Ctrl-Z
    )
    return session.prompt


def _completer(vocabulary: Vocabulary) -> Completer:
    """Return prompt_toolkit's completer for a vocabulary."""
    from prompt_toolkit.completion import Completer, PathCompleter, WordCompleter
    from prompt_toolkit.document import Document

    # ``sentence`` compares the entire text: for prompt_toolkit, "/" is not a part of a word.
    commands = WordCompleter(list(vocabulary.commands), sentence=True)
    files = PathCompleter(expanduser=True)
    # The completer of each command's arguments.
    arguments: dict[str, Completer] = dict.fromkeys(vocabulary.files_after, files)
    for command, words in vocabulary.words_after.items():
        arguments[command] = WordCompleter(list(words))

    class LineCompleter(Completer):
        """A completer for commands, then for the arguments of the command."""

        def get_completions(
            self, document: Document, complete_event: CompleteEvent
        ) -> Iterable[Completion]:
            """Complete the command, or after a space its argument."""
            command, space, argument = document.text_before_cursor.partition(" ")
            completer = arguments.get(command) if space else commands
            if completer is None:  # a question, or a command without arguments to complete
                return []
            # Give the completer only the command or its argument, as if that were the entire line.
            text = argument if space else command
            return completer.get_completions(Document(text, len(text)), complete_event)

    return LineCompleter()


# File names

_FULL_PATHS = ("/", "file:/")  # beginnings of full paths


def split_one_path(command: str, text: str) -> str:
    """Return the file name in a command's argument, which may be quoted as in a shell.

    Args:
        command: the command, for the message of the error.
        text: the argument.

    Raises:
        JanusError: there is not exactly one name, or quotes do not match.
    """
    paths = split_paths(text)
    if len(paths) != 1:
        raise JanusError(f"{command} takes one file, got {len(paths)}: quote a name with spaces")
    return paths[0]


def split_paths(text: str) -> list[str]:
    """Split file names as a shell does; the name of a single existing file needs no quotes.

    Addresses with file:// are returned unchanged; ``typed_path`` gives their paths.

    Raises:
        JanusError: quotes do not match.
    """
    if is_file(text):
        return [text]
    try:
        return shlex.split(text)
    except ValueError:
        raise JanusError(f"{text} does not exist: quote names with spaces or quotes") from None


def split_new_path(command: str, text: str) -> str:
    """Return the file name in the argument of a command that writes a file.

    An argument without quotes and backslashes is one name, even with spaces.

    Args:
        command: the command, for the message of the error.
        text: the argument, which may be empty.

    Raises:
        JanusError: the argument has quotes or backslashes, and names several files.
    """
    try:
        words = shlex.split(text)
    except ValueError:  # quotes do not match, as in "it's mine"
        return text
    if len(words) > 1 and any(character in text for character in "'\"\\"):
        raise JanusError(f"{command} takes one file, got {len(words)}: quote the entire name")
    return words[0] if len(words) == 1 else text


def dropped_files(line: str) -> list[str]:
    """Return the files of a line that has only full paths of existing files; [] for other lines.

    If the user drops files on a terminal, it types their full paths, with quotes or backslashes,
    or their file:// addresses.
    """
    if not line.lstrip("'\"").startswith(_FULL_PATHS):
        return []
    if is_file(line):
        return [line]
    try:
        words = shlex.split(line)
    except ValueError:
        return []
    are_files = all(word.startswith(_FULL_PATHS) and is_file(word) for word in words)
    return words if are_files else []


def expand_home(path: str) -> str:
    """Replace a leading "~" with the home folder; keep the "~" of an unknown user."""
    return os.path.expanduser(path)  # noqa: PTH111  pathlib's raises for unknown users


def typed_path(name: str) -> str:
    """Return the path of a file name as people type it, with "~", or of a file:// address.

    Raises:
        ImageError: the address names a file of another machine.
    """
    return expand_home(local_path(name))


def is_file(text: str) -> bool:
    """Return whether a text, which may be any line, is the name of an existing file."""
    try:
        return bool(text) and Path(typed_path(text)).is_file()
    except (OSError, ValueError, JanusError):  # too long, with a NUL, or of another machine
        return False
