"""Options that several commands share: decorators, parameter types, and rules for combinations."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..config import BITS, DTYPES, RECIPES, ROLES
from ..limits import (
    ALL_TOKENS,
    MAX_CFG_WEIGHT,
    MAX_PENALTY,
    MAX_REFLECT,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_STEPS,
    MAX_TEMPERATURE,
    MAX_TOKENS,
    MAX_TOP_K,
    MIN_REPETITION_PENALTY,
    RANDOM_SEED,
)
from ..version import __version__
from .runner import Rule, be_quiet

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

STDIN = "-"  # an option's value that means: read from stdin
STDOUT = "-"  # the value of --output that means: write to stdout


class FiniteRange(click.FloatRange):
    """A range of numbers that excludes "nan" and "inf"."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert as ``FloatRange`` does, and refuse "nan" and "inf", which it accepts."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class SeedRange(click.IntRange):
    """The range of seeds. -1 is converted to None, which means a random seed."""

    name = "seed"

    def __init__(self) -> None:
        super().__init__(RANDOM_SEED, MAX_SEED)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert as ``IntRange`` does, and -1 to None."""
        number = super().convert(value, param, ctx)
        return None if number == RANDOM_SEED else number


def stack(*decorators: Callable[[Decorated], Decorated]) -> Callable[[Decorated], Decorated]:
    """Return one decorator that applies several, as if they stood above the function in order."""

    def apply_all(function: Decorated) -> Decorated:
        for decorator in reversed(decorators):  # the first one is applied last
            function = decorator(function)
        return function

    return apply_all


# Rules


def refuse_if(condition: Callable[[Mapping[str, Any]], object], reason: str) -> Rule:
    """Return a rule that refuses a command line if its options meet a condition.

    Args:
        condition: called with the values of the options, by name.
        reason: the message of the refusal.
    """

    def rule(ctx: click.Context) -> str | None:
        return reason if condition(ctx.params) else None

    return rule


def flag_needs(flag: str, needed_flag: str, fix: str) -> Rule:
    """Return a rule that refuses a flag, such as "--private", without the flag that it needs.

    Args:
        flag: the flag to refuse.
        needed_flag: the flag that it needs, such as "--upload".
        fix: advice, which ends the message.
    """
    name = _parameter_name(flag)
    needed_name = _parameter_name(needed_flag)
    reason = f"{flag} needs {needed_flag}: {fix}."
    return refuse_if(lambda values: values[name] and not values[needed_name], reason)


def _parameter_name(flag: str) -> str:
    """Return click's name of a flag's parameter: "--group-size" gives "group_size"."""
    return flag.removeprefix("--").replace("-", "_")


# Callbacks


def whole_number(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Convert an option's choice, which click gives as text, to an integer."""
    return None if value is None else int(value)


