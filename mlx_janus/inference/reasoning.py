"""Drawing with a plan before it, and judgements after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .image_generation import generate_steps
from .loaded import LoadedModel
from .pathway import ImageJob, ReasoningPathway
from .pathways import pathway_of
from .planning import Steps, choose_plan, planned_job, planned_steps
from .reflection import check_reflect, check_room, reflected_steps


def reasoned_steps(
    janus: LoadedModel,
    jobs: Sequence[ImageJob],
    *,
    plan: bool | str | None = None,
    reflect: int = 0,
    reset_peak: bool = True,
) -> Steps:
    """Check the options of reasoning, and return the steps that generate the images of jobs.

    Args:
        janus: the model.
        jobs: images with equal options.
        plan: True: write a plan before each drawing; False: write none; None: write one if the
            model was trained for it; a text: draw by this plan.
        reflect: how often an image is judged and drawn again, at most.
        reset_peak: whether MLX's peak memory is counted from the first step.

    Raises:
        OptionError: an option has a wrong type or is out of range, or does not suit the model or
            images to change.
        PromptError: a prompt does not fit into the context.
    """
    edits = jobs[0].inputs is not None
    chosen = choose_plan(janus, plan, edits=edits)
    rounds = check_reflect(janus, reflect, edits=edits)
    if chosen is False and not rounds:
        return generate_steps(janus, jobs, reset_peak=reset_peak)
    pathway = pathway_of(janus)
    assert isinstance(pathway, ReasoningPathway)  # the checks above found that it is
    temperature = pathway.temperature(jobs[0].options)

    def make_job(job: ImageJob, text: str) -> ImageJob:
        """Return the job that draws by a plan."""
        planned = planned_job(janus, job, text)
        return check_room(janus, planned) if rounds else planned

    def draw(jobs: Sequence[ImageJob]) -> Steps:
        """Draw the images of a part of the request."""
        if rounds:
            return reflected_steps(janus, jobs, rounds, temperature, reset_peak=False)
        return generate_steps(janus, jobs, reset_peak=False)

    if chosen is True:
        return planned_steps(janus, jobs, temperature, make_job, draw, reset_peak=reset_peak)
    if chosen is not False:  # it is the plan
        jobs = _jobs_by_plan(jobs, chosen, make_job)
    if not rounds:
        return generate_steps(janus, jobs, reset_peak=reset_peak)
    for job in {job.prompt: job for job in jobs}.values():
        check_room(janus, job)
    return reflected_steps(janus, jobs, rounds, temperature, reset_peak=reset_peak)


def _jobs_by_plan(
    jobs: Sequence[ImageJob], plan: str, make_job: Callable[[ImageJob, str], ImageJob]
) -> list[ImageJob]:
    """Return the jobs that draw by a given plan. Each prompt is laid out only once."""
    of_prompts = {job.prompt: job for job in jobs}
    planned = {prompt: make_job(job, plan) for prompt, job in of_prompts.items()}
    return [replace(planned[job.prompt], seed=job.seed) for job in jobs]
