"""``python -m mlx_janus.chat``: talk with a model in the terminal, and have it draw."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import JanusError, PromptError
from .arguments import LoadArguments, load_pipeline
from .options import SETTINGS, answering_options, model_options, sampling_options, show_option, version_option
from .progress import follow_drawing, note_if_cut, terminal_preview
from .runner import Command, explain, say

if TYPE_CHECKING:
    from PIL import Image
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion

    from ..inference.conversation import Conversation
    from ..inference.results import GeneratedImage, TextChunk, TextResult
    from ..pipeline import JanusPipeline


@dataclass
class Chat:
    """A conversation, its settings, and the pictures that wait for the next question."""

    janus: JanusPipeline
    settings: dict[str, Any]
    show: bool | None = None  # pictures in the terminal; None: where it can
    waiting: list[Image.Image] = field(default_factory=list)
    result: TextResult | None = None  # of the last answer

    def __post_init__(self) -> None:
        self.talk: Conversation = self.janus.conversation(self.settings.pop("system", None))

    def ask(self, question: str) -> None:
        """Stream the answer; one that is stopped or fails leaves the chat as it was."""
        try:
            stream = self.talk.stream(question, self.waiting, **self._choice("max_tokens", "temperature", "top_p"))
        except PromptError as error:
            raise PromptError(f"{error}; /reset forgets what was said" if self.talk.messages else str(error)) from None
        self._speak(stream)
        self.waiting = []

    def retry(self, _: str) -> None:
        """Answer the last question again, with another seed unless one is set."""
        self._speak(self.talk.regenerate(**self._choice("max_tokens", "temperature", "top_p")))

    def _choice(self, *names: str) -> dict[str, Any]:
        return {name: self.settings[name] for name in ("seed", *names) if self.settings[name] is not None}

    def _speak(self, stream: Iterator[TextChunk]) -> None:
        before, result = self.talk.forgotten, None
        try:
            for chunk in stream:
                result = chunk.result
                click.echo(chunk.text, nl=False)
        finally:
            click.echo()  # ends the line of a ^C too
        assert result is not None
        self.result = result
        note_if_cut(result)
        if self.talk.forgotten > before:
            say(f"The context is full: the first {self.talk.forgotten} questions are no longer read.")

    def image(self, argument: str) -> None:
        """Show pictures with the next question."""
        from ..processing.images import open_image

        if not (paths := _paths(argument)):
            raise JanusError("/image needs a file: /image photo.jpg")
        self.waiting += [open_image(_at_home(path)) for path in paths]
        say(f"{len(self.waiting)} waiting for your question.")

    def draw(self, prompt: str) -> None:
        """Draw into janus.png, or its next free sibling."""

        def finished(image: GeneratedImage) -> None:
            click.echo(str(image.save(Path("janus.png"))))
            say(f"seed {image.seed}")

        steps = self.talk.stream_drawing(prompt, **self._choice("temperature", "top_p", "cfg_weight"))
        follow_drawing(steps, 1, finished, terminal_preview(self.show))

    def seed(self, argument: str) -> None:
        """Set the seed, or leave it to chance."""
        self.set(f"seed {argument or 'random'}")

    def set(self, argument: str) -> None:
        """Set how answers and pictures are chosen, or list how they are."""
        name, _, text = argument.partition(" ")
        if not name:
            for key in SETTINGS:
                value = self.settings.get(key)
                say(f"{key} {_UNSET.get(key, 'default') if value is None else value}")
            return
        if name not in SETTINGS:
            raise JanusError(f"there is no setting {name}: it is one of {', '.join(SETTINGS)}")
        text = text.strip()
        if text in ("", "default", "random"):
            self.settings[name] = None
        else:
            try:
                self.settings[name] = SETTINGS[name].convert(text, None, None)
            except click.ClickException as error:
                raise JanusError(f"{name}: {error.message}") from None
        say(f"{name} {text or _UNSET.get(name, 'default')}")

    def system(self, text: str) -> None:
        """Set the system prompt, or say what it is."""
        if text:
            self.talk.system = "" if text == "none" else text
        current = self.janus.config.prompt.system if self.talk.system is None else self.talk.system
        say(f"system prompt: {current or 'none'}")

    def undo(self, _: str) -> None:
        """Take back the last exchange or drawing."""
        message = self.talk.undo()
        say(f"Taken back: {message.text}")

    def save(self, argument: str) -> None:
        """Write the conversation into a file."""
        name = argument or "janus.json"
        path = self.talk.save(_at_home(name if name.endswith(".json") else f"{name}.json"))
        say(f"{len(self.talk.messages)} messages in {path}")

    def load(self, argument: str) -> None:
        """Go on with a saved conversation."""
        if not argument:
            raise JanusError("/load needs a file: /load janus.json")
        self.talk.load(_at_home(_paths(argument)[0]))
        self.waiting = []
        say(f"{len(self.talk.messages)} messages.")

    def stats(self, _: str) -> None:
        """Speed and memory of the last answer, and how much of the context is used."""
        from ..memory import format_size

        if self.result is not None:
            done, read = self.result, self.result.prompt_tokens - self.result.cached_tokens
            rate = f", {done.generation_tps:.1f} a second" if done.generation_tps else ""
            say(f"{len(done.tokens)} token{'s' if len(done.tokens) != 1 else ''}{rate}")
            say(
                f"{read} of {done.prompt_tokens} prompt tokens read, first token after {done.first_token_seconds:.2f} s"
            )
            say(f"{format_size(done.peak_memory)} of memory at most")
        say(f"context {self.talk.context_used} of {self.janus.config.language.max_position_embeddings}")

    def reset(self, _: str) -> None:
        """Forget everything that was said."""
        self.talk.reset()
        self.waiting = []
        say("All is forgotten.")

    def help(self, _: str) -> None:
        """This list."""
        say(HELP)


_UNSET = {"seed": "random"}
_COMMANDS: dict[str, tuple[str, Callable[[Chat, str], None], str]] = {
    "/image": ("FILE...", Chat.image, "show pictures with the next question (as do files dropped on the terminal)"),
    "/draw": ("PROMPT", Chat.draw, "draw a picture into janus.png (a numbered sibling if that exists)"),
    "/retry": ("", Chat.retry, "answer the last question again"),
    "/undo": ("", Chat.undo, "take back the last question or drawing"),
    "/seed": ("N", Chat.seed, "repeat results; random: no more"),
    "/set": ("NAME VALUE", Chat.set, f"{', '.join(SETTINGS)}; alone: list them"),
    "/system": ("TEXT", Chat.system, "set the system prompt; none: without; alone: show it"),
    "/save": ("FILE", Chat.save, "write the conversation, with its pictures beside it"),
    "/load": ("FILE", Chat.load, "go on with a saved one"),
    "/stats": ("", Chat.stats, "speed and memory of the last answer, context used"),
    "/reset": ("", Chat.reset, "forget what was said"),
    "/help": ("", Chat.help, "this list"),
}
HELP = "\n".join(
    [f"{f'{name} {argument}':16} {text}" for name, (argument, _, text) in _COMMANDS.items()]
    + [f"{'/quit':16} leave (or Ctrl-D); Ctrl-C stops an answer or a drawing"]
)


@click.command(cls=Command)
@model_options
@sampling_options
@answering_options
@click.option("--load", "saved", metavar="FILE", help="Go on with a conversation that /save wrote.")
@show_option
@version_option
def main(**options: Any) -> None:
    """Chat with a model about pictures, and have it draw.

    \b
    Examples:
      python -m mlx_janus.chat
      python -m mlx_janus.chat -m deepseek-ai/Janus-Pro-1B
      python -m mlx_janus.chat -m models/janus-pro-1b --temperature 0.7
      python -m mlx_janus.chat --load janus.json
    """
    janus = load_pipeline(LoadArguments.of(options))
    saved, show = options.pop("saved"), options.pop("show")
    settings = {name: options.get(name) for name in (*SETTINGS, "system")}
    chat = Chat(janus, settings, show)
    if saved is not None:
        chat.load(shlex.quote(saved))
    say(f"{janus.name} is ready. /help lists the commands.")
    read = _reader()
    while True:
        try:
            line = read().strip()
            if line.split(None, 1)[:1] in (["/quit"], ["/exit"]):
                return
            if line:
                with _without_echo():
                    _turn(chat, line)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():  # nobody is there to type on
                raise
            say("\nCtrl-D leaves.")


def _turn(chat: Chat, line: str) -> None:
    command, *rest = line.split(None, 1)
    argument = rest[0] if rest else ""
    try:
        if command in _COMMANDS:
            _COMMANDS[command][1](chat, argument)
        elif dropped := _dropped_files(line):
            chat.image(shlex.join(dropped))
        elif command.startswith("/") and "/" not in command[1:]:  # a path, /etc/hosts, may be asked about
            say(f"There is no {command[:40]}. /help lists the commands.")
        else:
            chat.ask(line)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        say("stopped")
    except BrokenPipeError:
        raise
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        say(f"Error: {message}")


@contextlib.contextmanager
def _without_echo() -> Iterator[None]:
    """Keep what is typed meanwhile for the line editor, and off an answer or a picture that is being written."""
    if not _has_line_editor():
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


def _reader() -> Callable[[], str]:
    """What reads a line: from a terminal with a prompt and line editing, which must not end up in a piped stdout."""
    if sys.stdin is None:
        raise JanusError("the chat has no input: run it in a terminal, or pipe questions to it")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if not sys.stdin.isatty():
        return input
    if sys.stdout is None or not sys.stdout.isatty():
        return _read_beside_pipe
    return _line_editor() if _has_line_editor() else lambda: input("> ")


def _has_line_editor() -> bool:
    streams = (sys.stdin, sys.stdout)
    smart = os.environ.get("TERM", "dumb") != "dumb"
    return smart and all(stream is not None and stream.isatty() for stream in streams)


def _read_beside_pipe() -> str:
    click.echo("> ", nl=False, err=True)
    return input()


def _line_editor() -> Callable[[], str]:
    """prompt_toolkit's prompt, with a history that is kept and completion of commands, settings and file names."""
    from platformdirs import user_state_path
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    class Kept(FileHistory):
        """A file that cannot be read or written, on a full disk say, is done without."""

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
        "> ", history=Kept(str(file)), completer=_completer(), complete_while_typing=False, enable_suspend=True
    )
    return session.prompt


