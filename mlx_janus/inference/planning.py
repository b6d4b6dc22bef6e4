"""Drawing in two stages: the model writes a plan of the image, and then draws by it.

T2I-R1 was trained for this. Its prompts have the roles User and Assistant in both stages. A plan is
written for each image, and its text follows the prompt.

Source: ``reason_inference.py`` of T2I-R1 (arXiv 2505.00703).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial

import mlx.core as mx
from PIL import Image

from ..decode.sampling import derive_seed
from ..decode.text_options import TextOptions
from ..errors import ContextLengthError, OptionError
from ..processing.prompts import Prompts, Turn
from .loaded import LoadedModel
from .pathway import ImageJob, ReasoningPathway
from .pathways import pathway_of
from .results import GeneratedImage, ImageStep
from .text_generation import Prompt, answer_events, answer_pieces
from .text_steps import text_steps

Steps = Generator[ImageStep, None, None]
"""Steps of a drawing."""
MakeJob = Callable[[str], ImageJob]
"""Returns the job that draws by a plan. It raises an error if the plan is too long."""

MAX_PLAN_TOKENS = 512
TOP_K = 50  # likeliest tokens that the plan is sampled from
_SYSTEM = (
    "You are a helpful assistant that receives an image prompt and generate a visualization of the "
    "prompt."
)
_REQUEST = """\
You are asked to generate an image based on this prompt: "{}"
Provide a brief, precise visualization of all elements in the prompt. Your description should:
1. Include every object mentioned in the prompt
2. Specify visual attributes (color, number, shape, texture) if specified in the prompt
3. Clarify relationships (e.g., spatial) between objects if specified in the prompt
4. Be concise (50 words or less)
5. Focus only on what's explicitly stated in the prompt
6. Do not elaborate beyond the attributes or relationships specified in the prompt
Do not miss objects. Output your visualization directly without explanation:"""


def choose_plan(janus: LoadedModel, plan: object, *, edits: bool) -> bool | str:
    """Check the option ``plan``, and return whether to write plans, or the given plan.

    Args:
        janus: the model, whose name decides if ``plan`` is None.
        plan: the option's value.
        edits: whether images are to be changed.

    Raises:
        OptionError: the value has a wrong type. Or it asks for a plan, and images are to be
            changed or the model cannot draw by a plan.
    """
    if not isinstance(plan, bool | str | None):
        kind = type(plan).__name__
        raise OptionError(f"plan must be True, False, None or the text of a plan, got {kind}")
    can_plan = not edits and isinstance(pathway_of(janus), ReasoningPathway)
    if plan is None:
        return janus.trained_for_plans and can_plan
    if plan is not False and edits:
        raise OptionError("plan is for drawing prompts: leave plan or images out")
    if plan is not False and not can_plan:
        raise OptionError(
            "this model cannot draw by a plan, as models that draw image tokens can: leave plan out"
        )
    return plan


def plan_prompts(janus: LoadedModel) -> Prompts:
    """Return the templates of both stages: with T2I-R1's roles, unless others were requested."""
    return janus.prompts if janus.roles else janus.prompts.with_roles("plain")


def plan_ids(janus: LoadedModel, prompt: str) -> list[int]:
    """Return the token ids of the prompt that asks for a plan.

    Raises:
        ContextLengthError: the context has no room for a plan.
    """
    turn = Turn("user", _REQUEST.replace("{}", prompt.strip()))
    ids = plan_prompts(janus).answering([turn], _SYSTEM)
    context = janus.config.language.max_position_embeddings
    if len(ids) >= context:
        raise ContextLengthError(
            f"the prompt that asks for a plan is {len(ids)} tokens long, and this model's maximum "
            f"context length is {context}: shorten the prompt, or leave plan out"
        )
    return ids


def planned_job(janus: LoadedModel, job: ImageJob, plan: str) -> ImageJob:
    """Return the job that draws the image of another job by a plan.

    Raises:
        ContextLengthError: the context has no room for the plan and an image.
    """
    pathway = pathway_of(janus)
    assert isinstance(pathway, ReasoningPathway)  # ``choose_plan`` has checked it
    ids = pathway.prompt_ids_in(plan_prompts(janus), f"{job.prompt.strip()}. {plan}")
    return replace(job, ids=ids, plan=plan)


