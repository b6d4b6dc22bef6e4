"""What is said about scenes of the shapes world: captions to draw from, and questions with their answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
_SAID = {"both": 0.68, "shape": 0.2, "colour": 0.12}  # of a thing in a caption
_CLEAR = 2.0  # pixels from a boundary between two places within which nothing is said of the place


@dataclass(frozen=True)
class Question:
    """A question about a scene, its answer, and what it is about: "existence", "colour", "shape", "number",
    "position", "content" or "description"."""

    text: str
    answer: str
    about: str


def relation(a: Thing, b: Thing, clear: float = 8.0) -> str | None:
    """How ``a`` lies to ``b`` along the longer axis; None if that is not plain to see."""
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < clear or max(abs(dx), abs(dy)) < 1.3 * min(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def place(thing: Thing) -> str:
    """One of nine places: "at the top left", "at the left", "in the middle", ..."""
    return _place_name(*(min(int(3 * v / SIDE), 2) for v in (thing.x, thing.y)))


def _place_name(column: int, row: int) -> str:
    words = [w for w in (("top", "", "bottom")[row], ("left", "", "right")[column]) if w]
    return f"at the {' '.join(words)}" if words else "in the middle"


def is_place_clear(thing: Thing) -> bool:
    """Whether a thing's centre is not on the boundary of two places."""
    return all(abs(v - SIDE * k / 3) > _CLEAR for v in (thing.x, thing.y) for k in (1, 2))


def phrase(thing: Thing) -> str:
    """ "a red circle", "an orange circle"."""
    return with_article(f"{thing.colour} {thing.shape}")


def with_article(noun: str) -> str:
    """A noun with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def counted(n: int, noun: str) -> str:
    """ "a star", "two stars"."""
    return with_article(noun) if n == 1 else f"{NUMBERS[n]} {noun}s"


def listed(phrases: Sequence[str]) -> str:
    """ "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def caption(scene: Scene, random: np.random.Generator) -> str:
    """Words to draw a scene from, in varied wording: all its things, mostly with shape and colour, else with one of the
    two, and sometimes where they are."""
    things = list(scene.things)
    if not things:
        return _any(random, ("nothing", "an empty picture", "a plain picture"))
    said = str(random.choice(list(_SAID), p=list(_SAID.values())))
    if len(things) == 1:
        text = with_article(_noun(things[0], said))
        if random.random() < 0.2 and is_place_clear(things[0]):
            text += f" {place(things[0])}"
    elif len(things) == 2 and random.random() < 0.25 and all(map(is_place_clear, things)):
        random.shuffle(things)
        text = listed([f"{with_article(_noun(thing, said))} {place(thing)}" for thing in things])
    elif len(things) == 2 and random.random() < 0.55 and (relation(things[0], things[1])):
        text = _related(things, said, random)
    else:
        groups = Counter(_noun(t, said) for t in things)
        nouns = list(groups)
        random.shuffle(nouns)
        text = listed([counted(groups[noun], noun) for noun in nouns])
    return _prefixed(text, random)


def _noun(thing: Thing, said: str) -> str:
    """ "red circle", "circle" or "red shape"."""
    return {"both": f"{thing.colour} {thing.shape}", "shape": thing.shape, "colour": f"{thing.colour} shape"}[said]


def _related(things: Sequence[Thing], said: str, random: np.random.Generator) -> str:
    a, b = (things[0], things[1]) if random.random() < 0.5 else (things[1], things[0])
    how = relation(a, b)
    assert how is not None
    first, second = (with_article(_noun(thing, said)) for thing in (a, b))
    return f"{first} {_any(random, _WORDINGS[how])} {second}"


def _prefixed(text: str, random: np.random.Generator) -> str:
    prefix = _any(random, _PREFIXES)
    if prefix == "one ":
        return text if not text.startswith(("a ", "an ")) else f"one {text.split(' ', 1)[1]}"
    plural = text.startswith(NUMBERS[2:])
    return f"{'there are ' if prefix == 'there is ' and plural else prefix}{text}"


def describe(scene: Scene) -> str:
    """The answer to "Describe the picture.": things in reading order with their places."""
    if not scene.things:
        return "nothing"
    return listed([f"{phrase(t)} {place(t)}" for t in scene.things])


def _any(random: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(random.integers(len(options)))]


# Questions: each maker gives one about a scene, or None where the scene allows none.

_Maker = Callable[[Scene, np.random.Generator], Question | None]


def ask_existence(scene: Scene, random: np.random.Generator) -> Question | None:
    """Whether a shape, a colour or both are there; as often yes as no, most noes differing in one of the two.

    A pair that is held out is never asked for where it is absent: training would learn that it is nowhere.
    """
    level = _any(random, ("both", "both", "both", "shape", "colour"))
    yes = bool(random.random() < 0.5)
    names = {t.name for t in scene.things}
    candidates = [(s, c) for s in SHAPES for c in COLOURS if (s, c) not in HELD_OUT]
    if level == "both":
        wanted = sorted(names) if yes else [n for n in candidates if n not in names]
        near = [n for n in wanted if any((n[0] == s) != (n[1] == c) for s, c in names)]
        if not yes and near and random.random() < 0.6:
            wanted = near
    elif level == "shape":
        shown = {s for s, _ in names}
        wanted = [(s, "") for s in SHAPES if (s in shown) == yes]
    else:
        shown = {c for _, c in names}
        wanted = [("", c) for c in COLOURS if (c in shown) == yes]
    if not wanted:
        return None
    shape, colour = wanted[int(random.integers(len(wanted)))]
    return existence_question(shape, colour, yes=yes, opening=_any(random, ("Is there", "Is there", "Do you see")))


