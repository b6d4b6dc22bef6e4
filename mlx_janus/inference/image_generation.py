"""From prompts to images, step by step, in groups that fit into memory."""

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
    """Check what to generate: ``n`` images of each prompt, with seeds from ``seed`` on.

    Args:
        janus: the model.
        prompt: one or several.
        n: images of each.
        seed: None: a random one.
        choices: options of the model's pathway, by name.

    Raises:
        PromptError: no prompt, an empty one, or one longer than the context.
        OptionError: a number out of its range.
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
    """Return the choices that say something: a pathway without nucleus sampling need not refuse ``top_p`` 1."""
    neutral = {"top_p": 1.0, "exact": False}
    return {
        name: value
        for name, value in choices.items()
        if value is not None
        and not (type(value) is type(neutral.get(name)) and value == neutral[name])
    }


def generate_steps(
    janus: LoadedModel, jobs: Sequence[ImageJob]
) -> Generator[ImageStep, None, None]:
    """Generate images of equal options, those with the shortest prompts first. Closing stops within a step."""
    mx.reset_peak_memory()
    pathway = pathway_of(janus)
    janus.load_weights_for("draw")
    options = jobs[0].options
    groups = _groups(janus, pathway, jobs)
    total = pathway.steps(options) * len(groups)
    done = 0
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
        for canvas in canvases:
            finished.append(canvas.finish())
            yield ImageStep(done, total, (finished[-1],), _previewer(janus, finished, ()))


def _groups(
    janus: LoadedModel, pathway: ImagePathway, jobs: Sequence[ImageJob]
) -> list[list[ImageJob]]:
    """Split jobs into groups whose prompts have one length and that fit into memory."""
    groups = []
    for length in sorted({len(job.ids) for job in jobs}):
        alike = [job for job in jobs if len(job.ids) == length]
        options = alike[0].options
        size = (
            1
            if options.exact
            else max(images_that_fit(janus, pathway.bytes_per_image(length, options)), 1)
        )
        groups += [alike[i : i + size] for i in range(0, len(alike), size)]
    return groups


def images_that_fit(janus: LoadedModel, bytes_per_image: int, reserved: int = 0) -> int:
    """Return how many images can be generated at once in the free memory, except for ``reserved`` bytes of it."""
    decoding = 0 if janus.low_memory else pathway_of(janus).decoding_bytes()
    room = SAFE_SHARE * available_memory() - reserved - decoding
    return max(int(room / bytes_per_image), 0)


def _previewer(
    janus: LoadedModel, finished: Sequence[GeneratedImage], canvases: Sequence[Canvas]
) -> Callable[[], list[Image.Image]]:
    """Return the function behind ``ImageStep.preview``; it may be called from any thread."""
    ready = [image.image for image in finished]

    def preview() -> list[Image.Image]:
        return ready + [canvas.preview() for canvas in canvases]

    return partial(janus.thread.call, preview) if canvases else preview
