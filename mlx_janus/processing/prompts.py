"""Prompts: the two templates of a model, answering and drawing, from text to token ids.

Unusual here:

- Every prompt begins with exactly one bos, whether or not ``tokenizer.json`` would add one.
- A prompt is a list of segments: control tokens and plain text. The tokenizer cuts at added tokens
  before anything else, and adjacent plain segments are joined before they are encoded. So an
  ordinary prompt gets the same ids as the whole rendered string encoded at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from ..config import PromptConfig
from ..errors import ConfigError, OptionError, PromptError
from ..limits import check_text
from .tokenizer import TOKENIZER_FILE, Detokenizer, PromptTokenizer, read_tokenizer

IMAGE_MARK = "{image}"
"""Marks the place of an image in the text of a question; see ``marked_question``."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Args:
        role: the speaker.
        text: the message's text.
        images: number of images; only the user's messages have any.
        places: for each image, in order, the number of the text's characters before it. None: all
            images come before the text, each followed by a line break.

    Raises:
        OptionError: the role is unknown, or cannot have this number of images; or the places are
            not one for each image, in order and within the text.
    """

    role: Literal["user", "assistant"]
    text: str
    images: int = 0
    places: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.role not in ("user", "assistant"):
            raise OptionError(f"a turn's role must be 'user' or 'assistant', got {self.role!r}")
        if self.role == "assistant" and self.images != 0:
            problem = "images of the assistant's turn must be 0 (only the user shows images)"
            raise OptionError(f"{problem}, got {self.images}")
        if self.images < 0:
            raise OptionError(f"images of the user's turn must be 0 or more, got {self.images}")
        if self.places is not None:
            bounds = (0, *self.places, len(self.text))
            is_ordered = all(start <= end for start, end in itertools.pairwise(bounds))
            if len(self.places) != self.images or not is_ordered:
                rule = "one for each image, in order, within the text"
                raise OptionError(f"places of a turn must be {rule}, got {self.places}")

    @property
    def pieces(self) -> list[str]:
        """The text before the first image, between each two images, and after the last image."""
        if self.places is not None:
            bounds = itertools.pairwise((0, *self.places, len(self.text)))
            return [self.text[start:end] for start, end in bounds]
        if not self.images:
            return [self.text]
        breaks = ["\n"] * (self.images - 1)
        return ["", *breaks, f"\n{self.text}"]


def marked_question(text: str, images: int) -> Turn:
    """Return a question about images, which stand at the ``{image}`` marks of its text.

    Without marks, the images come before the text. Without images, a mark is ordinary text.

    Args:
        text: the question, with one mark for each image or without marks.
        images: number of images.

    Raises:
        PromptError: there are marks and images, and their numbers differ.
    """
    marks = text.count(IMAGE_MARK)
    if not (marks and images):
        return Turn("user", text, images)
    if marks != images:
        counts = f"{_count(marks, f'{IMAGE_MARK} mark')} and {_count(images, 'image')}"
        fix = "write one mark for each image, or no mark to show the images before the text"
        raise PromptError(f"the question has {counts}: {fix}")
    pieces = text.split(IMAGE_MARK)
    lengths = [len(piece) for piece in pieces[:-1]]
    return Turn("user", "".join(pieces), images, tuple(itertools.accumulate(lengths)))


def _count(number: int, noun: str) -> str:
    """Return a number with its noun: "1 image", "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class _Control(str):
    """A segment of a prompt that is one control token; every other segment is plain text."""

    __slots__ = ()


def _is_control(segment: str) -> bool:
    """Return whether a segment is a control token rather than plain text."""
    return isinstance(segment, _Control)


