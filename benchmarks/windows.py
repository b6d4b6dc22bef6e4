"""How many tokens a pass of the language model settles, and what that saves: ``python benchmarks/windows.py``.

Draws the same pictures at every window, one by one, in turns, and checks that their tokens are the same.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

import mlx_janus

# isort: split
import numpy as np

from benchmarks.real_size import machine
from mlx_janus.decode.window import SETTLED
from mlx_janus.evaluation.shapes import TASKS, drawing_prompts
from mlx_janus.tuning import find_window


@click.command()
@click.option("-m", "--model", help="A folder or a Hub id.  [default: Janus-Tiny]")
@click.option("--prompts", type=int, default=4, show_default=True, help="Of each drawing task of the shapes benchmark.")
@click.option("--rounds", type=int, default=3, show_default=True, help="Times that everything is drawn.")
def main(model: str | None, prompts: int, rounds: int) -> None:
    """Print tokens per pass and time per picture at every window, against window 1 in the same run."""
    janus = mlx_janus.load(model)
    texts = [wanted.prompt for task in TASKS for wanted in drawing_prompts(task, prompts, 0)]
    positions = janus.config.image_tokens
    widths = [width for width in SETTLED if width < positions]
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
    ratios = {w: np.median(np.array(seconds[1]) / np.array(seconds[w])) for w in widths}
    click.echo(f"Machine: {machine()}\n{janus.name}, {len(texts) * rounds} pictures of {positions} tokens\n")
    click.echo("| window | tokens a pass | times as quick as window 1, median | seconds a picture | unlike window 1 |")
    click.echo("|---|---|---|---|---|")
    for width in widths:
        each = positions / np.mean(passes[width])
        spent = np.median(seconds[width])
        click.echo(f"| {width} | {each:.2f} | {ratios[width]:.2f} | {spent:.3f} | {unlike[width]} |")
    chosen = find_window(janus.model, 1 if janus.config.drawing.cfg_weight == 1 else 2)
    click.echo(f"\nThe window that is chosen by default here: {chosen}")


if __name__ == "__main__":
    main()
