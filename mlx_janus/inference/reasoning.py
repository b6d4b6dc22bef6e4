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
    """Check ``plan`` and ``reflect``, and return the steps that generate the images of jobs.

    Args:
        janus: the model.
        jobs: images with equal options.
        plan: whether to write plans; None: if the model was trained for it; a text: the plan.
        reflect: how often an image is judged and drawn again, at most.
        reset_peak: whether MLX's peak memory is counted from the first step.

    Raises:
        OptionError: an option is out of range, or does not suit the model or a change of images.
        PromptError: a prompt does not fit into the context.
    """
    edits = jobs[0].inputs is not None
    chosen = choose_plan(janus, plan, edits=edits)
    rounds = check_reflect(janus, reflect, edits=edits)
    if chosen is False and not rounds:
        return generate_steps(janus, jobs, reset_peak=reset_peak)
    pathway = pathway_of(janus)
    assert isinstance(pathway, ReasoningPathway)  # as checked above
    temperature = pathway.temperature(jobs[0].options)

    def make_job(job: ImageJob, text: str) -> ImageJob:
        """Return the job that draws by a plan; with ``reflect``, check the room for judgements."""
        planned = planned_job(janus, job, text)
        return check_room(janus, planned) if rounds else planned

    def draw(jobs: Sequence[ImageJob]) -> Steps:
        """Return the steps that draw images and, with ``reflect``, judge them."""
        if rounds:
            return reflected_steps(janus, jobs, rounds, temperature, reset_peak=False)
        return generate_steps(janus, jobs, reset_peak=False)

    if chosen is True:
        return planned_steps(janus, jobs, temperature, make_job, draw, reset_peak=reset_peak)
    if chosen is not False:  # ``chosen`` is the text of the plan
        jobs = _jobs_by_plan(jobs, chosen, make_job)
    if not rounds:
        return generate_steps(janus, jobs, reset_peak=reset_peak)
    for job in {job.prompt: job for job in jobs}.values():  # one job of each prompt
        check_room(janus, job)
    return reflected_steps(janus, jobs, rounds, temperature, reset_peak=reset_peak)


def _jobs_by_plan(
    jobs: Sequence[ImageJob], plan: str, make_job: Callable[[ImageJob, str], ImageJob]
) -> list[ImageJob]:
    """Return the jobs that draw by a given plan. The ids of each prompt are made only once."""
    job_of_prompt = {job.prompt: job for job in jobs}
    planned = {prompt: make_job(job, plan) for prompt, job in job_of_prompt.items()}
    return [replace(planned[job.prompt], seed=job.seed) for job in jobs]
