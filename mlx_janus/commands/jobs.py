"""The jobs of ``generate``, made from click's values: a question to answer, or images to draw."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import click
from click.core import ParameterSource

from ..limits import MAX_SEED
from .arguments import ImageArguments, LoadArguments, TextArguments
from .image_folder import DEFAULT_TEMPLATE
from .options import STDIN, STDOUT, flag_needs, refuse_if
from .runner import Rule

# Parameters of options that are refused with a question.
_DRAWING_ONLY = (
    "prompts_file",
    "same_seeds",
    "name",
    "config_from",
    "output",
    "n",
    "cfg_weight",
    "exact",
    "window",
    "upscale",
    "show",
    "preview_dir",
    "preview_every",
)
# Parameters of options that are refused with a drawing.
_ASKING_ONLY = (
    "max_tokens",
    "system",
    "lookup",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)
# Options whose values --config-from takes from the image, unless the command line gives them.
_STORED_OPTIONS = ("seed", "cfg_weight", "temperature", "top_p", "upscale")


@dataclass(frozen=True)
class AskJob:
    """A question to answer on stdout, with or without images."""

    load: LoadArguments
    prompt: str
    images: tuple[str, ...]  # files, https addresses, or "-" for stdin
    arguments: TextArguments
    as_json: bool


@dataclass(frozen=True)
class Previews:
    """Where and how often unfinished images are saved."""

    folder: Path
    every: int | None  # image tokens between two previews; None: one row


@dataclass(frozen=True)
class Origin:
    """The image that --config-from draws again: its file, settings and model."""

    file: str
    prompt: str
    seed: int
    cfg_weight: float
    temperature: float
    top_p: float
    upscale: int
    model: str  # the model's name
    dtype: str | None  # None: drawn by an earlier release, which did not store it
    bits: int | None  # None: float weights, or a recipe
    recipe: str | None
    roles: str | None = None  # None: the model's own


@dataclass(frozen=True)
class DrawJob:
    """Images to draw: of one prompt into files, or of several prompts into a folder."""

    load: LoadArguments
    fallback: LoadArguments | None  # tried if the model's quantization contradicts ``load``
    prompts: tuple[str, ...]  # which may repeat in a folder
    n: int  # images of each prompt
    arguments: ImageArguments
    output: Path | None  # None: the default
    into_folder: bool  # numbered files in a folder; those that exist are skipped
    upscale: int
    show: bool | None  # previews in the terminal; None: if it can show them
    as_json: bool
    previews: Previews | None
    origin: Origin | None
    makes_folder: bool = False  # whether to make the folder of ``output``, the file of one prompt
    to_stdout: bool = False  # write the image to stdout; ``output`` is None
    template: str = DEFAULT_TEMPLATE  # names of the images in a folder
    same_seeds: bool = False  # whether all prompts of a folder start from one seed


def asks(values: Mapping[str, Any]) -> bool:
    """Return whether the options of ``generate`` ask a question; otherwise they draw."""
    return bool(values["images"]) or values["text"]


# Rules for combinations of options


def _refuse_mixed_options(ctx: click.Context) -> str | None:
    """Refuse drawing options in a command that answers, and answering options in one that draws.

    Returns:
        The message of the refusal; None if nothing is refused.
    """
    asking = asks(ctx.params)
    unsuitable = _DRAWING_ONLY if asking else _ASKING_ONLY
    for name in unsuitable:
        is_default = ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE
        is_no_show = ctx.params[name] is False  # which scripts may always pass
        if is_default or is_no_show:
            continue
        flag = f"--{name.replace('_', '-')}"
        if asking:
            return f"{flag} does not go with answering: leave --image and --text out to draw."
        return f"{flag} does not go with drawing: add --image FILE or --text to ask."
    return None


def _count_stdin_readers(values: Mapping[str, Any]) -> int:
    """Count the prompts, images and prompt files that are read from stdin."""
    count = [*values["prompts"], *values["images"]].count(STDIN)
    file = values["prompts_file"]  # an open file; None: not given
    # stdin has the name "<stdin>", or no name if Python code has replaced ``sys.stdin``.
    if file is not None and getattr(file, "name", "<stdin>") == "<stdin>":
        count += 1
    return count


def _many_prompts(values: Mapping[str, Any]) -> bool:
    return bool(values["prompts_file"]) or len(values["prompts"]) > 1


def _to_stdout(values: Mapping[str, Any]) -> bool:
    return bool(values["output"] == STDOUT)


def _last_seed(values: Mapping[str, Any]) -> int:
    """Return the seed of a prompt's last image. Without --seed, the seeds are counted from 0."""
    return (values["seed"] or 0) + (values["n"] or 1) - 1


