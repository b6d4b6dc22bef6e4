"""``mlx-janus chat``: chat with a model in the terminal, about images and to generate them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import JanusError, PromptError
from .arguments import ImageArguments, LoadArguments, TextArguments, load_pipeline
from .line_editor import (
    Vocabulary,
    dropped_files,
    expand_home,
    line_reader,
    split_paths,
    without_echo,
)
from .options import (
    SETTINGS,
    answering_options,
    model_options,
    sampling_options,
    show_option,
    version_option,
)
from .progress import follow_drawing, note_if_cut, terminal_preview
from .runner import Command, explain, say

if TYPE_CHECKING:
    from PIL import Image

    from ..inference.conversation import Conversation
    from ..inference.results import GeneratedImage, TextChunk, TextResult
    from ..pipeline import JanusPipeline


class Chat:
    """A conversation with its settings, and the images attached to the next question.

    Args:
        janus: the model.
        settings: value of each name in ``SETTINGS``; None: the default.
        system: system prompt; None: the model's own, "": none.
        show: whether to show previews in the terminal; None: if the terminal can show them.
    """

    def __init__(
        self,
        janus: JanusPipeline,
        settings: dict[str, Any],
        system: str | None = None,
        show: bool | None = None,
    ):
        self.janus = janus
        self.settings = settings
        self.show = show
        self.talk: Conversation = janus.conversation(system)
        self.waiting: list[Image.Image] = []  # attached to the next question
        self.result: TextResult | None = None  # result of the last answer

    def ask(self, question: str) -> None:
        """Print the answer to a question about the attached images, while it is generated.

        If the answer is stopped or fails, the chat stays as it was, and the images stay attached.

        Raises:
            PromptError: the question is empty, or does not fit into the context.
        """
        arguments = TextArguments.of(self.settings).keywords()
        try:
            stream = self.talk.stream(question, self.waiting, **arguments)
        except PromptError as error:
            advice = "; /reset forgets the conversation" if self.talk.messages else ""
            raise PromptError(f"{error}{advice}") from None
        self._print_answer(stream)
        self.waiting = []

    def retry(self, _: str) -> None:
        """Answer the last question again, with another random seed unless a seed is set."""
        arguments = TextArguments.of(self.settings).keywords()
        self._print_answer(self.talk.regenerate(**arguments))

    def _print_answer(self, stream: Iterator[TextChunk]) -> None:
        """Print an answer and keep its result in ``result``.

        Print a note if the answer was cut, or if the context lost old questions.
        """
        before = self.talk.forgotten  # the stream may increase it
        result = None
        try:
            for chunk in stream:
                result = chunk.result
                click.echo(chunk.text, nl=False)
        finally:
            click.echo()  # also ends the line of a ^C
        assert result is not None  # a stream has at least one chunk
        self.result = result
        note_if_cut(result)
        if self.talk.forgotten > before:
            count = self.talk.forgotten
            say(f"The context is full: the first {count} questions are no longer read.")

    def image(self, argument: str) -> None:
        """Attach the images of one or more file names to the next question.

        If one cannot be read, none is attached.

        Raises:
            JanusError: there is no file name.
        """
        from ..processing.images import open_image

        paths = split_paths(argument)
        if not paths:
            raise JanusError("/image needs a file: /image photo.jpg")
        self.waiting += [open_image(expand_home(path)) for path in paths]
        count = len(self.waiting)
        say(f"{count} image{'s' if count != 1 else ''} attached to your next question.")

    def draw(self, prompt: str) -> None:
        """Draw an image into janus.png, or into janus_2.png and so on if that file exists.

        The model sees the image with the next question.
        """

        def finished(image: GeneratedImage) -> None:
            click.echo(str(image.save(Path("janus.png"))))
            say(f"seed {image.seed}")

        arguments = ImageArguments.of(self.settings).keywords()
        steps = self.talk.stream_drawing(prompt, **arguments)
        follow_drawing(steps, 1, finished, terminal_preview(self.show))

    def seed(self, argument: str) -> None:
        """Set the seed; without an argument, seeds are random again."""
        self.set(f"seed {argument or 'random'}")

    def set(self, argument: str) -> None:
        """Change a setting, such as with "seed 7"; without an argument, list all settings.

        A name without a value restores the default, as the values "default" and "random" do.

        Raises:
            JanusError: there is no such setting, or the value does not suit it.
        """
        name, _, text = argument.partition(" ")
        if not name:
            for key in SETTINGS:
                value = self.settings.get(key)
                say(f"{key} {_UNSET.get(key, 'default') if value is None else value}")
            return
        if name not in SETTINGS:
            raise JanusError(f"there is no setting {name}: it must be one of {', '.join(SETTINGS)}")
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
        """Set the system prompt ("none" for none) unless ``text`` is empty, and print it."""
        if text:
            self.talk.system = "" if text == "none" else text
        current = self.janus.config.prompt.system if self.talk.system is None else self.talk.system
        say(f"system prompt: {current or 'none'}")

    def undo(self, _: str) -> None:
        """Remove the last exchange or drawing."""
        message = self.talk.undo()
        say(f"Removed: {message.text}")

    def save(self, argument: str) -> None:
        """Save the conversation to a JSON file, janus.json by default."""
        name = argument or "janus.json"
        path = self.talk.save(expand_home(name if name.endswith(".json") else f"{name}.json"))
        say(f"Saved {len(self.talk.messages)} messages to {path}.")

    def load(self, argument: str) -> None:
        """Replace the conversation with a saved one, and drop the attached images.

        Raises:
            JanusError: there is no file name.
        """
        if not argument:
            raise JanusError("/load needs a file: /load janus.json")
        self.talk.load(expand_home(split_paths(argument)[0]))
        self.waiting = []
        say(f"Loaded {len(self.talk.messages)} messages.")

    def stats(self, _: str) -> None:
        """Print speed and memory of the last answer, if any, and the used part of the context."""
        from ..memory import format_size

        if self.result is not None:
            done = self.result
            read = done.prompt_tokens - done.cached_tokens
            rate = f", {done.generation_tps:.1f} per second" if done.generation_tps else ""
            say(f"{len(done.tokens)} token{'s' if len(done.tokens) != 1 else ''}{rate}")
            delay = f"first token after {done.first_token_seconds:.2f} s"
            say(f"{read} of {done.prompt_tokens} prompt tokens read, {delay}")
            say(f"peak memory {format_size(done.peak_memory)}")
        context = self.janus.config.language.max_position_embeddings
        say(f"{self.talk.context_used} of {context} context tokens used")

    def reset(self, _: str) -> None:
        """Forget the conversation and the attached images."""
        self.talk.reset()
        self.waiting = []
        say("The conversation is forgotten.")

    def help(self, _: str) -> None:
        """Print the list of commands."""
        say(HELP)


_UNSET = {"seed": "random"}  # the words for unset settings, other than "default"
_COMMANDS: dict[str, tuple[str, Callable[[Chat, str], None], str]] = {
    "/image": (
        "FILE...",
        Chat.image,
        "attach images to the next question (or drop files on the terminal)",
    ),
    "/draw": (
        "PROMPT",
        Chat.draw,
        "draw an image into janus.png (janus_2.png and so on if that exists)",
    ),
    "/retry": ("", Chat.retry, "answer the last question again"),
    "/undo": ("", Chat.undo, "remove the last question or drawing"),
    "/seed": ("N", Chat.seed, "repeat results with this seed; random: new seeds again"),
    "/set": ("NAME VALUE", Chat.set, f"set {', '.join(SETTINGS)}; no NAME: list them"),
    "/system": ("TEXT", Chat.system, "set the system prompt; none: remove it; no TEXT: show it"),
    "/save": ("FILE", Chat.save, "save the conversation, and its images next to FILE"),
    "/load": ("FILE", Chat.load, "continue a saved conversation"),
    "/stats": ("", Chat.stats, "show speed and memory of the last answer, and context used"),
    "/reset": ("", Chat.reset, "forget the conversation"),
    "/help": ("", Chat.help, "show this list"),
}
_VOCABULARY = Vocabulary(
    commands=(*_COMMANDS, "/quit"),
    files_after=("/image", "/load"),
    words_after={"/set": tuple(SETTINGS)},
)
HELP = "\n".join(
    [f"{f'{name} {argument}':16} {text}" for name, (argument, _, text) in _COMMANDS.items()]
    + [f"{'/quit':16} leave (or press Ctrl-D); Ctrl-C stops an answer or a drawing"]
)


@click.command(cls=Command)
@model_options
@sampling_options
@answering_options
@click.option("--load", "saved", metavar="FILE", help="Continue a conversation saved with /save.")
@show_option
@version_option
def main(**options: Any) -> None:
    """Chat with a model about images, and let it generate images.

    \b
    Examples:
      python -m mlx_janus.chat
      python -m mlx_janus.chat -m deepseek-ai/Janus-Pro-1B
      python -m mlx_janus.chat -m models/janus-pro-1b --temperature 0.7
      python -m mlx_janus.chat --load janus.json
    """
    janus = load_pipeline(LoadArguments.of(options))
    settings = {name: options.get(name) for name in SETTINGS}
    chat = Chat(janus, settings, options["system"], options["show"])
    if options["saved"] is not None:
        chat.load(shlex.quote(options["saved"]))  # one name: ``load`` splits it as a shell does
    say(f"{janus.name} is ready. /help lists the commands.")
    _talk(chat, line_reader(_VOCABULARY))


def _talk(chat: Chat, read: Callable[[], str]) -> None:
    """Run every line of ``read`` until the input ends or the user leaves.

    Ctrl-C at the prompt prints a hint. ``_act`` handles Ctrl-C during an answer or a drawing.
    """
    while True:
        try:
            line = read().strip()
            if line.split(None, 1)[:1] in (["/quit"], ["/exit"]):
                return
            if line:
                with without_echo():
                    _act(chat, line)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():  # not interactive: Ctrl-C ends the program
                raise
            say("\nCtrl-D leaves.")


def _act(chat: Chat, line: str) -> None:
    """Run one line. Errors that a user can mend do not end the chat.

    Ctrl-C ends only the answer or drawing, unless stdin is not a terminal. Bugs and a closed stdout
    are raised.
    """
    try:
        _dispatch(chat, line)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        say("stopped")
    except BrokenPipeError:  # nobody reads stdout any more: end the program
        raise
    except Exception as error:
        message = explain(error)
        if message is None:  # a bug
            raise
        say(f"Error: {message}")


def _dispatch(chat: Chat, line: str) -> None:
    """Run a command, attach files dropped on the terminal, or ask a question.

    An unknown command only prints a hint.
    """
    command, *rest = line.split(None, 1)
    argument = rest[0] if rest else ""
    if command in _COMMANDS:
        _COMMANDS[command][1](chat, argument)
    elif dropped := dropped_files(line):
        chat.image(shlex.join(dropped))
    elif command.startswith("/") and "/" not in command[1:]:  # /etc/hosts may begin a question
        say(f"There is no {command[:40]}. /help lists the commands.")
    else:
        chat.ask(line)
