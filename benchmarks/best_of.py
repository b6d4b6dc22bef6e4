"""Measure best of N: ``python benchmarks/best_of.py``.

Images of the shapes benchmark's prompts are drawn and judged exactly. For each N, the image that
the model scores highest is compared with one of the N by chance, and with the judge's own choice,
which is right if any of the N is. All wordings score the same images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

import mlx_janus

# isort: split
import numpy as np

from mlx_janus.evaluation.drawing import TASKS, drawing_prompts
from mlx_janus.inference.best_of import DEFAULT_WORDING, WORDINGS, score_images
from mlx_janus.worlds import judge

NUMBERS = (1, 2, 4, 8)  # images among which one is chosen
_DRAWN = max(NUMBERS)  # images of each prompt


@dataclass(frozen=True)
class JudgedPrompt:
    """The images of a prompt: which are right, and their scores by each wording."""

    task: str
    right: tuple[bool, ...]
    scores: Mapping[str, tuple[float, ...]]  # by the name of the wording


def judge_prompts(
    janus: mlx_janus.JanusPipeline, prompts: int, seed: int, wordings: Sequence[str]
) -> Iterable[JudgedPrompt]:
    """Draw, judge and score the images of each task's prompts; yield the prompts.

    Args:
        janus: the model.
        prompts: prompts of each task.
        seed: seed of prompts and images.
        wordings: names in ``WORDINGS``.
    """
    for number, task in enumerate(TASKS):
        for i, target in enumerate(drawing_prompts(task, prompts, seed)):
            # No two prompts share a seed: each has 100, and each task 10 million.
            first_seed = 10_000_000 * (number + 1) + 100 * i + seed
            drawn = janus.generate_images(target.prompt, n=_DRAWN, seed=first_seed)
            images = [result.image for result in drawn]
            right = tuple(target.is_met(judge.read(image)) for image in images)
            scores = {}
            for name in wordings:
                scores[name] = _scores(janus, target.prompt, images, name)
            yield JudgedPrompt(task, right, scores)


def _scores(
    janus: mlx_janus.JanusPipeline, prompt: str, images: Sequence, wording: str
) -> tuple[float, ...]:
    """Return the scores of images by a wording, computed in the model's thread."""
    scores = score_images(janus, prompt, images, WORDINGS[wording])
    return janus.thread.call(lambda: tuple(scores))


def share_right(prompt: JudgedPrompt, n: int, choice: str) -> float:
    """Return how often the right image is chosen, when one of ``n`` is chosen.

    The images of the prompt are split into groups of ``n``. The result is the share of groups whose
    chosen image is right.

    Args:
        prompt: the prompt.
        n: images in a group.
        choice: the way to choose: "chance", "judge" (a right image if there is one), or the name of
            a wording (the image of the highest score).
    """
    if choice == "chance":
        return float(np.mean(prompt.right))
    outcomes = []
    for start in range(0, _DRAWN, n):
        right = prompt.right[start : start + n]
        if choice == "judge":
            outcomes.append(any(right))
        else:
            scores = prompt.scores[choice][start : start + n]
            outcomes.append(right[int(np.argmax(scores))])
    return float(np.mean(outcomes))


def overall(prompts: Sequence[JudgedPrompt], n: int, choice: str) -> tuple[float, float]:
    """Return the mean share of right choices, and its standard error. Tasks have equal weight."""
    means = []
    variances = []
    for task in TASKS:
        shares = [share_right(one, n, choice) for one in prompts if one.task == task]
        means.append(np.mean(shares))
        variances.append(np.var(shares, ddof=1) / len(shares) if len(shares) > 1 else 0.0)
    return float(np.mean(means)), float(np.sqrt(np.sum(variances)) / len(TASKS))


def table(prompts: Sequence[JudgedPrompt], wordings: Sequence[str]) -> list[str]:
    """Return the lines of two Markdown tables: all tasks by N, and each task at the largest N."""
    lines = ["| chosen by | " + " | ".join(f"N = {n}" for n in NUMBERS) + " |"]
    lines.append("|---|" + "---|" * len(NUMBERS))
    choices = ("chance", *wordings, "judge")
    for choice in choices:
        cells = []
        for n in NUMBERS:
            mean, error = overall(prompts, n, choice)
            cells.append(f"{mean:.1%} ± {error:.1%}")
        lines.append(f"| {_label(choice)} | " + " | ".join(cells) + " |")
    lines += ["", f"| N = {_DRAWN} | " + " | ".join(TASKS) + " |", "|---|" + "---|" * len(TASKS)]
    for choice in choices:
        cells = []
        for task in TASKS:
            shares = [share_right(one, _DRAWN, choice) for one in prompts if one.task == task]
            cells.append(f"{np.mean(shares):.0%}")
        lines.append(f"| {_label(choice)} | " + " | ".join(cells) + " |")
    return lines


def _label(choice: str) -> str:
    """Return the name of a choice in the tables."""
    if choice in ("chance", "judge"):
        return {"chance": "chance", "judge": "the judge (the ceiling)"}[choice]
    wording = WORDINGS[choice]
    kind = ", yes or no" if wording.yes_no else ", the prompt as the answer"
    mark = " (the default)" if wording == DEFAULT_WORDING else ""
    return f"`{wording.question}`{kind}{mark}"


@click.command()
@click.option("-m", "--model", help="A folder.  [default: Janus-Tiny]")
@click.option("--prompts", type=int, default=8, show_default=True, help="Prompts of each task.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "-w",
    "--wording",
    "wordings",
    multiple=True,
    type=click.Choice(list(WORDINGS)),
    help="May be repeated.  [default: all]",
)
def main(model: str | None, prompts: int, seed: int, wordings: tuple[str, ...]) -> None:
    """Print the share of right images by N and by the way to choose."""
    janus = mlx_janus.load(model)
    names = wordings or tuple(WORDINGS)
    judged = []
    for one in judge_prompts(janus, prompts, seed, names):
        judged.append(one)
        click.echo(f"{len(judged)} of {prompts * len(TASKS)} prompts", err=True)
    click.echo("\n".join(table(judged, names)))


if __name__ == "__main__":
    main()
