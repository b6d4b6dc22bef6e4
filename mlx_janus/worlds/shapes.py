"""A world of coloured shapes on plain backgrounds: scenes and their images.

A scene is 0 to 4 things that do not touch; a thing is a shape with a colour. Some combinations are
held out of training: the pairs of shape and colour in ``HELD_OUT``, and about one in ten pairs of
things in one scene. Training scenes contain neither; test scenes contain one of them.
"""

from __future__ import annotations

import colorsys
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64  # pixels per side of an image
SMALLEST = SIDE // 8  # pixels across the smallest shape
LARGEST = SIDE // 2  # pixels across the largest
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 66),
    "blue": (40, 84, 214),
    "yellow": (242, 214, 44),
    "orange": (245, 136, 24),
    "purple": (140, 52, 178),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "grey": (222, 222, 222),
    "cream": (252, 243, 220),
    "mist": (224, 236, 250),
}
HELD_OUT = frozenset(
    {
        ("circle", "purple"),
        ("square", "orange"),
        ("triangle", "red"),
        ("star", "green"),
    }
)

Kind = Literal["single", "two", "same", "several", "empty"]
Split = Literal["train", "pairs", "scenes", "any"]
KINDS: dict[Kind, float] = {
    "single": 0.22,
    "two": 0.32,
    "same": 0.22,
    "several": 0.2,
    "empty": 0.04,
}
"""Share of each kind of scene."""
PAIRED: dict[Kind, float] = {
    "single": 0.16,
    "two": 0.46,
    "same": 0.26,
    "several": 0.09,
    "empty": 0.03,
}
"""Shares for training with more scenes of two things or of one shape."""
BUSY: tuple[Kind, ...] = ("several", "several", "same", "two", "single")
"""Equally likely kinds for training: fuller images teach more."""

_GAP = 3.0  # pixels at least between the circumscribed circles of two things
_EDGE = 1.0  # pixels at least between a thing and the edge
_TILTED = 0.1  # share of squares, triangles and stars that are not upright
_SAMPLES = 4  # samples per pixel and axis, for antialiased edges
_INNER = 0.45  # inner radius of a star, as a share of the outer
_LARGEST_BY_NUMBER = {0: 0, 1: LARGEST, 2: 28, 3: 22, 4: 18}  # pixels, by things in a scene
_TRIES = 30  # places tried for a thing before the scene is abandoned


@dataclass(frozen=True)
class Thing:
    """A shape with a colour. Places and sizes are in pixels; x grows to the right and y down."""

    shape: str
    colour: str
    size: float  # diameter of a circle or star, side of a square or triangle
    x: float  # of the centre of the circumscribed circle
    y: float  # of the same point
    angle: float = 0.0  # degrees, clockwise
    rgb: tuple[int, int, int] = (0, 0, 0)  # the shade of ``colour`` that is drawn

    @property
    def name(self) -> tuple[str, str]:
        """Shape and colour."""
        return self.shape, self.colour

    @property
    def radius(self) -> float:
        """Radius of the circumscribed circle."""
        per_size = {
            "circle": 0.5,
            "star": 0.5,
            "square": math.sqrt(0.5),
            "triangle": 1 / math.sqrt(3),
        }
        return self.size * per_size[self.shape]

    def outline(self) -> list[tuple[float, float]]:
        """Return the corners, as x and y in pixels; a circle has none.

        Upright, a square has horizontal sides, and a triangle or star has a corner at the top.
        """
        corners = {
            "circle": 0,
            "square": 4,
            "triangle": 3,
            "star": 10,
        }
        n = corners[self.shape]
        start = -45.0 if self.shape == "square" else -90.0
        points = []
        for i in range(n):
            direction = math.radians(start + self.angle + 360 * i / n)
            inner = self.shape == "star" and i % 2  # every second corner of a star
            radius = self.radius * (_INNER if inner else 1.0)
            x = self.x + radius * math.cos(direction)
            y = self.y + radius * math.sin(direction)
            points.append((x, y))
        return points

    def box(self) -> tuple[float, float, float, float]:
        """Return the bounding box: left, top, right, bottom."""
        if self.shape == "circle":
            r = self.radius
            return (
                self.x - r,
                self.y - r,
                self.x + r,
                self.y + r,
            )
        outline = self.outline()
        xs = [x for x, _ in outline]
        ys = [y for _, y in outline]
        return min(xs), min(ys), max(xs), max(ys)


