"""``python -m mlx_janus.generate``: one answer to stdout, or pictures to PNG files."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from ..errors import OptionError
from ..limits import MAX_CFG_WEIGHT, MAX_IMAGES, MAX_LOOKUP, MAX_SEED, MAX_TOKENS, MAX_UPSCALE, MAX_WINDOW
from .options import (
    Command,
    FiniteRange,
    answering_options,
    check_output,
    complete_files,
    complete_folders,
    follow_drawing,
    given,
    load_model,
    make_folder,
    model_options,
    note,
    quiet_option,
    sampling_options,
    say_if_cut,
    show_option,
    terminal_preview,
    version_option,
)

if TYPE_CHECKING:
    from ..inference.results import GeneratedImage, ImageStep
    from ..pipeline import JanusPipeline

DRAWING_ONLY = (
    "prompts_file", "config_from", "output", "n", "cfg_weight", "exact", "window", "upscale", "show", "preview_dir",
    "preview_every",
)  # fmt: skip
_CHOICE = ("cfg_weight", "temperature", "top_p", "window")
ANSWERING_ONLY = ("max_tokens", "system", "lookup")


def _not_blank(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    if not all(value.strip() for value in values):
        raise click.BadParameter("is empty: say what to draw, or ask something.")
    return values


def _not_web(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Of web addresses, only https; "file:" and the like are nothing that is read either."""
    for value in values:
        if not value:
            raise click.BadParameter("is empty: name a picture.")
        if (found := re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", value)) and found[1] != "https":
            raise click.BadParameter(f"{found[0]} is not read: give a file, or an address that begins with https://.")
    return values


@click.command(cls=Command)
@click.option(
    "-p",
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    callback=_not_blank,
    help="What to draw, or the question (-: read from stdin). Several are drawn together.",
)
@click.option(
    "--prompts-file",
    type=click.File(encoding="utf-8"),
    metavar="FILE",
    help="Draw every line of a file (-: of stdin); pictures already there are skipped.",
)
@click.option(
    "--config-from",
    metavar="FILE",
    shell_complete=complete_files,
    help="Draw the picture in this PNG again, from what it says of itself; options that are given prevail.",
)
@click.option(
    "-i",
    "--image",
    "images",
    multiple=True,
    metavar="FILE",
    callback=_not_web,
    shell_complete=complete_files,
    help="Ask about this picture: a file, an https address, or - for stdin; may be repeated.",
)
@click.option("--text", is_flag=True, help="Answer without a picture.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Where to draw to: a file, or for several prompts a folder.  [default: janus.png, or janus]",
)
@click.option(
    "-n", "--n", type=click.IntRange(1, MAX_IMAGES), metavar="N", help="How many pictures of a prompt.  [default: 1]"
)
@click.option(
    "--cfg-weight",
    type=FiniteRange(0, MAX_CFG_WEIGHT),
    metavar="W",
    help="Guidance, how strictly to follow the prompt; 1: none.  [default: the model's own, 5 for the published ones]",
)
@click.option("--exact", is_flag=True, help="Draw one by one, token by token: rounding depends on nothing else.")
@click.option(
    "--window",
    type=click.IntRange(1, MAX_WINDOW),
    metavar="W",
    help="Positions read in one pass: the same picture, sooner or later.  [default: the quickest, timed once]",
)
@click.option(
    "--lookup",
    type=click.IntRange(0, MAX_LOOKUP),
    metavar="K",
    help="Guess up to K tokens of the answer by copying: the same answer, sooner where it repeats.  [default: 0]",
)
@click.option(
    "--upscale",
    type=click.IntRange(1, MAX_UPSCALE),
    default=1,
    show_default=True,
    metavar="N",
    help="Save pictures N times as wide and high, enlarged by Lanczos' filter.",
)
@show_option
@click.option(
    "--preview-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    shell_complete=complete_folders,
    help="Save what is there so far as DIR/step-0016.png and so on.",
)
@click.option(
    "--preview-every",
    type=click.IntRange(1, MAX_TOKENS),
    metavar="K",
    help="Image tokens from one preview to the next.  [default: a row of them]",
)
@sampling_options
@answering_options
@model_options
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead: tokens, timings, memory.")
@version_option
@click.pass_context
def main(ctx: click.Context, /, **options: Any) -> None:
    """Draw pictures of a prompt, or answer a question (with --image or --text).

    Answers and the paths of pictures go to stdout, progress to stderr. Every PNG carries its prompt, seed, guidance,
    temperature, model and precision as text chunks, which --config-from reads. Files that exist are kept: janus.png
    becomes janus_2.png.

    \b
    Examples:
      python -m mlx_janus.generate -p "a red circle above a blue square"
      python -m mlx_janus.generate -m deepseek-ai/Janus-Pro-1B -p "a red fox in fresh snow"
      python -m mlx_janus.generate -m models/janus-pro-1b -p "a lighthouse" --n 4 --seed 7 -o light.png
      python -m mlx_janus.generate --prompts-file prompts.txt --seed 7 -o pictures
      python -m mlx_janus.generate -m models/janus-pro-1b --config-from light-2.png --upscale 2
      python -m mlx_janus.generate -m models/janus-pro-1b -i photo.jpg -p "What is in this picture?"
      curl https://example.org/a.jpg | python -m mlx_janus.generate -m models/janus-pro-1b -i - -p "What is this?"
      python -m mlx_janus.generate -m models/janus-pro-1b --text -p "Name three primes."
    """
    answering = bool(options["images"]) or options["text"]
    _check_use(ctx, answering)
    if "-" in options["prompts"]:
        from .inputs import read_prompt

        options["prompts"] = [read_prompt() if prompt == "-" else prompt for prompt in options["prompts"]]
    if options["config_from"]:
        _take_settings(ctx, options)
    if options["prompts_file"] or len(options["prompts"]) > 1:
        _draw_many(options)
    elif answering:
        _answer(options)
    else:
        _draw(options)


def _check_use(ctx: click.Context, answering: bool) -> None:
    for name in DRAWING_ONLY if answering else ANSWERING_ONLY:
        asked = ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if asked and ctx.params[name] is not False:  # --no-show is so in any case
            flag = f"--{name.replace('_', '-')}"
            fix = "leave --image and --text out to draw" if answering else "add --image FILE or --text to ask"
            does = "answering" if answering else "drawing"
            raise click.UsageError(f"{flag} does not go with {does}: {fix}.")
    prompts, file, images = (ctx.params[name] for name in ("prompts", "prompts_file", "images"))
    if answering and len(prompts) > 1:
        raise click.UsageError("one question at a time: give --prompt once.")
    if not (prompts or file or ctx.params["config_from"]):
        raise click.UsageError("Missing option '-p' / '--prompt'.")
    of_stdin = file is not None and getattr(file, "name", "<stdin>") == "<stdin>"
    if [*prompts, *images].count("-") + of_stdin > 1:
        raise click.UsageError("stdin can be read once: give - to one option alone.")
    if (ctx.params["seed"] or 0) + (ctx.params["n"] or 1) - 1 > MAX_SEED:
        raise click.UsageError(f"the last picture's seed would be above {MAX_SEED}: take a smaller --seed.")
    if ctx.params["preview_every"] and not ctx.params["preview_dir"]:
        raise click.UsageError("--preview-every goes with --preview-dir: name a folder.")
    if ctx.params["preview_dir"] and (file or len(prompts) > 1):
        raise click.UsageError("--preview-dir goes with one prompt.")


def _take_settings(ctx: click.Context, options: dict[str, Any]) -> None:
    """What the command line does not say, from the PNG."""
    from ..inference.results import read_settings

    settings = read_settings(options["config_from"])
    for name in ("seed", "cfg_weight", "temperature", "top_p", "upscale"):
        if ctx.get_parameter_source(name) == click.core.ParameterSource.DEFAULT:
            options[name] = settings[name]
    if not (options["prompts"] or options["prompts_file"]):
        options["prompts"] = [settings["prompt"]]
    options["drawn"] = settings


def _pipeline(options: dict[str, Any]) -> JanusPipeline:
    """The model; for --config-from in the precision of the picture, unless the command line names another."""
    drawn = options.get("drawn")
    if drawn is None:
        return load_model(options)
    wanted = options | {"dtype": options["dtype"] or drawn["dtype"]}
    if not (options["bits"] or options["recipe"]):
        wanted |= {"bits": drawn["bits"], "recipe": drawn["recipe"]}
    try:
        janus = load_model(wanted)
    except OptionError:  # a folder that is quantized otherwise
        if options["bits"] or options["recipe"]:
            raise
        janus = load_model(wanted | {"bits": None, "recipe": None})
    precision = janus.precision if drawn["dtype"] else {}  # an earlier release did not say
    before, now = _who(drawn["model"], drawn), _who(janus.name, precision)
    if before != now:
        note(f"{options['config_from']} was drawn by {before}, this is {now}: only the same draws the same picture")
    return janus


def _who(model: str, precision: dict[str, Any]) -> str:
    """A model and how it computes; its name may be a foreign file's words, so without control characters."""
    names = ("bits", "recipe", "dtype")
    return " ".join([repr(model), *(f"--{name} {precision[name]}" for name in names if precision.get(name))])


def _answer(options: dict[str, Any]) -> None:
    from ..decode.sampling import random_seed
    from .inputs import read_image

    images = [read_image(source) for source in options["images"]]  # a bad picture shows before a model is loaded
    janus = _pipeline(options)
    seed = random_seed() if options["seed"] is None else options["seed"]
    choice = given(options, "max_tokens", "temperature", "top_p", "system", "lookup")
    result, started = None, time.perf_counter()
    for chunk in janus.stream_text(options["prompts"][0], images, seed=seed, **choice):
        result = chunk.result
        if not options["as_json"]:
            click.echo(chunk.text, nl=False)
    assert result is not None
    if not options["as_json"]:
        click.echo()
        say_if_cut(result)
        if options["temperature"]:
            note(f"seed {seed}")
        return
    facts = {
        "text": result.text,
        "tokens": list(result.tokens),
        "finish_reason": result.finish_reason,
        "seed": seed,
        "prompt_tokens": result.prompt_tokens,
        "prompt_tps": round(result.prompt_tps, 3),
        "generation_tps": round(result.generation_tps, 3),
        "time_to_first_token": round(result.first_token_seconds, 3),
        "seconds": round(time.perf_counter() - started, 3),
        "peak_memory": result.peak_memory,
        "model": janus.name,
    }
    click.echo(json.dumps(facts, ensure_ascii=False))


def _draw(options: dict[str, Any]) -> None:
    from ..processing.png import free_paths

    n, output = options["n"] or 1, options["output"] or Path("janus.png")
    paths = iter(free_paths(output, n))
    check_output(output)
    if folder := options["preview_dir"]:
        make_folder(folder, "--preview-dir")
    janus = _pipeline(options)
    choice = given(options, "seed", *_CHOICE)
    report = _Report(options)
    steps: Iterator[ImageStep] = janus.stream_images(options["prompts"][0], n=n, exact=options["exact"], **choice)
    if folder:
        steps = _with_previews(steps, folder, options["preview_every"] or janus.pathway.preview_every, n)
    report.draw(steps, n, lambda _: next(paths))
    report.end(janus.name)


def _with_previews(steps: Iterable[ImageStep], folder: Path, every: int, n: int) -> Iterator[ImageStep]:
    """The steps; at each ``every``-th, the pictures that are begun are saved."""
    from ..processing.png import save_png

    finished = 0
    for step in steps:
        if step.index % every == 0 and not step.images:
            for number, picture in enumerate(step.preview()[finished:], finished + 1):
                name = f"step-{step.index:04d}" + (f"-{number}" if n > 1 else "")
                save_png(picture, folder / f"{name}.png", {"step": f"{step.index} of {step.total}"})
        finished += len(step.images)
        yield step


def _draw_many(options: dict[str, Any]) -> None:
    """Every prompt's pictures into a folder, but for those that are there."""
    from ..decode.sampling import random_seed

    prompts = dict.fromkeys(options["prompts"])
    if options["prompts_file"]:
        prompts |= dict.fromkeys(_lines(options["prompts_file"]))
    n, folder = options["n"] or 1, options["output"] or Path("janus")
    paths = {
        (prompt, k): folder / f"{number:04d}-{_slug(prompt)}{f'-{k + 1}' if n > 1 else ''}.png"
        for number, prompt in enumerate(prompts, 1)
        for k in range(n)
    }
    missing = {job: path for job, path in paths.items() if not path.exists()}
    if there := len(paths) - len(missing):
        note(f"{there} of {len(paths)} pictures are there already")
    if not missing:
        _Report(options).end(None)
        return
    make_folder(folder)
    janus = _pipeline(options)
    first = random_seed() if options["seed"] is None else options["seed"]
    choice = given(options, *_CHOICE) | {"exact": options["exact"]}
    report = _Report(options)
    whole = [prompt for prompt in prompts if all((prompt, k) in missing for k in range(n))]
    calls = [(whole, first, n)]
    calls += [([p for p in prompts if p not in whole and (p, k) in missing], first + k, 1) for k in range(n)]
    for wanted, seed, each in calls:
        if wanted:
            steps = janus.stream_images(wanted, n=each, seed=seed, **choice)
            report.draw(steps, each * len(wanted), lambda image: missing[image.prompt, image.seed - first])
    report.end(janus.name)


class _Report:
    """Draws and saves, and says what was drawn, as lines or as one JSON object."""

    def __init__(self, options: dict[str, Any]):
        self.as_json, self.upscale = options["as_json"], options["upscale"]
        self.show = False if self.as_json else options["show"]
        self.facts, self.started, self.peak = list[dict[str, Any]](), time.perf_counter(), 0

    def draw(self, steps: Iterable[ImageStep], n: int, path: Callable[[GeneratedImage], Path]) -> None:
        """Draw n pictures to where ``path`` says."""
        import mlx.core as mx

        follow_drawing(steps, n, lambda image: self._save(image, path(image)), terminal_preview(self.show))
        self.peak = max(self.peak, mx.get_peak_memory())

    def _save(self, image: GeneratedImage, path: Path) -> None:
        path = image.upscaled(self.upscale).save(path)
        self.facts.append(
            {
                "path": str(path),
                "prompt": image.prompt,
                "seed": image.seed,
                "passes": image.passes,
                "tokens": None if image.tokens is None else image.tokens.tolist(),
            }
        )
        if not self.as_json:
            click.echo(str(path))
            note(f"seed {image.seed}")

    def end(self, model: str | None) -> None:
        """``model``: the name of what drew; None if nothing was missing."""
        if self.as_json:
            seconds = round(time.perf_counter() - self.started, 3)
            summary = {"images": self.facts, "seconds": seconds, "peak_memory": self.peak, "model": model}
            click.echo(json.dumps(summary, ensure_ascii=False))


def _lines(file: TextIO) -> list[str]:
    try:
        lines = [line.strip() for line in file]
    except UnicodeDecodeError:
        raise click.UsageError(f"{file.name} is no text in UTF-8.") from None
    if not any(lines):
        raise click.UsageError(f"{file.name} holds no prompt: write one a line.")
    return [line for line in lines if line]


def _slug(prompt: str) -> str:
    """A prompt as part of a file name: "a-red-circle"."""
    return "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:40].strip("-") or "picture"
