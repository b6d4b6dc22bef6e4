"""A conversation: questions about images, answers, and generated images to ask about.

Each question lays out the ids of the entire conversation, and ``PrefixCache`` reads only those that
it does not hold. So undoing, answering again, changing the system prompt and dropping the oldest
exchanges need no code of their own.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from ..errors import (
    ContextLengthError,
    ConversationError,
    ImageError,
    JanusError,
    OutputError,
)
from ..files import write_atomically
from ..limits import check_keywords, check_text
from ..processing.file_names import names_folder
from ..processing.images import ImageSource, as_images, open_image
from ..processing.prompts import IMAGE_MARK, Turn, marked_question
from ..processing.saved_images import read_metadata, save_image
from ..sections import Fault, JsonError, read_json
from .editing import read_inputs
from .image_generation import generate_steps, image_jobs
from .model_thread import ThreadStream
from .pathways import pathway_of
from .prefix_cache import ImageFeatureCache, PrefixCache, image_digest
from .results import GeneratedImage, ImageStep, TextChunk, TextResult
from .text_generation import TEXT_OPTIONS, answer_chunks, last_result, text_options

if TYPE_CHECKING:
    from ..decode.text import TextOptions
    from .loaded import LoadedModel

_FORMAT = "mlx_janus conversation"
_VERSION = 1
_ROLES = ("user", "assistant", "drawing")
_ADVICE: dict[Fault, str] = {  # end of the message about a file that cannot be read
    "missing": "check the path",
    "too large": "give a saved conversation",
    "invalid": "give a saved conversation",
    "no object": "give a saved conversation",
}


@dataclass(frozen=True)
class Picture:
    """An image of a conversation."""

    image: Image.Image  # upright, RGB
    metadata: dict[str, str] = field(default_factory=dict, repr=False)  # text chunks of its PNG

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the image's size and pixels, in hexadecimal."""
        return image_digest(self.image)


@dataclass(frozen=True)
class Message:
    """A question, an answer, or the images of one prompt."""

    role: Literal["user", "assistant", "drawing"]
    text: str  # of a drawing: its prompt
    pictures: tuple[Picture, ...] = ()
    tokens: tuple[int, ...] | None = None  # an answer's ids as generated; None: encode its text
    # Whether the {image} marks of a question's text are the places of its images. Otherwise marks
    # are ordinary text, and the model reads the images before the text.
    marked: bool = False


Exchange = tuple[Message, Message]
"""A question and its answer."""


@dataclass(frozen=True)
class _Asked:
    """A question that is to be answered, and its place in the conversation."""

    history: tuple[Message, ...]  # the messages before the question
    question: Message  # with the images generated since the previous question
    replaced: tuple[Message, ...] = ()  # question and old answer, if it is answered again


