"""``mlx-janus evaluate``: measure how good a model's answers and pictures are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..errors import JanusError
from .arguments import LoadArguments, load_pipeline
from .options import model_options, version_option
from .outputs import check_writable
from .progress import stage_bars
from .runner import Command, Group, import_mlx, require_train_extra, say


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
    require_train_extra("scipy")
    import_mlx()
    from ..evaluation.shapes import Sizes, measure

    if output:
        check_writable(output)
    janus = load_pipeline(LoadArguments.of(options))
    if janus.config.image_size != 64:
        raise JanusError(
            f"{janus.name} draws {janus.config.image_size} pixels a side; this benchmark's pictures have 64"
        )
    given = {name: count for name, count in (("pictures", pictures), ("prompts", prompts)) if count}
    sizes = Sizes(**given)
    with stage_bars("picture") as progress:
        scores = measure(janus, sizes, seed=seed, progress=progress)
    for line in table(scores):
        click.echo(line)
    if output:
        output.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
        say(f"Wrote {output}.")


def table(scores: Mapping[str, Any]) -> list[str]:
    """Return the scores as Markdown tables."""
    lines = ["| existence | accuracy | F1 | yes-rate |", "|---|---|---|---|"]
    for kind, answers in scores["existence"].items():
        lines.append(f"| {kind} | {answers['accuracy']:.1%} | {answers['f1']:.1%} | {answers['yes_rate']:.1%} |")
    lines += ["", "| attributes | right |", "|---|---|"]
    lines += [f"| {about} | {share:.1%} |" for about, share in scores["attributes"].items()]
    mean = sum(scores["attributes"].values()) / len(scores["attributes"])
    lines += [f"| mean | {mean:.1%} |", ""]
    lines += [f"| drawing | guidance {scores['guidance']:g} | none |", "|---|---|---|"]
    for task, share in scores["drawing"].items():
        lines.append(f"| {task} | {share:.1%} | {scores['drawing_unguided'][task]:.1%} |")
    codec = scores["codec"]
    lines += ["", "| codec | |", "|---|---|", f"| PSNR | {codec['psnr']:.1f} dB |"]
    lines.append(f"| the judge is right on pictures | {codec['judge_right_before']:.1%} |")
    lines.append(f"| the judge is right on reconstructions | {codec['judge_right_after']:.1%} |")
    return lines
