"""Forms in which published benchmarks ask: short answers, options with letters, system prompts.

A form changes the words of a question about a scene, and with options also its answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from .language import NUMBERS, Question, choose
from .shapes import COLOURS, SHAPES

Form = Literal["plain", "yes or no", "short", "options"]

YES_OR_NO = "Please answer yes or no."  # POPE (arXiv 2305.10355) and MME (arXiv 2306.13394)
SHORT = "Answer the question using a single word or phrase."  # LLaVA-1.5 (arXiv 2310.03744)
OPTIONS = "Answer with the option's letter from the given choices directly."  # LLaVA-1.5
LETTERS = "ABCD"
SYSTEM_PROMPTS = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language.",
    "You are a helpful assistant.",
    "Answer briefly.",
)
"""System prompts of training: that of the published models comes first."""

FORMS: dict[Form, float] = {"plain": 0.45, "yes or no": 0.08, "short": 0.12, "options": 0.35}
"""Share of each form in training."""

_PLACES = (
    "at the top left",
    "at the top",
    "at the top right",
    "at the left",
    "in the middle",
    "at the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
_OTHER_ENDINGS = (" in the image?", " in the picture?", " in this image?")
_ENDING_SHARE = 0.5  # share of existence and number questions with one of these endings


def sample_form(
    question: Question,
    random: np.random.Generator,
    shares: Mapping[Form, float] = FORMS,
) -> Question:
    """Put a question into a random form, or into the plain one if that form does not fit.

    Args:
        question: a question in its plain form.
        random: source of all randomness.
        shares: share of each form; they sum to 1.
    """
    forms = list(shares)
    probabilities = list(shares.values())
    form = forms[int(random.choice(len(forms), p=probabilities))]
    return reword(question, form, random)


def reword(question: Question, form: Form, random: np.random.Generator) -> Question:
    """Put a question into a form. In every form, some questions get another ending.

    Args:
        question: a question in its plain form.
        form: "yes or no" fits questions with these answers. "options" needs several answers to
            choose from, which a description has not. "short" does not fit a description. If the
            form does not fit, the result is in the plain form.
        random: for the words, and the order and choice of options.
    """
    asked = _vary_ending(question, random)
    if form == "yes or no" and question.answer in ("yes", "no"):
        return replace(asked, text=f"{asked.text} {YES_OR_NO}")
    if form == "short" and question.about != "description":
        return replace(asked, text=f"{asked.text}\n{SHORT}")
    candidates = _answers_like(question.answer)
    if form == "options" and candidates:
        return _with_options(asked, candidates, random)
    return asked


def _vary_ending(question: Question, random: np.random.Generator) -> Question:
    """Add "in the image" to some of the questions that ask what is there."""
    text = question.text
    asks_what_is_there = question.about == "existence" or text.endswith("are there?")
    if not asks_what_is_there or random.random() >= _ENDING_SHARE:
        return question
    ending = choose(random, _OTHER_ENDINGS)
    return replace(question, text=text.removesuffix("?") + ending)


def _answers_like(answer: str) -> tuple[str, ...]:
    """Return all answers of the same kind, such as all colours; empty for any other answer."""
    for kind in (("yes", "no"), tuple(COLOURS), SHAPES, NUMBERS, _PLACES):
        if answer in kind:
            return kind
    return ()


def _with_options(
    question: Question,
    candidates: tuple[str, ...],
    random: np.random.Generator,
) -> Question:
    """Add two to four options to a question; its answer becomes the letter of the right one."""
    wrong = [answer for answer in candidates if answer != question.answer]
    random.shuffle(wrong)
    options = [question.answer, *wrong[: len(LETTERS) - 1]]
    random.shuffle(options)
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    separator = choose(random, ("\n", "\n\n"))
    text = question.text + "\n" + "\n".join(lines) + separator + OPTIONS
    return replace(question, text=text, answer=LETTERS[options.index(question.answer)])
