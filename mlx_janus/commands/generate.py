"""``mlx-janus generate``: print an answer, or write images to PNG files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import OptionError
from ..limits import MAX_IMAGES, MAX_LOOKUP, MAX_TOKENS, MAX_UPSCALE, MAX_WINDOW
from .arguments import load_pipeline
from .best_of import best_of_options, files_by_rank, incomplete, without_existing
from .editing import check_inputs, editing_options, note_if_made_from_others, read_sources
from .image_folder import FolderLayout, check_existing, check_template, plan_images
from .image_writer import ImageWriter
from .jobs import RULES, AskJob, DrawJob, Previews, read_job
from .options import (
    answering_options,
    cfg_weight_option,
    check_image_sources,
    complete_files,
    complete_folders,
    model_options,
    quiet_option,
    reasoning_options,
    sampling_options,
    show_option,
    steps_option,
    version_option,
)
from .origin import Origin
from .outputs import check_writable, make_folder
from .progress import note_if_cut
from .runner import Command, note
from .schema_option import json_value, schema_option

if TYPE_CHECKING:
    from ..inference.results import GeneratedImage, ImageStep, TextResult
    from ..pipeline import JanusPipeline
    from .image_folder import PlannedImage


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


def _check_template(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Check the value of --name and return it unchanged. click calls this function.

    Raises:
        click.BadParameter: the value is no template for the names of images.
    """
    if value is not None:
        try:
            check_template(value)
        except OptionError as error:
            raise click.BadParameter(f"{error}.") from None
    return value