class Conversation:
    """A conversation with one model, made by ``JanusPipeline.conversation``.

    An exchange is a question and its answer. A drawing is a message with the images that the model
    generated from one prompt. An answer or a drawing that is stopped or fails leaves the
    conversation as it was.

    While an answer is streamed, drawings may be added, and the methods refuse any other change. The
    complete answer is placed directly after its question, before those drawings. The next question
    is about those drawings.

    Args:
        janus: the model.
        system: system prompt; None: the model's own, "": none. This attribute can be changed at any
            time.
    """

    def __init__(self, janus: LoadedModel, system: str | None = None):
        self.system = system
        self.messages: list[Message] = []
        self.forgotten = 0  # number of oldest exchanges that no longer fit into the context
        self._janus = janus
        self._prompts = janus.prompts  # tokenizer and templates
        self._answering = False  # whether an answer is being streamed
        self._drawings = 0  # number of drawings that are being streamed
        self._prefix_cache = PrefixCache(janus)
        self._feature_cache = ImageFeatureCache(janus)

    # Asking and generating

    def send(
        self, text: str, images: Sequence[ImageSource] | ImageSource = (), **options: Any
    ) -> TextResult:
        """Ask a question and return the answer; arguments as for ``stream``."""
        check_keywords("send", options, TEXT_OPTIONS)
        return last_result(self.stream(text, images, **options))

    def stream(
        self, text: str, images: Sequence[ImageSource] | ImageSource = (), **options: Any
    ) -> ThreadStream[TextChunk]:
        """Ask a question and stream the answer in pieces.

        Closing the stream stops the model after the step in progress.

        Args:
            text: the question. ``{image}`` marks in it are the places of the images, one mark for
                each image. Without marks, the model reads the images before the text.
            images: images to ask about. Images generated since the last question come before them.
            options: keyword arguments of ``JanusPipeline.generate_text`` from ``max_tokens`` on,
                such as ``temperature`` and ``seed``, without ``system``.

        Raises:
            PromptError: the question has no words and no images, does not fit into the context, or
                has marks, but not one for each image.
            ImageError: an image cannot be read.
            OptionError: a number is out of range, or a value has the wrong type.
            ConversationError: another answer is being streamed, or ``messages`` was changed after
                this call, other than by drawings. The stream raises this error when its first piece
                is read.
        """
        check_keywords("stream", options, TEXT_OPTIONS)
        check_text("text", text)
        given = [Picture(open_image(image)) for image in as_images(images)]
        pictures = (*self._pictures_since_question(), *given)
        is_marked = marked_question(text, len(pictures)).places is not None
        question = Message("user", text, pictures, marked=is_marked)
        return self._answer(_Asked(tuple(self.messages), question), text_options(**options))

    def regenerate(self, **options: Any) -> ThreadStream[TextChunk]:
        """Answer the last question again, and stream the new answer.

        When complete, the new answer replaces the old one. Later drawings stay.

        Args:
            options: as for ``stream``.

        Raises:
            ConversationError: there is no question. When its first piece is read, the stream raises
                this error if another answer is being streamed, or if ``messages`` was changed after
                this call, other than by drawings.
            PromptError: the question does not fit into the context.
            OptionError: a number is out of range, or a value has the wrong type.
        """
        check_keywords("regenerate", options, TEXT_OPTIONS)
        index = self._last_question_index()
        question, *later = self.messages[index:]
        answer = [message for message in later if message.role != "drawing"]
        asked = _Asked(tuple(self.messages[:index]), question, (question, *answer))
        return self._answer(asked, text_options(**options))

    @property
    def drawing_options(self) -> tuple[str, ...]:
        """Names of the options of ``draw`` that this model has, without ``n`` and ``seed``."""
        return pathway_of(self._janus).option_names

    def draw(self, prompt: str, **options: Any) -> list[GeneratedImage]:
        """Generate images and return them; the next question will be about them.

        Arguments and exceptions are those of ``stream_drawing``.
        """
        images: list[GeneratedImage] = []
        for step in self.stream_drawing(prompt, **options):
            images += step.images
        return images

    def stream_drawing(self, prompt: str, **options: Any) -> ThreadStream[ImageStep]:
        """Generate images step by step; the next question will be about them.

        Args:
            prompt: the description of the images.
            options: keyword arguments of ``JanusPipeline.stream_images``, such as ``n`` and
                ``seed``.

        Raises:
            PromptError: the prompt is empty, or does not fit into the context.
            OptionError: an option is unknown, has the wrong type or is out of range.
        """
        check_text("prompt", prompt)
        n = options.pop("n", 1)
        seed = options.pop("seed", None)
        jobs = image_jobs(self._janus, prompt, n, seed, options)
        steps = generate_steps(self._janus, jobs)
        return self._janus.thread.stream(self._add_drawing(prompt, n, steps))

    def edit(
        self, prompt: str, images: Sequence[ImageSource] | ImageSource = (), **options: Any
    ) -> list[GeneratedImage]:
        """Change images and return the results; the next question will be about them.

        Arguments and exceptions are those of ``stream_edit``.
        """
        changed: list[GeneratedImage] = []
        for step in self.stream_edit(prompt, images, **options):
            changed += step.images
        return changed

    def stream_edit(
        self, prompt: str, images: Sequence[ImageSource] | ImageSource = (), **options: Any
    ) -> ThreadStream[ImageStep]:
        """Change images step by step; the next question will be about the results.

        Args:
            prompt: the description of the change.
            images: an image or several to change; none: the last image of the conversation.
            options: keyword arguments of ``JanusPipeline.stream_images``, such as ``n``, ``seed``,
                ``cfg_weight2`` and ``crop``.

        Raises:
            PromptError: the prompt is empty, or does not fit into the context.
            ImageError: an image cannot be read.
            OptionError: an option is unknown, has the wrong type or is out of range.
            ConversationError: no image is given, and the conversation has none.
        """
        check_text("prompt", prompt)
        sources = as_images(images)
        if not sources:
            last = self.last_picture
            if last is None:
                raise ConversationError("there is no image to change: draw one, or give one")
            sources = [last.image]
        n = options.pop("n", 1)
        seed = options.pop("seed", None)
        inputs = read_inputs(self._janus, sources, options.pop("crop", None))
        jobs = image_jobs(self._janus, prompt, n, seed, options, inputs)
        steps = generate_steps(self._janus, jobs)
        return self._janus.thread.stream(self._add_drawing(prompt, n, steps))

    def undo(self) -> Message:
        """Remove the last drawing if no question follows it, otherwise the last exchange.

        Returns:
            The removed question or drawing.

        Raises:
            ConversationError: there is nothing to remove, or an answer is being streamed.
        """
        self._refuse_during_answer()
        if self.messages and self.messages[-1].role == "drawing":
            return self.messages.pop()
        index = self._last_question_index()
        question = self.messages[index]
        del self.messages[index:]
        return question

    def reset(self) -> None:
        """Remove all messages; keep the system prompt.

        Raises:
            ConversationError: an answer or a drawing is being streamed.
        """
        self._refuse_during_answer()
        if self._drawings:
            raise ConversationError(
                "images are still being generated: read the steps to their end, or close them"
            )
        self.messages = []
        self.forgotten = 0
        self._prefix_cache = PrefixCache(self._janus)
        self._feature_cache = ImageFeatureCache(self._janus)

    @property
    def last_picture(self) -> Picture | None:
        """The last image that was generated, changed or asked about; None: there is none."""
        for message in reversed(self.messages):
            if message.pictures:
                return message.pictures[-1]
        return None

    @property
    def context_used(self) -> int:
        """The number of positions in the KV cache.

        ``reset`` and ``load`` empty the cache. ``undo`` leaves it as it is until the next question.
        """
        # There is one key for each position.
        return len(self._prefix_cache.keys)

    # Order of actions

    def _refuse_during_answer(self) -> None:
        """Check that no answer is being streamed; first wait for streams that are being closed.

        Raises:
            ConversationError: an answer is being streamed.
        """
        if self._answering or self._drawings:
            # The model's thread closes an interrupted or dropped stream, and only then updates
            # ``_answering`` or ``_drawings``. An empty call waits until it has done so. The call
            # fails if the model cannot be used any more; then there is nothing to wait for.
            with contextlib.suppress(JanusError):
                self._janus.thread.call(lambda: None)
        if self._answering:
            raise ConversationError(
                "an answer is still being given: read it to its end, or close it"
            )

    def _later_drawings(self, asked: _Asked) -> list[Message]:
        """Return the drawings that follow a question that is to be answered.

        Raises:
            ConversationError: messages other than drawings have changed since the question.
        """
        count = len(asked.history)
        later = self.messages[count:]
        drawings = [message for message in later if message.role == "drawing"]
        others = [message for message in later if message.role != "drawing"]
        if not (_same(self.messages[:count], asked.history) and _same(others, asked.replaced)):
            raise ConversationError("the conversation has changed since the question: ask it again")
        return drawings

    # Laying out the prompt

    def _pictures_since_question(self) -> list[Picture]:
        """Return the images generated since the last question, in order."""
        pictures: list[Picture] = []
        for message in reversed(self.messages):
            if message.role != "drawing":  # the answer to the last question
                break
            pictures = [*message.pictures, *pictures]
        return pictures

    def _last_question_index(self) -> int:
        """Return the index of the last question in ``messages``.

        Raises:
            ConversationError: there is no question.
        """
        indices = [i for i, message in enumerate(self.messages) if message.role == "user"]
        if not indices:
            raise ConversationError("nothing was asked yet: ask something first")
        return indices[-1]

    def _add_drawing(
        self, prompt: str, count: int, steps: Generator[ImageStep, None, None]
    ) -> Generator[ImageStep, None, None]:
        """Yield the steps that generate ``count`` images; append a message with all the images.

        The message is appended before the last step is yielded, because the caller may stop there.
        """
        pictures: list[Picture] = []
        self._drawings += 1
        try:
            for step in steps:
                # ``step.images`` has the images that this step finished, often none.
                pictures += [Picture(image.image, image.metadata) for image in step.images]
                if step.images and len(pictures) == count:  # this is the last step
                    self.messages.append(Message("drawing", prompt, tuple(pictures)))
                yield step
        finally:
            steps.close()
            self._drawings -= 1

    def _answer(self, asked: _Asked, options: TextOptions) -> ThreadStream[TextChunk]:
        """Build the prompt, and return the stream of the answer.

        The prompt is built now, so that this call raises its errors, not the stream.

        Raises:
            PromptError: the question does not fit into the context.
            OptionError: an option does not suit the model.
        """
        self._janus.check_text_options(options)
        ids, forgotten = self._fit_prompt(asked.history, asked.question, options.max_tokens)
        chunks = self._stream_answer(asked, ids, forgotten, options)
        return self._janus.thread.stream(chunks)

    def _fit_prompt(
        self, history: Sequence[Message], question: Message, max_tokens: int
    ) -> tuple[list[int], int]:
        """Build the prompt of a question, without the oldest exchanges if the context is too short.

        Exchanges left out of an earlier prompt are left out again.

        Returns:
            The prompt's ids, and the number of exchanges left out.

        Raises:
            PromptError: the question does not fit, even without earlier exchanges.
        """
        context = self._janus.config.language.max_position_embeddings
        room = min(max_tokens, context // 4)  # positions to keep free for the answer
        exchanges = _exchanges(history)
        forgotten = min(self.forgotten, len(exchanges))  # ``undo`` may have removed some of them
        ids = self._prompt_ids(exchanges[forgotten:], question)
        limit = context - room  # positions that the prompt may take
        if forgotten < len(exchanges) and len(ids) > limit:
            # Make more room than this answer needs, so that the next question need not drop
            # exchanges again.
            limit = context - 2 * room

            def fits(count: int) -> bool:
                """Return whether the prompt fits without the oldest ``count`` exchanges."""
                return len(self._prompt_ids(exchanges[count:], question)) <= limit

            # A bisection: a long chat would take minutes if each exchange was tried in turn.
            counts = range(forgotten + 1, len(exchanges))
            # This is the first count that fits. If none does, all exchanges are left out.
            forgotten += 1 + bisect.bisect_left(counts, True, key=fits)
            ids = self._prompt_ids(exchanges[forgotten:], question)
        # A prompt longer than ``limit`` is accepted if a position is left for the answer.
        if len(ids) >= context:
            raise ContextLengthError(
                f"the question is {len(ids)} tokens long, images included, and this model's "
                f"maximum context length is {context}: shorten it, or show fewer images"
            )
        return ids, forgotten

    def _prompt_ids(self, exchanges: Sequence[Exchange], question: Message) -> list[int]:
        """Return the token ids of a prompt: the system prompt, earlier exchanges and a question.

        They end where the answer to the question begins.
        """
        questions = [earlier for earlier, _ in exchanges]
        questions.append(question)
        turns = [_question_turn(message) for message in questions]
        ids = self._prompts.answering(turns[:1], self.system)  # system prompt and first question
        # Then each answer and the question after it.
        for (_, answer), next_turn in zip(exchanges, turns[1:], strict=True):
            ids += self._answer_ids(answer)
            ids.append(self._prompts.special.eos)
            ids += self._prompts.following(next_turn)
        return ids

    def _answer_ids(self, answer: Message) -> Sequence[int]:
        """Return an answer's tokens as generated or, if the message has none, encode its text."""
        if answer.tokens is not None:
            return answer.tokens
        text = answer.text.strip()
        # The prompt before an answer ends with ":", so the answer begins with a space.
        return self._prompts.encode(f" {text}" if text else "")

    def _stream_answer(
        self, asked: _Asked, ids: list[int], forgotten: int, options: TextOptions
    ) -> Generator[TextChunk, None, None]:
        """Answer a question; when the answer is complete, add both to ``messages``.

        They are placed after the messages before the question, and before later drawings.

        Args:
            asked: the question.
            ids: the prompt.
            forgotten: the number of oldest exchanges that the prompt leaves out.
            options: sampling and length.

        Raises:
            ConversationError: another answer is being streamed, or messages other than drawings
                have changed since the question.
        """
        self._refuse_during_answer()
        self._later_drawings(asked)  # refuses a question whose history has changed
        pictures: list[Picture] = []
        for earlier, _ in _exchanges(asked.history)[forgotten:]:
            pictures += earlier.pictures
        pictures += asked.question.pictures
        digests = [picture.digest for picture in pictures]
        keys = self._feature_cache.keys(ids, digests)
        images = {picture.digest: picture.image for picture in pictures}
        events = self._prefix_cache.answer(ids, keys, self._feature_cache, images, options)
        chunks = answer_chunks(events)
        self._answering = True
        try:
            for chunk in chunks:
                if chunk.result is not None:  # the last chunk
                    tokens = self._reusable_tokens(chunk.result)
                    answer = Message("assistant", chunk.result.text, tokens=tokens)
                    drawings = self._later_drawings(asked)
                    self.messages = [*asked.history, asked.question, answer, *drawings]
                    self.forgotten = forgotten
                yield chunk
        finally:
            chunks.close()
            self._answering = False

    def _reusable_tokens(self, result: TextResult) -> tuple[int, ...] | None:
        """Return an answer's tokens if later prompts can contain them; None: encode the text.

        Generated tokens are in the KV cache, and the ids of the encoded text may differ from them.
        The tokens cannot be used in two cases. If a stop string cut the text, the tokens go on
        after the cut. If a token is the image placeholder, it would take the place of an image.
        """
        same_text = self._prompts.decode(result.tokens).strip() == result.text.strip()
        if same_text and self._prompts.special.image not in result.tokens:
            return result.tokens
        return None

    # Saving and loading

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save the conversation as a JSON file, with a PNG in the same folder for each image.

        Args:
            path: the JSON file. An existing file is replaced only if it is a conversation.

        Returns:
            The path of the JSON file.

        Raises:
            OutputError: the file or an image cannot be written, or ``path`` is an existing file
                that is no conversation.
        """
        if names_folder(path):
            raise OutputError(f"{path} is a folder: name a file")
        path = Path(path)
        _check_save_path(path)
        try:
            content = {
                "format": _FORMAT,
                "version": _VERSION,
                "model": self._janus.name,
                "system": self.system,
                "messages": [self._save_message(message, path) for message in self.messages],
            }
            write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1))
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written ({error.strerror}): save it somewhere else"
            ) from None
        return path

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace the messages and the system prompt by those of a saved conversation.

        An error leaves this conversation unchanged.

        Args:
            path: the JSON file. The PNGs of its images must be in the same folder.

        Raises:
            ConversationError: the file is no conversation, is damaged or has token ids of another
                model, an image cannot be read, or an answer or a drawing is being streamed.
        """
        path = Path(path)
        try:
            data = read_json(path)
        except JsonError as error:
            raise ConversationError(error.advise(_ADVICE)) from None
        if data.get("format") != _FORMAT or data.get("version") != _VERSION:
            raise ConversationError(f"{path} is no conversation of mlx_janus, version {_VERSION}")
        system = data.get("system")
        messages = data.get("messages")
        if not isinstance(system, str | None) or not isinstance(messages, list):
            raise ConversationError(f"{path} is damaged: system must be text, messages a list")
        loaded = [self._load_message(item, path) for item in messages]
        # Questions and answers alternate; drawings may be anywhere between them.
        roles = [message.role for message in loaded if message.role != "drawing"]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise ConversationError(f"{path} is damaged: questions and answers must take turns")
        self.reset()
        self.system = system
        self.messages = loaded

    def _save_message(self, message: Message, path: Path) -> dict[str, Any]:
        """Save a message's images in the folder of ``path``; return the message as JSON."""
        item: dict[str, Any] = {"role": message.role, "text": message.text}
        if message.pictures:
            item["pictures"] = [_save_picture(picture, path) for picture in message.pictures]
        if message.tokens is not None:
            item["tokens"] = list(message.tokens)
        if message.marked:
            item["marked"] = True
        return item

    def _load_message(self, item: Any, path: Path) -> Message:
        """Check a message from the JSON file ``path``, and return it with its images.

        Raises:
            ConversationError: the message or an image is damaged, an image is missing, or the
                tokens are of another model.
        """
        if not _has_role_and_text(item):
            raise ConversationError(f"{path} is damaged: a message needs a role and a text")
        role = item["role"]
        names = item.get("pictures", [])  # of PNG files
        tokens = item.get("tokens")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConversationError(f"{path} is damaged: pictures must be file names")
        if tokens is not None and (role != "assistant" or not self._are_text_tokens(tokens)):
            raise ConversationError(
                f"{path} is damaged, or of another model: tokens must be ids of an answer"
            )
        if role == "assistant" and names:
            raise ConversationError(f"{path} is damaged: an answer has no pictures")
        marked = item.get("marked", False)
        if not isinstance(marked, bool) or (marked and not _has_mark_for_each(item, names)):
            raise ConversationError(
                f"{path} is damaged: a marked question needs an {IMAGE_MARK} for each image"
            )
        pictures = tuple(_load_picture(name, path) for name in names)
        tokens = None if tokens is None else tuple(tokens)
        return Message(role, item["text"], pictures, tokens, marked)

    def _are_text_tokens(self, tokens: Any) -> bool:
        """Return whether a JSON value is a list of this model's token ids, without images."""
        if not isinstance(tokens, list):
            return False
        size = self._janus.config.language.vocab_size
        # ``isinstance`` would accept true and false, as bool is a subclass of int.
        in_range = all(type(token) is int and 0 <= token < size for token in tokens)
        return in_range and self._prompts.special.image not in tokens


def _exchanges(messages: Sequence[Message]) -> list[Exchange]:
    """Return each question with its answer.

    Drawings are left out, because the question after a drawing includes its images.
    """
    texts = [message for message in messages if message.role != "drawing"]
    questions = texts[::2]  # questions and answers alternate
    answers = texts[1::2]
    return list(zip(questions, answers, strict=True))


def _same(messages: Sequence[Message], others: Sequence[Message]) -> bool:
    """Return whether two sequences hold the same messages, not only equal ones."""
    pairs = zip(messages, others, strict=False)
    return len(messages) == len(others) and all(first is second for first, second in pairs)


def _has_role_and_text(item: Any) -> bool:
    """Return whether a JSON value is an object with a known role and a text."""
    return (
        isinstance(item, dict) and item.get("role") in _ROLES and isinstance(item.get("text"), str)
    )


def _has_mark_for_each(item: dict[str, Any], names: Sequence[str]) -> bool:
    """Return whether a JSON message is a question with as many marks as images."""
    marks = item["text"].count(IMAGE_MARK)
    return item["role"] == "user" and marks == len(names) > 0


def _question_turn(question: Message) -> Turn:
    """Return a question as a turn of the prompt."""
    if question.marked:
        return marked_question(question.text, len(question.pictures))
    return Turn("user", question.text, len(question.pictures))


def _check_save_path(path: Path) -> None:
    """Check that ``path`` is a new file in an existing folder, or a saved conversation to replace.

    Raises:
        OutputError: ``path`` is another file, or its folder does not exist.
    """
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} is not a folder: make it first")
    if not path.exists():
        return
    try:
        is_conversation = read_json(path).get("format") == _FORMAT
    except JsonError:
        is_conversation = False
    if not is_conversation:
        raise OutputError(f"{path} is there already and no conversation: choose another name")


def _save_picture(picture: Picture, path: Path) -> str:
    """Write a PNG in the folder of ``path``, unless it is there already; return its file name."""
    # The name contains the image's hash, so an existing file of this name has the same image.
    target = path.with_name(f"{path.stem}-{picture.digest[:16]}.png")
    if not target.exists():
        save_image(picture.image, target, picture.metadata)
    return target.name


def _load_picture(name: str, path: Path) -> Picture:
    """Read an image and its metadata from the PNG ``name`` in the folder of ``path``.

    A name with a folder is refused, so that a saved conversation cannot read files elsewhere.

    Raises:
        ConversationError: the name is refused, or the image is missing or damaged.
    """
    if not name.endswith(".png") or name != Path(name).name:
        raise ConversationError(f"{path} is damaged: {name!r} is no PNG beside it")
    source = path.with_name(name)
    try:
        return Picture(open_image(source), read_metadata(source))
    except ImageError as error:
        raise ConversationError(
            f"{source}, an image of {path.name}, cannot be read: {error}"
        ) from None
