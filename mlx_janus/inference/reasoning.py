"""Drawing with a plan before it, and judgements after it."""

from __future__ import annotations

from collections.abc import Sequence
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
    of_prompts = {job.prompt: job for job in jobs}
    if isinstance(chosen, str):
        of_prompts = {prompt: make_job(job, chosen) for prompt, job in of_prompts.items()}
        jobs = [replace(of_prompts[job.prompt], seed=job.seed) for job in jobs]
    if not rounds:
        return generate_steps(janus, jobs, reset_peak=reset_peak)
    for job in of_prompts.values():
        check_room(janus, job)
    return reflected_steps(janus, jobs, rounds, temperature, reset_peak=reset_peak)
