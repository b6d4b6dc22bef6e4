"""Generate images of prompts step by step, in groups that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cache, partial
from typing import Any, TypeAlias

import mlx.core as mx
from PIL import Image

from ..decode.sampling import pick_seed
from ..errors import OptionError, PromptError
from ..limits import MAX_IMAGES, MAX_SEED, check_int
from ..memory import available_memory
from ..weights.footprint import SAFE_SHARE
from .loaded import LoadedModel
from .pathway import Canvas, EditingPathway, ImageJob, ImagePathway, InputImages
from .pathways import pathway_of
from .results import GeneratedImage, ImageStep
from .text_generation import as_strings

Seed: TypeAlias = int | Sequence[int] | None
"""Seed of each prompt's first image: one for all prompts, or one for each; None: a random one."""


def image_jobs(
    janus: LoadedModel,
    prompt: str | Sequence[str],
    n: int,
    seed: Seed,
    choices: Mapping[str, Any],
    inputs: InputImages | None = None,
) -> list[ImageJob]:
    """Check a request for images, and return a job for each image.

    Args:
        janus: the model.
        prompt: one or several prompts.
        n: images of each prompt.
        seed: the seed of each prompt's first image; each further image has the next higher seed. A
            sequence has a seed for each prompt. None and -1: a random seed.
        choices: options of image generation by name; None: the model's default.
        inputs: images to change, if any.

    Raises:
        PromptError: there is no prompt, or one is empty or does not fit into the context.
        OptionError: a number is out of range, a prompt is no text, there are not as many seeds as
            prompts, or the model has no such option.
    """
    pathway = pathway_of(janus)
    n = check_int("n", n, 1, MAX_IMAGES)
    chosen = _without_neutral_values(choices)
    if inputs is None:
        options = pathway.options(chosen)
    elif isinstance(pathway, EditingPathway):
        options = pathway.edit_options(chosen)
    else:
        raise OptionError("this model generates images from prompts only: leave images out")
    texts = as_strings("prompt", prompt)
    if not texts:
        raise PromptError("there is no prompt: say what to draw")
    jobs = []
    for text, first_seed in zip(texts, _first_seeds(seed, len(texts), n), strict=True):
        if inputs is not None and isinstance(pathway, EditingPathway):
            ids = pathway.edit_prompt_ids(text, len(inputs.pixels))
        else:
            ids = pathway.prompt_ids(text)
        jobs += [ImageJob(text, ids, first_seed + i, options, inputs) for i in range(n)]
    return jobs


def _first_seeds(seed: Seed, prompts: int, n: int) -> list[int]:
    """Return the seed of each prompt's first image.

    Args:
        seed: see ``image_jobs``.
        prompts: number of prompts, at least 1.
        n: images of each prompt, which have consecutive seeds.

    Raises:
        OptionError: a seed is no integer or out of range, or there are not as many as prompts.
    """
    if isinstance(seed, Sequence):
        seeds = [pick_seed(one) for one in seed]
    else:
        seeds = [pick_seed(seed)] * prompts
    if len(seeds) != prompts:
        raise OptionError(f"seed must be one number or one per prompt, got {len(seeds)} seeds")
    for first_seed in seeds:
        check_int("seed", first_seed, 0, MAX_SEED - n + 1)  # the last seed must be in range, too
    return seeds


