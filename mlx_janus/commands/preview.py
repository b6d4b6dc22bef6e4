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
_MAX_ROWS = 20  # rows of the terminal for a preview
_GAP = 4  # pixels between images
_MAX_IMAGES = 4  # images side by side
_ERASE_BELOW = "\x1b[J"  # erases the terminal from the cursor to the end


def can_show() -> bool:
    """Return whether stdout is a terminal with colours and block characters.

    There are no colours if NO_COLOR is set (https://no-color.org), or TERM is "dumb" or missing.
    """
    no_colours = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    on_terminal = sys.stdout is not None and sys.stdout.isatty()  # stdout is None if closed
    if no_colours or not on_terminal:
        return False
    return (sys.stdout.encoding or "").lower().startswith("utf")  # these have block characters


class TerminalPreview:
    """Previews of the images that one run generates.

    Several images are shown side by side, but finished images without the unfinished ones. Each
    preview replaces the one before, until ``keep`` is called.

    The first object of this class asks the terminal for its capabilities and waits for the answer.
    Keys typed during that wait may be lost.
    """

    def __init__(self) -> None:
        from rich.console import Console

        # On import, textual-image logs its guesses about the terminal with tracebacks. Hide these.
        logging.getLogger("textual_image").setLevel(logging.ERROR)
        from textual_image.renderable import Image as Renderable

        self._console = Console(file=sys.stdout, color_system="truecolor", legacy_windows=False)
        # Measuring asks the terminal for the size of a character cell. textual-image keeps the
        # answer. Ask now, because at the first preview the keys typed until then would be lost.
        self._console.measure(Renderable(Image.new("RGB", (1, 1))))
        self._renderable_class: Any = Renderable
        self._last_preview: Any = None  # the preview to replace; None: there is none
        self._last_rows = 0  # rows of the last preview in the terminal; 0: none to replace
        self._last_count = 0  # images in the last preview
        self._last_seconds = 0.0  # time that the last preview took; 0: no preview yet
        self._total_seconds = 0.0  # time that all previews took
        self._finished_count = 0  # images that are finished so far
        self._started = time.monotonic()

    def is_due(self, step: ImageStep) -> bool:
        """Return whether another preview fits into a tenth of the drawing time (``SHARE``).

        A preview is expected to take as long as the last one. The first one is due after an eighth
        of the steps.
        """
        if not self._last_seconds:
            return step.index >= step.total // 8
        drawing_seconds = time.monotonic() - self._started
        return self._total_seconds + self._last_seconds <= SHARE * drawing_seconds

    def show_step(self, step: ImageStep) -> None:
        """Show the images of a step, and measure the time that this takes, for ``is_due``.

        If images were finished at this step, only these are shown; otherwise, the unfinished ones.
        Every step with finished images must be shown, so that they are counted.
        """
        started = time.monotonic()
        if step.images:
            images = [image.image for image in step.images]
            self._finished_count += len(images)
        else:
            images = step.preview()[self._finished_count :]  # the finished images come first
        try:
            self.show(images)
        except KeyboardInterrupt:
            # End the interrupted escape sequence, and reset the colours.
            self._console.file.write("\x1b\\\x1b[0m")
            raise
        self._last_seconds = time.monotonic() - started
        self._total_seconds += self._last_seconds

    def keep(self) -> None:
        """Leave the last preview on the terminal; the next one is printed below it."""
        self._last_preview = None
        self._last_rows = 0

    def show(self, images: Sequence[Image.Image]) -> None:
        """Show at most four of the images, in place of the last preview if there is one."""
        from rich.control import Control

        images = images[:_MAX_IMAGES]
        if self._last_rows:
            # Move the cursor up to the last preview's first row.
            self._console.control(Control.move(0, -self._last_rows))
            if len(images) < self._last_count:  # a narrower preview would not cover the last one
                self._console.file.write(_ERASE_BELOW)
        # The images must fit into the terminal's width. They are square, and a cell is twice as
        # high as wide: n rows of an image take 2 * n columns.
        rows_for_width = self._console.width // (2 * len(images))
        # Leave four rows of the terminal for other lines, such as the progress bar.
        rows = max(min(_MAX_ROWS, self._console.height - 4, rows_for_width), 1)
        preview = self._renderable_class(_side_by_side(images), width="auto", height=rows)
        replaced = self._last_preview
        self._last_preview = preview
        self._last_rows = rows
        self._last_count = len(images)
        self._console.print(preview, end="")
        if replaced is not None:
            replaced.cleanup()  # a kitty terminal stores the image until this call


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Join several images into one, from left to right with gaps of ``_GAP`` pixels."""
    width = sum(image.width + _GAP for image in images) - _GAP  # no gap after the last image
    row = Image.new("RGB", (width, max(image.height for image in images)))
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + _GAP
    return row
