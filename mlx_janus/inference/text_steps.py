"""Steps of image generation that write text: a plan, or a judgement."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Protocol, TypeVar

from .results import ImageStep

Result = TypeVar("Result")


class ToStep(Protocol):
    """A function that makes the step of a piece of text."""

    def __call__(self, *, text: str) -> ImageStep: ...


def text_steps(
    pieces: Generator[str, None, Result], to_step: ToStep
) -> Generator[ImageStep, None, Result]:
    """Yield a step for each piece of a text, and return the result of the generator ``pieces``."""
    with contextlib.closing(pieces):
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                result: Result = end.value
                return result
            yield to_step(text=piece)
