"""``mlx-janus evaluate``: measure the quality of a model's answers and images."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import click

from .arguments import LoadArguments, load_pipeline
from .options import STDOUT, model_options, version_option
from .outputs import check_writable, output_file
from .progress import stage_bars
from .runner import Command, Group, import_mlx, require_train_extra, say


@click.group(cls=Group)
@version_option
def main() -> None:
    """Measure the quality of a model.

    \b
    Examples:
      mlx-janus evaluate shapes
      mlx-janus evaluate shapes --model runs/tiny/model --output scores.json
    """


@main.command(cls=Command)
@model_options
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=0,
    show_default=True,
    metavar="S",
    help="Seed of the test images, the questions and the drawings.",
)
@click.option(
    "--pictures",
    type=click.IntRange(1, 100_000),
    metavar="N",
    help="Number of images for each kind of question.  [default: 200]",
)
@click.option(
    "--prompts",
    type=click.IntRange(1, 10_000),
    metavar="N",
    help="Number of prompts for each drawing task.  [default: 24]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    metavar="FILE",
    help="Also write the scores to this file, as JSON. -: print only the JSON, to stdout.",
)
def shapes(
    seed: int,
    pictures: int | None,
    prompts: int | None,
    output: str | None,
    **options: Any,
) -> None:
    """Measure a model on images of coloured shapes.

    The test images have combinations of shapes that Janus-Tiny's training excludes. The scores are:
    questions on existence (after POPE) and on attributes, generated images (after GenEval) with and
    without guidance, and the image codec. Needs the extra "train".

    \b
    Examples:
      mlx-janus evaluate shapes --output scores.json
      mlx-janus evaluate shapes --model runs/tiny/model --bits 4
      mlx-janus evaluate shapes --pictures 20 --prompts 4
    """
    require_train_extra("scipy")
    import_mlx()
    from ..evaluation.shapes import measure, table
    from ..evaluation.sizes import Sizes

    file = None
    if output is not None and output != STDOUT:
        file = output_file(output, "scores.json")
        check_writable(file)  # fail now, not after the measurement
    janus = load_pipeline(LoadArguments.from_options(options))
    sizes = Sizes()  # default numbers of test images and prompts
    if pictures is not None:
        sizes = replace(sizes, pictures=pictures)
    if prompts is not None:
        sizes = replace(sizes, prompts=prompts)
    with stage_bars("image") as progress:
        scores = measure(janus, sizes, seed=seed, progress=progress)
    text = json.dumps(scores, indent=2)
    if output == STDOUT:
        click.echo(text)
        return
    for line in table(scores):
        click.echo(line)
    if file:
        file.write_text(f"{text}\n", encoding="utf-8")
        say(f"Wrote {file}.")
