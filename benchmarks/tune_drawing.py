"""Find a model's guidance and temperature: ``python benchmarks/tune_drawing.py``.

Images are generated at every pair of values, for prompts of the shapes benchmark's tasks. The
prompts have combinations that training shows, and other noise than the benchmark. Prompts without
colours (a single shape, counts) are few, and equal the benchmark's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

import mlx_janus

# isort: split
from mlx_janus.evaluation.drawing import measure_drawing
from mlx_janus.evaluation.sizes import Sizes


@click.command()
@click.option("-m", "--model", help="A folder.  [default: Janus-Tiny]")
@click.option(
    "-g", "--guidance", type=float, multiple=True, default=(1.5, 3.0, 5.0), show_default=True
)
@click.option(
    "-t", "--temperature", type=float, multiple=True, default=(0.5, 0.8, 1.0), show_default=True
)
@click.option("--prompts", type=int, default=6, show_default=True, help="Prompts of each task.")
def main(
    model: str | None, guidance: tuple[float, ...], temperature: tuple[float, ...], prompts: int
) -> None:
    """Print the overall score of every pair of guidance and temperature."""
    janus = mlx_janus.load(model)
    click.echo("| guidance | temperature | overall | tasks |\n|---|---|---|---|")
    for weight in guidance:
        for t in temperature:
            sizes = Sizes(prompts=prompts, drawn=2)
            scores = measure_drawing(
                janus, sizes, 7, lambda *_: None, held_out=False, cfg_weight=weight, temperature=t
            )
            tasks = ", ".join(f"{share:.0%}" for task, share in scores.items() if task != "overall")
            click.echo(f"| {weight:g} | {t:g} | {scores['overall']:.1%} | {tasks} |")


if __name__ == "__main__":
    main()
