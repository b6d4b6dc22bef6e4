"""Answers about scenes: existence after POPE (arXiv 2305.10355), and attributes.

Existence asks "Is there a red circle?", with "yes" as often as "no", and three ways to pick an
absent object: random, popular (one of the most frequent in all images), adversarial (like a present
object except for its shape or colour). Attributes are colour, shape, number and position.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from ..worlds import language, shapes
from .sizes import Progress, Sizes

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline

# POPE's strategies to choose an absent object
STRATEGIES = ("random", "popular", "adversarial")
ATTRIBUTES = ("colour", "shape", "number", "position")  # keys of ``language.TOPICS``
_POPULAR_COUNT = 4  # the most frequent absent objects, of which "popular" chooses one


@dataclass(frozen=True)
class YesNoScores:
    """POPE's scores of yes-or-no questions, from 0 to 1."""

    accuracy: float
    f1: float  # of "yes"
    yes_rate: float  # share of questions answered with "yes"
    questions: int  # number of questions


def measure_existence(
    janus: JanusPipeline,
    sizes: Sizes,
    seed: int,
    progress: Progress,
) -> dict[str, YesNoScores]:
    """Measure POPE's scores on held-out scenes, for each strategy to choose an absent object."""
    random = np.random.default_rng([seed, 11])  # 11: this part's own random numbers
    held_out = _held_out_scenes(random)
    scenes = list(islice(held_out, sizes.pictures))
    names_by_frequency = _by_popularity(scenes)
    done = 0
    total = len(STRATEGIES) * len(scenes)
    results = {}
    for strategy in STRATEGIES:
        outcomes = []
        for scene in scenes:
            outcomes += _ask_about_present_and_absent(
                janus, scene, strategy, names_by_frequency, random
            )
            done += 1
            progress("existence", done, total)
        results[strategy] = _score_yes_no(outcomes)
    return results


def _by_popularity(scenes: Sequence[shapes.Scene]) -> list[language.Name]:
    """List the names (shape, colour) that occur in these scenes, the most frequent first.

    A name's frequency is the number of scenes that have it. Equally frequent names are in
    alphabetical order.
    """
    counts: Counter[language.Name] = Counter()
    for scene in scenes:
        names = {thing.name for thing in scene.things}
        counts.update(names)

    def sort_key(name: language.Name) -> tuple[int, language.Name]:
        return -counts[name], name

    return sorted(counts, key=sort_key)


def _ask_about_present_and_absent(
    janus: JanusPipeline,
    scene: shapes.Scene,
    strategy: str,
    names_by_frequency: Sequence[language.Name],
    random: np.random.Generator,
) -> list[tuple[bool, bool | None]]:
    """Ask the model whether a scene has a present object, then whether it has an absent one.

    If the scene has objects that are held out of training, the present object is one of them.

    Args:
        janus: the model.
        scene: the scene.
        strategy: how to choose the absent object, one of ``STRATEGIES``.
        names_by_frequency: the objects of all scenes, the most frequent first.
        random: source of all choices.

    Returns:
        For each question, whether the object is present, and the model's answer: True for "yes",
        False for "no", None for any other text.
    """
    meanings = {"yes": True, "no": False}
    names = sorted({thing.name for thing in scene.things})
    held_out = [name for name in names if name in shapes.HELD_OUT]
    present = _choose(random, held_out or names)
    absent = _choose_absent(strategy, names, names_by_frequency, random)
    outcomes = []
    for name, is_present in ((present, True), (absent, False)):
        shape, colour = name
        question = language.existence_question(shape, colour, yes=is_present)
        answer = answer_to(janus, scene, question)
        outcomes.append((is_present, meanings.get(answer)))
    return outcomes


