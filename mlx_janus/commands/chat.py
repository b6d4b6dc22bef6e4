"""``mlx-janus chat``: chat with a model in the terminal, about images and to generate them."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ContextLengthError, JanusError
from ..processing.file_names import names_folder
from .arguments import EditArguments, ImageArguments, LoadArguments, TextArguments, load_pipeline
from .editing import cfg_weight2_option
from .line_editor import (
    QUOTES,
    Vocabulary,
    dropped_files,
    is_file,
    line_reader,
    split_new_path,
    split_one_path,
    split_paths,
    typed_path,
    without_echo,
    without_quotes,
)
from .options import (
    SETTINGS,
    answering_options,
    cfg_weight_option,
    model_options,
    sampling_options,
    show_option,
    steps_option,
    version_option,
)
from .outputs import make_folder
from .progress import follow_drawing, note_if_cut, terminal_preview
from .runner import Command, explain, say

if TYPE_CHECKING:
    from PIL import Image

    from ..inference.conversation import Conversation, Picture
    from ..inference.model_thread import ThreadStream
    from ..inference.results import GeneratedImage, ImageStep, TextChunk, TextResult
    from ..pipeline import JanusPipeline


class Chat:
    """A conversation in the terminal, with its settings and the images for the next question.

    Each chat command, such as /retry, has a method that takes the text after the command.

    Args:
        janus: the model.
        settings: value of each name in ``SETTINGS``; None: the default.
        system: system prompt; None: the model's own, "": none.
        show_previews: whether drawings are previewed in the terminal; None: if it can show them.
    """

    def __init__(
        self,
        janus: JanusPipeline,
        settings: dict[str, Any],
        system: str | None = None,
        show_previews: bool | None = None,
    ):
        self.janus = janus
        self.settings = settings
        self.show_previews = show_previews
        self.conversation: Conversation = janus.conversation(system)
        self.attached: list[Image.Image] = []  # images for the next question
        self._seen: list[Picture] = []  # attached, drawn and changed images, in this order
        # The result of the last answer; None before the first.
        self.last_result: TextResult | None = None

    def ask(self, question: str) -> None:
        """Ask a question about the attached images, and print the answer while it is generated.

        ``{image}`` marks in the question are the places of the images. If the answer is stopped or
        fails, the chat stays as it was, and the images stay attached.

        Raises:
            PromptError: the question is empty, does not fit into the context, or has marks, but not
                one for each image.
        """
        arguments = TextArguments.from_options(self.settings).keywords()
        try:
            stream = self.conversation.stream(question, self.attached, **arguments)
        except ContextLengthError as error:
            advice = "; /reset forgets the conversation" if self.conversation.messages else ""
            raise ContextLengthError(f"{error}{advice}") from None
        self._print_answer(stream)
        self.attached = []

    def retry(self, _: str) -> None:
        """Answer the last question again, with another random seed unless a seed is set."""
        arguments = TextArguments.from_options(self.settings).keywords()
        self._print_answer(self.conversation.regenerate(**arguments))

    def _print_answer(self, stream: ThreadStream[TextChunk]) -> None:
        """Print an answer while it is generated, and keep its result in ``last_result``.

        Then say if the answer was cut at its maximum length, and if the model no longer reads the
        oldest questions because the context is full.
        """
        forgotten_before = self.conversation.forgotten  # questions dropped from the context
        result = None
        try:
            with contextlib.closing(stream):  # after Ctrl-C, the next command is allowed at once
                for chunk in stream:
                    result = chunk.result
                    click.echo(chunk.text, nl=False)
        finally:
            click.echo()  # end the line, also after Ctrl-C
        assert result is not None  # the last chunk has the result
        self.last_result = result
        note_if_cut(result)
        forgotten = self.conversation.forgotten
        if forgotten > forgotten_before:
            say(f"The context is full: the first {forgotten} questions are no longer read.")

    def attach_images(self, argument: str) -> None:
        """Attach image files to the next question. If a file cannot be read, attach none.

        Args:
            argument: one or more file names or https addresses, quoted as in a shell.

        Raises:
            JanusError: there is no file name, quotes do not match, or a file cannot be read.
        """
        from ..processing.images import open_image
        from .inputs import is_web, read_image

        names = split_paths(argument)
        if not names:
            raise JanusError("/image needs a file: /image photo.jpg")
        images = [
            read_image(name) if is_web(name) else open_image(typed_path(name)) for name in names
        ]
        self.attached += images
        self._remember(images)
        count = len(self.attached)
        say(f"{count} image{'s' if count != 1 else ''} attached to your next question.")

    def draw(self, prompt: str) -> None:
        """Draw an image into janus.png, or into janus_2.png and so on if that file exists.

        The model sees the image with the next question.
        """
        names = self.conversation.drawing_options
        settings = {name: self.settings.get(name) for name in ("seed", *names)}
        arguments = ImageArguments.from_options(settings).keywords()
        self._save_drawing(self.conversation.stream_drawing(prompt, **arguments))

    def edit(self, prompt: str) -> None:
        """Change the last image, and save the result as ``draw`` does.

        The model sees the result with the next question.

        Raises:
            JanusError: no image was drawn or attached.
        """
        image = self._last_image()
        if image is None:
            raise JanusError("there is no image to change: /draw one, or attach one with /image")
        arguments = EditArguments.from_options(self.settings).keywords()
        self._save_drawing(self.conversation.stream_edit(prompt, image, **arguments))

    def _save_drawing(self, steps: ThreadStream[ImageStep]) -> None:
        """Run the steps that draw or change an image, and save it."""

        def save_image(image: GeneratedImage) -> None:
            click.echo(str(image.save(Path("janus.png"))))
            say(f"seed {image.seed}")
            self._remember([image.image])

        with contextlib.closing(steps):
            follow_drawing(steps, 1, save_image, terminal_preview(self.show_previews))

    def _remember(self, images: Sequence[Image.Image]) -> None:
        """Add images to those that ``edit`` may change."""
        from ..inference.conversation import Picture

        self._seen += [Picture(image) for image in images]

    def _last_image(self) -> Image.Image | None:
        """Return the image that was attached, drawn or changed last; None: there is none.

        Images that /undo removed do not count.
        """
        pictures = [
            picture for message in self.conversation.messages for picture in message.pictures
        ]
        digests = {picture.digest for picture in pictures}
        for seen in reversed(self._seen):
            is_attached = any(seen.image is image for image in self.attached)
            if is_attached or seen.digest in digests:
                return seen.image
        # The images of a conversation that was loaded are not in ``_seen``.
        return pictures[-1].image if pictures else None

    def seed(self, argument: str) -> None:
        """Set the seed; without an argument, seeds are random again."""
        self.set(f"seed {argument or 'random'}")

    @property
    def _setting_names(self) -> list[str]:
        """The names of the settings that have an effect on this model."""
        names = self.conversation.drawing_options
        return [name for name in SETTINGS if name != "steps" or name in names]

    def set(self, argument: str) -> None:
        """Change a setting and print it.

        Args:
            argument: name and value, such as "seed 7". A name without a value, or with the value
                "default" or "random", restores the default. An empty argument lists all settings.

        Raises:
            JanusError: there is no such setting, or it does not allow the value.
        """
        name, _, text = argument.partition(" ")
        if not name:
            for key in self._setting_names:
                say(_setting_line(key, self.settings.get(key)))
            return
        if name not in self._setting_names:
            known = ", ".join(self._setting_names)
            raise JanusError(f"there is no setting {name}: it must be one of {known}")
        text = text.strip()
        if text in ("", "default", "random"):
            self.settings[name] = None
        else:
            try:
                # None, None: the value belongs to no parameter and no context of click.
                self.settings[name] = SETTINGS[name].convert(text, None, None)
            except click.ClickException as error:
                raise JanusError(f"{name}: {error.message}") from None
        is_unset = self.settings[name] is None
        say(_setting_line(name, None if is_unset else text))

    def system(self, text: str) -> None:
        """Set the system prompt to ``text``, unless that is empty, and print the prompt in use.

        The text "none" removes the system prompt.
        """
        if text:
            self.conversation.system = "" if text == "none" else text
        in_use = self.conversation.system
        if in_use is None:
            in_use = self.janus.config.prompt.system  # the model's own
        say(f"system prompt: {in_use or 'none'}")

    def undo(self, _: str) -> None:
        """Remove the last exchange or drawing."""
        message = self.conversation.undo()
        say(f"Removed: {message.text}")

    def save(self, argument: str) -> None:
        """Save the conversation to a JSON file.

        Args:
            argument: the file's name, by default janus.json; ".json" may be left out. A folder gets
                the file janus.json.

        Raises:
            JanusError: there are several names, or the file cannot be written.
        """
        name = typed_path(split_new_path("/save", argument)) or "janus.json"
        if names_folder(name):
            make_folder(Path(name), "/save")
            name = str(Path(name, "janus.json"))
        if not name.endswith(".json"):
            name += ".json"
        path = self.conversation.save(name)
        say(f"Saved {len(self.conversation.messages)} messages to {path}.")

    def load(self, argument: str) -> None:
        """Replace the conversation with a saved one, and detach the images.

        Args:
            argument: the file's name, quoted as in a shell; ".json" may be left out.

        Raises:
            JanusError: there is not exactly one file name, or the file is no saved conversation or
                is damaged.
        """
        if not argument:
            raise JanusError("/load needs a file: /load janus.json")
        name = _with_json(argument)
        if not is_file(name):  # perhaps the name is in quotes
            name = _with_json(split_one_path("/load", argument))
        self.conversation.load(typed_path(name))
        self.attached = []
        self._seen = []
        say(f"Loaded {len(self.conversation.messages)} messages.")

    def stats(self, _: str) -> None:
        """Print speed and memory of the last answer, if any, and the used part of the context."""
        from ..memory import format_size

        answer = self.last_result
        if answer is not None:
            count = len(answer.tokens)
            speed = answer.generation_tps  # tokens per second; 0: too few tokens to measure it
            rate = f", {speed:.1f} per second" if speed else ""
            say(f"{count} token{'s' if count != 1 else ''}{rate}")
            read = answer.prompt_tokens - answer.cached_tokens
            delay = f"first token after {answer.first_token_seconds:.2f} s"
            say(f"{read} of {answer.prompt_tokens} prompt tokens read, {delay}")
            say(f"peak memory {format_size(answer.peak_memory)}")
        context = self.janus.config.language.max_position_embeddings
        say(f"{self.conversation.context_used} of {context} context tokens used")

    def reset(self, _: str) -> None:
        """Forget the conversation and the attached images."""
        self.conversation.reset()
        self.attached = []
        self._seen = []
        say("The conversation is forgotten.")

    def help(self, _: str) -> None:
        """Print the list of commands."""
        say(HELP)


def _with_json(name: str) -> str:
    """Return a name. Add ".json" if that gives an existing file and the name itself does not."""
    return f"{name}.json" if is_file(f"{name}.json") and not is_file(name) else name


def _setting_line(name: str, value: Any) -> str:
    """Return the line that shows a setting: its name, then its value.

    Args:
        name: one of ``SETTINGS``.
        value: the value; None: not set, shown as "random" for the seed and else as "default".
    """
    if value is None:
        value = "random" if name == "seed" else "default"
    return f"{name} {value}"


_COMMANDS: dict[str, tuple[str, Callable[[Chat, str], None], str]] = {
    "/image": (
        "FILE...",
        Chat.attach_images,
        "attach images to the next question: files, also dropped ones, or https addresses",
    ),
    "/draw": (
        "PROMPT",
        Chat.draw,
        "draw an image into janus.png (janus_2.png and so on if that exists)",
    ),
    "/edit": (
        "PROMPT",
        Chat.edit,
        "change the last image, drawn or attached, and save the result as /draw does",
    ),
    "/retry": ("", Chat.retry, "answer the last question again"),
    "/undo": ("", Chat.undo, "remove the last question, drawing or change"),
    "/seed": ("N", Chat.seed, "repeat results with this seed; random: new seeds again"),
    "/set": ("NAME VALUE", Chat.set, "change a setting, such as temperature; no NAME: list all"),
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
    + [
        f"{'/quit':16} leave (or press Ctrl-D); Ctrl-C stops an answer or a drawing",
        f"{QUOTES:16} begin and end a question of several lines; Alt-Enter: one more line",
        f"{'{image}':16} in a question: the place of an image, one for each; none: images first",
    ]
)


@click.command(cls=Command)
@model_options
@sampling_options
@answering_options
@cfg_weight_option
@cfg_weight2_option
@steps_option
@click.option("--load", "saved", metavar="FILE", help="Continue a conversation saved with /save.")
@show_option
@version_option
def main(**options: Any) -> None:
    """Chat with a model about images, and let it generate and change images.

    /draw PROMPT generates an image, and /edit PROMPT changes the last one. A question of several
    lines is enclosed in triple quotes, on a terminal as in a pipe. On a terminal, Alt-Enter, or Esc
    and then Enter, begins a new line too. {image} in a question is the place of an attached image.

    \b
    Examples:
      python -m mlx_janus.chat
      python -m mlx_janus.chat -m deepseek-ai/Janus-Pro-1B
      python -m mlx_janus.chat -m models/janus-pro-1b --temperature 0.7
      python -m mlx_janus.chat --load janus.json
    """
    janus = load_pipeline(LoadArguments.from_options(options))
    if options["steps"] is not None:  # no later step refuses it in a model without steps
        janus.pathway.options({"steps": options["steps"]})
    settings = {name: options[name] for name in SETTINGS}
    chat = Chat(janus, settings, options["system"], options["show"])
    if options["saved"] is not None:
        chat.load(shlex.quote(options["saved"]))  # ``load`` removes the quotes
    say(f"{janus.name} is ready. /help lists the commands.")
    _run_lines(chat, line_reader(_VOCABULARY))


def _run_lines(chat: Chat, read_line: Callable[[], str]) -> None:
    """Read and run the user's lines until the input ends or the user leaves.

    In a terminal, Ctrl-C at the prompt prints a hint. Otherwise it ends the program.
    """
    while True:
        try:
            line = read_line().strip()
            words = line.split()
            if words and words[0] in ("/quit", "/exit"):
                return
            if words:
                with without_echo():
                    _run_line(chat, line)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            say("\nCtrl-D leaves.")


def _run_line(chat: Chat, line: str) -> None:
    """Run one line of the user. Print an error that the user can mend, and go on.

    In a terminal, Ctrl-C ends only the answer or drawing. Otherwise it ends the program, as bugs
    and a closed stdout do.
    """
    try:
        _dispatch(chat, line)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        say("stopped")
    except BrokenPipeError:  # nobody reads stdout any more
        raise
    except Exception as error:
        message = explain(error)
        if message is None:  # a bug
            raise
        say(f"Error: {message}")


def _dispatch(chat: Chat, line: str) -> None:
    """Run a command, attach files dropped on the terminal, or ask a question.

    For an unknown command, print a hint. A text in triple quotes is a question, or the argument of
    the command before it.

    Raises:
        JanusError: the command fails, or takes no argument but has one.
    """
    command, *rest = line.split(None, 1)
    argument = rest[0] if rest else ""
    question = without_quotes(line)
    if question is not None:
        chat.ask(question)
    elif command in _COMMANDS:
        arguments, run, _ = _COMMANDS[command]
        if argument and not arguments:
            raise JanusError(f"{command} takes nothing after it: write only {command}")
        in_quotes = without_quotes(argument)
        run(chat, argument if in_quotes is None else in_quotes)
    elif dropped := dropped_files(line):
        chat.attach_images(shlex.join(dropped))
    elif command.startswith("/") and "/" not in command[1:]:  # "/etc/hosts" may begin a question
        say(f"There is no {command[:40]}. /help lists the commands.")
    else:
        chat.ask(line)
