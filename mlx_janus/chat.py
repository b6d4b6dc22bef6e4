"""``python -m mlx_janus.chat``: talk with a model in the terminal, a line at a time."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import JanusError, PromptError
from .options import (
    Command,
    answering_options,
    explain,
    follow_drawing,
    given,
    load_model,
    model_options,
    sampling_options,
    say,
    say_if_cut,
    version_option,
)

if TYPE_CHECKING:
    from PIL import Image

    from .pipeline import JanusPipeline
    from .prompts import Turn
    from .results import GeneratedImage

HELP = """\
/image FILE...   show pictures with the next question (as does a file dropped on the terminal)
/draw PROMPT     draw a picture into janus.png (a numbered sibling if that exists)
/reset           forget what was said
/help            this list
/quit            leave (or Ctrl-D); Ctrl-C stops an answer"""


@dataclass
class Talk:
    """What was said, and the pictures shown with it."""

    janus: JanusPipeline
    options: dict[str, Any]
    turns: list[Turn] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    waiting: list[Image.Image] = field(default_factory=list)  # shown with the next question

    def reset(self) -> None:
        self.turns, self.images, self.waiting = [], [], []

    def show(self, paths: list[str]) -> None:
        from .images import open_image

        if not paths:
            raise JanusError("/image needs a file: /image photo.jpg")
        self.waiting += [open_image(_at_home(path)) for path in paths]
        say(f"{len(self.waiting)} waiting for your question.")

    def ask(self, question: str) -> None:
        """Stream the answer; an answer that is stopped or fails leaves the talk as it was."""
        from .decode.text import TextOptions
        from .pipeline import random_seed
        from .prompts import Turn

        seed = random_seed() if self.options["seed"] is None else self.options["seed"]
        turns = [*self.turns, Turn("user", question, len(self.waiting))]
        images = [*self.images, *self.waiting]
        choice = TextOptions(seed=seed, **given(self.options, "max_tokens", "temperature", "top_p"))
        try:
            stream = self.janus.stream_turns(turns, images, options=choice, system=self.options["system"])
        except PromptError as error:
            raise PromptError(f"{error}; /reset forgets what was said" if self.turns else str(error)) from None
        said, result = "", None
        try:
            for chunk in stream:
                said += chunk.text
                result = chunk.result
                click.echo(chunk.text, nl=False)
        finally:
            click.echo()  # ends the line of a ^C too
        assert result is not None
        say_if_cut(result)
        self.turns, self.images, self.waiting = [*turns, Turn("assistant", said)], images, []

    def draw(self, prompt: str) -> None:
        def finished(image: GeneratedImage) -> None:
            click.echo(str(image.save(Path("janus.png"))))
            say(f"seed {image.seed}")

        steps = self.janus.stream_images(prompt, **given(self.options, "seed", "temperature", "top_p"))
        follow_drawing(steps, 1, finished)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@model_options
@sampling_options
@answering_options
@version_option
def main(**options: Any) -> None:
    """Chat with a model about pictures, and have it draw.

    \b
    Examples:
      python -m mlx_janus.chat -m deepseek-ai/Janus-Pro-1B
      python -m mlx_janus.chat -m models/janus-pro-1b --temperature 0.7
    """
    talk = Talk(load_model(*(options[name] for name in ("model", "bits", "recipe", "dtype", "revision"))), options)
    say(f"{talk.janus.name} is ready. /help lists the commands.")
    read = _reader()
    while True:
        try:
            line = read().strip()
            if line in ("/quit", "/exit"):
                return
            if line:
                _turn(talk, line)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():  # nobody is there to type on
                raise
            say("\nCtrl-D leaves.")


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
    with contextlib.suppress(ImportError):  # not in every build
        import readline  # noqa: F401  input() uses it once it is imported
    return lambda: input("> ")


def _read_beside_pipe() -> str:
    click.echo("> ", nl=False, err=True)
    return input()


def _turn(talk: Talk, line: str) -> None:
    command, *rest = line.split(None, 1)
    argument = rest[0] if rest else ""
    try:
        if command == "/image":
            talk.show(_paths(argument))
        elif command == "/draw":
            talk.draw(argument)
        elif command == "/reset":
            talk.reset()
        elif command == "/help":
            say(HELP)
        elif dropped := _dropped_file(line):
            talk.show([dropped])
        elif command.startswith("/") and "/" not in command[1:]:  # a path, /etc/hosts, may be asked about
            say(f"There is no {command[:40]}. /help lists the commands.")
        else:
            talk.ask(line)
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


def _paths(text: str) -> list[str]:
    """File names as a shell would take them, or one that has spaces or an apostrophe in it and no quotes around it."""
    if _is_file(text):
        return [text]
    try:
        return shlex.split(text)
    except ValueError:
        raise JanusError(f"{text} does not exist: quote names that have spaces or quotes in them") from None


def _dropped_file(line: str) -> str | None:
    """The file whose full path is all that the line holds, as a terminal types it when one is dropped onto it."""
    if not line.startswith(("/", "'/")):
        return None
    if _is_file(line):
        return line
    try:
        words = shlex.split(line)
    except ValueError:
        return None
    return words[0] if len(words) == 1 and _is_file(words[0]) else None


def _at_home(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111  pathlib's raises for the home of nobody


def _is_file(text: str) -> bool:
    try:
        return bool(text) and Path(_at_home(text)).is_file()
    except (OSError, ValueError):  # too long, a NUL
        return False


if __name__ == "__main__":
    main(prog_name="python -m mlx_janus.chat")
