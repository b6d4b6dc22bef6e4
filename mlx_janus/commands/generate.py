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


def _check_prompts(
    _: click.Context, __: click.Parameter, prompts: tuple[str, ...]
) -> tuple[str, ...]:
    """Check the values of --prompt and return them unchanged. click calls this function.

    Raises:
        click.BadParameter: a prompt is empty or only spaces.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise click.BadParameter("is empty: say what to draw, or ask something.")
    return prompts


def _check_image_names(
    _: click.Context, __: click.Parameter, names: tuple[str, ...]
) -> tuple[str, ...]:
    """Check the values of --image and return them unchanged. click calls this function.

    Raises:
        click.BadParameter: a name is empty, or is a URL that does not begin with "https://".
    """
    for name in names:
        if not name:
            raise click.BadParameter("is empty: name an image.")
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name)  # None: a file, or - for stdin
        if scheme and scheme[0] != "https://":
            raise click.BadParameter(
                f"{scheme[0]} is not read: give a file, or an address that begins with https://."
            )
    return names


@click.command(cls=Command, rules=RULES)
@click.option(
    "-p",
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    callback=_check_prompts,
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
    callback=_check_image_names,
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
    # Choose a random seed here, not in the library, so that it can be printed.
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
        answer = _answer_object(result, seed, seconds, janus.name)
        click.echo(json.dumps(answer, ensure_ascii=False))
        return
    click.echo()
    note_if_cut(result)
    if job.arguments.temperature:  # at 0, the default, the seed has no effect
        note(f"seed {seed}")


def _answer_object(result: TextResult, seed: int, seconds: float, model: str) -> dict[str, Any]:
    """Return the JSON object about an answer of ``model``, which took ``seconds``.

    In the keys, "tps" means tokens per second. ``peak_memory`` is in bytes.
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
    from ..processing.png import numbered_paths

    output = job.output or Path("janus.png")
    paths = iter(numbered_paths(output, job.n))
    check_writable(output)
    if job.previews:
        make_folder(job.previews.folder, "--preview-dir")
    janus = _load_to_draw(job)
    writer = _ImageWriter(job)
    steps: Iterable[ImageStep] = janus.stream_images(
        job.prompts[0], n=job.n, **job.arguments.keywords()
    )
    if job.previews:
        steps = _save_previews(steps, job.n, job.previews, janus.pathway.preview_every)
    # The images are finished in the order of their seeds, so each gets the next path.
    writer.draw(steps, job.n, lambda _: next(paths))
    writer.finish(janus.name)


