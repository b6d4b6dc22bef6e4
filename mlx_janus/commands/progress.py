"""Progress bars and notes on stderr, and previews of images in the terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .runner import is_quiet, note

if TYPE_CHECKING:
    from ..inference.results import GeneratedImage, ImageStep, TextResult
    from .preview import TerminalPreview

Progress = Callable[[str, int, int], None]
"""A function called with a stage, the amount done and the total."""

_TERMINAL_INTERVAL = 0.2  # seconds between two updates of a bar
_LOG_INTERVAL = 10.0  # seconds between two lines of a bar in a file


def progress_bar(title: str, unit: str, total: int | None = None) -> Any:
    """Return a tqdm bar on stderr, updated often on a terminal and rarely in a log.

    Args:
        title: text before the bar.
        unit: name of one unit; "B": bytes, shown as kB, MB and so on.
        total: number of units; None: the caller sets it later.
    """
    from tqdm import tqdm

    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(
        desc=title,
        unit=unit,
        unit_scale=unit == "B",
        total=total,
        file=sys.stderr,
        disable=sys.stderr is None or is_quiet(),  # a closed stderr is None
        mininterval=_TERMINAL_INTERVAL if on_terminal else _LOG_INTERVAL,
    )


@contextlib.contextmanager
def stage_bars(unit: str) -> Iterator[Progress]:
    """Yield a function that shows the progress of one stage after another, each on its own bar.

    Args:
        unit: name of one unit, as for ``progress_bar``.
    """
    current_stage = ""
    bar: Any = None

    def report(stage: str, done: int, total: int) -> None:
        nonlocal current_stage, bar
        if stage != current_stage:
            if bar is not None:
                bar.close()
            current_stage = stage
            bar = progress_bar(stage, unit, total)
        bar.update(done - bar.n)  # takes the increase since the last call

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()


@contextlib.contextmanager
def byte_progress() -> Iterator[Progress]:
    """Yield a function that shows the progress in bytes of one stage after another."""
    with stage_bars("B") as report:
        yield report


def follow_drawing(
    steps: Iterable[ImageStep],
    n: int,
    on_finished: Callable[[GeneratedImage], None],
    preview: TerminalPreview | None = None,
) -> None:
    """Run the steps of a drawing, with a progress bar and previews.

    Args:
        steps: steps of the drawing.
        n: number of images.
        on_finished: called with each finished image, while the bar is hidden.
        preview: shows the images while they are drawn; None: no previews.
    """
    from tqdm import tqdm

    started = time.perf_counter()
    with progress_bar("drawing", "token") as bar:
        for step in steps:
            bar.total = step.total
            images_done = n * step.index / step.total  # unfinished images count as fractions
            per_minute = 60 * images_done / (time.perf_counter() - started)
            bar.set_postfix_str(f"{per_minute:.2f} images/min", refresh=False)
            bar.update(step.index - bar.n)  # takes the increase since the last call
            # Finished images are shown even if the previews have taken too much time already.
            if preview is not None and (step.images or preview.is_due(step)):
                with tqdm.external_write_mode(file=sys.stderr):  # hides the bar during the preview
                    preview.show_step(step)
            for image in step.images:
                with tqdm.external_write_mode(file=sys.stderr):
                    on_finished(image)
            if preview is not None and step.images:
                preview.keep()  # ``on_finished`` may have printed lines below the preview


def terminal_preview(requested: bool | None) -> TerminalPreview | None:
    """Return the preview in the terminal for one drawing; None: show no preview.

    Args:
        requested: True for --show, False for --no-show. None, without either option: return a
            preview if the terminal can show it and the command is not quiet.
    """
    from .preview import TerminalPreview, can_show

    if requested is None:
        requested = can_show() and not is_quiet()
    return TerminalPreview() if requested else None


def note_if_cut(result: TextResult) -> None:
    """Print a note if an answer was cut at its maximum length."""
    if result.finish_reason == "length":
        note(f"Cut after {len(result.tokens)} tokens, by --max-tokens or the model's context.")
