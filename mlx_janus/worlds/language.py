"""Texts about scenes of the shapes world: captions to draw from, and questions with their answers.

The order of random draws is part of every function: a seed must keep its texts, since Janus-Tiny's
training and the benchmark are reproduced from seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product

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
_PREFIXES = ("", "", "", "there is ", "a picture of ", "draw ", "one ")
_DETAILS = {"both": 0.68, "shape": 0.2, "colour": 0.12}  # shares of captions that name these
_CLEAR = 2.0  # pixels from a boundary between two places within which a thing's place is not named

Name = tuple[str, str]
"""Shape and colour; either may be "" for any."""


@dataclass(frozen=True)
class Question:
    """A question about a scene, its answer, and its topic, a key of ``MAKERS``."""

    text: str
    answer: str
    about: str


# Words and phrases


def relation(a: Thing, b: Thing, clear: float = 8.0) -> str | None:
    """Return the position of ``a`` relative to ``b`` on the longer axis; None if not obvious.

    Args:
        a: a thing.
        b: another.
        clear: least distance of the centres along that axis, in pixels.
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
    """Return whether a thing's centre is clearly inside one of the nine places."""
    distances = [abs(v - SIDE * k / 3) for v, k in product((thing.x, thing.y), (1, 2))]
    return min(distances) > _CLEAR


def phrase(thing: Thing) -> str:
    """Name a thing: "a red circle", "an orange circle"."""
    return with_article(f"{thing.colour} {thing.shape}")


def with_article(noun: str) -> str:
    """Put "a" or "an" before a noun."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def counted(n: int, noun: str) -> str:
    """Put a number before a noun: "a star", "two stars"."""
    return with_article(noun) if n == 1 else f"{NUMBERS[n]} {noun}s"


def listed(phrases: Sequence[str]) -> str:
    """Join phrases: "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _any(random: np.random.Generator, options: Sequence[str]) -> str:
    """Pick one option."""
    return options[int(random.integers(len(options)))]


# Captions


def caption(scene: Scene, random: np.random.Generator) -> str:
    """Word a prompt for a scene.

    It names all things, mostly by shape and colour, else by one of the two, and sometimes their
    places or their relative position.
    """
    things = list(scene.things)
    if not things:
        return _any(random, ("nothing", "an empty picture", "a plain picture"))
    detail = str(random.choice(list(_DETAILS), p=list(_DETAILS.values())))
    if len(things) == 1:
        text = _name_one(things[0], detail, random)
    elif len(things) == 2:
        text = _name_two(things, detail, random)
    else:
        text = _count_alike(things, detail, random)
    return _prefixed(text, random)


def _name_one(thing: Thing, detail: str, random: np.random.Generator) -> str:
    """Name a thing, sometimes with its place."""
    text = with_article(_noun(thing, detail))
    if random.random() < 0.2 and is_place_clear(thing):
        text += f" {place(thing)}"
    return text


def _name_two(things: list[Thing], detail: str, random: np.random.Generator) -> str:
    """Name two things, with their places, with their relative position, or with neither."""
    if random.random() < 0.25 and all(map(is_place_clear, things)):
        random.shuffle(things)
        return listed([f"{with_article(_noun(thing, detail))} {place(thing)}" for thing in things])
    if random.random() < 0.55 and relation(things[0], things[1]):
        return _relate(things, detail, random)
    return _count_alike(things, detail, random)


def _relate(things: Sequence[Thing], detail: str, random: np.random.Generator) -> str:
    """Name two things and the position of one relative to the other."""
    first, second = things if random.random() < 0.5 else reversed(things)
    how = relation(first, second)
    assert how is not None
    subject = with_article(_noun(first, detail))
    landmark = with_article(_noun(second, detail))
    return f"{subject} {_any(random, _WORDINGS[how])} {landmark}"


def _count_alike(things: Sequence[Thing], detail: str, random: np.random.Generator) -> str:
    """List things, equal ones together: "two red circles and a blue star"."""
    counts = Counter(_noun(thing, detail) for thing in things)
    nouns = list(counts)
    random.shuffle(nouns)
    return listed([counted(counts[noun], noun) for noun in nouns])


