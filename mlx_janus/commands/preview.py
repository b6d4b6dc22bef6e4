"""A picture in the terminal as it forms, by textual-image: sixel, kitty's protocol, or half-block cells of colour."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..inference.results import ImageStep

SHARE = 0.1  # of the drawing time that looking may take
_ROWS = 20  # of the terminal, at most
_GAP = 4  # pixels between pictures
_MOST = 4  # pictures


def can_show() -> bool:
    """Whether stdout is a terminal with colours (https://no-color.org) and blocks, whose cursor can be moved."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    if plain or sys.stdout is None or not sys.stdout.isatty():
        return False
    return (sys.stdout.encoding or "").lower().startswith("utf")


class TerminalPreview:
    """Shows the pictures of one drawing side by side, every time over the last.

    The first one asks the terminal what it can do, for which a moment must do: what is typed meanwhile may be lost.
    """

    def __init__(self) -> None:
        from rich.console import Console

        logging.getLogger("textual_image").setLevel(logging.ERROR)  # it warns, with a traceback, of what it can guess
        from textual_image.renderable import Image as Renderable

        self._console = Console(file=sys.stdout, color_system="truecolor", legacy_windows=False)
        # Asks for the size of a cell, which is kept: asked with the first picture, it would take what is typed by then.
        self._console.measure(Renderable(Image.new("RGB", (1, 1))))
        self._renderable: Any = Renderable
        self._shown: Any = None
        self._rows = 0  # that the last one took
        self._started = time.monotonic()
        self._spent = self._last = 0.0

    def is_due(self, step: ImageStep) -> bool:
        """Whether one more look fits into its share of the time, if it costs what the last one did; the first is taken
        when there is something to see."""
        if not self._last:
            return step.index >= step.total // 8
        return self._spent + self._last <= SHARE * (time.monotonic() - self._started)

    def look(self, step: ImageStep) -> None:
        """Show what there is of the pictures, and note what that cost."""
        started = time.monotonic()
        pictures = step.preview()
        try:
            self.show(pictures)
        except KeyboardInterrupt:  # what follows must be no part of a sequence that was cut, nor in its colours
            self._console.file.write("\x1b\\\x1b[0m")
            raise
        self._last = time.monotonic() - started
        self._spent += self._last

    def show(self, pictures: Sequence[Image.Image]) -> None:
        """Draw pictures, the first few of many, over those that were drawn before."""
        from rich.control import Control

        pictures = pictures[:_MOST]
        if self._rows:
            self._console.control(Control.move(0, -self._rows))
        before = self._shown
        self._rows = max(min(_ROWS, self._console.height - 4, self._console.width // (2 * len(pictures))), 1)
        self._shown = self._renderable(_side_by_side(pictures), width="auto", height=self._rows)
        self._console.print(self._shown, end="")
        if before is not None:
            before.cleanup()  # of what a kitty keeps


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    width = sum(picture.width + _GAP for picture in pictures) - _GAP
    row = Image.new("RGB", (width, max(picture.height for picture in pictures)))
    at = 0
    for picture in pictures:
        row.paste(picture, (at, 0))
        at += picture.width + _GAP
    return row