def existence_question(shape: str, colour: str, *, yes: bool, opening: str = "Is there") -> Question:
    """ "Is there a red circle?"; an empty shape asks for any shape of the colour, an empty colour for any colour."""
    noun = f"{colour} {shape or 'shape'}".strip()
    return Question(f"{opening} {with_article(noun)}?", "yes" if yes else "no", "existence")


def ask_colour(scene: Scene, random: np.random.Generator) -> Question | None:
    """The colour of a shape that is there once."""
    shapes = Counter(t.shape for t in scene.things)
    once = [t for t in scene.things if shapes[t.shape] == 1]
    if not once:
        return None
    thing = once[int(random.integers(len(once)))]
    word = _any(random, ("color", "colour"))
    forms = (f"What {word} is the {thing.shape}?", f"Which {word} does the {thing.shape} have?")
    return Question(_any(random, (forms[0], forms[0], forms[1])), thing.colour, "colour")


def ask_shape(scene: Scene, random: np.random.Generator) -> Question | None:
    """The shape of what alone has a colour."""
    colours = Counter(t.colour for t in scene.things)
    once = [t for t in scene.things if colours[t.colour] == 1]
    if not once:
        return None
    thing = once[int(random.integers(len(once)))]
    forms = (f"What shape is {thing.colour}?", f"Which shape is {thing.colour}?", f"What is the {thing.colour} shape?")
    return Question(_any(random, forms), thing.shape, "shape")


def ask_number(scene: Scene, random: np.random.Generator) -> Question | None:
    """How many things, of one shape or of one colour."""
    level = _any(random, ("all", "shape", "shape", "colour"))
    if level == "all":
        return Question("How many shapes are there?", NUMBERS[len(scene.things)], "number")
    present = [t.shape if level == "shape" else t.colour for t in scene.things]
    options: Sequence[str] = SHAPES if level == "shape" else tuple(COLOURS)
    choice = _any(random, present) if present and random.random() < 0.8 else _any(random, options)
    noun = f"{choice}s" if level == "shape" else f"{choice} shapes"
    return Question(f"How many {noun} are there?", NUMBERS[present.count(choice)], "number")


def ask_place(scene: Scene, random: np.random.Generator) -> Question | None:
    """Where a thing is, one of nine places; only what is there once and not on a boundary."""
    names = Counter(t.name for t in scene.things)
    clear = [t for t in scene.things if names[t.name] == 1 and is_place_clear(t)]
    if not clear:
        return None
    thing = clear[int(random.integers(len(clear)))]
    return Question(f"Where is the {thing.colour} {thing.shape}?", place(thing), "position")


def ask_relation(scene: Scene, random: np.random.Generator) -> Question | None:
    """Whether one thing is left of, right of, above or below another; as often yes as no."""
    names = Counter(t.name for t in scene.things)
    pairs = [(a, b) for a in scene.things for b in scene.things if a is not b and names[a.name] == names[b.name] == 1]
    pairs = [(a, b) for a, b in pairs if relation(a, b)]
    if not pairs:
        return None
    a, b = pairs[int(random.integers(len(pairs)))]
    true = relation(a, b)
    assert true is not None
    opposite = RELATIONS[RELATIONS.index(true) ^ 1]
    yes = bool(random.random() < 0.5)
    how = _any(random, _WORDINGS[true if yes else opposite])
    text = f"Is the {a.colour} {a.shape} {how} the {b.colour} {b.shape}?"
    return Question(text, "yes" if yes else "no", "position")


def ask_content(scene: Scene, random: np.random.Generator) -> Question | None:
    """What is at a place where one thing is, or which colour or shape it has."""
    places = Counter(place(t) for t in scene.things)
    alone = [t for t in scene.things if places[place(t)] == 1]
    if not alone or not all(map(is_place_clear, scene.things)):
        return None
    thing = alone[int(random.integers(len(alone)))]
    where, word = place(thing), _any(random, ("color", "colour"))
    forms = (
        (f"What {word} is the shape {where}?", thing.colour),
        (f"What shape is {where}?", thing.shape),
        (f"What is {where}?", phrase(thing)),
    )
    text, answer = forms[int(random.integers(len(forms)))]
    return Question(text, answer, "content")


def ask_description(scene: Scene, random: np.random.Generator) -> Question | None:
    """Everything, in reading order, where no thing is on a boundary of places."""
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
    "existence": 0.08, "colour": 0.22, "shape": 0.22, "number": 0.05, "position": 0.14, "content": 0.15,
    "description": 0.14,
}  # fmt: skip
"""Shares to begin with: most answers are found by looking for one thing."""
SHARES = {
    "existence": 0.27, "colour": 0.16, "shape": 0.12, "number": 0.14, "position": 0.22, "content": 0.06,
    "description": 0.03,
}  # fmt: skip
"""Shares of questions. Descriptions are few: they are long, and would be most of what is learnt."""

PLACES = {
    "existence": 0.14, "colour": 0.08, "shape": 0.08, "number": 0.2, "position": 0.46, "content": 0.02,
    "description": 0.02,
}  # fmt: skip
"""Shares to end with: what takes longest to learn."""


def question(
    scene: Scene, random: np.random.Generator, about: str | None = None, *, shares: Mapping[str, float] = SHARES
) -> Question:
    """A question about a scene, of the kind named by ``about`` or of any, in the given shares.

    Raises:
        ValueError: the scene allows no question of that kind (an empty one has no colour to ask for).
    """
    for _ in range(20):
        kind = about or str(random.choice(list(shares), p=list(shares.values())))
        makers = MAKERS[kind]
        made = makers[int(random.integers(len(makers)))](scene, random)
        if made is not None:
            return made
    if about:
        raise ValueError(f"the scene allows no question about {about}")
    return Question("How many shapes are there?", NUMBERS[len(scene.things)], "number")
