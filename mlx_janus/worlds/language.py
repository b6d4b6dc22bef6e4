"""Texts about scenes of the shapes world: captions to draw from, and questions with their answers.

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
# ``_any`` picks a repeated option more often, here and below.
_PREFIXES = ("", "", "", "there is ", "a picture of ", "draw ", "one ")
_DETAILS = {"both": 0.68, "shape": 0.2, "colour": 0.12}  # shares of captions that name these
_CLEAR = 2.0  # pixels: a thing this near to a boundary between two places has no clear place

Name = tuple[str, str]
"""Shape and colour; either may be "" for any."""
Option = TypeVar("Option")


@dataclass(frozen=True)
class Question:
    """A question about a scene, its answer, and its topic, a key of ``MAKERS``."""

    text: str
    answer: str
    about: str


# Words and phrases


def relation(a: Thing, b: Thing, clear: float = 8.0) -> str | None:
    """Return the relation of ``a`` to ``b``, one of ``RELATIONS``, or None if it is not obvious.

    The axis on which the centres lie farther apart decides. The relation is not obvious if they are
    close, or about as far apart on the other axis.

    Args:
        a: a thing.
        b: another.
        clear: least distance of the centres on the deciding axis, in pixels.
    """
    dx = a.x - b.x
    dy = a.y - b.y
    longer = max(abs(dx), abs(dy))
    shorter = min(abs(dx), abs(dy))
    if longer < clear or longer < 1.3 * shorter:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def place(thing: Thing) -> str:
    """Return one of nine places: "at the top left", "at the left", "in the middle", ..."""
    column = min(int(3 * thing.x / SIDE), 2)
    row = min(int(3 * thing.y / SIDE), 2)
    vertical = ("top", "", "bottom")[row]
    horizontal = ("left", "", "right")[column]
    words = f"{vertical} {horizontal}".strip()
    return f"at the {words}" if words else "in the middle"


def is_place_clear(thing: Thing) -> bool:
    """Return whether a thing's centre is more than ``_CLEAR`` pixels from all place boundaries."""
    for boundary in (SIDE / 3, SIDE * 2 / 3):
        nearest = min(abs(thing.x - boundary), abs(thing.y - boundary))
        if nearest <= _CLEAR:
            return False
    return True


def _are_places_clear(things: Iterable[Thing]) -> bool:
    """Return whether each thing's place is clear."""
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


def _any(random: np.random.Generator, options: Sequence[Option]) -> Option:
    """Pick one of the options with equal probability."""
    index = int(random.integers(len(options)))
    return options[index]


def _any_key(random: np.random.Generator, shares: Mapping[str, float]) -> str:
    """Pick one key; a key's share is its probability."""
    keys = list(shares)
    probabilities = list(shares.values())
    return str(random.choice(keys, p=probabilities))


# Captions


def caption(scene: Scene, random: np.random.Generator) -> str:
    """Word a prompt for a scene.

    The caption names all things: mostly by shape and colour, else by one of the two. It sometimes
    adds their places or their relative position. An empty scene has captions of its
    own, such as "nothing".
    """
    things = list(scene.things)
    if not things:
        return _any(random, ("nothing", "an empty picture", "a plain picture"))
    detail = _any_key(random, _DETAILS)  # how ``_noun`` names every thing of this caption
    if len(things) == 1:
        text = _name_one(things[0], detail, random)
    elif len(things) == 2:
        text = _name_two(things, detail, random)
    else:
        text = _count_alike(things, detail, random)
    return _prefixed(text, random)


def _name_one(thing: Thing, detail: str, random: np.random.Generator) -> str:
    """Name a thing, sometimes with its place."""
    noun = _noun(thing, detail)
    text = with_article(noun)
    if random.random() < 0.2 and is_place_clear(thing):
        text += f" {place(thing)}"
    return text


def _name_two(things: list[Thing], detail: str, random: np.random.Generator) -> str:
    """Name two things, with their places, with their relative position, or with neither.

    May reorder ``things`` in place.
    """
    if random.random() < 0.25 and _are_places_clear(things):
        random.shuffle(things)
        phrases = []
        for thing in things:
            noun = _noun(thing, detail)
            phrases.append(f"{with_article(noun)} {place(thing)}")
        return listed(phrases)
    first, second = things
    if random.random() < 0.55 and relation(first, second):
        return _relate(things, detail, random)
    return _count_alike(things, detail, random)


def _relate(things: Sequence[Thing], detail: str, random: np.random.Generator) -> str:
    """Name two things and the position of one relative to the other.

    ``relation`` must not be None for the two. Swapping them only reverses it.
    """
    first, second = things
    if random.random() >= 0.5:
        first, second = second, first
    how = relation(first, second)
    assert how is not None
    subject = _noun(first, detail)
    landmark = _noun(second, detail)
    words = _any(random, _WORDINGS[how])
    return f"{with_article(subject)} {words} {with_article(landmark)}"


