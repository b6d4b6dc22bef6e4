"""``mlx-janus evaluate``: measure how good a model's answers and pictures are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..errors import JanusError
from .options import (
    Command,
    Group,
    check_output,
    import_mlx,
    load_model,
    model_options,
    say,
    stage_bars,
    version_option,
)


@click.group(cls=Group)
@version_option
def main() -> None:
    """Measure a model.

    \b
    Examples:
      mlx-janus evaluate shapes
      mlx-janus evaluate shapes --model runs/tiny/model --output scores.json
    """


@main.command(cls=Command)
@model_options
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, metavar="S")
@click.option(
    "--pictures", type=click.IntRange(1, 100_000), metavar="N", help="To ask about, each kind.  [default: 200]"
)
@click.option("--prompts", type=click.IntRange(1, 10_000), metavar="N", help="To draw, each task.  [default: 24]")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the scores as JSON, too.")
def shapes(
    seed: int,
    pictures: int | None,
    prompts: int | None,
    output: Path | None,
    **options: Any,
) -> None:
    """Coloured shapes, in combinations that Janus-Tiny's training never showed: existence after POPE, attributes,
    drawing after GenEval with and without guidance, and the image codec. Needs the extra "train".

    \b
    Examples:
      mlx-janus evaluate shapes --output scores.json
      mlx-janus evaluate shapes --model runs/tiny/model --bits 4
      mlx-janus evaluate shapes --pictures 20 --prompts 4
    """
    import importlib.util

    if importlib.util.find_spec("scipy") is None:
        raise JanusError("scipy is not installed: in the clone, run pip install -e '.[train]'")
    import_mlx()
    from ..evaluation.shapes import Sizes, measure, table

    if output:
        check_output(output)
    janus = load_model(options)
    sizes = Sizes(**{k: v for k, v in (("pictures", pictures), ("prompts", prompts)) if v})
    with stage_bars("picture") as progress:
        scores = measure(janus, sizes, seed=seed, progress=progress)
    for line in table(scores):
        click.echo(line)
    if output:
        output.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
        say(f"Wrote {output}.")
