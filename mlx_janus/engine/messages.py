"""The engine's requests, the events of a request, and the errors of submitting one."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from ..decode.text import TextOptions
from ..errors import JanusError
from ..inference.pathway import ImageOptions
from ..inference.results import GeneratedImage, TextResult, TokenLogprob
from ..processing.prompts import Turn


@dataclass(frozen=True)
class AnswerRequest:
    """A request for answers to the last turn of a conversation.

    Args:
        turns: messages. If the last one is the assistant's, the answers continue its text.
        images: the images of all turns, in order, upright and RGB.
        options: sampling and length. The seed is the first answer's; the other answers use the
            following numbers.
        system: system prompt; None: the model's own, "": none.
        n: the number of answers.
    """

    turns: tuple[Turn, ...]
    images: tuple[Image.Image, ...]
    options: TextOptions
    system: str | None = None
    n: int = 1


@dataclass(frozen=True)
class DrawingRequest:
    """A request for images of a prompt.

    Args:
        prompt: the description of the images.
        options: options of the model's pathway.
        seed: seed of the first image; the other images use the following numbers.
        n: the number of images.
        partial_images: the maximum number of previews of each image, evenly spaced over its steps.
            A preview is skipped if a newer one replaces it before it is decoded.
    """

    prompt: str
    options: ImageOptions
    seed: int
    n: int = 1
    partial_images: int = 0


@dataclass(frozen=True)
class Piece:
    """A piece of an answer's text; ``index`` is the answer's number, from 0.

    If log-probabilities were asked for, there is a piece for each token, even without text.
    """

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()  # of the piece's token


@dataclass(frozen=True)
class Answered:
    """The end of an answer; ``index`` is the answer's number, from 0.

    The result has the text of all the answer's pieces.
    """

    index: int
    result: TextResult


@dataclass(frozen=True)
class Partial:
    """A preview of an image, grey where unfinished.

    ``index`` is the image's number, from 0. ``number`` counts the previews of that image from 0.
    """

    index: int
    number: int
    image: Image.Image


@dataclass(frozen=True)
class Drawn:
    """A finished image; ``index`` is its number, from 0."""

    index: int
    image: GeneratedImage
    prompt_tokens: int  # length of the prompt


Request = AnswerRequest | DrawingRequest
Event = Piece | Answered | Partial | Drawn


class BusyError(JanusError):
    """The queue of requests is full.

    Args:
        retry_after: seconds after which to try again.
    """

    def __init__(self, retry_after: int):
        super().__init__("too many requests are waiting: try again later")
        self.retry_after = retry_after


class StoppingError(JanusError):
    """The server is shutting down and starts no requests."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down: try again when it is back")