class Prompts:
    """A model's prompt templates over its tokenizer.

    Args:
        tokenizer: a tokenizer of the ``tokenizers`` library, which is not changed.
        config: roles, separators and the spellings of the control tokens.
        image_tokens: positions that one image takes in an answering prompt.

    Raises:
        ConfigError: a control token is missing, or the tokenizer is not byte-level, loses text or
            gives a token two ids.
        OptionError: ``image_tokens`` is below 1.
    """

    def __init__(self, tokenizer: Tokenizer, config: PromptConfig, *, image_tokens: int) -> None:
        if image_tokens < 1:
            raise OptionError(f"image_tokens must be 1 or more, got {image_tokens}")
        self.config = config
        self.image_tokens = image_tokens
        self._prompt_tokenizer = PromptTokenizer(tokenizer, config)
        self.tokenizer = self._prompt_tokenizer.tokenizer  # for callers: the library's tokenizer
        self.special = self._prompt_tokenizer.special  # ids of the control tokens
        self._user = self._role_segment(config.user)
        self._assistant = self._role_segment(config.assistant)

    @classmethod
    def load(cls, folder: Path, config: PromptConfig, *, image_tokens: int) -> Prompts:
        """Return the prompt templates over the ``tokenizer.json`` of a model folder.

        The arguments are those of the class.

        Raises:
            ConfigError: the file is missing, not JSON or not a tokenizer; or the tokenizer lacks a
                control token, is not byte-level, loses text or gives a token two ids.
            OptionError: ``image_tokens`` is below 1.
        """
        path = folder / TOKENIZER_FILE
        tokenizer = read_tokenizer(path)
        try:
            return cls(tokenizer, config, image_tokens=image_tokens)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids that end an answer: eos, and those that the config adds."""
        return frozenset({self.special.eos, *(self.config.stop_ids or ())})

    def answering(self, turns: Sequence[Turn], system: str | None = None) -> list[int]:
        """Return the ids of a conversation, from bos to the point where the model continues it.

        An image takes the ids image_start, ``image_tokens`` times image, and image_end.

        Args:
            turns: the messages. If the last one is the assistant's, it is the beginning of the
                answer, and no eos follows it.
            system: system prompt; None: the model's default; "": no system prompt.

        Raises:
            PromptError: no turn is the user's, a question has neither text nor images, or a text is
                not Unicode.
            OptionError: ``system`` is not a str.
        """
        segments = self._answering_segments(turns, system)
        return self._encode(segments)

    def following(self, turn: Turn) -> list[int]:
        """Return the ids to append to a conversation for its next question.

        They follow the eos of the last answer, so they have no bos. They end where the answer to
        ``turn`` begins.

        Raises:
            PromptError: the question has neither text nor images, or its text is not Unicode.
        """
        segments = self._turn_segments(turn)
        segments += [self._assistant, ":"]
        _bos, *ids = self._encode(segments)
        return ids

    def drawing(self, text: str) -> list[int]:
        """Return the ids of a prompt for an image, from bos to image_start.

        They are the conditional row of classifier-free guidance.

        Raises:
            PromptError: the text is empty or not Unicode.
        """
        segments = self._drawing_segments(text)
        return self._encode(segments)

    def editing(self, text: str, images: int, image_tokens: int) -> list[int]:
        """Return the ids of a prompt that changes images, from bos to image_start.

        They have the form of Janus-4o's training. Each image has two slots, one after the other:
        image positions for the features of the vision encoder, and pads for its image tokens. The
        instruction follows all slots, without a space.

        Args:
            text: the instruction.
            images: number of images, 1 or more.
            image_tokens: image tokens of one image.

        Raises:
            PromptError: the text is empty or not Unicode.
        """
        instruction = text.strip()
        if not instruction:
            raise PromptError("the prompt is empty: describe the change of the image")
        start = _Control(self.config.image_start)
        pads = [_Control(self.config.pad)] * image_tokens
        slots = [_Control(self.config.image), start, *pads, _Control(self.config.image_end)]
        template = [self._user, ": ", *slots * images]
        template += [f"{instruction}{self.config.separator}", self._assistant, ":"]
        return self._encode([*_strip(template), start])

    def unconditional(self, ids: Sequence[int]) -> list[int]:
        """Return the unconditional row of classifier-free guidance for a conditional row.

        Every id between the first and the last is replaced by pad.
        """
        first = ids[:1]
        pads = [self.special.pad] * (len(ids) - 2)
        last = ids[1:][-1:]  # empty if the first id is the only one
        return [*first, *pads, *last]

    def render_answering(self, turns: Sequence[Turn], system: str | None = None) -> str:
        """Return the text of an answering prompt, without bos and with a placeholder per image."""
        segments = self._answering_segments(turns, system)
        return "".join(segments)

    def render_drawing(self, text: str) -> str:
        """Return the text of a drawing prompt, without bos."""
        segments = self._drawing_segments(text)
        return "".join(segments)

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text, without bos and without control tokens.

        Raises:
            PromptError: the text is not Unicode.
        """
        return self._prompt_tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Special tokens and ids beyond the vocabulary are skipped."""
        return self._prompt_tokenizer.decode(ids)

    def detokenizer(self) -> Detokenizer:
        """Return a new streaming decoder, which takes one id at a time."""
        return self._prompt_tokenizer.detokenizer()

    def spelling(self, token_id: int) -> tuple[str, bytes | None]:
        """Return a token's text and bytes, as ``PromptTokenizer.spelling`` does."""
        return self._prompt_tokenizer.spelling(token_id)

    def _role_segment(self, name: str) -> str:
        """Return a role's name as a segment: a control token if it is an added token, else text."""
        if self._prompt_tokenizer.is_added(name):
            return _Control(name)
        return name  # Janus-1.3B's roles are ordinary words

    def _answering_segments(self, turns: Sequence[Turn], system: str | None) -> list[str]:
        """Return the segments of an answering prompt, without bos.

        Whitespace is stripped from both ends of the prompt.

        Raises:
            PromptError: no turn is the user's, or a question has neither text nor images.
            OptionError: ``system`` is not a str.
        """
        if not any(turn.role == "user" for turn in turns):
            raise PromptError("there is no question: add a message of the user")
        system = self.config.system if system is None else check_text("system", system)
        segments = []
        if system:
            segments.append(system + self.config.separator)
        answer_start = ""
        if turns[-1].role == "assistant":
            *turns, unfinished = turns
            answer_start = unfinished.text.strip()
        for turn in turns:
            segments += self._turn_segments(turn)
        segments += [self._assistant, f": {answer_start}"]
        return _strip(segments)

    def _turn_segments(self, turn: Turn) -> list[str]:
        """Return the segments of one message. An answer ends with eos, a question with a separator.

        As in DeepSeek's code, whitespace is stripped only from the ends of the whole question. So
        text next to an image keeps its whitespace, and an image at the end has no line break.

        Raises:
            PromptError: a question has neither text nor images.
        """
        text = turn.text.strip()
        if turn.role == "assistant":
            # A model that answers nothing generates eos directly after the colon, without a space.
            answer = f": {text}" if text else ":"
            eos = _Control(self.config.eos)
            return [self._assistant, answer, eos]
        if not text and not turn.images:
            raise PromptError("the question is empty: say what you want to know")
        first, *others = turn.pieces
        question = [first]
        for piece in others:
            question += [_Control(self.config.image), piece]
        return [self._user, ": ", *_strip(question), self.config.separator]

    def _drawing_segments(self, text: str) -> list[str]:
        """Return the segments of a drawing prompt, without bos.

        Whitespace is stripped from both ends of ``text``, and of the prompt up to image_start.

        Raises:
            PromptError: the text is empty.
        """
        text = text.strip()
        if not text:
            raise PromptError("the prompt is empty: describe the image to draw")
        request = f": {text}{self.config.separator}"
        template = [self._user, request, self._assistant, ":"]
        image_start = _Control(self.config.image_start)
        return [*_strip(template), image_start]

    def _encode(self, segments: Iterable[str]) -> list[int]:
        """Return bos and the ids of segments. Adjacent plain segments are encoded as one text."""
        ids = [self.special.bos]
        groups = itertools.groupby(segments, _is_control)
        for is_control, group in groups:
            if is_control:
                for control in group:
                    ids += self._control_ids(control)
            else:
                text = "".join(group)
                ids += self.encode(text)
        return ids

    def _control_ids(self, spelling: str) -> list[int]:
        """Return the ids that stand for a control token: its own id, or all ids of an image.

        The image token becomes the start of an image, ``image_tokens`` positions and the end.
        """
        if spelling == self.config.image:
            positions = [self.special.image] * self.image_tokens
            return [self.special.image_start, *positions, self.special.image_end]
        found = self._prompt_tokenizer.token_id(spelling)
        assert found is not None  # a _Control is made only of tokens that __init__ has found
        return [found]


def _strip(segments: Sequence[str]) -> list[str]:
    """Strip whitespace from both ends of a prompt, up to the first and the last control token.

    DeepSeek's code strips the rendered prompt, which has the same effect.
    """
    stripped = list(segments)
    # For each end: the index of its outermost segment, and the method that strips this segment.
    ends = ((0, str.lstrip), (-1, str.rstrip))
    for outermost, strip in ends:
        while stripped and not _is_control(stripped[outermost]):
            text = strip(stripped[outermost])
            if text:
                stripped[outermost] = text
                break
            del stripped[outermost]  # it was only whitespace, so strip the next segment too
    return stripped
