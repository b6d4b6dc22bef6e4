"""Options that commands share: decorators, parameter types, and rules on how options combine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..config import BITS, DTYPES, RECIPES
from ..limits import MAX_CFG_WEIGHT, MAX_SEED, MAX_TEMPERATURE, MAX_TOKENS
from ..version import __version__
from .runner import Rule, be_quiet

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

STDIN = "-"  # the value of an option that reads stdin


class FiniteRange(click.FloatRange):
    """A range of numbers without "nan" and "inf"."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def stack(*decorators: Callable[[Decorated], Decorated]) -> Callable[[Decorated], Decorated]:
    """Return several decorators as one, the first outermost."""

    def apply(function: Decorated) -> Decorated:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


# Rules


def refuse_if(broken: Callable[[Mapping[str, Any]], object], reason: str) -> Rule:
    """Return a rule that gives a reason if ``broken`` is true of the options' values."""

    def rule(ctx: click.Context) -> str | None:
        return reason if broken(ctx.params) else None

    return rule


def goes_with(flag: str, other: str, fix: str) -> Rule:
    """Return the rule that one option needs another; both are flags, such as "--bits"."""
    name = _parameter(flag)
    needed = _parameter(other)
    reason = f"{flag} goes with {other}: {fix}."
    return refuse_if(lambda values: values[name] and not values[needed], reason)


def _parameter(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


# Callbacks


def whole_number(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Return the choice of an option as an integer; click's choices are text."""
    return None if value is None else int(value)


def _refuse_both(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuse --bits and --recipe together: both say how to quantize."""
    if value and any(ctx.params.get(name) for name in ("bits", "recipe") if name != param.name):
        raise click.UsageError("--recipe does not go with --bits: give one of them.")
    return value


def _bits(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    return whole_number(ctx, param, _refuse_both(ctx, param, value))


def _be_quiet(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        be_quiet(ctx)


def complete_files(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete file names, without the checks that click's own ``Path`` adds."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def complete_folders(
    _: click.Context, __: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Let the shell complete folder names."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="dir")]


# Options


bits_option = click.option(
    "--bits",
    type=click.Choice([str(bits) for bits in BITS]),
    callback=_bits,
    help="Quantize the language model to this many bits.  [default: as it is]",
)

recipe_option = click.option(
    "--recipe",
    type=click.Choice(RECIPES),
    callback=_refuse_both,
    help="Quantize layer by layer: light is the smallest, balanced little larger, faithful closest to the float "
    "model; the others are MLX's small floats.",
)

quiet_option = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=_be_quiet,
    help="No progress and no notes on stderr; errors stay.",
)

show_option = click.option(
    "--show/--no-show",
    default=None,
    help="Show pictures in the terminal as they form.  [default: where it can, with colours]",
)

version_option = click.version_option(
    __version__, "-V", "--version", message="mlx_janus %(version)s"
)

weights_options = stack(
    click.option(
        "-m",
        "--model",
        metavar="MODEL",
        shell_complete=complete_folders,
        help="Converted folder, PyTorch model folder, Hub id such as deepseek-ai/Janus-Pro-1B, or janus-1.3b, "
        "janus-pro-1b, janus-pro-7b or tiny for short; PyTorch models are converted once, into a cache.  "
        "[default: Janus-Tiny, which is in the package]",
    ),
    bits_option,
    recipe_option,
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Type to compute in.  [default: the model's own; float32 on a CPU]",
    ),
    click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub."),
)

model_options = stack(
    weights_options,
    click.option(
        "--low-memory",
        is_flag=True,
        help="Hold one part of the model at a time, and read the others again when they are needed.",
    ),
)

SETTINGS: dict[str, click.ParamType] = {
    "temperature": FiniteRange(0, MAX_TEMPERATURE),
    "top_p": FiniteRange(0, 1, min_open=True),
    "max_tokens": click.IntRange(1, MAX_TOKENS),
    "cfg_weight": FiniteRange(0, MAX_CFG_WEIGHT),
    "seed": click.IntRange(0, MAX_SEED),
}
"""Settings of a chat, with the values that each takes; options of these names take the same."""

sampling_options = stack(
    click.option(
        "--temperature",
        type=SETTINGS["temperature"],
        metavar="T",
        help="How much chance there is; 0: none.  [default: 0 to answer, the model's own to draw]",
    ),
    click.option(
        "--top-p",
        type=SETTINGS["top_p"],
        default=1.0,
        show_default=True,
        metavar="P",
        help="Choose among the likeliest tokens that hold this much probability.",
    ),
    click.option(
        "--seed", type=SETTINGS["seed"], metavar="S", help="Repeat a result.  [default: random]"
    ),
)

answering_options = stack(
    click.option(
        "--max-tokens",
        type=SETTINGS["max_tokens"],
        metavar="N",
        help="Longest answer.  [default: 512]",
    ),
    click.option(
        "--system",
        metavar="TEXT",
        help='System prompt of answers; "" for none.  [default: the model\'s own]',
    ),
)
