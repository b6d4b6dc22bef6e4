"""Texts about scenes of the shapes world: captions to draw from, and questions with answers.

Keep the order of random draws in every function. Janus-Tiny's training and the benchmark are
reproduced from seeds, so a seed must go on giving the same texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import TypeVar

import numpy as np

from .shapes import COLOURS, HELD_OUT, SHAPES, SIDE, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
_WORDINGS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}
# Options are equally likely, here and below: one that is listed twice is chosen twice as often.
_PREFIXES = ("", "", "", "there is ", "a picture of ", "draw ", "one ")
# Shares of captions that name each thing by its shape and colour, by its shape, or by its colour.
_NAMED_BY = {"both": 0.68, "shape": 0.2, "colour": 0.12}
_CLEARANCE = 2.0  # pixels: a thing this near to a boundary between two places has no clear place

Name = tuple[str, str]
"""Shape and colour of a thing; "" means any shape or any colour."""
Option = TypeVar("Option")


@dataclass(frozen=True)
class Question:
    """A question about a scene, with its answer."""

    text: str
    answer: str
    about: str  # a key of ``TOPICS``


# Words and phrases


def relation(a: Thing, b: Thing, least_distance: float = 8.0) -> str | None:
    """Return the relation of ``a`` to ``b``, one of ``RELATIONS``, or None if it is not obvious.

    The axis with the longer distance between the centres decides. The relation is not obvious if
    this distance is short, or if the distance on the other axis is about as long.

    Args:
        a: a thing.
        b: another thing.
        least_distance: least distance of the centres on the deciding axis, in pixels.
    """
    dx = a.x - b.x
    dy = a.y - b.y
    longer = max(abs(dx), abs(dy))
    shorter = min(abs(dx), abs(dy))
    is_diagonal = longer < 1.3 * shorter
    if longer < least_distance or is_diagonal:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def place(thing: Thing) -> str:
    """Name the place of a thing, one of nine: "at the top left", "at the left", "in the middle"."""
    # 0, 1 or 2; a centre on the right or bottom edge is in the last column or row too.
    column = min(int(3 * thing.x / SIDE), 2)
    row = min(int(3 * thing.y / SIDE), 2)
    vertical = ("top", "", "bottom")[row]
    horizontal = ("left", "", "right")[column]
    words = f"{vertical} {horizontal}".strip()
    return f"at the {words}" if words else "in the middle"


def is_place_clear(thing: Thing) -> bool:
    """Return whether a thing's centre is not too near to a boundary between two places."""
    # The nine places are a grid of 3 x 3.
    for boundary in (SIDE / 3, SIDE * 2 / 3):
        distance = min(abs(thing.x - boundary), abs(thing.y - boundary))
        if distance <= _CLEARANCE:
            return False
    return True


def _are_places_clear(things: Iterable[Thing]) -> bool:
    """Return whether each of these things has a clear place."""
    return all(map(is_place_clear, things))


def phrase(thing: Thing) -> str:
    """Name a thing: "a red circle", "an orange circle"."""
    return with_article(f"{thing.colour} {thing.shape}")


def with_article(noun: str) -> str:
    """Put "a" or "an" before a noun."""
    article = "an" if noun[0] in "aeiou" else "a"
    return f"{article} {noun}"


def counted(n: int, noun: str) -> str:
    """Put a number from 0 to 4 before a noun: "zero stars", "a star", "two stars"."""
    if n == 1:
        return with_article(noun)
    return f"{NUMBERS[n]} {noun}s"


def listed(phrases: Sequence[str]) -> str:
    """Join phrases: "a, b and c"."""
    *others, last = phrases
    if not others:
        return last
    beginning = ", ".join(others)
    return f"{beginning} and {last}"


def choose(random: np.random.Generator, options: Sequence[Option]) -> Option:
    """Choose one of the options with equal probability."""
    index = int(random.integers(len(options)))
    return options[index]


def _choose_key(random: np.random.Generator, shares: Mapping[str, float]) -> str:
    """Choose one key of ``shares``; a key's value is its probability."""
    keys = list(shares)
    probabilities = list(shares.values())
    return str(random.choice(keys, p=probabilities))


# Captions


def caption(scene: Scene, random: np.random.Generator) -> str:
    """Word a caption that names all things of a scene.

    In most captions, a thing is named by its shape and colour; in some, only by its shape or only
    by its colour. Some captions of one or two things also say where the things are.
    """
    things = list(scene.things)
    if not things:
        return choose(random, ("nothing", "an empty picture", "a plain picture"))
    named_by = _choose_key(random, _NAMED_BY)  # the same for every thing of a caption
    if len(things) == 1:
        text = _caption_for_one(things[0], named_by, random)
    elif len(things) == 2:
        text = _caption_for_two(things, named_by, random)
    else:
        text = _caption_with_counts(things, named_by, random)
    return _add_prefix(text, random)