def _count_alike(things: Sequence[Thing], detail: str, random: np.random.Generator) -> str:
    """List things in random order, equal nouns as one: "two red circles and a blue star"."""
    counts = Counter(_noun(thing, detail) for thing in things)
    nouns = list(counts)
    random.shuffle(nouns)
    phrases = [counted(counts[noun], noun) for noun in nouns]
    return listed(phrases)


def _noun(thing: Thing, detail: str) -> str:
    """Name a thing without article: "red circle", "circle" or "red shape".

    ``detail`` is a key of ``_DETAILS``.
    """
    nouns = {
        "both": f"{thing.colour} {thing.shape}",
        "shape": thing.shape,
        "colour": f"{thing.colour} shape",
    }
    return nouns[detail]


def _prefixed(text: str, random: np.random.Generator) -> str:
    """Put a random opening before a caption; "there is" becomes "there are" before a plural."""
    prefix = _any(random, _PREFIXES)
    if prefix == "one ":  # replaces "a" or "an"; any other caption stays as it is
        article, noun = text.split(" ", 1)
        return f"one {noun}" if article in ("a", "an") else text
    plural = text.startswith(NUMBERS[2:])
    if plural and prefix == "there is ":
        prefix = "there are "
    return f"{prefix}{text}"


def describe(scene: Scene) -> str:
    """Describe a scene: list the things in reading order with their places."""
    if not scene.things:
        return "nothing"
    phrases = [f"{phrase(thing)} {place(thing)}" for thing in scene.things]
    return listed(phrases)


# Questions: a maker returns a question about a scene, or None if the scene allows none of its kind.

_Maker = Callable[[Scene, np.random.Generator], Question | None]