RULES: tuple[Rule, ...] = (
    _refuse_mixed_options,
    refuse_if(
        lambda values: asks(values) and len(values["prompts"]) > 1,
        "one question at a time: give --prompt once.",
    ),
    refuse_if(
        lambda values: not (values["prompts"] or values["prompts_file"] or values["config_from"]),
        "Missing option '-p' / '--prompt'.",
    ),
    refuse_if(
        lambda values: _count_stdin_readers(values) > 1,
        "stdin can be read once: give - to only one option.",
    ),
    refuse_if(
        lambda values: _last_seed(values) > MAX_SEED,
        f"the last image's seed would be above {MAX_SEED}: take a smaller --seed.",
    ),
    refuse_if(
        lambda values: values["top_p"] == 0 and not asks(values),
        "--top-p 0 does not go with drawing: take --temperature 0, or a larger number.",
    ),
    refuse_if(lambda values: "" in values["images"], "--image is empty: name an image."),
    refuse_if(
        lambda values: _to_stdout(values) and (_many_prompts(values) or (values["n"] or 1) > 1),
        "--output - writes one image: name a file or a folder for several.",
    ),
    refuse_if(
        lambda values: _to_stdout(values) and (values["as_json"] or values["show"]),
        "--output - writes only the image to stdout: leave --json and --show out.",
    ),
    refuse_if(
        lambda values: _to_stdout(values) and (sys.stdout is None or sys.stdout.isatty()),
        "--output - needs a stdout that is a file or a pipe: add > image.png.",
    ),
    refuse_if(
        lambda values: (values["name"] or values["same_seeds"]) and not _many_prompts(values),
        "--name and --same-seeds are for several prompts: add --prompts-file FILE.",
    ),
    flag_needs("--preview-every", "--preview-dir", "name a folder"),
    refuse_if(
        lambda values: values["preview_dir"] and _many_prompts(values),
        "--preview-dir needs exactly one prompt: leave one of them out.",
    ),
)
"""The rules of ``generate``, checked in this order before ``read_job``."""


# From values to jobs


def read_job(ctx: click.Context) -> AskJob | DrawJob:
    """Return the job of a command line. Read its prompts, and the image of --config-from.

    Raises:
        PromptError: stdin has no prompt, or is not text.
        ImageError: the image of --config-from cannot be read, or does not store its settings.
        click.UsageError: the file of prompts has no prompt, or is not text.
    """
    from .inputs import read_prompt

    values = ctx.params
    prompts = tuple(read_prompt() if prompt == STDIN else prompt for prompt in values["prompts"])
    if not asks(values):
        return _draw_job(ctx, prompts)
    return AskJob(
        load=LoadArguments.from_options(values),
        prompt=prompts[0],  # ``RULES`` allow exactly one
        images=values["images"],
        arguments=TextArguments.from_options(values),
        as_json=values["as_json"],
    )