@dataclass(frozen=True)
class Scene:
    """Things in reading order, and the background's colour."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int] = (255, 255, 255)


def reading_order(things: Sequence[Thing]) -> tuple[Thing, ...]:
    """Sort things by rows, each a third of the side high, and from left to right in a row."""

    def row_and_x(thing: Thing) -> tuple[int, float]:
        row = int(3 * thing.y / SIDE)
        return row, thing.x

    return tuple(sorted(things, key=row_and_x))


def nearest_hue(rgb: Sequence[float] | np.ndarray) -> str:
    """Return the named colour of the nearest hue; the named colours are far apart in hue.

    Args:
        rgb: red, green and blue, from 0 to 255.
    """
    hue = _hue(rgb)

    def distance(name: str) -> float:
        difference = hue - _hue(COLOURS[name])
        return abs((difference + 0.5) % 1 - 0.5)  # hues are on a circle

    return min(COLOURS, key=distance)


def _hue(rgb: Sequence[float] | np.ndarray) -> float:
    """Return the hue of a colour, from 0 to 1."""
    red, green, blue = (float(value) / 255 for value in rgb)
    hue, _, _ = colorsys.rgb_to_hsv(red, green, blue)
    return hue


def is_held_out_pair(thing: Thing) -> bool:
    """Return whether this shape in this colour is held out of training."""
    return thing.name in HELD_OUT


def is_held_out_scene(things: Sequence[Thing]) -> bool:
    """Return whether any two of these things together are held out of training."""
    names = sorted(thing.name for thing in things)
    pairs = combinations(names, 2)
    return any(_is_held_out_together(a, b) for a, b in pairs)


def _is_held_out_together(a: tuple[str, str], b: tuple[str, str]) -> bool:
    """Return whether two names, in sorted order, may not meet in a training scene.

    That holds for about a tenth of all pairs of names, but never for two equal names.
    """
    if a == b:
        return False
    text = f"{a} {b}"  # its CRC is the same in every process; Python's hash() of it is not
    return zlib.crc32(text.encode()) % 10 == 0


def belongs(things: Sequence[Thing], split: Split) -> bool:
    """Return whether a scene belongs to a split.

    "train" has nothing held out. "pairs" has a held-out pair of shape and colour. "scenes" has two
    things that are held out together, and no held-out pair of shape and colour. "any" is every
    scene.
    """
    held_out_pair = any(map(is_held_out_pair, things))
    held_out_together = is_held_out_scene(things)
    splits = {
        "train": not held_out_pair and not held_out_together,
        "pairs": held_out_pair,
        "scenes": held_out_together and not held_out_pair,
        "any": True,
    }
    return splits[split]


def sample_scene(
    random: np.random.Generator,
    kind: Kind | None = None,
    split: Split = "train",
    *,
    kinds: Mapping[Kind, float] = KINDS,
) -> Scene:
    """Sample a scene of a split.

    It samples again while the things do not fit into the image or the scene is of another split.
    Thus it never ends for a kind that the split cannot have, such as "empty" in "pairs".

    Args:
        random: source of all randomness.
        kind: "single", "two", "same" (2 to 4 of one shape), "several" (3 or 4) or "empty"; None for
            a random one.
        split: see ``belongs``.
        kinds: share of each kind if ``kind`` is None; they sum to 1.
    """
    options = list(kinds)
    shares = list(kinds.values())
    while True:
        chosen = kind or str(random.choice(options, p=shares))
        names = _sample_names(random, chosen)
        things = _place(random, names)
        if things is None or not belongs(things, split):
            continue
        background = _background(random)
        return Scene(reading_order(things), background)


def _sample_names(random: np.random.Generator, kind: str) -> list[tuple[str, str]]:
    """Sample the shape and colour of each thing in a scene of a kind.

    The things of "same" have one shape, and in most scenes one colour.
    """

    def any_of(options: Sequence[str]) -> str:
        index = int(random.integers(len(options)))
        return options[index]

    colours = tuple(COLOURS)
    if kind == "same":
        shape = any_of(SHAPES)
        n = int(random.integers(2, 5))
        shared_colour = any_of(colours) if random.random() < 0.6 else None
        return [(shape, shared_colour or any_of(colours)) for _ in range(n)]
    # The number is drawn even if it is unused, so that each seed keeps its scenes.
    several = 3 + int(random.random() < 0.4)
    numbers = {"empty": 0, "single": 1, "two": 2}
    n = numbers.get(kind, several)
    return [(any_of(SHAPES), any_of(colours)) for _ in range(n)]


def _place(random: np.random.Generator, names: Sequence[tuple[str, str]]) -> list[Thing] | None:
    """Place things so that they do not touch; None if no place was found for one of them.

    A thing gets a little smaller after each place that does not fit, down to ``SMALLEST``.
    """
    things: list[Thing] = []
    most = _LARGEST_BY_NUMBER[len(names)]
    for shape, colour in names:
        share = math.sqrt(random.random())  # large ones are likelier
        size = SMALLEST + (most - SMALLEST) * share
        for _ in range(_TRIES):
            thing = _sample_thing(random, shape, colour, size)
            if _is_inside(thing) and _is_apart(thing, things):
                things.append(thing)
                break
            size = max(SMALLEST, 0.95 * size)
        else:  # no place was found
            return None
    return things


def _is_inside(thing: Thing) -> bool:
    """Return whether a thing is inside the image and not too near an edge."""
    left, top, right, bottom = thing.box()
    low = min(left, top)
    high = max(right, bottom)
    return low >= _EDGE and high <= SIDE - _EDGE


def _is_apart(thing: Thing, others: Sequence[Thing]) -> bool:
    """Return whether a thing is far enough from each of the others: more than ``_GAP``."""
    for other in others:
        distance = math.hypot(thing.x - other.x, thing.y - other.y)
        if distance <= thing.radius + other.radius + _GAP:
            return False
    return True


def _sample_thing(random: np.random.Generator, shape: str, colour: str, size: float) -> Thing:
    """Return a thing at a random place, with a random angle and shade.

    The margin to the image's edge is enough for a circle. A corner of another shape may still reach
    over the edge, and the thing may overlap other things: ``_place`` rejects both.
    """
    low = size / 2 + _EDGE
    high = SIDE - size / 2 - _EDGE
    x = random.uniform(low, high)
    y = random.uniform(low, high)
    tilted = shape != "circle" and random.random() < _TILTED
    angle = float(random.uniform(-30, 30)) if tilted else 0.0
    rgb = _shade(random, COLOURS[colour])
    return Thing(shape, colour, size, x, y, angle, rgb)


def _shade(
    random: np.random.Generator,
    rgb: tuple[int, int, int],
    off: float = 6.0,
) -> tuple[int, int, int]:
    """Vary a colour: a little lighter or darker, and each channel by up to ``off`` of 255."""
    brightness = random.uniform(0.93, 1.04)
    offsets = random.uniform(-off, off, 3)
    values = np.array(rgb) * brightness + offsets
    red, green, blue = values.clip(0, 255).round()
    return int(red), int(green), int(blue)


def _background(random: np.random.Generator) -> tuple[int, int, int]:
    """Sample the background's colour: exact white, or a shade of another colour."""
    names = list(BACKGROUNDS)
    name = str(random.choice(names, p=[0.64, 0.12, 0.12, 0.12]))
    rgb = BACKGROUNDS[name]
    if name == "white":
        return rgb
    return _shade(random, rgb, 0.0)


def render(scene: Scene) -> Image.Image:
    """Render a scene: RGB, ``SIDE`` x ``SIDE``, antialiased."""
    side = SIDE * _SAMPLES
    canvas = Image.new("RGB", (side, side), scene.background)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        if thing.shape == "circle":
            left, top, right, bottom = (_SAMPLES * v for v in thing.box())
            box = (left, top, right - 1, bottom - 1)  # Pillow fills the last pixel too
            draw.ellipse(box, fill=thing.rgb)
        else:
            corners = []
            for x, y in thing.outline():
                # Pillow counts from the first pixel's centre, a scene from that pixel's corner.
                corner = (_SAMPLES * x - 0.5, _SAMPLES * y - 0.5)
                corners.append(corner)
            draw.polygon(corners, fill=thing.rgb)
    return canvas.reduce(_SAMPLES)


def pixels(scene: Scene) -> np.ndarray:
    """Render a scene for the networks: (SIDE, SIDE, 3) float32 in [-1, 1]."""
    values = np.asarray(render(scene), dtype=np.float32)
    return values / 127.5 - 1.0
