"""The forms in which benchmarks ask: does a model answer as well as when asked plainly?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..worlds import language, question_forms, shapes
from .answers import ATTRIBUTES, answer_to, held_out_questions
from .sizes import Progress, Sizes

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline

_FORMS: dict[str, question_forms.Form] = {
    "Please answer yes or no.": "yes or no",
    "a single word or phrase": "short",
    "options with letters": "options",
    "the published system prompt": "plain",
}


@dataclass(frozen=True)
class FormScores:
    """Right answers to questions in a form, from 0 to 1."""

    right: float  # of all questions
    right_if_plain: float  # of those that the model answers right in the plain form
    questions: int  # number of questions


def measure_forms(
    janus: JanusPipeline,
    sizes: Sizes,
    seed: int,
    progress: Progress,
) -> dict[str, FormScores]:
    """Ask questions about held-out scenes plainly and in each form.

    Args:
        janus: the model.
        sizes: its ``pictures`` is the number of questions for each form.
        seed: seed of scenes, questions and forms.
        progress: called after every question.
    """
    random = np.random.default_rng([seed, 15])  # 15: this part's own random numbers
    results = {}
    done = 0
    for name, form in _FORMS.items():
        outcomes = []
        for index in range(sizes.pictures):
            scene, plain = _sample_question(random, form, index)
            system = question_forms.SYSTEM_PROMPTS[0] if form == "plain" else None
            asked = question_forms.reword(plain, form, random)
            is_right = _is_right(janus, scene, asked, system=system)
            is_plain_right = _is_right(janus, scene, plain)
            outcomes.append((is_right, is_plain_right))
            done += 1
            progress("forms", done, len(_FORMS) * sizes.pictures)
        results[name] = _score(outcomes)
    return results


def _sample_question(
    random: np.random.Generator,
    form: question_forms.Form,
    index: int,
) -> tuple[shapes.Scene, language.Question]:
    """Sample a held-out scene and a question that fits a form; the topics take turns."""
    topics = ("existence", "position") if form == "yes or no" else ("existence", *ATTRIBUTES)
    topic = topics[index % len(topics)]
    for scene, question in held_out_questions(random, topic):
        if form != "yes or no" or question.answer in ("yes", "no"):
            return scene, question
    raise AssertionError("held_out_questions ends")  # pragma: no cover


def _is_right(
    janus: JanusPipeline,
    scene: shapes.Scene,
    question: language.Question,
    **options: Any,
) -> bool:
    """Return whether the model gives a question's answer; options are of ``generate_text``."""
    return answer_to(janus, scene, question, **options) == question.answer.lower()


def _score(outcomes: list[tuple[bool, bool]]) -> FormScores:
    """Score pairs: whether the answer in the form is right, and whether the plain one is."""
    in_form = [is_right for is_right, _ in outcomes]
    if_plain = [is_right for is_right, is_plain_right in outcomes if is_plain_right]
    return FormScores(
        right=sum(in_form) / len(in_form),
        right_if_plain=sum(if_plain) / len(if_plain) if if_plain else 0.0,
        questions=len(outcomes),
    )