def _draw_job(ctx: click.Context, prompts: tuple[str, ...]) -> DrawJob:
    """Return the job to draw the prompts of --prompt and those of --prompts-file.

    If neither option is given, the prompt is the one stored in the image of --config-from.

    Args:
        ctx: click's context.
        prompts: the prompts of --prompt.
    """
    values = ctx.params
    load = LoadArguments.from_options(values)
    fallback = None
    origin = None
    if values["config_from"]:
        origin = _read_origin(values["config_from"])
        load, fallback = _with_settings_of(origin, load)
        values = values | _stored_values(origin, ctx)
    file = values["prompts_file"]
    if file:
        prompts += _read_prompt_lines(file)
    elif not prompts and origin is not None:
        prompts = (origin.prompt,)
    into_folder = file is not None or len(prompts) > 1
    output, makes_folder = _read_output(values["output"], into_folder)
    return DrawJob(
        load=load,
        fallback=fallback,
        prompts=prompts,
        n=values["n"] or 1,
        arguments=ImageArguments.from_options(values),
        output=output,
        into_folder=into_folder,
        upscale=values["upscale"],
        show=values["show"],
        as_json=values["as_json"],
        previews=_previews(values),
        origin=origin,
        makes_folder=makes_folder,
        to_stdout=_to_stdout(values),
        template=values["name"] or DEFAULT_TEMPLATE,
        same_seeds=values["same_seeds"],
    )


def _read_output(value: str | None, into_folder: bool) -> tuple[Path | None, bool]:
    """Return the path that --output names, and whether its folder has to be made.

    Args:
        value: the value of --output; None: not given.
        into_folder: whether several prompts are drawn, for which the path is a folder.

    Returns:
        ``path``: a folder for several prompts, or a file for one. If the value names a folder for
        one prompt, the file is janus.png in it. None: --output is not given or is stdout.
        ``makes_folder``: whether to make the folder of the file janus.png.

    Raises:
        ImageError: the value is a file:// address that is no file of this machine.
    """
    from ..processing.file_names import local_path, names_folder

    if value is None or value == STDOUT:
        return None, False
    name = local_path(value)
    is_folder = name != "" and names_folder(name)
    if is_folder and not into_folder:
        return Path(name) / "janus.png", True
    return Path(name), False


def _previews(values: Mapping[str, Any]) -> Previews | None:
    folder = values["preview_dir"]
    return None if folder is None else Previews(folder, values["preview_every"])


def _read_origin(file: str) -> Origin:
    from ..inference.results import read_settings

    return Origin(file=file, **read_settings(file))


def _stored_values(origin: Origin, ctx: click.Context) -> dict[str, Any]:
    """Return the values stored in ``origin`` for options that the command line does not give.

    Args:
        origin: the image of --config-from.
        ctx: click's context, which knows the options on the command line.
    """
    values = {}
    for name in _STORED_OPTIONS:
        if ctx.get_parameter_source(name) is ParameterSource.DEFAULT:
            values[name] = getattr(origin, name)
    return values


def _with_settings_of(
    origin: Origin, load: LoadArguments
) -> tuple[LoadArguments, LoadArguments | None]:
    """Complete ``load`` so that the model has the precision and roles of ``origin``.

    Options of the command line take precedence.

    Returns:
        The completed arguments, and a fallback without the origin's quantization, for a model that
        is already quantized in another way. The fallback is None with --bits or --recipe, so that
        the user sees the error about such a model.
    """
    load = replace(load, dtype=load.dtype or origin.dtype, roles=load.roles or origin.roles)
    if load.bits or load.recipe:
        return load, None
    return replace(load, bits=origin.bits, recipe=origin.recipe), load


def _read_prompt_lines(file: TextIO) -> tuple[str, ...]:
    """Return the prompts of a file, which has one on each line.

    Empty lines and comments, which begin with "#", are ignored.

    Raises:
        click.UsageError: the file has no prompt, or is not UTF-8.
    """
    try:
        lines = [line.strip() for line in file]
    except UnicodeDecodeError:
        raise click.UsageError(f"{file.name} is not UTF-8 text: save it as UTF-8.") from None
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise click.UsageError(f"{file.name} holds no prompt: write one prompt per line.")
    return prompts