def _caption_for_one(thing: Thing, named_by: str, random: np.random.Generator) -> str:
    """Word a caption for one thing, sometimes with its place."""
    noun = _noun(thing, named_by)
    text = with_article(noun)
    if random.random() < 0.2 and is_place_clear(thing):
        text += f" {place(thing)}"
    return text


def _caption_for_two(things: list[Thing], named_by: str, random: np.random.Generator) -> str:
    """Word a caption for two things: with each one's place, with their relation, or with neither.

    This may change the order of the list ``things``.
    """
    if random.random() < 0.3 and _are_places_clear(things):
        random.shuffle(things)
        phrases = []
        for thing in things:
            noun = _noun(thing, named_by)
            phrases.append(f"{with_article(noun)} {place(thing)}")
        return listed(phrases)
    first, second = things
    if random.random() < 0.7 and relation(first, second):
        return _caption_with_relation(things, named_by, random)
    return _caption_with_counts(things, named_by, random)


def _caption_with_relation(
    things: Sequence[Thing], named_by: str, random: np.random.Generator
) -> str:
    """Word a caption for two things that says where one is, relative to the other.

    The two things must have an obvious ``relation``.
    """
    first, second = things
    if random.random() >= 0.5:
        first, second = second, first
    relation_name = relation(first, second)
    assert relation_name is not None
    subject = _noun(first, named_by)
    landmark = _noun(second, named_by)
    wording = choose(random, _WORDINGS[relation_name])
    return f"{with_article(subject)} {wording} {with_article(landmark)}"


def _caption_with_counts(
    things: Sequence[Thing], named_by: str, random: np.random.Generator
) -> str:
    """List things in random order, with a number for equal ones: "two red circles and a star"."""
    counts = Counter(_noun(thing, named_by) for thing in things)
    nouns = list(counts)
    random.shuffle(nouns)
    phrases = [counted(counts[noun], noun) for noun in nouns]
    return listed(phrases)


def _noun(thing: Thing, named_by: str) -> str:
    """Name a thing without an article.

    Args:
        thing: the thing.
        named_by: "both" for "red circle", "shape" for "circle", "colour" for "red shape".
    """
    nouns = {
        "both": f"{thing.colour} {thing.shape}",
        "shape": thing.shape,
        "colour": f"{thing.colour} shape",
    }
    return nouns[named_by]


def _add_prefix(text: str, random: np.random.Generator) -> str:
    """Put a random prefix, which may be empty, before a caption."""
    prefix = choose(random, _PREFIXES)
    if prefix == "one ":  # it replaces "a" or "an", but not a number such as "two"
        first_word, remaining = text.split(" ", 1)
        return f"one {remaining}" if first_word in ("a", "an") else text
    is_plural = text.startswith(NUMBERS[2:])  # "two" and more
    if is_plural and prefix == "there is ":
        prefix = "there are "
    return f"{prefix}{text}"


def describe(scene: Scene) -> str:
    """List the things of a scene in reading order, each with its place."""
    if not scene.things:
        return "nothing"
    phrases = [f"{phrase(thing)} {place(thing)}" for thing in scene.things]
    return listed(phrases)


# Questions: each function ``ask_...`` returns a question about a scene, or None if it finds none.

_AskFunction = Callable[[Scene, np.random.Generator], Question | None]