def _without_neutral_values(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options by name, without those that have no effect: None and neutral values.

    So a model without nucleus sampling accepts ``top_p=1.0`` instead of refusing the option.
    """
    neutral_values = {"top_p": 1.0, "exact": False}
    kept = {}
    for name, value in choices.items():
        neutral = neutral_values.get(name)
        # ``top_p=True`` equals 1.0, but is kept, so that the check of its type refuses it later.
        is_neutral = type(value) is type(neutral) and value == neutral
        if value is not None and not is_neutral:
            kept[name] = value
    return kept


def generate_steps(
    janus: LoadedModel, jobs: Sequence[ImageJob]
) -> Generator[ImageStep, None, None]:
    """Generate the images of jobs with equal options, those with the shortest prompts first.

    Closing the generator ends the work on all groups. MLX's peak memory is reset at the start.

    Yields:
        For each group of images, an ``ImageStep`` without images after each step of the group, and
        then one for each finished image.
    """
    mx.reset_peak_memory()
    pathway = pathway_of(janus)
    janus.load_weights_for("draw")
    options = jobs[0].options
    groups = _group_jobs(janus, pathway, jobs)
    total = pathway.steps(options) * len(groups)
    done = 0  # steps
    finished: list[GeneratedImage] = []
    for group in groups:
        canvases: Sequence[Canvas] = []  # the group's images in progress
        stream = pathway.generate(group, options)
        try:
            for canvases in stream:
                done += 1
                previews = [canvas.preview for canvas in canvases]
                yield ImageStep(done, total, (), _preview_function(janus, finished, previews))
        finally:
            stream.close()
        mx.clear_cache()
        # The canvases of the group's last step are complete. A preview may finish an image before
        # its own step does, so the result is kept.
        finishing = [cache(canvas.finish) for canvas in canvases]
        for i, finish in enumerate(finishing):
            image = finish()
            finished.append(image)
            previews = [partial(_finished_image, later) for later in finishing[i + 1 :]]
            yield ImageStep(done, total, (image,), _preview_function(janus, finished, previews))


def _finished_image(finish: Callable[[], GeneratedImage]) -> Image.Image:
    """Finish an image, and return its pixels."""
    return finish().image


def sort_by_prompt(
    images: Sequence[GeneratedImage], prompts: Sequence[str]
) -> list[GeneratedImage]:
    """Return images sorted by prompt, in the order of ``prompts``, and then by seed."""
    ranks: dict[str, int] = {}
    for text in prompts:
        ranks.setdefault(text, len(ranks))  # a repeated prompt keeps its first rank
    return sorted(images, key=lambda image: (ranks[image.prompt], image.seed))


def _group_jobs(
    janus: LoadedModel, pathway: ImagePathway, jobs: Sequence[ImageJob]
) -> list[list[ImageJob]]:
    """Split jobs into groups that fit into memory; a group's prompts have one length in tokens.

    Args:
        janus: the model.
        pathway: the model's way to generate images, which estimates their memory.
        jobs: images with equal options.

    Returns:
        The groups, those with the shortest prompts first.
    """
    groups = []
    for length in sorted({len(job.ids) for job in jobs}):
        same_length = [job for job in jobs if len(job.ids) == length]
        options = same_length[0].options
        size = 1  # images in a group; ``exact`` generates each image separately
        if not options.exact:
            bytes_per_image = pathway.bytes_per_image(length, options)
            size = max(images_that_fit(janus, bytes_per_image), 1)  # if none fits, still try one
        for start in range(0, len(same_length), size):
            groups.append(same_length[start : start + size])
    return groups


def images_that_fit(janus: LoadedModel, bytes_per_image: int, reserved: int = 0) -> int:
    """Return how many images can be generated together in the free memory; 0 if none fits.

    Args:
        janus: the model.
        bytes_per_image: memory of one image while it is generated.
        reserved: bytes of the free memory to leave unused.
    """
    # Low-memory mode frees the language model's weights before it decodes an image, which then
    # uses their memory.
    decoding_bytes = 0 if janus.low_memory else pathway_of(janus).decoding_bytes()
    usable_bytes = SAFE_SHARE * available_memory() - reserved - decoding_bytes
    return max(int(usable_bytes / bytes_per_image), 0)


def _preview_function(
    janus: LoadedModel,
    finished: Sequence[GeneratedImage],
    unfinished: Sequence[Callable[[], Image.Image]],
) -> Callable[[], list[Image.Image]]:
    """Return the function that ``ImageStep.preview`` calls, for use in any thread.

    It returns the finished images, and decodes the others in the model's thread. If there are no
    others, it does not need the model, and works even after the model is closed.

    Args:
        janus: the model.
        finished: the images finished so far.
        unfinished: functions that decode the other images of the group, as far as they are made.
    """
    ready = [image.image for image in finished]  # a copy, because the caller extends ``finished``

    def preview() -> list[Image.Image]:
        return ready + [decode() for decode in unfinished]

    return partial(janus.thread.call, preview) if unfinished else preview