def _refuse_both(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Return the value of --bits or --recipe, and refuse both options together.

    click calls this function once for each of the two options. The second call finds the value of
    the first option in ``ctx.params``.

    Raises:
        click.UsageError: both options are given.
    """
    other = "recipe" if param.name == "bits" else "bits"
    if value and ctx.params.get(other):
        raise click.UsageError("--recipe does not go with --bits: give one of them.")
    return value


def _bits(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Convert the value of --bits to an integer, and refuse --bits together with --recipe."""
    return whole_number(ctx, param, _refuse_both(ctx, param, value))


def refuse_two_revisions(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Return the value of a model's name or of --revision, and refuse two different revisions.

    click calls this function once for the name, and once for --revision. The second call finds the
    value of the first in ``ctx.params``.

    Raises:
        click.UsageError: the name ends in a revision other than that of --revision.
    """
    from ..errors import CheckpointError
    from ..weights.addresses import split_revision

    values = {**ctx.params, param.name: value}
    name = values.get("model") or values.get("source")  # the source of ``convert``
    if isinstance(name, tuple):  # of ``serve``, which refuses --revision for several models
        name = name[0].rpartition("=")[2]  # without a given name
    revision = values.get("revision")
    if not name or not revision or Path(name).exists():  # a path has no revision in its name
        return value
    try:
        _, revision_in_name = split_revision(name)
    except CheckpointError:  # the command reports it
        return value
    if revision_in_name not in (None, revision):
        raise click.UsageError(
            f"the model's name says revision {revision_in_name!r} and --revision says "
            f"{revision!r}: give one of them."
        )
    return value


def _be_quiet(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Hide progress and notes if --quiet is given."""
    if wanted:
        be_quiet(ctx)


def check_image_sources(
    _: click.Context, __: click.Parameter, sources: tuple[str, ...]
) -> tuple[str, ...]:
    """Check the images that an option or argument names, and return them unchanged.

    click calls this function. Files, https and file:// addresses, and - for stdin are allowed.

    Raises:
        click.BadParameter: an image is an address of another kind.
    """
    for source in sources:
        match = re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source)
        if match is None:  # the path of a file, or - for stdin
            continue
        scheme = match[0]  # such as "http://"
        if scheme.lower() not in ("https://", "file://"):
            raise click.BadParameter(
                f"{scheme} is not read: give a file, or an address that begins with https://."
            )
    return sources


def complete_files(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete file names, for an option that is not of click's type ``Path``."""
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
    help="Quantize the language model to this many bits per weight, to save memory.  "
    "[default: the model's own precision]",
)

recipe_option = click.option(
    "--recipe",
    type=click.Choice(RECIPES),
    callback=_refuse_both,
    help="Quantize each layer by its own rule. light: the smallest model; balanced: slightly "
    "larger; faithful: closest to the float model; mxfp4, mxfp8, nvfp4: MLX's small float formats.",
)

roles_option = click.option(
    "--roles",
    type=click.Choice(list(ROLES)),
    help="Roles in prompts. pro: <|User|> and <|Assistant|>, as Janus-Pro was trained; plain: User "
    "and Assistant, as Janus-1.3B was.  [default: those that the model's files tell]",
)

vae_option = click.option(
    "--vae",
    metavar="SOURCE",
    shell_complete=complete_folders,
    help="JanusFlow's autoencoder: a folder or a Hub id in diffusers' layout. It becomes part of "
    "the converted model.  [default: stabilityai/sdxl-vae]",
)

quiet_option = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=_be_quiet,
    help="Print no progress and no notes on stderr, only errors.",
)

show_option = click.option(
    "--show/--no-show",
    default=None,
    help="Show images in the terminal while they are generated.  [default: if the terminal can]",
)

reasoning_options = stack(
    click.option(
        "--plan/--no-plan",
        default=None,
        help="Let the model write a plan of each image first, and draw by it, as T2I-R1 was "
        "trained to.  [default: if the model is T2I-R1]",
    ),
    click.option(
        "--reflect",
        type=click.IntRange(0, MAX_REFLECT),
        metavar="N",
        help="Let the model judge each image, and draw it again if it does not match the prompt, "
        "up to N times, as Janus-Pro-R1 was trained to.  [default: 0]",
    ),
)

version_option = click.version_option(
    __version__, "-V", "--version", message="mlx_janus %(version)s"
)

MODEL_HELP = (
    "Model to use: a converted folder, a PyTorch model folder, a Hub id such as "
    "deepseek-ai/Janus-Pro-1B, its page's address, or a short name: janus-1.3b, janus-pro-1b, "
    "janus-pro-7b, janus-4o-7b, janusflow-1.3b or tiny. A PyTorch model is converted once, "
    "into a cache."
)

loading_options = stack(
    bits_option,
    recipe_option,
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Float type to compute in.  [default: the model's own; float32 on a CPU]",
    ),
    click.option(
        "--revision",
        metavar="REV",
        callback=refuse_two_revisions,
        help="Branch, tag or commit of a model on the Hub; -m OWNER/NAME@REV does the same.",
    ),
    roles_option,
    vae_option,
)

weights_options = stack(
    click.option(
        "-m",
        "--model",
        metavar="MODEL",
        callback=refuse_two_revisions,
        shell_complete=complete_folders,
        help=f"{MODEL_HELP}  [default: Janus-Tiny, which is part of the package]",
    ),
    loading_options,
)

