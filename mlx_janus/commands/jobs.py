"""The jobs of ``generate``, made from click's values: a question to answer, or images to draw.

Changing images is drawing with images as a part of the prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import click
from click.core import ParameterSource

from ..limits import MAX_SEED
from .arguments import EditArguments, ImageArguments, LoadArguments, TextArguments
from .best_of import BEST_OF_RULES
from .editing import require_inputs
from .image_folder import DEFAULT_TEMPLATE
from .options import STDIN, STDOUT, flag_needs, refuse_if
from .origin import Origin, read_origin
from .runner import Rule

# Parameters of options that are refused with a question.
_DRAWING_ONLY = (
    "prompts_file",
    "same_seeds",
    "name",
    "config_from",
    "output",
    "n",
    "best_of",
    "keep_all",
    "cfg_weight",
    "cfg_weight2",
    "crop",
    "plan",
    "reflect",
    "exact",
    "window",
    "steps",
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
    "schema",
)
# Parameters of options that are refused with a drawing that changes no images.
_EDITING_ONLY = ("cfg_weight2", "crop")
# Parameters of options that are refused with a change of images. No model has both.
_NOT_FOR_EDITING = ("plan", "reflect", "steps", "vae")
# Parameters of options that only a rectified flow has, and of those that it does not have.
_FLOW_ONLY = ("steps", "vae")
_TOKENS_ONLY = ("temperature", "top_p", "plan", "reflect", "exact", "window")
_NEUTRAL = {"top_p": 1.0, "reflect": 0}  # values that every model takes
_SEED_TOO_HIGH = f"the last image's seed would be above {MAX_SEED}: take a smaller --seed."
_TEXT_SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".csv")
# Options whose values --config-from takes from the image, unless the command line gives them.
_STORED_OPTIONS = (
    "seed",
    "cfg_weight",
    "temperature",
    "top_p",
    "steps",
    "upscale",
    *_EDITING_ONLY,
)


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
    every: int | None  # steps between two previews; None: the model's own number


@dataclass(frozen=True)
class DrawJob:
    """Images to draw or to change: by one prompt into files, or by several into a folder."""

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
    images: tuple[str, ...] = ()  # to change: files, https addresses, or "-" for stdin
    best_of: int | None = None  # images of each prompt, of which the ``n`` best are kept

    @property
    def keywords(self) -> dict[str, Any]:
        """The arguments of ``stream_images``, without the prompt and the images to change."""
        chosen = {"n": self.n} | ({} if self.best_of is None else {"best_of": self.best_of})
        return self.arguments.keywords() | chosen


def edits(values: Mapping[str, Any]) -> bool:
    """Return whether ``generate`` changes images: --image and --output, but not --text."""
    return bool(values["images"]) and values["output"] is not None and not values["text"]


def asks(values: Mapping[str, Any]) -> bool:
    """Return whether the options of ``generate`` ask a question.

    Otherwise they draw, or change images.
    """
    return bool(values["images"] or values["text"]) and not edits(values)


# Rules for combinations of options


def _refuse_mixed_options(ctx: click.Context) -> str | None:
    """Refuse options that do not suit the task: answering, drawing or changing images.

    Returns:
        The message of the refusal; None if nothing is refused.
    """
    values = ctx.params
    if asks(values):
        flag = _first_given(ctx, _DRAWING_ONLY)
        return flag and f"{flag} does not go with answering: {_drawing_hint(values)}."
    flag = _first_given(ctx, _ASKING_ONLY)
    if edits(values):
        if flag is None:
            return _refuse_drawing_options(values)
        return f"{flag} does not go with changing images: leave --output out to ask about them."
    if flag:
        return f"{flag} does not go with drawing: add --image FILE or --text to ask."
    flag = _first_given(ctx, _EDITING_ONLY)
    return flag and (
        f"{flag} does not go with drawing: add --image FILE and --output FILE.png to change images."
    )


def _refuse_drawing_options(values: Mapping[str, Any]) -> str | None:
    """Return the message that refuses an option that does not suit changing images; None: none."""
    flag = _first_with_effect(values, _NOT_FOR_EDITING)
    return flag and f"{flag} does not go with changing images: leave {flag} out."


def _refuse_options_of_two_kinds(ctx: click.Context) -> str | None:
    """Return the message that refuses a drawing with options that no model has all; None: none."""
    if asks(ctx.params):
        return None
    flow_flag = _first_with_effect(ctx.params, _FLOW_ONLY)
    tokens_flag = _first_with_effect(ctx.params, _TOKENS_ONLY)
    if flow_flag is None or tokens_flag is None:
        return None
    return (
        f"{flow_flag} is for models that draw by a rectified flow, and {tokens_flag} for those "
        "that draw image tokens: leave one of them out."
    )


def _first_with_effect(values: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the first of some options whose value is not neutral, as a flag; None: no option."""
    for name in names:
        value = values[name]
        if value is not None and value is not False and value != _NEUTRAL.get(name):
            return _flag(name)
    return None


def _flag(name: str) -> str:
    """Return the flag of click's parameter: "top_p" gives "--top-p"."""
    return f"--{name.replace('_', '-')}"


def _first_given(ctx: click.Context, names: Sequence[str]) -> str | None:
    """Return the first of some options that the command line gives, as a flag; None: no option.

    --no-show and --no-crop do not count, since scripts may always pass them.
    """
    for name in names:
        is_given = ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if is_given and ctx.params[name] is not False:
            return _flag(name)
    return None