def ask_existence(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask whether a shape, a colour or both exist; "yes" and "no" are equally likely.

    Most absent pairs differ from a present one only in shape or only in colour. An absent
    pair in ``HELD_OUT`` is never asked for: training would teach that it does not exist.
    """
    asked = _any(random, ("both", "both", "both", "shape", "colour"))
    yes = bool(random.random() < 0.5)
    present = {thing.name for thing in scene.things}
    if asked == "shape":
        candidates = _shapes_to_ask(present, yes=yes)
    elif asked == "colour":
        candidates = _colours_to_ask(present, yes=yes)
    elif yes:
        candidates = sorted(present)
    else:
        candidates = _absent_pairs_to_ask(present, random)
    if not candidates:
        return None
    shape, colour = _any(random, candidates)
    opening = _any(random, ("Is there", "Is there", "Do you see"))
    return existence_question(shape, colour, yes=yes, opening=opening)


def _shapes_to_ask(present: Collection[Name], *, yes: bool) -> list[Name]:
    """List the shapes that are present if ``yes``, else those that are absent; in any colour."""
    shown = {shape for shape, _ in present}
    return [(shape, "") for shape in SHAPES if (shape in shown) == yes]


def _colours_to_ask(present: Collection[Name], *, yes: bool) -> list[Name]:
    """List the colours that are present if ``yes``, else those that are absent; in any shape."""
    shown = {colour for _, colour in present}
    return [("", colour) for colour in COLOURS if (colour in shown) == yes]


def _absent_pairs_to_ask(present: Collection[Name], random: np.random.Generator) -> list[Name]:
    """List absent pairs that are not held out; often only their ``near_misses``, if any."""
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
    """Select the names that share exactly one of shape and colour with a present name."""

    def is_near(name: Name) -> bool:
        shape, colour = name
        for present_shape, present_colour in present:
            same_shape = shape == present_shape
            same_colour = colour == present_colour
            if same_shape != same_colour:
                return True
        return False

    return [name for name in names if is_near(name)]


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
        yes: whether the answer is "yes".
        opening: the first words.
    """
    noun = f"{colour} {shape or 'shape'}".strip()
    text = f"{opening} {with_article(noun)}?"
    answer = "yes" if yes else "no"
    return Question(text, answer, "existence")


def ask_colour(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask for the colour of the only thing of some shape."""
    counts = Counter(thing.shape for thing in scene.things)
    once = [thing for thing in scene.things if counts[thing.shape] == 1]
    if not once:
        return None
    thing = _any(random, once)
    word = _any(random, ("color", "colour"))
    usual = f"What {word} is the {thing.shape}?"
    other = f"Which {word} does the {thing.shape} have?"
    text = _any(random, (usual, usual, other))
    return Question(text, thing.colour, "colour")


def ask_shape(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask for the shape of the only thing of some colour."""
    counts = Counter(thing.colour for thing in scene.things)
    once = [thing for thing in scene.things if counts[thing.colour] == 1]
    if not once:
        return None
    thing = _any(random, once)
    forms = (
        f"What shape is {thing.colour}?",
        f"Which shape is {thing.colour}?",
        f"What is the {thing.colour} shape?",
    )
    text = _any(random, forms)
    return Question(text, thing.shape, "shape")


def ask_number(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask for the number of all things, or of one shape or colour, mostly a present one."""
    counted_by = _any(random, ("all", "shape", "shape", "colour"))
    if counted_by == "all":
        return _ask_how_many(scene)
    options: Sequence[str]
    if counted_by == "shape":
        ending = "s"
        options = SHAPES
        present = [thing.shape for thing in scene.things]
    else:
        ending = " shapes"
        options = tuple(COLOURS)
        present = [thing.colour for thing in scene.things]
    if present and random.random() < 0.8:
        options = present  # with repeats, so a frequent one is asked for more often
    choice = _any(random, options)
    number = present.count(choice)
    text = f"How many {choice}{ending} are there?"
    return Question(text, NUMBERS[number], "number")


def _ask_how_many(scene: Scene) -> Question:
    """Ask for the number of all things."""
    number = len(scene.things)
    return Question("How many shapes are there?", NUMBERS[number], "number")


def ask_place(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask for the place of a thing that occurs once and has a clear place."""
    clear = [thing for thing in _unique_things(scene) if is_place_clear(thing)]
    if not clear:
        return None
    thing = _any(random, clear)
    text = f"Where is the {thing.colour} {thing.shape}?"
    return Question(text, place(thing), "position")


def ask_relation(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask whether a thing is left of, right of, above or below another.

    "yes" and "no" are equally likely; for "no", the question names the opposite of
    the true relation.
    """
    related = []
    unique = _unique_things(scene)
    for a, b in permutations(unique, 2):
        how = relation(a, b)
        if how:
            related.append((a, b, how))
    if not related:
        return None
    a, b, how = _any(random, related)
    answer = "yes"
    if random.random() >= 0.5:
        answer = "no"
        how = _opposite(how)
    wording = _any(random, _WORDINGS[how])
    text = f"Is the {a.colour} {a.shape} {wording} the {b.colour} {b.shape}?"
    return Question(text, answer, "position")


def _opposite(how: str) -> str:
    """Return the opposite of a relation: its partner in ``RELATIONS``, which lists pairs."""
    index = RELATIONS.index(how)
    return RELATIONS[index ^ 1]  # 0 and 1 change places, and so do 2 and 3


def _unique_things(scene: Scene) -> list[Thing]:
    """List the things whose shape and colour together occur once."""
    counts = Counter(thing.name for thing in scene.things)
    return [thing for thing in scene.things if counts[thing.name] == 1]


def ask_content(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask for the thing at a place that holds no other, or for its colour or shape.

    All things of the scene must have clear places.
    """
    counts = Counter(map(place, scene.things))
    alone = [thing for thing in scene.things if counts[place(thing)] == 1]
    if not alone or not _are_places_clear(scene.things):
        return None
    thing = _any(random, alone)
    where = place(thing)
    word = _any(random, ("color", "colour"))
    answers = {
        f"What {word} is the shape {where}?": thing.colour,
        f"What shape is {where}?": thing.shape,
        f"What is {where}?": phrase(thing),
    }
    text = _any(random, tuple(answers))
    return Question(text, answers[text], "content")


def ask_description(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask for all things in reading order, if each has a clear place."""
    if not _are_places_clear(scene.things):
        return None
    forms = ("Describe the picture.", "What is in the picture?", "What do you see?")
    text = _any(random, forms)
    return Question(text, describe(scene), "description")


MAKERS: dict[str, tuple[_Maker, ...]] = {
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
"""Shares of questions to begin training with: most are answered by finding one thing."""
SHARES = {
    "existence": 0.27,
    "colour": 0.16,
    "shape": 0.12,
    "number": 0.14,
    "position": 0.22,
    "content": 0.06,
    "description": 0.03,
}
"""Shares of questions. Descriptions are few, because long answers would dominate the loss."""

PLACES = {
    "existence": 0.14,
    "colour": 0.08,
    "shape": 0.08,
    "number": 0.2,
    "position": 0.46,
    "content": 0.02,
    "description": 0.02,
}
"""Shares of questions to end training with: those that take longest to learn."""


def question(
    scene: Scene,
    random: np.random.Generator,
    about: str | None = None,
    *,
    shares: Mapping[str, float] = SHARES,
) -> Question:
    """Ask a question about a scene.

    A function in ``MAKERS`` may find nothing to ask, so up to 20 attempts are made. Without
    ``about``, the last resort is to ask how many shapes there are.

    Args:
        scene: the scene.
        random: source of all randomness.
        about: the topic, a key of ``MAKERS``; None for a random one.
        shares: probability of each topic if ``about`` is None; they sum to 1.

    Raises:
        ValueError: the scene allows no question about the topic (an empty scene has no colours).
    """
    for _ in range(20):
        topic = about or _any_key(random, shares)
        make = _any(random, MAKERS[topic])
        made = make(scene, random)
        if made is not None:
            return made
    if about:
        raise ValueError(f"the scene allows no question about {about}")
    return _ask_how_many(scene)