low_memory_option = click.option(
    "--low-memory",
    is_flag=True,
    help="Keep one part of the model in memory at a time, and read the others when needed.",
)

model_options = stack(weights_options, low_memory_option)

system_option = click.option(
    "--system",
    metavar="TEXT",
    help='System prompt for answers; "" for none.  [default: the model\'s own]',
)

SETTINGS: dict[str, click.ParamType] = {
    "temperature": FiniteRange(0, MAX_TEMPERATURE),
    "top_p": FiniteRange(0, 1),
    "top_k": click.IntRange(ALL_TOKENS, MAX_TOP_K),
    "min_p": FiniteRange(0, 1),
    "frequency_penalty": FiniteRange(-MAX_PENALTY, MAX_PENALTY),
    "presence_penalty": FiniteRange(-MAX_PENALTY, MAX_PENALTY),
    "repetition_penalty": FiniteRange(MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
    "max_tokens": click.IntRange(1, MAX_TOKENS),
    "cfg_weight": FiniteRange(0, MAX_CFG_WEIGHT),
    "steps": click.IntRange(1, MAX_STEPS),
    "cfg_weight2": FiniteRange(0, MAX_CFG_WEIGHT),
    "seed": SeedRange(),
}
"""Settings of a chat, with their allowed values. The options of the same names share them."""

cfg_weight_option = click.option(
    "--cfg-weight",
    type=SETTINGS["cfg_weight"],
    metavar="W",
    help="Guidance: how strictly images follow the prompt; 1: no guidance.  "
    "[default: the model's own, 5 for Janus and to change images, 2 for JanusFlow]",
)

steps_option = click.option(
    "--steps",
    type=SETTINGS["steps"],
    metavar="N",
    help="Steps from noise to an image, for a model that draws by a rectified flow: more are "
    "slower and finer.  [default: the model's own, 30 for JanusFlow]",
)

sampling_options = stack(
    click.option(
        "--temperature",
        type=SETTINGS["temperature"],
        metavar="T",
        help="Sampling temperature: higher values give more varied results; 0: no randomness.  "
        "[default: 0 for answers, the model's own for images]",
    ),
    click.option(
        "--top-p",
        type=SETTINGS["top_p"],
        default=1.0,
        show_default=True,
        metavar="P",
        help="Nucleus sampling: sample from the likeliest tokens with this total probability; 0, "
        "only for answers: no randomness.",
    ),
    click.option(
        "--seed",
        type=SETTINGS["seed"],
        metavar="S",
        help="Random seed: the same seed gives the same result; -1: a random one.  "
        "[default: random]",
    ),
)

penalty_options = stack(
    click.option(
        "--top-k",
        type=SETTINGS["top_k"],
        metavar="K",
        help="Sample an answer from this number of the likeliest tokens; 0: from all.  "
        "[default: 0]",
    ),
    click.option(
        "--min-p",
        type=SETTINGS["min_p"],
        metavar="P",
        help="Sample an answer from the tokens that are at least this share as likely as the "
        "likeliest; 0: from all.  [default: 0]",
    ),
    click.option(
        "--frequency-penalty",
        type=SETTINGS["frequency_penalty"],
        metavar="F",
        help="Make a token less likely, -2 to 2, for each time that the answer has it.  "
        "[default: 0]",
    ),
    click.option(
        "--presence-penalty",
        type=SETTINGS["presence_penalty"],
        metavar="F",
        help="Make all tokens that the answer has less likely, -2 to 2.  [default: 0]",
    ),
    click.option(
        "--repetition-penalty",
        type=SETTINGS["repetition_penalty"],
        metavar="F",
        help="Make all tokens that the question or the answer has less likely; 1: no penalty.  "
        "[default: 1]",
    ),
)

answering_options = stack(
    click.option(
        "--max-tokens",
        type=SETTINGS["max_tokens"],
        metavar="N",
        help="Maximum number of tokens in an answer.  [default: 512]",
    ),
    system_option,
    penalty_options,
)