def _completer() -> Completer:
    from prompt_toolkit.completion import Completer, PathCompleter, WordCompleter
    from prompt_toolkit.document import Document

    commands = WordCompleter([*_COMMANDS, "/quit"], sentence=True)
    files = PathCompleter(expanduser=True)
    arguments = {"/image": files, "/load": files, "/set": WordCompleter(list(SETTINGS))}

    class Commands(Completer):
        """Commands at the beginning of the line, then what the command takes."""

        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            command, space, rest = document.text_before_cursor.partition(" ")
            inner = arguments.get(command) if space else commands
            if inner is None:
                return []
            text = rest if space else command
            return inner.get_completions(Document(text, len(text)), complete_event)

    return Commands()


def _paths(text: str) -> list[str]:
    """File names as a shell would take them, or one that has spaces or an apostrophe in it and no quotes around it."""
    if _is_file(text):
        return [text]
    try:
        return shlex.split(text)
    except ValueError:
        raise JanusError(f"{text} does not exist: quote names that have spaces or quotes in them") from None


def _dropped_files(line: str) -> list[str]:
    """The files whose full paths are all that a line holds, as a terminal types them when they are dropped onto it."""
    if not line.startswith(("/", "'/", '"/')):
        return []
    if _is_file(line):
        return [line]
    try:
        words = shlex.split(line)
    except ValueError:
        return []
    return words if all(word.startswith("/") and _is_file(word) for word in words) else []


def _at_home(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111  pathlib's raises for the home of nobody


def _is_file(text: str) -> bool:
    try:
        return bool(text) and Path(_at_home(text)).is_file()
    except (OSError, ValueError):  # too long, a NUL
        return False