@click.command(cls=Command, rules=RULES)
@click.option(
    "-p",
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    callback=_check_prompts,
    help="Prompt for images, change of images, or question to answer; - reads it from stdin. May "
    "be repeated to draw several prompts together.",
)
@click.option(
    "--prompts-file",
    type=click.File(encoding="utf-8-sig"),
    metavar="FILE",
    help="Draw every line of this file (- for stdin), except comments, which begin with #. Images "
    "that exist already are skipped. A line that repeats is drawn again, with another seed.",
)
@click.option(
    "--same-seeds",
    is_flag=True,
    help="Start every prompt of several from --seed, with the same noise. Otherwise the seeds of a "
    "prompt are made of --seed and its words.",
)
@click.option(
    "--name",
    callback=_check_template,
    metavar="TEMPLATE",
    help="Names of the images of several prompts, with fields in braces: {name}, {words}, "
    "{prompt}, {copy}, {line}, {image}, {seed}; {line:05} has five digits, and {copy0}, {line0} "
    "and {image0} count from 0. A suffix .jpg or .webp chooses the format.  [default: {name}]",
)
@click.option(
    "--config-from",
    metavar="FILE",
    shell_complete=complete_files,
    help="Draw the image in this PNG again, with the prompt and settings stored in it. "
    "Options on the command line take precedence. A changed image needs its --image again.",
)
@click.option(
    "-i",
    "--image",
    "images",
    multiple=True,
    metavar="FILE",
    callback=check_image_sources,
    shell_complete=complete_files,
    help="Image to ask about or, with --output, to change: a file, an https address, or - for "
    "stdin. May be repeated. {image} in a question is the place of an image, one for each; without "
    "it the images come first.",
)
@click.option("--text", is_flag=True, help="Answer a question without an image.")
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    metavar="PATH",
    help="File for the image, folder (a name that ends in /, or an existing one) for janus.png, or "
    "- for a PNG on stdout; with several prompts always a folder.  [default: janus.png, or janus; "
    "with --image: none, and the prompt is a question]",
)
@click.option(
    "-n",
    "--n",
    type=click.IntRange(1, MAX_IMAGES),
    metavar="N",
    help="Number of images per prompt.  [default: 1]",
)
@best_of_options
@cfg_weight_option
@editing_options
@reasoning_options
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
@steps_option
@click.option(
    "--lookup",
    type=click.IntRange(0, MAX_LOOKUP),
    metavar="K",
    help="Prompt lookup: draft up to K tokens of an answer by copying earlier text. The answer is "
    "the same, but faster where it repeats text.  [default: 0]",
)
@schema_option
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
    help="Number of steps between two previews; a step is an image token, or one of --steps.  "
    "[default: one row of the image, or 5 of --steps]",
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
    """Generate images from a prompt, change images, or answer a question.

    Without --image and --text, the prompt is drawn. With --image, --output decides: with it, the
    images are changed as the prompt says; without it, the prompt is a question about them.
    Janus-4o was trained to change images, and other models are not.

    Answers and the paths of images are printed to stdout, progress to stderr. Each PNG stores its
    prompt, seed, guidance, temperature or steps, model and precision in text chunks, which
    --config-from reads; a changed one also the names and hashes of its --image files. Existing
    files are never overwritten: janus.png becomes janus_2.png.

    \b
    Examples:
      python -m mlx_janus.generate -p "a red circle above a blue square"
      python -m mlx_janus.generate -m deepseek-ai/Janus-Pro-1B -p "a red fox in fresh snow"
      python -m mlx_janus.generate -m janus-pro-1b -p "a lighthouse" --n 4 --seed 7 -o light.png
      python -m mlx_janus.generate -m janus-pro-1b -p "a lighthouse" --best-of 8 -o light.png
      python -m mlx_janus.generate --prompts-file prompts.txt --seed 7 -o pictures
      python -m mlx_janus.generate -m models/janus-pro-1b --config-from light-2.png --upscale 2
      python -m mlx_janus.generate -m models/janus-pro-1b -i photo.jpg -p "What is in this picture?"
      python -m mlx_janus.generate -i a.png -i b.png -p "Is {image} brighter than {image}?"
      python -m mlx_janus.generate -m janus-4o-7b -i photo.jpg -p "make it night" -o night.png
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
    from ..processing.prompts import marked_question
    from .inputs import read_image

    # Check the prompt and the images first: a mistake fails before minutes are spent on the model.
    marked_question(job.prompt, len(job.images))
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
        if job.arguments.schema:
            answer["json"] = json_value(result.text)
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
    """Draw the images of one prompt, and save them to files or write the image to stdout."""
    from ..processing.saved_images import numbered_paths

    output = job.output or Path("janus.png")
    # The path None means stdout.
    paths: Iterator[Path | None] = iter([None] if job.to_stdout else numbered_paths(output, job.n))
    if job.makes_folder:
        make_folder(output.parent)
    if not job.to_stdout:
        check_writable(output)
    if job.previews:
        make_folder(job.previews.folder, "--preview-dir")
    sources = read_sources(job.images)
    note_if_made_from_others(job.origin, sources)
    janus = _load_to_draw(job)
    writer = ImageWriter(job)
    steps: Iterable[ImageStep] = janus.stream_images(job.prompts[0], images=sources, **job.keywords)
    if job.previews:
        drawn = job.best_of or job.n
        steps = _save_previews(steps, drawn, job.previews, janus.pathway.preview_every)
    # The images come in the order of their seeds, or of their ranks: each gets the next path.
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
    """Print a note if the image of --config-from was drawn by another model than ``janus``.

    The same model with another precision or other roles counts as another. An image of an early
    release stores only the model's name. Then only the names are compared.
    """
    options = janus.load_options if origin.dtype else {}  # no dtype: an early release
    drawn_by = _name_with_flags(origin.model, vars(origin))
    loaded = _name_with_flags(janus.name, options)
    if drawn_by != loaded:
        difference = f"{origin.file} was drawn by {drawn_by}, this is {loaded}"
        note(f"{difference}: only the same model and precision draw the same image")


def _name_with_flags(model: str, values: Mapping[str, Any]) -> str:
    """Return a model's name with the flags of its settings: "'a/b' --bits 4 --dtype float16".

    Args:
        model: the name. It may come from a stranger's file, so its control characters are escaped.
        values: values of bits, recipe, dtype and roles, by name. A value that is None or missing
            gives no flag. Values with other names are ignored.
    """
    names = ("bits", "recipe", "dtype", "roles")
    flags = [f"--{name} {values[name]}" for name in names if values.get(name)]
    return " ".join([repr(model), *flags])


def _save_previews(
    steps: Iterable[ImageStep], n: int, previews: Previews, default_every: int
) -> Iterator[ImageStep]:
    """Yield the steps unchanged, and save the unfinished images at regular intervals.

    Args:
        steps: steps of the drawing.
        n: number of images.
        previews: folder, and interval in steps.
        default_every: the interval if ``previews.every`` is None.
    """
    from ..processing.saved_images import save_image

    every = previews.every or default_every
    finished = 0  # images finished so far
    for step in steps:
        # A step with finished images adds no tokens. It has the index of the step before.
        if step.index % every == 0 and not step.images and step.stage == "draw":
            unfinished = step.preview()[finished:]  # the finished images come first
            for number, image in enumerate(unfinished, finished + 1):
                suffix = f"-{number}" if n > 1 else ""
                path = previews.folder / f"step-{step.index:04d}{suffix}.png"
                save_image(image, path, {"step": f"{step.index} of {step.total}"})
        finished += len(step.images)
        yield step


# Drawing many prompts


def draw_into_folder(job: DrawJob) -> None:
    """Draw the images of all prompts into a folder, except images whose files exist.

    ``plan_images`` decides the names and seeds. With the same --seed, a later run draws the missing
    images as the first run would have drawn them.
    """
    layout = FolderLayout(job.output or Path("janus"), job.template, job.same_seeds)
    lines = _plan_lines(layout, job)
    images = [image for line in lines for image in line]
    missing = [image for image in images if not image.path.exists()]
    existing = [image for image in images if image.path.exists()]
    check_existing(layout, existing)
    sources = read_sources(job.images)
    check_inputs(existing, sources)
    note_if_made_from_others(job.origin, sources)
    if existing:
        note(f"{len(existing)} of {len(images)} images exist already")
    if not missing:
        ImageWriter(job).finish(model=None)  # all images were there already: no model was loaded
        return
    make_folder(layout.folder)
    janus = _load_to_draw(job)
    # The prompt and the seed of a generated image together identify its file.
    paths = {(image.prompt, image.seed): image.path for image in missing}
    if job.best_of is None:
        steps = _stream_folder(janus, job, missing, sources, n=1)
    else:
        paths = {}  # filled when the seeds of the best images are known
        lines = incomplete(lines)
        drawing = _stream_folder(janus, job, [line[0] for line in lines], sources)
        steps = without_existing(drawing, lines, paths)

    def path_of(image: GeneratedImage) -> Path:
        """Return the path for an image, and make its folder: --name may contain subfolders."""
        path = paths[image.prompt, image.seed]
        make_folder(path.parent)
        return path

    writer = ImageWriter(job)
    writer.draw(steps, len(missing), path_of)
    writer.finish(janus.name)


def _plan_lines(layout: FolderLayout, job: DrawJob) -> list[list[PlannedImage]]:
    """Return the planned images of a folder for each line of prompts.

    Raises:
        OutputError: two images have the same name, or a name is too long.
    """
    from ..decode.sampling import random_seed

    seed = job.arguments.seed
    first_seed = random_seed() if seed is None else seed
    drawn = job.best_of or job.n  # images of each prompt
    return files_by_rank(plan_images(layout, job.prompts, drawn, first_seed), drawn, job.n)


def _stream_folder(
    janus: JanusPipeline,
    job: DrawJob,
    images: Sequence[PlannedImage],
    sources: Sequence[str | bytes],
    **options: Any,
) -> Iterable[ImageStep]:
    """Return the steps of drawing the prompts of planned images, from their seeds.

    Args:
        janus: the model.
        job: the job.
        images: planned images. Each gives a prompt, and the seed of the first image drawn of it.
        sources: the images to change, if any.
        options: arguments of ``stream_images`` in place of the job's.
    """
    prompts = [image.prompt for image in images]
    seeds = [image.seed for image in images]
    keywords = job.keywords | {"seed": seeds} | options
    return janus.stream_images(prompts, images=sources, **keywords)
