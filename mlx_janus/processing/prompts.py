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


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Args:
        role: the speaker.
        text: the message's text.
        images: number of images before the text; only the user's messages have any.

    Raises:
        OptionError: the role is unknown, or cannot have this number of images.
    """

    role: Literal["user", "assistant"]
    text: str
    images: int = 0

    def __post_init__(self) -> None:
        if self.role not in ("user", "assistant"):
            raise OptionError(f"a turn's role must be 'user' or 'assistant', got {self.role!r}")
        if self.role == "assistant" and self.images != 0:
            rule = "images of the assistant's turn must be 0 (only the user shows images)"
            raise OptionError(f"{rule}, got {self.images}")
        if self.images < 0:
            raise OptionError(f"images of the user's turn must be 0 or more, got {self.images}")


class _Control(str):
    """A segment of a prompt that is one control token; every other segment is plain text."""

    __slots__ = ()


def _is_control(segment: str) -> bool:
    return isinstance(segment, _Control)


class Prompts:
    """A model's prompt templates over its tokenizer.

    Args:
        tokenizer: the tokenizer; copied rather than changed if a control token is not special.
        config: roles, separators and the spellings of the control tokens.
        image_tokens: positions that one image takes in an answering prompt.

    Raises:
        ConfigError: a control token is missing, or the tokenizer loses text, contradicts itself or
            is not byte-level.
        OptionError: ``image_tokens`` is below 1.
    """

    def __init__(self, tokenizer: Tokenizer, config: PromptConfig, *, image_tokens: int) -> None:
        if image_tokens < 1:
            raise OptionError(f"image_tokens must be 1 or more, got {image_tokens}")
        self.config = config
        self.image_tokens = image_tokens
        self._tokenizer = PromptTokenizer(tokenizer, config)
        self.tokenizer = self._tokenizer.tokenizer  # of the ``tokenizers`` library, for callers
        self.special = self._tokenizer.special  # ids of the control tokens
        self._user = self._role(config.user)
        self._assistant = self._role(config.assistant)

    @classmethod
    def load(cls, folder: Path, config: PromptConfig, *, image_tokens: int) -> Prompts:
        """Read ``tokenizer.json`` of a model folder.

        Raises:
            ConfigError: the file is missing, not JSON or not a tokenizer, or the tokenizer lacks a
                control token, loses text, contradicts itself or is not byte-level.
            OptionError: ``image_tokens`` is below 1.
        """
        path = folder / TOKENIZER_FILE
        tokenizer = read_tokenizer(path)
        try:
            return cls(tokenizer, config, image_tokens=image_tokens)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def answering(self, turns: Sequence[Turn], system: str | None = None) -> list[int]:
        """Return the ids of a conversation, from bos to the beginning of the assistant's answer.

        Each image is image_start, ``image_tokens`` times the image id, image_end.

        Args:
            turns: the messages, the last one the user's.
            system: system prompt; None: the model's own, "": none.

        Raises:
            PromptError: there is no turn, the last one is not the user's, a question has neither
                text nor images, or a text is not Unicode.
            OptionError: ``system`` is not text.
        """
        segments = self._answering_segments(turns, system)
        return self._encode(segments)

    def following(self, turn: Turn) -> list[int]:
        """Return the ids of a further question, to the beginning of the assistant's answer.

        They have no bos: append them after the eos of the last answer.

        Raises:
            PromptError: the question has neither text nor images, or its text is not Unicode.
        """
        segments = self._turn_segments(turn)
        segments += [self._assistant, ":"]
        _bos, *ids = self._encode(segments)
        return ids

    def drawing(self, text: str) -> list[int]:
        """Return the ids of a prompt to draw: bos first, image_start last.

        Guidance uses them as its conditional row.

        Raises:
            PromptError: the text is empty or not Unicode.
        """
        segments = self._drawing_segments(text)
        return self._encode(segments)

    def unconditional(self, ids: Sequence[int]) -> list[int]:
        """Return guidance's unconditional row: ``ids``, with pad between the first and the last."""
        pads = [self.special.pad] * (len(ids) - 2)
        first = ids[:1]
        last = ids[1:][-1:]  # empty if the first id is the only one
        return [*first, *pads, *last]

    def render_answering(self, turns: Sequence[Turn], system: str | None = None) -> str:
        """Return ``answering``'s template as text: no bos, one placeholder for each image."""
        segments = self._answering_segments(turns, system)
        return "".join(segments)

    def render_drawing(self, text: str) -> str:
        """Return the template of ``drawing`` as text, without bos."""
        segments = self._drawing_segments(text)
        return "".join(segments)

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text: no bos, no template, and no control token.

        Raises:
            PromptError: the text is not Unicode.
        """
        return self._tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Special tokens and ids beyond the vocabulary are skipped."""
        return self._tokenizer.decode(ids)

    def detokenizer(self) -> Detokenizer:
        """Return a decoder that takes one id at a time."""
        return self._tokenizer.detokenizer()

    def _role(self, name: str) -> str:
        """Return the segment of a role: a control token if it is an added token, otherwise text."""
        if self._tokenizer.is_added(name):
            return _Control(name)
        return name  # Janus-1.3B's roles are ordinary words

    def _answering_segments(self, turns: Sequence[Turn], system: str | None) -> list[str]:
        """Return the segments of ``answering``: all but bos, stripped at both ends.

        Raises:
            PromptError: there is no turn, the last one is not the user's, or a question has neither
                text nor images.
            OptionError: ``system`` is not text.
        """
        if not turns or turns[-1].role != "user":
            raise PromptError("the last message must be the user's: add a question")
        system = self.config.system if system is None else check_text("system", system)
        segments = []
        if system:
            segments.append(system + self.config.separator)
        for turn in turns:
            segments += self._turn_segments(turn)
        segments += [self._assistant, ":"]
        return _strip(segments)

    def _turn_segments(self, turn: Turn) -> list[str]:
        """Return the segments of one message, from its role to its eos or separator.

        Raises:
            PromptError: a question has neither text nor images.
        """
        text = turn.text.strip()
        if turn.role == "assistant":
            # In an empty answer eos follows the colon directly, as when it was generated.
            answer = f": {text}" if text else ":"
            eos = _Control(self.config.eos)
            return [self._assistant, answer, eos]
        if not text and not turn.images:
            raise PromptError("the question is empty: say what you want to know")
        image = _Control(self.config.image)
        images = [image, "\n"] * turn.images
        question = text + self.config.separator
        return [self._user, ": ", *images, question]

    def _drawing_segments(self, text: str) -> list[str]:
        """Return the segments of ``drawing``: all but bos, stripped before image_start.

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
        """Return bos and the ids of segments; adjacent plain ones are encoded as one text."""
        ids = [self.special.bos]
        groups = itertools.groupby(segments, _is_control)
        for is_control, group in groups:
            if is_control:
                for spelling in group:
                    ids += self._control_ids(spelling)
            else:
                text = "".join(group)
                ids += self.encode(text)
        return ids

    def _control_ids(self, spelling: str) -> list[int]:
        """Return the id of a control token, or all ids of an image for its placeholder."""
        if spelling == self.config.image:
            placeholders = [self.special.image] * self.image_tokens
            return [self.special.image_start, *placeholders, self.special.image_end]
        found = self._tokenizer.token_id(spelling)
        assert found is not None  # a _Control is made only of tokens that __init__ has found
        return [found]


def _strip(segments: Sequence[str]) -> list[str]:
    """Strip both ends of the rendered prompt, as the reference does, but never a control token."""
    stripped = list(segments)
    ends = ((0, str.lstrip), (-1, str.rstrip))
    for end, strip in ends:
        while stripped and not _is_control(stripped[end]):
            text = strip(stripped[end])
            if text:
                stripped[end] = text
                break
            del stripped[end]  # it was only spaces: strip its neighbour
    return stripped