def _load_to_draw(job: DrawJob) -> JanusPipeline:
    """Load the model, and print a note if another model drew the image of --config-from.

    ``job.load`` asks for the quantization with which that image was drawn. A model folder that is
    already quantized in another way refuses this. It is then loaded with ``job.fallback``, which
    asks for no quantization.

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
        _note_if_drawn_by_another(job.origin, janus)
    return janus


def _note_if_drawn_by_another(origin: Origin, janus: JanusPipeline) -> None:
    """Print a note if another model or precision drew ``origin``, the image of --config-from.

    An image of an early release does not store the precision. Then only the names are compared.
    """
    precision = janus.precision if origin.dtype else {}
    drawn_by = _name_with_flags(origin.model, vars(origin))
    loaded = _name_with_flags(janus.name, precision)
    if drawn_by != loaded:
        difference = f"{origin.file} was drawn by {drawn_by}, this is {loaded}"
        note(f"{difference}: only the same model and precision draw the same image")


def _name_with_flags(model: str, values: Mapping[str, Any]) -> str:
    """Return a model's name with the flags of its precision: "'a/b' --bits 4 --dtype float16".

    Args:
        model: the name. It may come from a stranger's file, so its control characters are escaped.
        values: values of bits, recipe and dtype, by name. A value that is None or missing gives no
            flag. Values with other names are ignored.
    """
    names = ("bits", "recipe", "dtype")
    flags = [f"--{name} {values[name]}" for name in names if values.get(name)]
    return " ".join([repr(model), *flags])


def _save_previews(
    steps: Iterable[ImageStep], n: int, previews: Previews, tokens_per_row: int
) -> Iterator[ImageStep]:
    """Yield the steps unchanged, and save the unfinished images at regular intervals.

    Args:
        steps: steps of the drawing.
        n: number of images.
        previews: folder, and interval in image tokens.
        tokens_per_row: the interval if ``previews.every`` is None.
    """
    from ..processing.png import save_png

    every = previews.every or tokens_per_row
    finished = 0  # images finished so far
    for step in steps:
        # A step with finished images adds no tokens. It has the index of the step before.
        if step.index % every == 0 and not step.images:
            unfinished = step.preview()[finished:]  # the finished images come first
            for number, image in enumerate(unfinished, finished + 1):
                suffix = f"-{number}" if n > 1 else ""
                path = previews.folder / f"step-{step.index:04d}{suffix}.png"
                save_png(image, path, {"step": f"{step.index} of {step.total}"})
        finished += len(step.images)
        yield step


# Drawing many prompts


def draw_into_folder(job: DrawJob) -> None:
    """Draw the images of all prompts into a folder, except images whose files exist.

    The images of a prompt have consecutive seeds, and the first image of every prompt has the same
    seed. So a later run with that seed completes the folder with the same images.
    """
    from ..decode.sampling import random_seed

    folder = job.output or Path("janus")
    files = image_files(folder, job.prompts, job.n)
    missing = [file for file in files if not file.path.exists()]
    existing = len(files) - len(missing)
    if existing:
        note(f"{existing} of {len(files)} images exist already")
    if not missing:
        _ImageWriter(job).finish(None)
        return
    make_folder(folder)
    janus = _load_to_draw(job)
    seed = job.arguments.seed
    first_seed = random_seed() if seed is None else seed
    # The prompt and the seed of a generated image together identify its file.
    paths = {(file.prompt, first_seed + file.index): file.path for file in missing}
    writer = _ImageWriter(job)
    for call in plan_calls(missing, job.n):
        arguments = replace(job.arguments, seed=first_seed + call.index)
        steps = janus.stream_images(call.prompts, n=call.n, **arguments.keywords())
        count = call.n * len(call.prompts)
        writer.draw(steps, count, lambda image: paths[image.prompt, image.seed])
    writer.finish(janus.name)


# Saving


class _ImageWriter:
    """A writer that saves images and prints their paths, or one JSON object about all of them.

    Args:
        job: the job. Only its options ``upscale``, ``show`` and ``as_json`` are used.
    """

    def __init__(self, job: DrawJob):
        self._job = job
        # Previews are printed to stdout, where they would be mixed into the JSON.
        self._show_previews = False if job.as_json else job.show
        self._saved: list[dict[str, Any]] = []  # a JSON object about each saved image
        self._started = time.perf_counter()
        self._peak_memory = 0  # bytes

    def draw(
        self, steps: Iterable[ImageStep], n: int, path_of: Callable[[GeneratedImage], Path]
    ) -> None:
        """Run the steps of a drawing, and save its images.

        Args:
            steps: steps of the drawing.
            n: number of images that the steps draw in all.
            path_of: returns the file for an image.
        """
        import mlx.core as mx

        preview = terminal_preview(self._show_previews)
        follow_drawing(steps, n, lambda image: self._save(image, path_of(image)), preview)
        self._peak_memory = max(self._peak_memory, mx.get_peak_memory())

    def _save(self, image: GeneratedImage, path: Path) -> None:
        """Save an image and add it to the JSON object. Without --json, print its path and seed."""
        saved_path = image.upscaled(self._job.upscale).save(path)
        self._saved.append(
            {
                "path": str(saved_path),
                "prompt": image.prompt,
                "seed": image.seed,
                "passes": image.passes,
                "tokens": None if image.tokens is None else image.tokens.tolist(),
            }
        )
        if not self._job.as_json:
            click.echo(str(saved_path))
            note(f"seed {image.seed}")

    def finish(self, model: str | None) -> None:
        """Print the JSON object if the job wants one.

        Args:
            model: name of the model; None: no image was missing, so no model was loaded.
        """
        if not self._job.as_json:
            return
        report = {
            "images": self._saved,
            "seconds": round(time.perf_counter() - self._started, 3),  # without loading
            "peak_memory": self._peak_memory,
            "model": model,
        }
        click.echo(json.dumps(report, ensure_ascii=False))
