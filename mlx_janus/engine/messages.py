"""What is asked of the engine, what it tells meanwhile, and why it may refuse."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from ..decode.text import TextOptions
from ..errors import JanusError
from ..inference.pathway import ImageOptions
from ..inference.results import GeneratedImage, TextResult
from ..processing.prompts import Turn


@dataclass(frozen=True)
class AnswerRequest:
    """Answers to the last turn of a conversation.

    Args:
        turns: messages, the last one the user's.
        pictures: of all turns, in order, upright and RGB.
        options: choice and length; the seed is of the first answer, the others have the next ones.
        system: system prompt; None: the model's own, "": none.
        n: how many answers.
    """

    turns: tuple[Turn, ...]
    pictures: tuple[Image.Image, ...]
    options: TextOptions
    system: str | None = None
    n: int = 1


@dataclass(frozen=True)
class DrawingRequest:
    """Pictures of a prompt.

    Args:
        prompt: what to draw.
        options: of the model's pathway.
        seed: of the first picture, the others have the next ones.
        n: how many pictures.
        partial_images: how often at most each picture is shown before it is whole, after equal parts of it; what
            something newer has come for is left out.
    """

    prompt: str
    options: ImageOptions
    seed: int
    n: int = 1
    partial_images: int = 0


@dataclass(frozen=True)
class Piece:
    """Characters of an answer; ``index`` is which of the ``n`` it is, from 0."""

    index: int
    text: str


@dataclass(frozen=True)
class Answered:
    """An answer is whole; its text is that of its pieces."""

    index: int
    result: TextResult


@dataclass(frozen=True)
class Partial:
    """A picture as far as it is drawn, grey where it is not; ``number`` counts from 0 for each picture."""

    index: int
    number: int
    image: Image.Image


@dataclass(frozen=True)
class Drawn:
    """A picture is whole."""

    index: int
    image: GeneratedImage
    prompt_tokens: int


Request = AnswerRequest | DrawingRequest
Event = Piece | Answered | Partial | Drawn


class BusyError(JanusError):
    """As many requests wait as may.

    Args:
        retry_after: seconds after which there may be room.
    """

    def __init__(self, retry_after: int):
        super().__init__("too many requests are waiting: try again later")
        self.retry_after = retry_after


class StoppingError(JanusError):
    """The server is shutting down, and begins nothing new."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down: try again when it is back")
