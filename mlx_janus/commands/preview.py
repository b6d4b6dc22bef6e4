"""Previews in the terminal, with textual-image: sixels, kitty's protocol or half blocks."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..inference.results import ImageStep

SHARE = 0.1  # largest share of the drawing time for previews
_ROWS = 20  # rows of the terminal, at most
_GAP = 4  # pixels between images
_MAX_IMAGES = 4  # images side by side


def can_show() -> bool:
    """Return whether stdout is a terminal with colours and block characters.

    NO_COLOR turns colours off (https://no-color.org).
    """
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    if plain or sys.stdout is None or not sys.stdout.isatty():
        return False
    return (sys.stdout.encoding or "").lower().startswith("utf")


class TerminalPreview:
    """Previews of one drawing, with its images side by side; each replaces the previous preview.

    The first preview of a process queries the terminal's capabilities and waits briefly. Keys typed
    during that wait may be lost.
    """

    def __init__(self) -> None:
        from rich.console import Console

        # Set this first: on import, textual-image logs its guesses with a traceback.
        logging.getLogger("textual_image").setLevel(logging.ERROR)
        from textual_image.renderable import Image as Renderable

        self._console = Console(file=sys.stdout, color_system="truecolor", legacy_windows=False)
        # Query the size of a cell now, which is then cached: a query at the first preview would
        # swallow keys that are typed until then.
        self._console.measure(Renderable(Image.new("RGB", (1, 1))))
        self._renderable: Any = Renderable
        self._shown: Any = None  # the last preview
        self._rows = 0  # rows of the last preview; 0: none yet
        self._started = time.monotonic()
        self._spent = 0.0  # seconds for all previews
        self._last = 0.0  # seconds for the last preview; 0: none yet

    def is_due(self, step: ImageStep) -> bool:
        """Return whether another preview fits into a tenth of the drawing time (``SHARE``).

        A preview is expected to take as long as the last one. The first one is due after an eighth
        of the steps.
        """
        if not self._last:
            return step.index >= step.total // 8
        return self._spent + self._last <= SHARE * (time.monotonic() - self._started)

    def look(self, step: ImageStep) -> None:
        """Show the unfinished images of a step, and measure the time, for ``is_due``."""
        started = time.monotonic()
        images = step.preview()
        try:
            self.show(images)
        except KeyboardInterrupt:  # end the interrupted escape sequence, and reset the colours
            self._console.file.write("\x1b\\\x1b[0m")
            raise
        self._last = time.monotonic() - started
        self._spent += self._last

    def show(self, images: Sequence[Image.Image]) -> None:
        """Show at most four of the images, in place of the last preview if there is one."""
        from rich.control import Control

        images = images[:_MAX_IMAGES]
        if self._rows:
            self._console.control(Control.move(0, -self._rows))  # to the last preview's first row
        before = self._shown
        rows_in_width = self._console.width // (2 * len(images))  # a cell is twice as high as wide
        # Leave four rows of the terminal for other lines, such as the progress bar.
        self._rows = max(min(_ROWS, self._console.height - 4, rows_in_width), 1)
        self._shown = self._renderable(_side_by_side(images), width="auto", height=self._rows)
        self._console.print(self._shown, end="")
        if before is not None:
            before.cleanup()  # a kitty terminal keeps each image until it is told to free it


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Return one image of several, in a row from left to right with gaps of ``_GAP``."""
    width = sum(image.width + _GAP for image in images) - _GAP
    row = Image.new("RGB", (width, max(image.height for image in images)))
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + _GAP
    return row
