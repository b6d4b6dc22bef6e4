"""``mlx-janus train``: train Janus-Tiny, the model in the package, from random weights."""

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
    help="Folder for checkpoints, the log and the trained model.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=0,
    show_default=True,
    metavar="S",
    help="Seed of the first weights and the training data.",
)
@click.option(
    "--codec-steps",
    type=click.IntRange(1, 10**6),
    metavar="N",
    help="Training steps of the image codec.",
)
@click.option(
    "--merged-steps",
    type=click.IntRange(1, 10**6),
    metavar="N",
    help="Training steps of the codec with merged codes.",
)
@click.option(
    "--encoder-steps",
    type=click.IntRange(1, 10**6),
    metavar="N",
    help="Training steps of only the vision encoder.",
)
@click.option(
    "--drawing-steps",
    type=click.IntRange(1, 10**6),
    metavar="N",
    help="Training steps of the model on captions only.",
)
@click.option(
    "--joint-steps",
    type=click.IntRange(1, 10**6),
    metavar="N",
    help="Training steps of the complete model.",
)
@click.option(
    "--places-steps",
    type=click.IntRange(1, 10**6),
    metavar="N",
    help="Training steps of the complete model on questions about places.",
)
@click.option(
    "--checkpoint-every",
    type=click.FloatRange(0),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two checkpoints.",
)
@click.option(
    "--processes",
    type=click.IntRange(1, 2),
    metavar="N",
    help="Number of training processes.  [default: 2 on a CPU with several cores, otherwise 1]",
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
    """Train Janus-Tiny on images of coloured shapes, in six stages, into DIR/model.

    Images and texts are generated from the seed during training. To resume after a kill, a Ctrl-C
    or a full disk, run the same command again: it continues from the last checkpoint, and the
    result is the same. DIR also gets log.jsonl and losses.png. Needs the extra "train".

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
    from ..training.two_processes import end_with_parent, run_side_by_side, two_are_faster

    recipe = _recipe(seed, steps)
    output.mkdir(parents=True, exist_ok=True)
    # To train in two processes, this process runs its own command twice more, with --beside, and
    # waits. A process with --beside trains, and starts no others.
    if beside:
        end_with_parent()
    elif processes == 2 or (processes is None and two_are_faster()):
        command = [sys.executable, "-m", "mlx_janus", "train", "tiny"]
        run_side_by_side([*command, *_option_words(context), "--beside"])
        return
    with _StepBar() as bar:
        train_tiny(output, recipe, every=checkpoint_every, report=bar.report)
    if mx.distributed.init().rank() > 0:  # this is the second process; only the first one reports
        return
    plot_log(output / LOG_FILE, output / "losses.png")
    click.echo(str(output / MODEL_FOLDER))
    say(f"Try it: mlx-janus evaluate shapes --model {output / MODEL_FOLDER}")


def _recipe(seed: int, steps: Mapping[str, int | None]) -> TinyRecipe:
    """Return Janus-Tiny's training recipe, with the numbers of steps from the command line.

    Args:
        seed: seed of the training.
        steps: number of steps by option, such as ``codec_steps``; None keeps the recipe's number.
    """
    from ..training.tiny.recipe import TinyRecipe

    recipe = TinyRecipe(seed=seed)
    for name, count in steps.items():
        if count is not None:
            stage = name.removesuffix("_steps")
            changed = replace(getattr(recipe, stage), steps=count)
            recipe = replace(recipe, **{stage: changed})
    # Without this, a short training of the codec would end before its first quantized step.
    codec = recipe.codec
    if codec.unquantized_steps >= codec.steps:
        recipe = replace(recipe, codec=replace(codec, unquantized_steps=codec.steps // 2))
    return recipe


def _option_words(context: click.Context) -> list[str]:
    """Return the options of this command as words of a command line, to run the command again.

    Options without a value (None) are left out, and so is the only flag, --beside, which is off.
    """
    words = []
    for option in context.command.params:
        value = context.params[str(option.name)]
        if value is not None and value is not False:  # 0 is a value
            name = option.opts[0]  # such as --seed
            words += [name, str(value)]
    return words


class _StepBar:
    """A progress bar for each stage of the training, with the measurements of the last step."""

    def __init__(self) -> None:
        self.stage = ""
        self.bar: Any = None

    def __enter__(self) -> _StepBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def report(self, stage: str, done: int, total: int, measured: dict[str, float]) -> None:
        """Show that step ``done`` of a stage has ended, with its measurements, such as losses.

        A new stage gets a new bar. If an earlier run was interrupted in the stage, the bar begins
        with the steps of that run.
        """
        if stage != self.stage:
            self.__exit__()  # closes the last stage's bar
            self.stage = stage
            self.bar = progress_bar(stage, "step", total)
            self.bar.update(done - 1)  # steps of an earlier run
            self.bar.unpause()  # measure the speed from now on
        # The gradient's norm ("norm") is only written to the log.
        shown = {key: f"{value:.3g}" for key, value in measured.items() if key != "norm"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)
