"""Images in the terminal as they form, by textual-image: sixels, kitty's protocol or half blocks."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..inference.results import ImageStep

SHARE = 0.1  # of the drawing time, at most, for previews
_ROWS = 20  # of the terminal, at most
_GAP = 4  # pixels between images
_MOST = 4  # images side by side


def can_show() -> bool:
    """Return whether stdout is a terminal with colours (https://no-color.org) and block characters."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    if plain or sys.stdout is None or not sys.stdout.isatty():
        return False
    return (sys.stdout.encoding or "").lower().startswith("utf")


class TerminalPreview:
    """Images of one drawing side by side, each preview drawn over the last.

    The first preview of a process queries the terminal's capabilities and waits briefly; keys typed during that wait
    may be lost.
    """

    def __init__(self) -> None:
        from rich.console import Console

        logging.getLogger("textual_image").setLevel(
            logging.ERROR
        )  # its guesses come with a traceback
        from textual_image.renderable import Image as Renderable

        self._console = Console(file=sys.stdout, color_system="truecolor", legacy_windows=False)
        # Queries the size of a cell, which is cached: a query at the first preview would swallow typed keys.
        self._console.measure(Renderable(Image.new("RGB", (1, 1))))
        self._renderable: Any = Renderable
        self._shown: Any = None
        self._rows = 0  # of the last preview
        self._started = time.monotonic()
        self._spent = self._last = 0.0

    def is_due(self, step: ImageStep) -> bool:
        """Return whether one more preview fits into its share of the time, at the cost of the last one.

        The first is due when an eighth of the image is drawn.
        """
        if not self._last:
            return step.index >= step.total // 8
        return self._spent + self._last <= SHARE * (time.monotonic() - self._started)

    def look(self, step: ImageStep) -> None:
        """Show the images as far as they are drawn, and measure the cost."""
        started = time.monotonic()
        pictures = step.preview()
        try:
            self.show(pictures)
        except KeyboardInterrupt:  # ends a sequence that was cut, and its colours
            self._console.file.write("\x1b\\\x1b[0m")
            raise
        self._last = time.monotonic() - started
        self._spent += self._last

    def show(self, pictures: Sequence[Image.Image]) -> None:
        """Show images, the first few of many, over the last preview."""
        from rich.control import Control

        pictures = pictures[:_MOST]
        if self._rows:
            self._console.control(Control.move(0, -self._rows))
        before = self._shown
        self._rows = max(
            min(_ROWS, self._console.height - 4, self._console.width // (2 * len(pictures))), 1
        )
        self._shown = self._renderable(_side_by_side(pictures), width="auto", height=self._rows)
        self._console.print(self._shown, end="")
        if before is not None:
            before.cleanup()  # frees the image that a kitty terminal keeps


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    width = sum(picture.width + _GAP for picture in pictures) - _GAP
    row = Image.new("RGB", (width, max(picture.height for picture in pictures)))
    at = 0
    for picture in pictures:
        row.paste(picture, (at, 0))
        at += picture.width + _GAP
    return row
