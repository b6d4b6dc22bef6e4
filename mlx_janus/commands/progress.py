"""Progress on stderr: bars, images in the terminal, and a note under a cut answer."""

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
"""Called with a stage, the amount done and the total."""

_ON_TERMINAL = 0.2  # seconds between two drawings of a bar
_IN_LOG = 10.0  # seconds between two lines of a bar in a file


def progress_bar(title: str, unit: str, total: int | None = None) -> Any:
    """Return a tqdm bar, which is redrawn often on a terminal and rarely in a log."""
    from tqdm import tqdm

    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(
        desc=title,
        unit=unit,
        unit_scale=unit == "B",
        total=total,
        file=sys.stderr,
        disable=sys.stderr is None or is_quiet(),  # None: 2>&-
        mininterval=_ON_TERMINAL if on_terminal else _IN_LOG,
    )


@contextlib.contextmanager
def stage_bars(unit: str) -> Iterator[Progress]:
    """Give a function that reports progress; the first report of each stage begins a bar on a new line."""
    stage = ""
    bar: Any = None

    def report(name: str, done: int, total: int) -> None:
        nonlocal stage, bar
        if name != stage:
            if bar is not None:
                bar.close()
            stage = name
            bar = progress_bar(name, unit, total)
        bar.update(done - bar.n)

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()


@contextlib.contextmanager
def byte_progress() -> Iterator[Progress]:
    """Give a function that reports progress in bytes, as ``stage_bars`` does."""
    with stage_bars("B") as report:
        yield report


def follow_drawing(
    steps: Iterable[ImageStep],
    n: int,
    finished: Callable[[GeneratedImage], None],
    preview: TerminalPreview | None = None,
) -> None:
    """Draw n images with a bar of image tokens, below a ``preview`` of them if there is one.

    ``finished`` gets each image while the bar is off the screen.
    """
    from tqdm import tqdm

    started = time.perf_counter()
    with progress_bar("drawing", "token") as bar:
        for step in steps:
            bar.total = step.total
            per_minute = 60 * n * step.index / step.total / (time.perf_counter() - started)
            bar.set_postfix_str(f"{per_minute:.2f} images/min", refresh=False)
            bar.update(step.index - bar.n)
            done = step.index == step.total and bool(step.images)
            if preview is not None and (preview.is_due(step) or done):
                with tqdm.external_write_mode(file=sys.stderr):
                    preview.look(step)
            for image in step.images:
                with tqdm.external_write_mode(file=sys.stderr):
                    finished(image)


def terminal_preview(show: bool | None) -> TerminalPreview | None:
    """Return a preview of one drawing in the terminal, or None.

    Args:
        show: value of ``show_option``; None: if the terminal can and the command is not quiet.
    """
    from .preview import TerminalPreview, can_show

    wanted = can_show() and not is_quiet() if show is None else show
    return TerminalPreview() if wanted else None


def note_if_cut(result: TextResult) -> None:
    """Print a note under an answer that reached the limit of its length."""
    if result.finish_reason == "length":
        note(f"Cut after {len(result.tokens)} tokens, by --max-tokens or the model's context.")