def ask_existence(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask whether a scene has a shape, a colour, or a shape in a colour.

    "yes" and "no" are equally likely. For "no", most pairs of shape and colour differ from a
    present pair only in shape or only in colour. An absent pair in ``HELD_OUT`` is never used,
    because training would teach that it does not exist.
    """
    asked_for = choose(random, ("both", "both", "both", "shape", "colour"))
    yes = bool(random.random() < 0.5)
    present = {thing.name for thing in scene.things}
    if asked_for == "shape":
        candidates = _shapes_to_ask_for(present, yes=yes)
    elif asked_for == "colour":
        candidates = _colours_to_ask_for(present, yes=yes)
    elif yes:
        candidates = sorted(present)
    else:
        candidates = _absent_names_to_ask_for(present, random)
    if not candidates:
        return None
    shape, colour = choose(random, candidates)
    opening = choose(random, ("Is there", "Is there", "Do you see"))
    return existence_question(shape, colour, yes=yes, opening=opening)


def _shapes_to_ask_for(present: Collection[Name], *, yes: bool) -> list[Name]:
    """List the present shapes if ``yes``, else the absent shapes, as names of any colour ("")."""
    present_shapes = {shape for shape, _ in present}
    return [(shape, "") for shape in SHAPES if (shape in present_shapes) == yes]


def _colours_to_ask_for(present: Collection[Name], *, yes: bool) -> list[Name]:
    """List the present colours if ``yes``, else the absent colours, as names of any shape ("")."""
    present_colours = {colour for _, colour in present}
    return [("", colour) for colour in COLOURS if (colour in present_colours) == yes]


def _absent_names_to_ask_for(present: Collection[Name], random: np.random.Generator) -> list[Name]:
    """List the pairs of shape and colour to ask for if the answer is "no".

    These are the absent pairs that are not held out of training. If some of them are near misses,
    often only these are listed.
    """
    absent = [name for name in absent_names(present) if name not in HELD_OUT]
    near = near_misses(absent, present)
    if near and random.random() < 0.6:
        return near
    return absent


def absent_names(present: Collection[Name]) -> list[Name]:
    """List all pairs of shape and colour except the present ones."""
    names = product(SHAPES, COLOURS)
    return [name for name in names if name not in present]


def near_misses(names: Iterable[Name], present: Collection[Name]) -> list[Name]:
    """Select the names that differ from a present one only in shape, or only in colour."""

    def is_near_miss(name: Name) -> bool:
        """Return whether a present name has the same shape or the same colour, but not both."""
        shape, colour = name
        for present_shape, present_colour in present:
            same_shape = shape == present_shape
            same_colour = colour == present_colour
            if same_shape != same_colour:
                return True
        return False

    return [name for name in names if is_near_miss(name)]


def existence_question(
    shape: str,
    colour: str,
    *,
    yes: bool,
    opening: str = "Is there",
) -> Question:
    """Word a question like "Is there a red circle?".

    Args:
        shape: "" for any shape.
        colour: "" for any colour.
        yes: True if the answer is "yes", False if it is "no".
        opening: the first words of the question.
    """
    noun = f"{colour} {shape or 'shape'}".strip()
    text = f"{opening} {with_article(noun)}?"
    answer = "yes" if yes else "no"
    return Question(text, answer, "existence")


def ask_colour(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask for the colour of a thing whose shape occurs once in the scene."""
    counts = Counter(thing.shape for thing in scene.things)
    unique = [thing for thing in scene.things if counts[thing.shape] == 1]
    if not unique:
        return None
    thing = choose(random, unique)
    spelling = choose(random, ("color", "colour"))
    usual = f"What {spelling} is the {thing.shape}?"
    other = f"Which {spelling} does the {thing.shape} have?"
    text = choose(random, (usual, usual, other))
    return Question(text, thing.colour, "colour")


def ask_shape(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask for the shape of a thing whose colour occurs once in the scene."""
    counts = Counter(thing.colour for thing in scene.things)
    unique = [thing for thing in scene.things if counts[thing.colour] == 1]
    if not unique:
        return None
    thing = choose(random, unique)
    wordings = (
        f"What shape is {thing.colour}?",
        f"Which shape is {thing.colour}?",
        f"What is the {thing.colour} shape?",
    )
    text = choose(random, wordings)
    return Question(text, thing.shape, "shape")


def ask_number(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask for the number of all things, of the things of a shape, or of the things of a colour.

    In a few questions, the shape or the colour is absent, so the answer is "zero".
    """
    counted_by = choose(random, ("all", "shape", "shape", "colour"))
    if counted_by == "all":
        return _ask_how_many(scene)
    options: Sequence[str]
    if counted_by == "shape":
        ending = "s"  # "How many stars are there?"
        options = SHAPES
        present = [thing.shape for thing in scene.things]
    else:
        ending = " shapes"  # "How many red shapes are there?"
        options = tuple(COLOURS)
        present = [thing.colour for thing in scene.things]
    if present and random.random() < 0.8:
        options = present  # with repeats, so a frequent one is asked for more often
    asked_for = choose(random, options)
    number = present.count(asked_for)
    text = f"How many {asked_for}{ending} are there?"
    return Question(text, NUMBERS[number], "number")


def _ask_how_many(scene: Scene) -> Question:
    """Ask for the number of all things."""
    number = len(scene.things)
    return Question("How many shapes are there?", NUMBERS[number], "number")


def ask_place(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask where a thing is. Its name must be unique in the scene, and its place must be clear."""
    candidates = [thing for thing in _unique_things(scene) if is_place_clear(thing)]
    if not candidates:
        return None
    thing = choose(random, candidates)
    text = f"Where is the {thing.colour} {thing.shape}?"
    return Question(text, place(thing), "position")


def ask_relation(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask whether a thing is left of, right of, above or below another.

    "yes" and "no" are equally likely. Where "no" is right, the question names the opposite of the
    true relation.
    """
    candidates = []
    unique = _unique_things(scene)
    for a, b in permutations(unique, 2):
        true_relation = relation(a, b)
        if true_relation:
            candidates.append((a, b, true_relation))
    if not candidates:
        return None
    a, b, asked_relation = choose(random, candidates)
    answer = "yes"
    if random.random() >= 0.5:
        answer = "no"
        asked_relation = _opposite(asked_relation)
    wording = choose(random, _WORDINGS[asked_relation])
    text = f"Is the {a.colour} {a.shape} {wording} the {b.colour} {b.shape}?"
    return Question(text, answer, "position")


def _opposite(relation_name: str) -> str:
    """Return the opposite of a relation; ``RELATIONS`` lists opposites next to each other."""
    index = RELATIONS.index(relation_name)
    return RELATIONS[index ^ 1]  # 0 becomes 1, 1 becomes 0, 2 becomes 3, and 3 becomes 2


def _unique_things(scene: Scene) -> list[Thing]:
    """List the things whose combination of shape and colour occurs once in the scene."""
    counts = Counter(thing.name for thing in scene.things)
    return [thing for thing in scene.things if counts[thing.name] == 1]


def ask_content(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask which thing is at a place, or which colour or shape it has.

    The place must hold only one thing, and all things of the scene must have clear places.
    """
    counts = Counter(map(place, scene.things))
    candidates = [thing for thing in scene.things if counts[place(thing)] == 1]
    if not candidates or not _are_places_clear(scene.things):
        return None
    thing = choose(random, candidates)
    where = place(thing)
    spelling = choose(random, ("color", "colour"))
    answer_by_text = {
        f"What {spelling} is the shape {where}?": thing.colour,
        f"What shape is {where}?": thing.shape,
        f"What is {where}?": phrase(thing),
    }
    text = choose(random, tuple(answer_by_text))
    return Question(text, answer_by_text[text], "content")


def ask_description(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask for a description of the scene. All its things must have clear places."""
    if not _are_places_clear(scene.things):
        return None
    wordings = ("Describe the picture.", "What is in the picture?", "What do you see?")
    text = choose(random, wordings)
    return Question(text, describe(scene), "description")


TOPICS: dict[str, tuple[_AskFunction, ...]] = {
    "existence": (ask_existence,),
    "colour": (ask_colour,),
    "shape": (ask_shape,),
    "number": (ask_number,),
    "position": (ask_place, ask_relation),
    "content": (ask_content,),
    "description": (ask_description,),
}
LOOKUPS = {
    "existence": 0.08,
    "colour": 0.22,
    "shape": 0.22,
    "number": 0.05,
    "position": 0.14,
    "content": 0.15,
    "description": 0.14,
}
"""Shares of topics to begin training with: most questions are about one thing of the scene."""
SHARES = {
    "existence": 0.27,
    "colour": 0.16,
    "shape": 0.12,
    "number": 0.14,
    "position": 0.22,
    "content": 0.06,
    "description": 0.03,
}
"""Shares of topics. Descriptions are few, because long answers would dominate the loss."""

PLACES = {
    "existence": 0.14,
    "colour": 0.08,
    "shape": 0.08,
    "number": 0.2,
    "position": 0.46,
    "content": 0.02,
    "description": 0.02,
}
"""Shares of topics to end training with: most questions are of those that take longest to learn."""


def question(
    scene: Scene,
    random: np.random.Generator,
    about: str | None = None,
    *,
    shares: Mapping[str, float] = SHARES,
) -> Question:
    """Ask a question about a scene.

    The functions in ``TOPICS`` may find no question, so this makes up to 20 attempts. If all fail
    and ``about`` is None, the question is how many shapes there are.

    Args:
        scene: the scene.
        random: source of all randomness.
        about: the topic, a key of ``TOPICS``; None for a random one.
        shares: probability of each topic if ``about`` is None; they sum to 1.

    Raises:
        ValueError: the scene allows no question about the topic. For example, an empty scene has
            no colours.
    """
    for _ in range(20):
        topic = about or _choose_key(random, shares)
        ask = choose(random, TOPICS[topic])
        asked = ask(scene, random)
        if asked is not None:
            return asked
    if about:
        raise ValueError(f"the scene allows no question about {about}")
    return _ask_how_many(scene)
