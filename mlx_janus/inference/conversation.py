"""A conversation: turns of text and pictures, and drawings that later turns may be about.

A turn lays out the ids of all that was said, and reads what ``prefix.ReadPrefix`` does not hold yet. So undoing,
answering again, another system prompt and forgetting the oldest turns need nothing of their own.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from ..errors import ConversationError, ImageError, OutputError, PromptError
from ..files import write_atomically
from ..limits import check_text
from ..processing.images import ImageSource, as_images, open_image
from ..processing.png import save_png
from ..processing.prompts import Turn
from ..sections import Fault, JsonError, read_json
from .image_generation import generate_steps, image_jobs
from .model_thread import ThreadStream
from .prefix_cache import ImageFeatureCache, PrefixCache, image_digest
from .results import GeneratedImage, ImageStep, TextChunk, TextResult
from .text_generation import answer_chunks, last_result, text_options

if TYPE_CHECKING:
    from ..decode.text import TextOptions
    from .loaded import LoadedModel

_FORMAT = "mlx_janus conversation"
_VERSION = 1
_ROLES = ("user", "assistant", "drawing")
_ADVICE: dict[Fault, str] = {
    "missing": "check the path",
    "too large": "give a saved conversation",
    "invalid": "give a saved conversation",
    "no object": "give a saved conversation",
}


@dataclass(frozen=True)
class Picture:
    """A picture of a conversation."""

    image: Image.Image  # upright, RGB
    metadata: dict[str, str] = field(default_factory=dict, repr=False)  # of a drawn one

    @property
    def digest(self) -> str:
        """SHA-256 of its size and pixels, in hexadecimal."""
        return image_digest(self.image)


@dataclass(frozen=True)
class Message:
    """What was said or drawn."""

    role: Literal["user", "assistant", "drawing"]
    text: str  # of a drawing its prompt
    pictures: tuple[Picture, ...] = ()  # the user's are shown before the text
    tokens: tuple[int, ...] | None = None  # of an answer, as the model gave them


Exchange = tuple[Message, Message]
"""A question and its answer."""


class Conversation:
    """Turns with one model. Made by ``JanusPipeline.conversation``.

    An answer or a drawing that is stopped, or fails, leaves the conversation as it was.

    Args:
        janus: the model.
        system: system prompt; None: the model's own, "": none. It may be changed at any time.
    """

    def __init__(self, janus: LoadedModel, system: str | None = None):
        self.system = system
        self.messages: list[Message] = []
        self.forgotten = (
            0  # of the oldest exchanges, those that no longer fit into the context and are not read
        )
        self._janus = janus
        self._prompts = janus.prompts
        self._speaking = False
        self._prefix = PrefixCache(janus)
        self._features = ImageFeatureCache(janus)

    # Talking

    def send(
        self, text: str, images: Sequence[ImageSource] | ImageSource = (), **options: Any
    ) -> TextResult:
        """``stream`` to its end."""
        return last_result(self.stream(text, images, **options))

    def stream(
        self, text: str, images: Sequence[ImageSource] | ImageSource = (), **options: Any
    ) -> ThreadStream[TextChunk]:
        """Say something, and get the answer piece by piece. Closing stops within a step.

        Args:
            text: what the user says.
            images: pictures to show with it. What was drawn since the last question is shown before them.
            options: ``max_tokens``, ``temperature``, ``top_p``, ``seed``, ``stop`` and ``lookup``, as for
                ``JanusPipeline.generate_text``.

        Raises:
            PromptError: nothing is said or shown, or more than fits into the model's context.
            ImageError: a picture cannot be read.
            OptionError: a number out of its range.
        """
        check_text("text", text)
        shown = [Picture(open_image(image)) for image in as_images(images)]
        message = Message("user", text, (*self._drawn(), *shown))
        return self._answer(self.messages, message, text_options(**options))

    def regenerate(self, **options: Any) -> ThreadStream[TextChunk]:
        """Answer the last question again, in place of the answer that there is; as ``stream``.

        Raises:
            ConversationError: nothing was asked yet.
        """
        at = self._last_question()
        return self._answer(self.messages[:at], self.messages[at], text_options(**options))

    def draw(self, prompt: str, **choice: Any) -> list[GeneratedImage]:
        """``stream_drawing`` to its end."""
        return [image for step in self.stream_drawing(prompt, **choice) for image in step.images]

    def stream_drawing(self, prompt: str, **choice: Any) -> ThreadStream[ImageStep]:
        """Draw pictures, which are shown with the next question; arguments as for ``JanusPipeline.stream_images``."""
        n = choice.pop("n", 1)
        jobs = image_jobs(self._janus, prompt, n, choice.pop("seed", None), choice)
        return self._janus.thread.stream(self._draw(prompt, n, generate_steps(self._janus, jobs)))

    def undo(self) -> Message:
        """Take back the last exchange, or the last drawing if nothing was asked since.

        Returns:
            The question, or the drawing.

        Raises:
            ConversationError: there is nothing to take back.
        """
        if self.messages and self.messages[-1].role == "drawing":
            return self.messages.pop()
        at = self._last_question()
        message = self.messages[at]
        del self.messages[at:]
        return message

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = []
        self.forgotten = 0
        self._prefix = PrefixCache(self._janus)
        self._features = ImageFeatureCache(self._janus)

    @property
    def context_used(self) -> int:
        """Positions of the model's context that are read at present."""
        return len(self._prefix.keys)

    # What is read

    def _drawn(self) -> list[Picture]:
        """What was drawn since the last question."""
        since = itertools.takewhile(
            lambda message: message.role == "drawing", reversed(self.messages)
        )
        return [picture for message in reversed([*since]) for picture in message.pictures]

    def _last_question(self) -> int:
        asked = [at for at, message in enumerate(self.messages) if message.role == "user"]
        if not asked:
            raise ConversationError("nothing was asked yet: ask something first")
        return asked[-1]

    def _draw(
        self, prompt: str, count: int, steps: Generator[ImageStep, None, None]
    ) -> Generator[ImageStep, None, None]:
        pictures: list[Picture] = []
        try:
            for step in steps:
                pictures += [Picture(image.image, image.metadata) for image in step.images]
                if step.images and len(pictures) == count:
                    self.messages.append(Message("drawing", prompt, tuple(pictures)))
                yield step
        finally:
            steps.close()

    def _answer(
        self, before: Sequence[Message], asked: Message, options: TextOptions
    ) -> ThreadStream[TextChunk]:
        ids, forgotten = self._fit(before, asked, options.max_tokens)
        return self._janus.thread.stream(self._speak(list(before), asked, ids, forgotten, options))

    def _fit(
        self, before: Sequence[Message], asked: Message, max_tokens: int
    ) -> tuple[list[int], int]:
        """The ids to read, and how many of the oldest exchanges are left out so that an answer has room."""
        context = self._janus.config.language.max_position_embeddings
        room = min(max_tokens, context // 4)
        exchanges = _exchanges(before)
        start = min(self.forgotten, len(exchanges))
        ids, most = self._ids(exchanges[start:], asked), context - room
        while start < len(exchanges) and len(ids) > most:
            start, most = (
                start + 1,
                context - 2 * room,
            )  # so that it need not be again with the next question
            ids = self._ids(exchanges[start:], asked)
        if len(ids) >= context:
            raise PromptError(
                f"the question is {len(ids)} tokens long, pictures included, and the model's context {context}: "
                "shorten it, or show fewer pictures"
            )
        return ids, start

    def _ids(self, exchanges: Sequence[Exchange], asked: Message) -> list[int]:
        questions = [*(question for question, _ in exchanges), asked]
        turns = [Turn("user", message.text, len(message.pictures)) for message in questions]
        ids = self._prompts.answering(turns[:1], self.system)
        for (_, answer), turn in zip(exchanges, turns[1:], strict=True):
            text = answer.text.strip()
            said = (
                self._prompts.encode(f" {text}" if text else "")
                if answer.tokens is None
                else answer.tokens
            )
            ids += [*said, self._prompts.special.eos, *self._prompts.following(turn)]
        return ids

    def _speak(
        self,
        before: list[Message],
        asked: Message,
        ids: list[int],
        forgotten: int,
        options: TextOptions,
    ) -> Generator[TextChunk, None, None]:
        if self._speaking:
            raise ConversationError(
                "an answer is still being given: read it to its end, or close it"
            )
        self._speaking = True
        shown = [p for question, _ in _exchanges(before)[forgotten:] for p in question.pictures] + [
            *asked.pictures
        ]
        keys = self._features.keys(ids, [picture.digest for picture in shown])
        images = {picture.digest: picture.image for picture in shown}
        stream = answer_chunks(self._prefix.answer(ids, keys, self._features, images, options))
        try:
            for chunk in stream:
                if chunk.result is not None:
                    answer = Message(
                        "assistant", chunk.result.text, tokens=self._own_tokens(chunk.result)
                    )
                    self.messages, self.forgotten = [*before, asked, answer], forgotten
                yield chunk
        finally:
            stream.close()
            self._speaking = False

    def _own_tokens(self, result: TextResult) -> tuple[int, ...] | None:
        """The answer's tokens, unless a stop string cut its text shorter, or one would stand for a picture."""
        whole = self._prompts.decode(result.tokens).strip() == result.text.strip()
        return result.tokens if whole and self._prompts.special.image not in result.tokens else None

    # Keeping

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the conversation: one JSON file, and beside it a PNG for each picture.

        Args:
            path: of the JSON file, which is replaced if it is a conversation.

        Raises:
            OutputError: it cannot be written, or is another file.
        """
        path = Path(path)
        _check_target(path)
        try:
            messages = [self._as_json(message, path) for message in self.messages]
            facts = {
                "format": _FORMAT,
                "version": _VERSION,
                "model": self._janus.name,
                "system": self.system,
            }
            write_atomically(
                path, json.dumps(facts | {"messages": messages}, ensure_ascii=False, indent=1)
            )
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written ({error.strerror}): save it somewhere else"
            ) from None
        return path

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take up a saved conversation in place of this one. Only the file and the PNGs beside it are read.

        Raises:
            ConversationError: no conversation, a damaged one, or one with a picture that is not there.
        """
        path = Path(path)
        try:
            data = read_json(path)
        except JsonError as error:
            raise ConversationError(error.advise(_ADVICE)) from None
        if data.get("format") != _FORMAT or data.get("version") != _VERSION:
            raise ConversationError(f"{path} is no conversation of mlx_janus, version {_VERSION}")
        system, messages = data.get("system"), data.get("messages")
        if not isinstance(system, str | None) or not isinstance(messages, list):
            raise ConversationError(f"{path} is damaged: system must be text, messages a list")
        loaded = [self._from_json(item, path) for item in messages]
        roles = [message.role for message in loaded if message.role != "drawing"]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise ConversationError(f"{path} is damaged: questions and answers must take turns")
        self.reset()
        self.system, self.messages = system, loaded

    def _as_json(self, message: Message, path: Path) -> dict[str, Any]:
        item: dict[str, Any] = {"role": message.role, "text": message.text}
        if message.pictures:
            item["pictures"] = [_save_picture(picture, path) for picture in message.pictures]
        if message.tokens is not None:
            item["tokens"] = list(message.tokens)
        return item

    def _from_json(self, item: Any, path: Path) -> Message:
        if (
            not isinstance(item, dict)
            or item.get("role") not in _ROLES
            or not isinstance(item.get("text"), str)
        ):
            raise ConversationError(f"{path} is damaged: a message needs a role and a text")
        role = item["role"]
        names = item.get("pictures", [])
        tokens = item.get("tokens")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConversationError(f"{path} is damaged: pictures must be file names")
        if tokens is not None and (role != "assistant" or not self._are_tokens(tokens)):
            raise ConversationError(
                f"{path} is damaged, or of another model: tokens must be ids of an answer"
            )
        if role == "assistant" and names:
            raise ConversationError(f"{path} is damaged: an answer has no pictures")
        pictures = tuple(_load_picture(name, path) for name in names)
        return Message(role, item["text"], pictures, None if tokens is None else tuple(tokens))

    def _are_tokens(self, tokens: Any) -> bool:
        """Return whether a JSON value is a list of ids that this model can have answered with."""
        if not isinstance(tokens, list):
            return False
        top = self._janus.config.language.vocab_size
        in_range = all(type(token) is int and 0 <= token < top for token in tokens)
        return in_range and self._prompts.special.image not in tokens


def _exchanges(messages: Sequence[Message]) -> list[Exchange]:
    """Questions with their answers."""
    said = [message for message in messages if message.role != "drawing"]
    return list(zip(said[::2], said[1::2], strict=True))


def _check_target(path: Path) -> None:
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} is no folder: make it first")
    if path.is_dir():
        raise OutputError(f"{path} is a folder: name a file")
    if not path.exists():
        return
    try:
        ours = read_json(path).get("format") == _FORMAT
    except JsonError:
        ours = False
    if not ours:
        raise OutputError(f"{path} is there already and no conversation: choose another name")


def _save_picture(picture: Picture, path: Path) -> str:
    """The name of the picture's PNG beside ``path``, which is written unless it is there."""
    target = path.with_name(f"{path.stem}-{picture.digest[:16]}.png")
    if not target.exists():
        save_png(picture.image, target, picture.metadata)
    return target.name


def _load_picture(name: str, path: Path) -> Picture:
    if not name.endswith(".png") or name != Path(name).name:
        raise ConversationError(f"{path} is damaged: {name!r} is no PNG beside it")
    try:
        with Image.open(path.with_name(name), formats=["PNG"]) as file:
            metadata = {
                str(key): value for key, value in file.info.items() if isinstance(value, str)
            }
        return Picture(open_image(path.with_name(name)), metadata)
    except (ImageError, OSError, ValueError, SyntaxError) as error:
        raise ConversationError(
            f"{path.with_name(name)}, a picture of {path.name}, cannot be read: {error}"
        ) from None
