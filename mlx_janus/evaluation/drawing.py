"""Drawing from prompts, after GenEval (arXiv 2310.11513): six tasks, several images per prompt.

An image is right if it holds the prompt's objects and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np

from ..worlds import judge, language, shapes
from .sizes import Progress, Sizes

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline

TASKS = ("single object", "two objects", "counting", "colours", "position", "colour attribution")


@dataclass(frozen=True)
class DrawingTarget:
    """A prompt, and the objects that an image of it must show."""

    prompt: str
    things: tuple[language.Name, ...]  # shapes and colours; a colour of "" means any
    relation: str | None = None  # of the first thing to the second; None: any

    def is_met(self, found: Sequence[judge.Detection]) -> bool:
        """Return whether an image's objects are exactly ``things``, in ``relation`` if it is set.

        Args:
            found: the objects that the judge finds in the image.
        """
        if len(found) != len(self.things):
            return False
        if self.relation is None:
            return _match_one_to_one(self.things, found)
        first, second = self.things  # only prompts for two objects have a relation
        for a, b in permutations(found, 2):
            fits = _fits(a, first) and _fits(b, second)
            if fits and _is_related(a, b, self.relation):
                return True
        return False


def _fits(detection: judge.Detection, name: language.Name) -> bool:
    """Return whether an object has the shape and colour of a name; a colour of "" means any."""
    shape, colour = name
    if detection.shape != shape:
        return False
    return colour in ("", detection.colour)


def _match_one_to_one(names: Sequence[language.Name], found: Sequence[judge.Detection]) -> bool:
    """Return whether wanted names and found objects match one to one.

    A name without a colour may fit several objects, and another name only one of them. Therefore
    every object that fits the first name is tried.
    """
    if not names:
        return not found  # an object that is left over was not wanted
    first_name, *other_names = names
    for i, detection in enumerate(found):
        if not _fits(detection, first_name):
            continue
        others_found = [*found[:i], *found[i + 1 :]]
        if _match_one_to_one(other_names, others_found):
            return True
    return False


def _is_related(a: judge.Detection, b: judge.Detection, relation: str) -> bool:
    """Return whether ``a`` has a relation to ``b``, by GenEval's rule.

    The offset from the centre of ``b`` to that of ``a``, in the relation's direction, must be more
    than half of the distance between the centres.

    Args:
        a: a found object.
        b: another found object.
        relation: one of ``language.RELATIONS``.
    """
    dx = a.x - b.x
    dy = a.y - b.y
    offsets = {
        "left of": -dx,
        "right of": dx,
        "above": -dy,  # y grows down
        "below": dy,
    }
    distance = np.hypot(dx, dy)
    return bool(offsets[relation] > 0.5 * distance)


def drawing_prompts(
    task: str,
    count: int,
    seed: int,
    *,
    held_out: bool = True,
) -> list[DrawingTarget]:
    """Make the prompts of a task.

    The prompts of "colours", "position" and "colour attribution" name colours, so that they can ask
    for combinations held out of training. The prompts of "single object", "counting" and "two
    objects" name only shapes, none of which is held out.

    Args:
        task: one of ``TASKS``.
        count: number of prompts.
        seed: seed of the prompts.
        held_out: in prompts with colours, True to name only combinations held out of training;
            False to name only combinations of training, for example to choose settings.
    """
    # 13 and the task's index: this task's own random numbers
    random = np.random.default_rng([seed, 13, TASKS.index(task)])
    makers = {
        "single object": _single_object,
        "two objects": _two_objects,
        "counting": _counting,
        "colours": _colours,
        "position": _position,
        "colour attribution": _colour_attribution,
    }
    make = makers[task]
    return [make(index, random, held_out) for index in range(count)]


def _single_object(index: int, *_: Any) -> DrawingTarget:
    """Make prompt number ``index`` for one object: "a circle".

    The four shapes take turns; after each round the wording changes.
    """
    shape = shapes.SHAPES[index % 4]
    text = _word_prompt(shape, index // 4)
    return DrawingTarget(text, ((shape, ""),))  # "": of any colour


def _two_objects(index: int, random: np.random.Generator, *_: Any) -> DrawingTarget:
    """Make a random prompt for two objects of different shapes: "a circle and a star"."""
    chosen = random.choice(shapes.SHAPES, 2, replace=False).tolist()
    phrases = [language.with_article(shape) for shape in chosen]
    things = tuple((shape, "") for shape in chosen)  # "": of any colour
    return DrawingTarget(language.listed(phrases), things)


def _counting(index: int, *_: Any) -> DrawingTarget:
    """Make prompt number ``index`` for several objects of one shape: "three stars".

    The four shapes take turns. The number of objects is 2 in the first round of four prompts, then
    3, then 4, then 2 again.
    """
    shape = shapes.SHAPES[index % 4]
    round_number = index // 4
    objects = 2 + round_number % 3
    text = language.counted(objects, shape)
    return DrawingTarget(text, ((shape, ""),) * objects)  # "": of any colour


def _colours(index: int, random: np.random.Generator, held_out: bool) -> DrawingTarget:
    """Make prompt number ``index`` for one coloured object: "a purple circle".

    With ``held_out``, the four held-out pairs of shape and colour take turns. Otherwise the shape
    and the colour are those of the object in a random training scene.
    """
    if held_out:
        names = sorted(shapes.HELD_OUT)
        name = names[index % len(names)]
    else:
        scene = shapes.sample_scene(random, "single")
        name = scene.things[0].name
    shape, colour = name
    text = _word_prompt(f"{colour} {shape}", index // 4)
    return DrawingTarget(text, (name,))


def _word_prompt(noun: str, number: int) -> str:
    """Word a prompt for one object. The five wordings are used in turn as ``number`` grows."""
    text = language.with_article(noun)
    wordings = (
        text,
        f"one {noun}",
        f"a picture of {text}",
        f"there is {text}",
        f"draw {text}",
    )
    return wordings[number % len(wordings)]


def _position(index: int, random: np.random.Generator, held_out: bool) -> DrawingTarget:
    """Make prompt number ``index`` for two objects in a relation: "a red circle above a blue star".

    The four relations take turns. Shapes and colours are those of a sampled scene.
    """
    a, b = _sample_two_things(index, random, held_out)
    subject = language.phrase(a)
    landmark = language.phrase(b)
    relation = language.RELATIONS[index % 4]
    names = (a.name, b.name)
    return DrawingTarget(f"{subject} {relation} {landmark}", names, relation)


def _colour_attribution(index: int, random: np.random.Generator, held_out: bool) -> DrawingTarget:
    """Make prompt number ``index`` for two coloured objects: "a red circle and a blue star"."""
    things = _sample_two_things(index, random, held_out)
    phrases = [language.phrase(thing) for thing in things]
    names = tuple(thing.name for thing in things)
    return DrawingTarget(language.listed(phrases), names)


def _sample_two_things(
    index: int,
    random: np.random.Generator,
    held_out: bool,
) -> tuple[shapes.Thing, shapes.Thing]:
    """Sample two things that differ in shape and in colour.

    Args:
        index: number of the sample. A held-out sample is of the split "scenes" if this number is
            even, and of "pairs" if it is odd.
        random: source of all randomness.
        held_out: True to sample a held-out scene, False to sample a training scene.
    """
    split: shapes.Split = "train"
    if held_out:
        split = "pairs" if index % 2 else "scenes"
    while True:
        scene = shapes.sample_scene(random, "two", split)
        a, b = scene.things
        if a.shape != b.shape and a.colour != b.colour:
            return a, b


def measure_drawing(
    janus: JanusPipeline,
    sizes: Sizes,
    seed: int,
    progress: Progress,
    *,
    held_out: bool = True,
    **options: Any,
) -> dict[str, float]:
    """Measure the share of right images for each task, and the mean of all tasks as "overall".

    Args:
        janus: the model.
        sizes: number of prompts per task and of images per prompt.
        seed: seed of prompts and images.
        progress: called after every prompt.
        held_out: whether prompts with colours name combinations held out of training; see
            ``drawing_prompts``.
        options: options of ``generate_images``, such as ``cfg_weight``, instead of its defaults.
    """
    done = 0
    total = len(TASKS) * sizes.prompts
    results = {}
    for number, task in enumerate(TASKS):
        right = 0
        targets = drawing_prompts(task, sizes.prompts, seed, held_out=held_out)
        for i, target in enumerate(targets):
            # Image k of a prompt has the seed ``first_seed + k``. With at most 10,000 prompts per
            # task and 100 images per prompt, no two images have the same seed.
            first_seed = 1_000_000 * (number + 1) + 100 * i + seed
            drawn = janus.generate_images(
                target.prompt,
                n=sizes.drawn,
                seed=first_seed,
                **options,
            )
            for result in drawn:
                found = judge.read(result.image)
                right += target.is_met(found)
            done += 1
            progress("drawing", done, total)
        results[task] = right / (sizes.prompts * sizes.drawn)
    shares = list(results.values())
    results["overall"] = float(np.mean(shares))
    return results
