"""``python -m mlx_janus.chat``: talk with a model in the terminal, a line at a time."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import JanusError
from .options import Command, answering_options, load_model, model_options, sampling_options, say, version_option

if TYPE_CHECKING:
    from PIL import Image

    from .pipeline import JanusPipeline
    from .prompts import Turn

HELP = """\
/image FILE...   show pictures with the next question
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
        self.waiting += [open_image(path) for path in paths]
        say(f"{len(self.waiting)} waiting for your question.")

    def ask(self, question: str) -> None:
        """Stream the answer; an answer that is stopped or fails leaves the talk as it was."""
        from .decode.text import TextOptions
        from .pipeline import random_seed
        from .prompts import Turn

        given = {name: self.options[name] for name in ("max_tokens", "temperature", "top_p") if self.options[name]}
        seed = self.options["seed"] if self.options["seed"] is not None else random_seed()
        turns = [*self.turns, Turn("user", question, len(self.waiting))]
        images = [*self.images, *self.waiting]
        stream = self.janus.stream_turns(
            turns, images, options=TextOptions(seed=seed, **given), system=self.options["system"]
        )
        said = ""
        try:
            for chunk in stream:
                said += chunk.text
                click.echo(chunk.text, nl=False)
                sys.stdout.flush()
        finally:
            click.echo()
        self.turns, self.images, self.waiting = [*turns, Turn("assistant", said)], images, []

    def draw(self, prompt: str) -> None:
        for step in self.janus.stream_images(prompt, seed=self.options["seed"]):
            if step.index % 16 == 0 or step.images:
                click.echo(f"\r{step.index}/{step.total}", nl=False, err=True)
            for image in step.images:
                click.echo(err=True)
                click.echo(str(image.save(Path("janus.png"))))


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
    talk = Talk(load_model(*(options[name] for name in ("model", "bits", "dtype", "revision"))), options)
    say(f"{talk.janus.name} is ready. /help lists the commands.")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            click.echo(err=True)
            continue
        if line in ("/quit", "/exit"):
            return
        if line:
            _turn(talk, line)


def _turn(talk: Talk, line: str) -> None:
    command, _, rest = line.partition(" ")
    try:
        if command == "/image":
            talk.show(shlex.split(rest))
        elif command == "/draw":
            talk.draw(rest)
        elif command == "/reset":
            talk.reset()
        elif command == "/help":
            say(HELP)
        elif command.startswith("/") and not Path(command).exists():
            say(f"There is no {command}. /help lists the commands.")
        else:
            talk.ask(line)
    except KeyboardInterrupt:
        say("\nstopped")
    except (JanusError, ValueError) as error:
        say(f"Error: {error}")


if __name__ == "__main__":
    main(prog_name="python -m mlx_janus.chat")
