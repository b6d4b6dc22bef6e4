"""Generate images of prompts step by step, in groups that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from PIL import Image

from ..decode.sampling import pick_seed
from ..errors import PromptError
from ..limits import MAX_IMAGES, MAX_SEED, check_int
from ..memory import available_memory
from ..weights.footprint import SAFE_SHARE
from .loaded import LoadedModel
from .pathway import Canvas, ImageJob, ImagePathway
from .pathways import pathway_of
from .results import GeneratedImage, ImageStep
from .text_generation import as_strings


def image_jobs(
    janus: LoadedModel,
    prompt: str | Sequence[str],
    n: int,
    seed: int | None,
    choices: Mapping[str, Any],
) -> list[ImageJob]:
    """Check a request and return its jobs: ``n`` images of each prompt.

    Args:
        janus: the model.
        prompt: one or several prompts.
        n: images of each prompt.
        seed: the seed of each prompt's first image, the others have the next ones; None: random.
        choices: options of the model's pathway, by name.

    Raises:
        PromptError: there is no prompt, or one is empty or does not fit into the context.
        OptionError: a number is out of range, a prompt is no text, or an option is not the
            pathway's.
    """
    pathway = pathway_of(janus)
    n = check_int("n", n, 1, MAX_IMAGES)
    options = pathway.options(_explicit(choices))
    first = pick_seed(seed)
    check_int("seed", first, 0, MAX_SEED - n + 1)
    jobs = []
    for text in as_strings("prompt", prompt):
        ids = pathway.prompt_ids(text)
        jobs += [ImageJob(text, ids, first + i, options) for i in range(n)]
    if not jobs:
        raise PromptError("there is no prompt: say what to draw")
    return jobs


def _explicit(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choices except for None and neutral values, which have no effect.

    So a pathway without nucleus sampling accepts ``top_p`` 1. Types are compared too: True equals
    1.0, but the pathway must refuse it.
    """
    neutral = {"top_p": 1.0, "exact": False}
    kept = {}
    for name, value in choices.items():
        default = neutral.get(name)
        is_neutral = type(value) is type(default) and value == default
        if value is not None and not is_neutral:
            kept[name] = value
    return kept


def generate_steps(
    janus: LoadedModel, jobs: Sequence[ImageJob]
) -> Generator[ImageStep, None, None]:
    """Generate the images of jobs with equal options, those with the shortest prompts first.

    Yields a step without images for each step of a group, then one step for each finished image.
    Closing the generator ends the drawing; later groups are not begun. MLX's peak memory is reset
    at the start.
    """
    mx.reset_peak_memory()
    pathway = pathway_of(janus)
    janus.load_weights_for("draw")
    options = jobs[0].options
    groups = _groups(janus, pathway, jobs)
    total = pathway.steps(options) * len(groups)
    done = 0  # steps
    finished: list[GeneratedImage] = []
    for group in groups:
        canvases: Sequence[Canvas] = []
        stream = pathway.generate(group, options)
        try:
            for canvases in stream:
                done += 1
                yield ImageStep(done, total, (), _previewer(janus, finished, canvases))
        finally:
            stream.close()
        mx.clear_cache()
        for canvas in canvases:  # those of the group's last step, so they are complete
            finished.append(canvas.finish())
            yield ImageStep(done, total, (finished[-1],), _previewer(janus, finished, ()))


def sort_by_prompt(
    images: Sequence[GeneratedImage], prompts: Sequence[str]
) -> list[GeneratedImage]:
    """Return images in the order of their prompts, and then of their seeds."""
    order: dict[str, int] = {}
    for text in prompts:
        order.setdefault(text, len(order))
    return sorted(images, key=lambda image: (order[image.prompt], image.seed))


def _groups(
    janus: LoadedModel, pathway: ImagePathway, jobs: Sequence[ImageJob]
) -> list[list[ImageJob]]:
    """Split jobs into groups whose prompts have one length and that fit into memory."""
    groups = []
    for length in sorted({len(job.ids) for job in jobs}):
        same_length = [job for job in jobs if len(job.ids) == length]
        options = same_length[0].options
        size = 1  # images in a group; always 1 with ``exact``
        if not options.exact:
            needed = pathway.bytes_per_image(length, options)
            size = max(images_that_fit(janus, needed), 1)
        for start in range(0, len(same_length), size):
            groups.append(same_length[start : start + size])
    return groups


def images_that_fit(janus: LoadedModel, bytes_per_image: int, reserved: int = 0) -> int:
    """Return how many images can be generated at once in the free memory; 0 if none fits.

    Args:
        janus: the model.
        bytes_per_image: memory of one image while it is generated.
        reserved: bytes of the free memory to leave unused.
    """
    # In low-memory mode, the weights of the language model are freed before an image is decoded.
    decoding = 0 if janus.low_memory else pathway_of(janus).decoding_bytes()
    room = SAFE_SHARE * available_memory() - reserved - decoding
    return max(int(room / bytes_per_image), 0)


def _previewer(
    janus: LoadedModel, finished: Sequence[GeneratedImage], canvases: Sequence[Canvas]
) -> Callable[[], list[Image.Image]]:
    """Return the function behind ``ImageStep.preview``, which any thread may call.

    Unfinished images are decoded in the model's thread. If all are finished, the function does not
    need the model, and works even after the model is closed.
    """
    ready = [image.image for image in finished]

    def preview() -> list[Image.Image]:
        return ready + [canvas.preview() for canvas in canvases]

    return partial(janus.thread.call, preview) if canvases else preview
