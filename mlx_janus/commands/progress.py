"""Progress on stderr: bars, previews in the terminal, and a note under a truncated answer."""

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

_ON_TERMINAL = 0.2  # seconds between two updates of a bar
_IN_LOG = 10.0  # seconds between two lines of a bar in a file


def progress_bar(title: str, unit: str, total: int | None = None) -> Any:
    """Return a tqdm bar on stderr, updated often on a terminal and rarely in a log.

    Args:
        title: text before the bar.
        unit: name of one unit; "B": bytes, shown as kB, MB and so on.
        total: units in all; None: not known at first.
    """
    from tqdm import tqdm

    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(
        desc=title,
        unit=unit,
        unit_scale=unit == "B",
        total=total,
        file=sys.stderr,
        disable=sys.stderr is None or is_quiet(),  # stderr is None if closed
        mininterval=_ON_TERMINAL if on_terminal else _IN_LOG,
    )


@contextlib.contextmanager
def stage_bars(unit: str) -> Iterator[Progress]:
    """Yield a function that reports progress in units; each stage has a bar of its own."""
    stage = ""
    bar: Any = None

    def report(name: str, done: int, total: int) -> None:
        nonlocal stage, bar
        if name != stage:
            if bar is not None:
                bar.close()
            stage = name
            bar = progress_bar(name, unit, total)
        bar.update(done - bar.n)  # tqdm takes the increase

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()


@contextlib.contextmanager
def byte_progress() -> Iterator[Progress]:
    """Yield a function that reports progress in bytes; each stage has a bar of its own."""
    with stage_bars("B") as report:
        yield report


def follow_drawing(
    steps: Iterable[ImageStep],
    n: int,
    finished: Callable[[GeneratedImage], None],
    preview: TerminalPreview | None = None,
) -> None:
    """Run the steps of a drawing, with a progress bar and previews.

    Args:
        steps: steps of the drawing.
        n: number of images.
        finished: called with each finished image, while the bar is hidden.
        preview: shows the unfinished images; None: no previews.
    """
    from tqdm import tqdm

    started = time.perf_counter()
    with progress_bar("drawing", "token") as bar:
        for step in steps:
            bar.total = step.total
            per_minute = 60 * n * step.index / step.total / (time.perf_counter() - started)
            bar.set_postfix_str(f"{per_minute:.2f} images/min", refresh=False)
            bar.update(step.index - bar.n)
            # Finished images are always previewed, however much time previews have taken.
            done = step.index == step.total and bool(step.images)
            if preview is not None and (preview.is_due(step) or done):
                with tqdm.external_write_mode(file=sys.stderr):  # hides the bar meanwhile
                    preview.look(step)
            for image in step.images:
                with tqdm.external_write_mode(file=sys.stderr):
                    finished(image)


def terminal_preview(show: bool | None) -> TerminalPreview | None:
    """Return a preview for one drawing, or None.

    Args:
        show: value of ``show_option``; None: show it if the terminal can, unless the command is
            quiet.
    """
    from .preview import TerminalPreview, can_show

    wanted = can_show() and not is_quiet() if show is None else show
    return TerminalPreview() if wanted else None


def note_if_cut(result: TextResult) -> None:
    """Print a note if an answer was cut at its maximum length."""
    if result.finish_reason == "length":
        note(f"Cut after {len(result.tokens)} tokens, by --max-tokens or the model's context.")