def write_plan(
    janus: LoadedModel, job: ImageJob, ids: Sequence[int], temperature: float, make_job: MakeJob
) -> Generator[str, None, ImageJob]:
    """Write the plan of an image. The job's seed decides the sampling.

    A plan is cut at its end if the context has no room for it and an image.

    Args:
        janus: the model.
        job: the image.
        ids: ``plan_ids`` of its prompt.
        temperature: the sampling temperature.
        make_job: makes the job that draws by a plan.

    Yields:
        Pieces of the plan.

    Returns:
        The job that draws by the plan.
    """
    seed = derive_seed(job.seed, "plan")
    options = TextOptions(
        max_tokens=MAX_PLAN_TOKENS, temperature=temperature, top_k=TOP_K, seed=seed
    )
    prompt = Prompt(ids, lambda _: [], reset_peak=False)  # without images
    tokens = yield from answer_pieces(answer_events(janus, prompt, options))
    mx.clear_cache()
    while True:
        # White space at the start is kept, as in T2I-R1. An image file cannot store NUL.
        plan = janus.prompts.decode(tokens).replace("\0", "")
        try:
            return make_job(plan)
        except ContextLengthError:
            if not tokens:
                raise
            # Drop the last sixteenth of the plan, and try again.
            tokens = tokens[: -max(len(tokens) // 16, 1)]


def planned_steps(
    janus: LoadedModel,
    jobs: Sequence[ImageJob],
    temperature: float,
    make_job: Callable[[ImageJob, str], ImageJob],
    draw: Callable[[Sequence[ImageJob]], Steps],
    *,
    reset_peak: bool = True,
) -> Steps:
    """Write the plan of each image and draw the image by it, one image after the other.

    Args:
        janus: the model.
        jobs: the images, without plans.
        temperature: the temperature of plans.
        make_job: makes the job that draws an image by a plan.
        draw: draws the images of jobs.
        reset_peak: whether MLX's peak memory is counted from the first step.

    Returns:
        The steps. Each image begins with those that write its plan, which have ``stage`` "plan".

    Raises:
        ContextLengthError: the context has no room for the question for a plan, or for the prompt
            and an image, even without a plan.
    """
    requests = {}
    for prompt, job in {job.prompt: job for job in jobs}.items():
        requests[prompt] = plan_ids(janus, prompt)
        make_job(job, "")  # to fail now if even the prompt without a plan is too long
    return _plan_and_draw(janus, jobs, requests, temperature, make_job, draw, reset_peak)


def _plan_and_draw(
    janus: LoadedModel,
    jobs: Sequence[ImageJob],
    requests: dict[str, list[int]],
    temperature: float,
    make_job: Callable[[ImageJob, str], ImageJob],
    draw: Callable[[Sequence[ImageJob]], Steps],
    reset_peak: bool,
) -> Steps:
    """Yield the steps of ``planned_steps``; ``requests`` has the ``plan_ids`` of each prompt."""
    if reset_peak:
        mx.reset_peak_memory()
    steps_per_image = pathway_of(janus).steps(jobs[0].options)
    done = 0  # steps of the images so far
    finished: list[GeneratedImage] = []
    for number, job in enumerate(jobs):
        later = steps_per_image * (len(jobs) - number - 1)  # steps of the images after this one
        total = done + steps_per_image + later
        earlier = [image.image for image in finished]
        pieces = write_plan(janus, job, requests[job.prompt], temperature, partial(make_job, job))
        to_step = partial(ImageStep, done, total, (), partial(list, earlier), "plan")
        planned = yield from text_steps(pieces, to_step)
        with contextlib.closing(draw([planned])) as steps:
            for step in steps:
                total = done + step.total + later
                preview = partial(_joined_preview, earlier, step)
                yield replace(step, index=done + step.index, total=total, _preview=preview)
                finished += step.images
        # Steps up to this image; images that were drawn again have more than expected.
        done = total - later


def _joined_preview(earlier: list[Image.Image], step: ImageStep) -> list[Image.Image]:
    """Return the images that were finished earlier, and then the preview of a step."""
    return earlier + step.preview()
