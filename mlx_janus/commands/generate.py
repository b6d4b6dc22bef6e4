"""``mlx-janus generate``: print an answer, or write images to PNG files."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import OptionError
from ..limits import MAX_IMAGES, MAX_LOOKUP, MAX_TOKENS, MAX_UPSCALE, MAX_WINDOW
from .arguments import load_pipeline
from .image_folder import image_files, plan_calls
from .jobs import RULES, AskJob, DrawJob, Origin, Previews, read_job
from .options import (
    SETTINGS,
    answering_options,
    complete_files,
    complete_folders,
    model_options,
    quiet_option,
    sampling_options,
    show_option,
    version_option,
)
from .outputs import check_writable, make_folder
from .progress import follow_drawing, note_if_cut, terminal_preview
from .runner import Command, note

if TYPE_CHECKING:
    from ..inference.results import GeneratedImage, ImageStep, TextResult
    from ..pipeline import JanusPipeline


def _not_blank(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Return the prompts unchanged; click calls this for ``--prompt``.

    Raises:
        click.BadParameter: a prompt is empty or only spaces.
    """
    if not all(value.strip() for value in values):
        raise click.BadParameter("is empty: say what to draw, or ask something.")
    return values


def _not_web(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Return the images' names unchanged; click calls this for ``--image``.

    Raises:
        click.BadParameter: a name is empty, or an address other than https, such as "file://...".
    """
    for value in values:
        if not value:
            raise click.BadParameter("is empty: name an image.")
        if (found := re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", value)) and found[1] != "https":
            raise click.BadParameter(
                f"{found[0]} is not read: give a file, or an address that begins with https://."
            )
    return values


@click.command(cls=Command, rules=RULES)
@click.option(
    "-p",
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    callback=_not_blank,
    help="Prompt for images, or question to answer; - reads it from stdin. May be repeated to draw "
    "several prompts together.",
)
@click.option(
    "--prompts-file",
    type=click.File(encoding="utf-8"),
    metavar="FILE",
    help="Draw every line of this file (- for stdin). Images that exist already are skipped.",
)
@click.option(
    "--config-from",
    metavar="FILE",
    shell_complete=complete_files,
    help="Draw the image in this PNG again, with the prompt and settings stored in it. "
    "Options on the command line take precedence.",
)
@click.option(
    "-i",
    "--image",
    "images",
    multiple=True,
    metavar="FILE",
    callback=_not_web,
    shell_complete=complete_files,
    help="Image to ask about: a file, an https address, or - for stdin. May be repeated.",
)
@click.option("--text", is_flag=True, help="Answer a question without an image.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="File for the image, or folder for several prompts.  [default: janus.png, or janus]",
)
@click.option(
    "-n",
    "--n",
    type=click.IntRange(1, MAX_IMAGES),
    metavar="N",
    help="Number of images per prompt.  [default: 1]",
)
@click.option(
    "--cfg-weight",
    type=SETTINGS["cfg_weight"],
    metavar="W",
    help="Guidance: how strictly images follow the prompt; 1: no guidance.  "
    "[default: the model's own, 5 for the published models]",
)
@click.option(
    "--exact",
    is_flag=True,
    help="Draw images one at a time and token by token: slower, but the rounding does not depend "
    "on how many images or tokens are computed together.",
)
@click.option(
    "--window",
    type=click.IntRange(1, MAX_WINDOW),
    metavar="W",
    help="Image tokens to draft and check in one pass: changes the speed, not the image.  "
    "[default: the fastest, measured once]",
)
@click.option(
    "--lookup",
    type=click.IntRange(0, MAX_LOOKUP),
    metavar="K",
    help="Prompt lookup: draft up to K tokens of an answer by copying earlier text. The answer is "
    "the same, but faster where it repeats text.  [default: 0]",
)
@click.option(
    "--upscale",
    type=click.IntRange(1, MAX_UPSCALE),
    default=1,
    show_default=True,
    metavar="N",
    help="Enlarge saved images N times in width and height, with a Lanczos filter.",
)
@show_option
@click.option(
    "--preview-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    shell_complete=complete_folders,
    help="Save the unfinished image as DIR/step-0016.png and so on.",
)
@click.option(
    "--preview-every",
    type=click.IntRange(1, MAX_TOKENS),
    metavar="K",
    help="Number of image tokens between two previews.  [default: one row of the image]",
)
@sampling_options
@answering_options
@model_options
@quiet_option
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object instead, with tokens, timings and memory.",
)
@version_option
@click.pass_context
def main(ctx: click.Context, /, **_: Any) -> None:
    """Generate images from a prompt, or answer a question (with --image or --text).

    Answers and the paths of images are printed to stdout, progress to stderr. Each PNG stores its
    prompt, seed, guidance, temperature, model and precision in text chunks, which --config-from
    reads. Existing files are never overwritten: janus.png becomes janus_2.png.

    \b
    Examples:
      python -m mlx_janus.generate -p "a red circle above a blue square"
      python -m mlx_janus.generate -m deepseek-ai/Janus-Pro-1B -p "a red fox in fresh snow"
      python -m mlx_janus.generate -m janus-pro-1b -p "a lighthouse" --n 4 --seed 7 -o light.png
      python -m mlx_janus.generate --prompts-file prompts.txt --seed 7 -o pictures
      python -m mlx_janus.generate -m models/janus-pro-1b --config-from light-2.png --upscale 2
      python -m mlx_janus.generate -m models/janus-pro-1b -i photo.jpg -p "What is in this picture?"
      curl example.org/a.jpg | python -m mlx_janus.generate -m janus-pro-1b -i - -p "What is this?"
      python -m mlx_janus.generate -m models/janus-pro-1b --text -p "Name three primes."
    """
    job = read_job(ctx)
    if isinstance(job, AskJob):
        ask(job)
    elif job.into_folder:
        draw_into_folder(job)
    else:
        draw(job)


# Answering


def ask(job: AskJob) -> None:
    """Answer a question; print the text while it is generated, or one JSON object at the end."""
    from ..decode.sampling import random_seed
    from .inputs import read_image

    # Read the images first: a bad file fails before minutes are spent on the model.
    images = [read_image(source) for source in job.images]
    janus = load_pipeline(job.load)
    # Choose a random seed here, not in the library, to print it.
    seed = random_seed() if job.arguments.seed is None else job.arguments.seed
    arguments = replace(job.arguments, seed=seed)
    result = None
    started = time.perf_counter()
    for chunk in janus.stream_text(job.prompt, images, **arguments.keywords()):
        result = chunk.result
        if not job.as_json:
            click.echo(chunk.text, nl=False)
    assert result is not None  # the last chunk of a stream has it
    if job.as_json:
        seconds = round(time.perf_counter() - started, 3)
        click.echo(json.dumps(_facts(result, seed, seconds, janus.name), ensure_ascii=False))
        return
    click.echo()
    note_if_cut(result)
    if job.arguments.temperature:  # without randomness the seed changes nothing
        note(f"seed {seed}")


def _facts(result: TextResult, seed: int, seconds: float, model: str) -> dict[str, Any]:
    """Return the JSON object about an answer that took ``seconds``.

    In the names, "tps" means tokens per second. ``peak_memory`` is in bytes.
    """
    return {
        "text": result.text,
        "tokens": list(result.tokens),
        "finish_reason": result.finish_reason,
        "seed": seed,
        "prompt_tokens": result.prompt_tokens,
        "prompt_tps": round(result.prompt_tps, 3),
        "generation_tps": round(result.generation_tps, 3),
        "time_to_first_token": round(result.first_token_seconds, 3),
        "seconds": seconds,
        "peak_memory": result.peak_memory,
        "model": model,
    }


# Drawing one prompt


def draw(job: DrawJob) -> None:
    """Draw the images of one prompt, and save them to files."""
    from ..processing.saved_images import free_paths

    output = job.output or Path("janus.png")
    paths = iter(free_paths(output, job.n))
    check_writable(output)
    if job.previews:
        make_folder(job.previews.folder, "--preview-dir")
    janus = _load_to_draw(job)
    report = _ImageReport(job)
    steps: Iterable[ImageStep] = janus.stream_images(
        job.prompts[0], n=job.n, **job.arguments.keywords()
    )
    if job.previews:
        steps = _with_previews(steps, job, job.previews, janus.pathway.preview_every)
    report.draw(steps, job.n, lambda _: next(paths))
    report.end(janus.name)


def _load_to_draw(job: DrawJob) -> JanusPipeline:
    """Load the model, and print a note if it is not the one that drew the --config-from image.

    ``job.load`` asks for the quantization of that image. A model that is already quantized
    differently refuses this. It is then loaded by ``job.fallback``, which does not ask for it.

    Raises:
        OptionError: the model refuses an option, and there is no fallback.
    """
    try:
        janus = load_pipeline(job.load)
    except OptionError:
        if job.fallback is None:
            raise
        janus = load_pipeline(job.fallback)
    if job.origin is not None:
        _note_if_other(job.origin, janus)
    return janus


def _note_if_other(origin: Origin, janus: JanusPipeline) -> None:
    """Print a note if another model or precision drew the origin, the --config-from image.

    Early releases stored no precision: if the origin has none, only the names are compared.
    """
    precision_fields = janus.precision if origin.dtype else {}
    before = _with_flags(origin.model, vars(origin))
    now = _with_flags(janus.name, precision_fields)
    if before != now:
        difference = f"{origin.file} was drawn by {before}, this is {now}"
        note(f"{difference}: only the same model and precision draw the same image")


def _with_flags(model: str, fields: Mapping[str, Any]) -> str:
    """Return a model's name with the flags of its precision: "'a/b' --bits 4 --dtype float16".

    The name may come from a stranger's file, so its control characters are escaped.

    Args:
        model: the name.
        fields: values of bits, recipe and dtype. A value that is None or missing gives no flag.
            Other fields are ignored.
    """
    names = ("bits", "recipe", "dtype")
    flags = [f"--{name} {fields[name]}" for name in names if fields.get(name)]
    return " ".join([repr(model), *flags])


def _with_previews(
    steps: Iterable[ImageStep], job: DrawJob, previews: Previews, row: int
) -> Iterator[ImageStep]:
    """Yield the steps, and save the unfinished images every ``previews.every`` tokens.

    Args:
        steps: steps of the drawing.
        job: the job, for the number of images.
        previews: folder and interval.
        row: image tokens in one row of the image: the interval if ``previews.every`` is None.
    """
    from ..processing.saved_images import save_image

    every = previews.every or row
    finished = 0  # images finished so far: ``step.preview`` returns them before the unfinished ones
    for step in steps:
        if step.index % every == 0 and not step.images:
            for number, image in enumerate(step.preview()[finished:], finished + 1):
                suffix = f"-{number}" if job.n > 1 else ""
                path = previews.folder / f"step-{step.index:04d}{suffix}.png"
                save_image(image, path, {"step": f"{step.index} of {step.total}"})
        finished += len(step.images)
        yield step


# Drawing many prompts


def draw_into_folder(job: DrawJob) -> None:
    """Draw the images of all prompts into a folder, except images whose files exist.

    An image's seed is the first seed plus its number among its prompt's images, from 0. A later run
    with the same seed therefore completes the folder with the same images.
    """
    from ..decode.sampling import random_seed

    folder = job.output or Path("janus")
    files = image_files(folder, job.prompts, job.n)
    missing = [file for file in files if not file.path.exists()]
    there = len(files) - len(missing)
    if there:
        note(f"{there} of {len(files)} images exist already")
    if not missing:
        _ImageReport(job).end(None)
        return
    make_folder(folder)
    janus = _load_to_draw(job)
    seed = job.arguments.seed
    first = random_seed() if seed is None else seed
    # Each generated image has its prompt and seed, which together identify its file.
    paths = {(file.prompt, first + file.index): file.path for file in missing}
    report = _ImageReport(job)
    for call in plan_calls(missing, job.n):
        arguments = replace(job.arguments, seed=first + call.index)
        steps = janus.stream_images(call.prompts, n=call.n, **arguments.keywords())
        count = call.n * len(call.prompts)
        report.draw(steps, count, lambda image: paths[image.prompt, image.seed])
    report.end(janus.name)


# Saving


class _ImageReport:
    """A reporter that saves images and prints their paths, or one JSON object about all of them.

    Args:
        job: only the enlargement, the terminal preview and the choice of JSON are used.
    """

    def __init__(self, job: DrawJob):
        self._job = job
        self._show = False if job.as_json else job.show  # a preview would be mixed into the JSON
        self._facts: list[dict[str, Any]] = []
        self._started = time.perf_counter()
        self._peak = 0  # bytes of memory

    def draw(
        self, steps: Iterable[ImageStep], n: int, path: Callable[[GeneratedImage], Path]
    ) -> None:
        """Draw ``n`` images in all; save each to the file that ``path`` returns for it."""
        import mlx.core as mx

        preview = terminal_preview(self._show)
        follow_drawing(steps, n, lambda image: self._save(image, path(image)), preview)
        self._peak = max(self._peak, mx.get_peak_memory())

    def _save(self, image: GeneratedImage, path: Path) -> None:
        """Save an image and keep its facts for the JSON object; without JSON, print its path."""
        saved = image.upscaled(self._job.upscale).save(path)
        self._facts.append(
            {
                "path": str(saved),
                "prompt": image.prompt,
                "seed": image.seed,
                "passes": image.passes,
                "tokens": None if image.tokens is None else image.tokens.tolist(),
            }
        )
        if not self._job.as_json:
            click.echo(str(saved))
            note(f"seed {image.seed}")

    def end(self, model: str | None) -> None:
        """Print the JSON object if the job wants one.

        Args:
            model: name of the model; None: no image was missing, so no model was loaded.
        """
        if not self._job.as_json:
            return
        facts = {
            "images": self._facts,
            "seconds": round(time.perf_counter() - self._started, 3),
            "peak_memory": self._peak,
            "model": model,
        }
        click.echo(json.dumps(facts, ensure_ascii=False))