def _drawing_hint(values: Mapping[str, Any]) -> str:
    """Say how to get an image, for a question with an option that only drawing takes."""
    if values["images"] and values["text"]:
        return "leave --text out to change the images"
    if values["images"]:
        return "add --output FILE.png to change the images, or leave --image out to draw"
    return "leave --image and --text out to draw"


def _refuse_text_output(ctx: click.Context) -> str | None:
    """Return the message that refuses a text file as the file of a changed image; None: none is."""
    output = ctx.params["output"]
    if not edits(ctx.params) or not output.lower().endswith(_TEXT_SUFFIXES):
        return None
    return (
        f"--output is the file of the changed image, not {output}: "
        "name it .png, or leave --output out for an answer on stdout."
    )


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
    """Return the seed of a prompt's last image. Without --seed, the first is taken as 0."""
    return (values["seed"] or 0) + (values["best_of"] or values["n"] or 1) - 1


def _kept(values: Mapping[str, Any]) -> int:
    """Return the number of images that are saved of each prompt."""
    return int((values["best_of"] if values["keep_all"] else values["n"]) or 1)


RULES: tuple[Rule, ...] = (
    _refuse_mixed_options,
    _refuse_text_output,
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
        _SEED_TOO_HIGH,
    ),
    refuse_if(
        lambda values: values["top_p"] == 0 and not asks(values),
        "--top-p 0 does not go with drawing: take --temperature 0, or a larger number.",
    ),
    refuse_if(
        lambda values: values["schema"] and values["lookup"],
        "--lookup does not go with --schema: leave one of them out.",
    ),
    refuse_if(lambda values: "" in values["images"], "--image is empty: name an image."),
    refuse_if(
        lambda values: _to_stdout(values) and (_many_prompts(values) or _kept(values) > 1),
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
    *BEST_OF_RULES,
    _refuse_options_of_two_kinds,
    refuse_if(
        lambda values: values["exact"] and (values["window"] or 1) > 1,
        "--exact draws token by token: leave --window out.",
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
        click.UsageError: the file of prompts has no prompt, or is not text. Or the image of
            --config-from was made from images, and none is given. Or an option does not suit its
            settings.
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

    Raises:
        ImageError, click.UsageError: as for ``read_job``.
    """
    values = ctx.params
    arguments = EditArguments if values["images"] else ImageArguments
    load = LoadArguments.from_options(values)
    fallback = None
    origin = read_origin(values["config_from"]) if values["config_from"] else None
    file = values["prompts_file"]
    if file:
        prompts += _read_prompt_lines(file)
    if origin is not None:
        require_inputs(origin, values["images"])
        prompts = prompts or (origin.prompt,)
        load, fallback = _with_settings_of(origin, load)
        values = values | _stored_values(origin, ctx)
        if not values["images"]:
            values = values | _stored_reasoning(origin, values, prompts)
        _check_stored(origin, values)
    into_folder = file is not None or len(prompts) > 1
    output, makes_folder = _read_output(values["output"], into_folder)
    return DrawJob(
        load=load,
        fallback=fallback,
        prompts=prompts,
        n=_kept(values),
        arguments=arguments.from_options(values),
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
        images=values["images"],
        best_of=values["best_of"],
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


def _stored_values(origin: Origin, ctx: click.Context) -> dict[str, Any]:
    """Return the values stored in ``origin`` for options that the command line does not give.

    Args:
        origin: the image of --config-from.
        ctx: click's context, which knows the options on the command line.
    """
    values = {}
    for name in _STORED_OPTIONS:
        is_given = ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
        # A drawing by a rectified flow lends a change of images its guidance only.
        is_unused = name in _NOT_FOR_EDITING and ctx.params["images"]
        if not is_given and not is_unused:
            values[name] = getattr(origin, name)
    return values


def _check_stored(origin: Origin, values: Mapping[str, Any]) -> None:
    """Check that the options of the command line suit the settings of the image of --config-from.

    Args:
        origin: the image.
        values: the values of the options, with those that are stored.

    Raises:
        click.UsageError: they do not.
    """
    flow_flag = _first_with_effect(values, _FLOW_ONLY)
    tokens_flag = _first_with_effect(values, _TOKENS_ONLY)
    if flow_flag and tokens_flag:
        by_flow = origin.steps is not None
        kind = "by a rectified flow" if by_flow else "as image tokens"
        flag = tokens_flag if by_flow else flow_flag
        raise click.UsageError(f"{origin.file} was drawn {kind}: leave {flag} out.")
    if _last_seed(values) > MAX_SEED:
        raise click.UsageError(_SEED_TOO_HIGH)


def _stored_reasoning(
    origin: Origin, values: Mapping[str, Any], prompts: Sequence[str]
) -> dict[str, Any]:
    """Return the values of --plan and --reflect: the command line's, or those stored in ``origin``.

    A stored plan is for the stored prompt. For other prompts, new plans are written.

    Args:
        origin: the image of --config-from.
        values: the values of the options.
        prompts: the prompts to draw.
    """
    plan: bool | str | None = values["plan"]
    if plan is None:
        plan = origin.plan is not None  # True: write new plans
        if plan and set(prompts) == {origin.prompt}:
            plan = origin.plan
    reflect = values["reflect"]
    if reflect is None:
        reflect = origin.reflect or None  # None leaves the option out
    return {"plan": plan, "reflect": reflect}


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