def _choose_absent(
    strategy: str,
    present: Sequence[language.Name],
    names_by_frequency: Sequence[language.Name],
    random: np.random.Generator,
) -> language.Name:
    """Choose an object that is absent from a scene.

    Args:
        strategy: "random" chooses one of all absent objects; "popular", one of the most frequent
            of them; "adversarial", one that shares either its shape or its colour with a present
            object. If a strategy finds no object, any absent one is chosen.
        present: the objects of the scene.
        names_by_frequency: the objects of all scenes, the most frequent first.
        random: source of all choices.
    """
    absent = language.absent_names(present)
    candidates = absent
    if strategy == "popular":
        absent_by_frequency = [name for name in names_by_frequency if name not in present]
        candidates = absent_by_frequency[:_POPULAR_COUNT]
    elif strategy == "adversarial":
        candidates = language.near_misses(absent, present)
    return _choose(random, candidates or absent)


def _choose(random: np.random.Generator, names: Sequence[language.Name]) -> language.Name:
    """Choose one of the names with equal probability."""
    index = int(random.integers(len(names)))
    return names[index]


def _score_yes_no(outcomes: Sequence[tuple[bool, bool | None]]) -> YesNoScores:
    """Score the answers to one or more yes-or-no questions.

    Args:
        outcomes: for each question, whether "yes" is right, and the answer: True for "yes", False
            for "no", None for any other text, which counts as wrong.
    """
    questions = len(outcomes)
    right = 0
    true_positives = 0
    answered_yes = 0
    truly_yes = 0
    for is_yes, answer in outcomes:
        right += answer is is_yes
        true_positives += is_yes and answer is True
        answered_yes += answer is True
        truly_yes += is_yes
    # F1 is 2 TP / (2 TP + FP + FN). TP + FP counts the answers "yes", and TP + FN counts the
    # questions to which "yes" is right.
    f1_divisor = answered_yes + truly_yes
    return YesNoScores(
        accuracy=right / questions,
        f1=2 * true_positives / f1_divisor if f1_divisor else 0.0,
        yes_rate=answered_yes / questions,
        questions=questions,
    )


def measure_attributes(
    janus: JanusPipeline,
    sizes: Sizes,
    seed: int,
    progress: Progress,
) -> dict[str, float]:
    """Measure the share of right answers to questions about each attribute of held-out scenes."""
    random = np.random.default_rng([seed, 12])  # 12: this part's own random numbers
    done = 0
    total = len(ATTRIBUTES) * sizes.pictures
    results = {}
    for attribute in ATTRIBUTES:
        right = 0
        questions = held_out_questions(random, attribute)
        for scene, question in islice(questions, sizes.pictures):
            answer = answer_to(janus, scene, question)
            right += answer == question.answer
            done += 1
            progress("attributes", done, total)
        results[attribute] = right / sizes.pictures
    return results


def _held_out_scenes(random: np.random.Generator) -> Iterator[shapes.Scene]:
    """Yield held-out scenes without end, alternately of the splits "scenes" and "pairs".

    Empty scenes are left out.
    """
    yielded = 0
    while True:
        split: shapes.Split = "pairs" if yielded % 2 else "scenes"
        scene = shapes.sample_scene(random, split=split)
        if scene.things:
            yielded += 1
            yield scene


def held_out_questions(
    random: np.random.Generator,
    attribute: str,
) -> Iterator[tuple[shapes.Scene, language.Question]]:
    """Yield held-out scenes without end, each with a question about an attribute."""
    for scene in _held_out_scenes(random):
        try:
            question = language.question(scene, random, attribute)
        except ValueError:  # the scene allows no question about the attribute
            continue
        yield scene, question


def answer_to(
    janus: JanusPipeline,
    scene: shapes.Scene,
    question: language.Question,
    **options: Any,
) -> str:
    """Return the model's answer to a question about a scene, in lower case without a full stop.

    ``options`` are more options of ``generate_text``, such as ``system``.
    """
    image = shapes.render(scene)
    result = janus.generate_text(question.text, image, max_tokens=48, **options)
    answer = result.text.strip()
    return answer.lower().rstrip(".")
