"""``mlx-janus train``: train Janus-Tiny, the model inside the package, from nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import version_option
from .progress import progress_bar
from .runner import Command, Group, import_mlx, require_train_extra, say

if TYPE_CHECKING:
    from ..training.tiny.recipe import TinyRecipe


@click.group(cls=Group)
@version_option
def main() -> None:
    """Train a model.

    \b
    Examples:
      mlx-janus train tiny --output runs/tiny
      mlx-janus train tiny --output runs/other --seed 1
    """


@main.command(cls=Command)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Where to train.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, metavar="S"
)
@click.option(
    "--codec-steps", type=click.IntRange(1, 10**6), metavar="N", help="Of the image codec."
)
@click.option(
    "--merged-steps",
    type=click.IntRange(1, 10**6),
    metavar="N",
    help="Of the codec with merged codes.",
)
@click.option(
    "--encoder-steps",
    type=click.IntRange(1, 10**6),
    metavar="N",
    help="Of the vision encoder alone.",
)
@click.option(
    "--drawing-steps",
    type=click.IntRange(1, 10**6),
    metavar="N",
    help="Of the model on captions alone.",
)
@click.option(
    "--joint-steps", type=click.IntRange(1, 10**6), metavar="N", help="Of the whole model."
)
@click.option(
    "--places-steps",
    type=click.IntRange(1, 10**6),
    metavar="N",
    help="Of the whole model, on places.",
)
@click.option(
    "--checkpoint-every",
    type=click.FloatRange(0),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
)
@click.option(
    "--processes",
    type=click.IntRange(1, 2),
    metavar="N",
    help="1 or 2.  [default: 2 on a CPU with several cores, else 1]",
)
@click.option("--beside", is_flag=True, hidden=True, help="This is one of two processes.")
@click.pass_context
def tiny(
    context: click.Context,
    /,
    output: Path,
    seed: int,
    checkpoint_every: float,
    processes: int | None,
    beside: bool,
    **steps: int | None,
) -> None:
    """Train Janus-Tiny on the shapes world, in six stages, into DIR/model.

    Pictures and words are made on the fly from the seed. Run the same command again after a kill, a Ctrl-C or a full
    disk: it goes on from the last checkpoint to the same result. DIR also gets log.jsonl and losses.png. Needs the
    extra "train".

    \b
    Examples:
      mlx-janus train tiny --output runs/tiny
      mlx-janus train tiny --output runs/try --codec-steps 50 --merged-steps 50 \\
        --encoder-steps 50 --drawing-steps 50 --joint-steps 50 --places-steps 50
    """
    require_train_extra("scipy", "matplotlib", "filelock")
    import_mlx()
    import mlx.core as mx

    from ..training.loop import LOG_FILE
    from ..training.tiny.plot import plot_log
    from ..training.tiny.train import MODEL_FOLDER, train_tiny
    from ..training.two_processes import COUNT, end_with_parent, run_side_by_side, two_are_faster

    recipe = _recipe(seed, steps)
    output.mkdir(parents=True, exist_ok=True)
    if beside:
        end_with_parent()
    elif processes == COUNT or (processes is None and two_are_faster()):
        run_side_by_side(
            [sys.executable, "-m", "mlx_janus", "train", "tiny", *_spelt_out(context), "--beside"]
        )
        return
    with _StepBar() as bar:
        train_tiny(output, recipe, every=checkpoint_every, report=bar.report)
    if mx.distributed.init().rank():
        return
    plot_log(output / LOG_FILE, output / "losses.png")
    click.echo(str(output / MODEL_FOLDER))
    say(f"Try it: mlx-janus evaluate shapes --model {output / MODEL_FOLDER}")


def _recipe(seed: int, steps: Mapping[str, int | None]) -> TinyRecipe:
    """Return Janus-Tiny's recipe with other numbers of steps: ``codec_steps`` and the like, None for its own."""
    from ..training.tiny.recipe import TinyRecipe

    recipe = TinyRecipe(seed=seed)
    for name, count in steps.items():
        if count is not None:
            stage = name.removesuffix("_steps")
            recipe = replace(recipe, **{stage: replace(getattr(recipe, stage), steps=count)})
    codec = recipe.codec
    if codec.unquantized_steps >= codec.steps:
        recipe = replace(recipe, codec=replace(codec, unquantized_steps=codec.steps // 2))
    return recipe


def _spelt_out(context: click.Context) -> list[str]:
    """The options of this call, as words of a command."""
    given = (
        (option.opts[0], context.params[str(option.name)]) for option in context.command.params
    )
    return [
        word for name, value in given if value not in (None, False) for word in (name, str(value))
    ]


class _StepBar:
    """A bar of steps on stderr, a line for each stage, with what the step measured."""

    def __init__(self) -> None:
        self.stage = ""
        self.bar: Any = None

    def __enter__(self) -> _StepBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def report(self, stage: str, done: int, total: int, measured: dict[str, float]) -> None:
        if stage != self.stage:
            self.__exit__()
            self.stage, self.bar = stage, progress_bar(stage, "step", total)
            self.bar.update(done - 1)
            self.bar.unpause()
        shown = {key: f"{value:.3g}" for key, value in measured.items() if key != "norm"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)
