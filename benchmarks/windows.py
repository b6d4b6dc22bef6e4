"""Measure the tokens that a pass accepts at every window: ``python benchmarks/windows.py``.

The same images are generated one by one at every window in turn, and their tokens compared.
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

from benchmarks.machine import machine
from mlx_janus.decode.window import MEAN_ACCEPTED
from mlx_janus.evaluation.drawing import TASKS, drawing_prompts
from mlx_janus.inference.window_timing import find_window


@dataclass(frozen=True)
class Window:
    """The cost of images at a window."""

    width: int
    passes: float  # for each image, mean
    seconds: float  # for each image, median
    speedup: float  # over window 1, median of images
    unlike: int  # images whose tokens differ from window 1's


@click.command()
@click.option("-m", "--model", help="A folder or a Hub id.  [default: Janus-Tiny]")
@click.option(
    "--prompts",
    type=int,
    default=4,
    show_default=True,
    help="Prompts of each task of the shapes benchmark.",
)
@click.option(
    "--rounds", type=int, default=3, show_default=True, help="Repetitions with new noise."
)
def main(model: str | None, prompts: int, rounds: int) -> None:
    """Print tokens per pass and time per image at every window, compared with window 1."""
    janus = mlx_janus.load(model)
    texts = [wanted.prompt for task in TASKS for wanted in drawing_prompts(task, prompts, 0)]
    positions = janus.config.generation.tokens
    drawn = measure(janus, texts, rounds)
    click.echo(f"Machine: {machine()}")
    click.echo(f"{janus.name}, {len(texts) * rounds} images of {positions} tokens\n")
    click.echo("| window | tokens a pass | times as fast as window 1, median ", nl=False)
    click.echo("| seconds an image | unlike window 1 |\n|---|---|---|---|---|")
    for w in drawn:
        tokens = positions / w.passes
        click.echo(f"| {w.width} | {tokens:.2f} | {w.speedup:.2f} | {w.seconds:.3f} | {w.unlike} |")
    chosen = find_window(janus.model, 1 if janus.config.generation.cfg_weight == 1 else 2)
    click.echo(f"\nThe default window on this machine: {chosen}")


def measure(janus: mlx_janus.JanusPipeline, texts: Sequence[str], rounds: int) -> list[Window]:
    """Generate every prompt at every window, ``rounds`` times with new noise; window 1 is first."""
    widths = [width for width in MEAN_ACCEPTED if width < janus.config.generation.tokens]
    seconds: dict[int, list[float]] = {width: [] for width in widths}
    passes: dict[int, list[int]] = {width: [] for width in widths}
    unlike: dict[int, int] = dict.fromkeys(widths, 0)
    for width in widths:  # compile first
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