def _noun(thing: Thing, detail: str) -> str:
    """Name a thing without article: "red circle", "circle" or "red shape"."""
    nouns = {
        "both": f"{thing.colour} {thing.shape}",
        "shape": thing.shape,
        "colour": f"{thing.colour} shape",
    }
    return nouns[detail]


def _prefixed(text: str, random: np.random.Generator) -> str:
    """Put a random opening before a caption, in agreement with its number."""
    prefix = _any(random, _PREFIXES)
    if prefix == "one ":
        return text if not text.startswith(("a ", "an ")) else f"one {text.split(' ', 1)[1]}"
    plural = text.startswith(NUMBERS[2:])
    return f"{'there are ' if prefix == 'there is ' and plural else prefix}{text}"


def describe(scene: Scene) -> str:
    """Answer "Describe the picture.": list the things in reading order with their places."""
    if not scene.things:
        return "nothing"
    return listed([f"{phrase(thing)} {place(thing)}" for thing in scene.things])


# Questions: a maker returns a question about a scene, or None if the scene allows none of its kind.

_Maker = Callable[[Scene, np.random.Generator], Question | None]


def ask_existence(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask whether a shape, a colour or both exist; "yes" and "no" are equally likely.

    Most absent pairs differ from a present one only in shape or only in colour. A held-out pair is
    never asked for where it is absent: training would teach that it does not exist.
    """
    level = _any(random, ("both", "both", "both", "shape", "colour"))
    yes = bool(random.random() < 0.5)
    present = {thing.name for thing in scene.things}
    if level == "shape":
        candidates = _shapes_to_ask(present, yes=yes)
    elif level == "colour":
        candidates = _colours_to_ask(present, yes=yes)
    elif yes:
        candidates = sorted(present)
    else:
        candidates = _absent_pairs_to_ask(present, random)
    if not candidates:
        return None
    shape, colour = candidates[int(random.integers(len(candidates)))]
    opening = _any(random, ("Is there", "Is there", "Do you see"))
    return existence_question(shape, colour, yes=yes, opening=opening)


def _shapes_to_ask(present: Collection[Name], *, yes: bool) -> list[Name]:
    """List the present or the absent shapes, of any colour."""
    shown = {shape for shape, _ in present}
    return [(shape, "") for shape in SHAPES if (shape in shown) == yes]


def _colours_to_ask(present: Collection[Name], *, yes: bool) -> list[Name]:
    """List the present or the absent colours, of any shape."""
    shown = {colour for _, colour in present}
    return [("", colour) for colour in COLOURS if (colour in shown) == yes]


def _absent_pairs_to_ask(present: Collection[Name], random: np.random.Generator) -> list[Name]:
    """List absent pairs that are not held out, often only the near misses."""
    absent = [name for name in absent_names(present) if name not in HELD_OUT]
    near = near_misses(absent, present)
    return near if near and random.random() < 0.6 else absent


def absent_names(present: Collection[Name]) -> list[Name]:
    """List all pairs of shape and colour except the present ones."""
    return [name for name in product(SHAPES, COLOURS) if name not in present]


def near_misses(names: Iterable[Name], present: Collection[Name]) -> list[Name]:
    """Select the names that share exactly one of shape and colour with a present name."""

    def is_near(name: Name) -> bool:
        return any((name[0] == shape) != (name[1] == colour) for shape, colour in present)

    return [name for name in names if is_near(name)]


def existence_question(
    shape: str, colour: str, *, yes: bool, opening: str = "Is there"
) -> Question:
    """Word a question like "Is there a red circle?".

    Args:
        shape: "" for any shape.
        colour: "" for any colour.
        yes: whether the answer is "yes".
        opening: the first words.
    """
    noun = f"{colour} {shape or 'shape'}".strip()
    return Question(f"{opening} {with_article(noun)}?", "yes" if yes else "no", "existence")


def ask_colour(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask for the colour of a shape that occurs once."""
    counts = Counter(thing.shape for thing in scene.things)
    once = [thing for thing in scene.things if counts[thing.shape] == 1]
    if not once:
        return None
    thing = once[int(random.integers(len(once)))]
    word = _any(random, ("color", "colour"))
    forms = (f"What {word} is the {thing.shape}?", f"Which {word} does the {thing.shape} have?")
    return Question(_any(random, (forms[0], forms[0], forms[1])), thing.colour, "colour")


def ask_shape(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask for the shape of a colour that occurs once."""
    counts = Counter(thing.colour for thing in scene.things)
    once = [thing for thing in scene.things if counts[thing.colour] == 1]
    if not once:
        return None
    thing = once[int(random.integers(len(once)))]
    forms = (
        f"What shape is {thing.colour}?",
        f"Which shape is {thing.colour}?",
        f"What is the {thing.colour} shape?",
    )
    return Question(_any(random, forms), thing.shape, "shape")


def ask_number(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask for the number of all things, or of one shape or colour, mostly a present one."""
    level = _any(random, ("all", "shape", "shape", "colour"))
    if level == "all":
        return Question("How many shapes are there?", NUMBERS[len(scene.things)], "number")
    present = [thing.shape if level == "shape" else thing.colour for thing in scene.things]
    options: Sequence[str] = SHAPES if level == "shape" else tuple(COLOURS)
    if present and random.random() < 0.8:
        options = present
    choice = _any(random, options)
    noun = f"{choice}s" if level == "shape" else f"{choice} shapes"
    return Question(f"How many {noun} are there?", NUMBERS[present.count(choice)], "number")


def ask_place(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask in which of the nine places a thing is that occurs once and has a clear place."""
    clear = [thing for thing in _unique_things(scene) if is_place_clear(thing)]
    if not clear:
        return None
    thing = clear[int(random.integers(len(clear)))]
    return Question(f"Where is the {thing.colour} {thing.shape}?", place(thing), "position")


def ask_relation(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask for the relative position of two things; "yes" and "no" are equally likely."""
    related = []
    for a, b in permutations(_unique_things(scene), 2):
        if how := relation(a, b):
            related.append((a, b, how))
    if not related:
        return None
    a, b, true = related[int(random.integers(len(related)))]
    opposite = RELATIONS[RELATIONS.index(true) ^ 1]
    yes = bool(random.random() < 0.5)
    wording = _any(random, _WORDINGS[true if yes else opposite])
    text = f"Is the {a.colour} {a.shape} {wording} the {b.colour} {b.shape}?"
    return Question(text, "yes" if yes else "no", "position")


def _unique_things(scene: Scene) -> list[Thing]:
    """List the things whose shape and colour together occur once."""
    counts = Counter(thing.name for thing in scene.things)
    return [thing for thing in scene.things if counts[thing.name] == 1]


def ask_content(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask for the thing, the colour or the shape at a place that holds one thing."""
    counts = Counter(place(thing) for thing in scene.things)
    alone = [thing for thing in scene.things if counts[place(thing)] == 1]
    if not alone or not all(map(is_place_clear, scene.things)):
        return None
    thing = alone[int(random.integers(len(alone)))]
    where = place(thing)
    word = _any(random, ("color", "colour"))
    forms = (
        (f"What {word} is the shape {where}?", thing.colour),
        (f"What shape is {where}?", thing.shape),
        (f"What is {where}?", phrase(thing)),
    )
    text, answer = forms[int(random.integers(len(forms)))]
    return Question(text, answer, "content")


def ask_description(scene: Scene, random: np.random.Generator) -> Question | None:
    """Ask for all things in reading order, if each has a clear place."""
    if not all(map(is_place_clear, scene.things)):
        return None
    forms = ("Describe the picture.", "What is in the picture?", "What do you see?")
    return Question(_any(random, forms), describe(scene), "description")


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

    Args:
        scene: the scene.
        random: source of all randomness.
        about: the topic, a key of ``MAKERS``; None for a random one.
        shares: share of each topic if ``about`` is None.

    Raises:
        ValueError: the scene allows no question about the topic (an empty scene has no colours).
    """
    for _ in range(20):
        topic = about or str(random.choice(list(shares), p=list(shares.values())))
        makers = MAKERS[topic]
        made = makers[int(random.integers(len(makers)))](scene, random)
        if made is not None:
            return made
    if about:
        raise ValueError(f"the scene allows no question about {about}")
    return Question("How many shapes are there?", NUMBERS[len(scene.things)], "number")
