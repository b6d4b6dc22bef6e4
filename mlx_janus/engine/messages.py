"""The engine's requests, the events of a request, and the errors of submitting one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from ..decode.text import TextOptions
from ..errors import JanusError
from ..inference.input_records import InputImage, InputRecord
from ..inference.pathway import ImageOptions
from ..inference.results import GeneratedImage, TextResult, TokenLogprob
from ..processing.images import Box
from ..processing.prompts import Turn


@dataclass(frozen=True)
class AnswerRequest:
    """A request for answers to the last turn of a conversation, or for text that continues a text.

    Args:
        turns: messages. If the last one is the assistant's, the answers continue its text.
        images: the images of all turns, in order, upright and RGB.
        options: sampling and length. The seed is the first answer's; the other answers use the
            following numbers.
        system: system prompt; None: the model's own, "": none.
        n: the number of answers.
        plain: a text to continue, which the model reads without a template and in place of the
            turns; None: there are turns.
        with_progress: whether reading the prompt adds ``Progress`` events.
    """

    turns: tuple[Turn, ...]
    images: tuple[Image.Image, ...]
    options: TextOptions
    system: str | None = None
    n: int = 1
    plain: str | None = None
    with_progress: bool = False

    @property
    def continues(self) -> bool:
        """Whether the prompt ends with the beginning of the answers."""
        return self.plain is not None or self.turns[-1].role == "assistant"


@dataclass(frozen=True)
class DrawingRequest:
    """A request for images of a prompt, or for a change to given images.

    Args:
        prompt: the description of the images or of the change.
        options: options of the model's pathway.
        seed: seed of the first image; the other images use the following numbers.
        n: the number of images.
        partial_images: the maximum number of previews of each image, evenly spaced over its steps.
            A preview is skipped if a newer one replaces it before it is decoded.
        images: the images to change, upright and RGB. Each result is made from all of them.
        with_progress: whether each step adds a ``Progress`` event.
        records: of each of ``images``, for the metadata; (): only their sizes are known.
        crop: the part of each result to keep; None: all of it.
    """

    prompt: str
    options: ImageOptions
    seed: int
    n: int = 1
    partial_images: int = 0
    images: tuple[Image.Image, ...] = ()
    with_progress: bool = False
    records: tuple[InputRecord, ...] = ()
    crop: Box | None = None


def edit_arguments(images: Sequence[InputImage], *, crop: bool = False) -> dict[str, Any]:
    """Return the arguments of a ``DrawingRequest`` that changes images.

    Args:
        images: the images; none: there are no such arguments.
        crop: whether each result is cut to the shape of the first image.
    """
    if not images:
        return {}
    return {
        "images": tuple(one.image for one in images),
        "records": tuple(one.record for one in images),
        "crop": images[0].box if crop else None,
    }


@dataclass(frozen=True)
class Piece:
    """A piece of an answer's text; ``index`` is the answer's number, from 0.

    If log-probabilities were asked for, there is a piece for each token, even one without text.
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
    input_image_tokens: int = 0  # number of the prompt's tokens that stand for images to change


@dataclass(frozen=True)
class Progress:
    """The progress of a request that has ``with_progress``.

    While an answer's prompt is read, ``done`` and ``total`` count the positions of the prompt.
    While images are drawn, they count the steps of all images of the request.
    """

    stage: Literal["read", "draw"]
    done: int
    total: int


Request = AnswerRequest | DrawingRequest
Event = Piece | Answered | Partial | Drawn | Progress


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
