"""How many tokens a pass of the language model settles, and what that saves: ``python benchmarks/windows.py``.

Draws the same pictures at every window, one by one, in turns, and checks that their tokens are the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

import mlx_janus

# isort: split
import numpy as np

from benchmarks.real_size import machine
from mlx_janus.decode.window import SETTLED
from mlx_janus.evaluation.shapes import TASKS, drawing_prompts
from mlx_janus.inference.window_timing import find_window


@dataclass(frozen=True)
class Window:
    """What drawing with windows of a width took."""

    width: int
    passes: float  # a picture, mean
    seconds: float  # a picture, median
    speedup: float  # over window 1, median of pictures
    unlike: int  # pictures whose tokens differ from window 1's


@click.command()
@click.option("-m", "--model", help="A folder or a Hub id.  [default: Janus-Tiny]")
@click.option(
    "--prompts",
    type=int,
    default=4,
    show_default=True,
    help="Of each drawing task of the shapes benchmark.",
)
@click.option(
    "--rounds", type=int, default=3, show_default=True, help="Times that everything is drawn."
)
def main(model: str | None, prompts: int, rounds: int) -> None:
    """Print tokens per pass and time per picture at every window, against window 1 in the same run."""
    janus = mlx_janus.load(model)
    texts = [wanted.prompt for task in TASKS for wanted in drawing_prompts(task, prompts, 0)]
    positions = janus.config.generation.tokens
    drawn = measure(janus, texts, rounds)
    click.echo(
        f"Machine: {machine()}\n{janus.name}, {len(texts) * rounds} pictures of {positions} tokens\n"
    )
    click.echo(
        "| window | tokens a pass | times as quick as window 1, median | seconds a picture | unlike window 1 |"
    )
    click.echo("|---|---|---|---|---|")
    for w in drawn:
        click.echo(
            f"| {w.width} | {positions / w.passes:.2f} | {w.speedup:.2f} | {w.seconds:.3f} | {w.unlike} |"
        )
    chosen = find_window(janus.model, 1 if janus.config.generation.cfg_weight == 1 else 2)
    click.echo(f"\nThe window that is chosen by default here: {chosen}")


def measure(janus: mlx_janus.JanusPipeline, texts: Sequence[str], rounds: int) -> list[Window]:
    """Draw every text at every window in turns, ``rounds`` times with new noise; window 1 comes first."""
    widths = [width for width in SETTLED if width < janus.config.generation.tokens]
    seconds: dict[int, list[float]] = {width: [] for width in widths}
    passes: dict[int, list[int]] = {width: [] for width in widths}
    unlike: dict[int, int] = dict.fromkeys(widths, 0)
    for width in widths:  # compiled once
        janus.generate_images(texts[0], seed=0, window=width)
    for round_ in range(rounds):
        for i, text in enumerate(texts):
            plain: np.ndarray | None = None
            for width in widths:
                started = time.perf_counter()
                image = janus.generate_images(text, seed=1000 * round_ + i, window=width)[0]
                seconds[width].append(time.perf_counter() - started)
                passes[width].append(image.passes)
                plain = image.tokens if plain is None else plain
                unlike[width] += not np.array_equal(plain, image.tokens)
    return [
        Window(
            w,
            float(np.mean(passes[w])),
            float(np.median(seconds[w])),
            float(np.median(np.array(seconds[1]) / np.array(seconds[w]))),
            unlike[w],
        )
        for w in widths
    ]


if __name__ == "__main__":
    main()
