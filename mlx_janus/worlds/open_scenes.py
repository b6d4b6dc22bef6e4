"""Scenes with figures of any colour, and with more outlines than the four named shapes.

The image codec is trained on them and on the scenes of ``shapes.py``, so that an image comes back
in its own colours and with its own outlines. The held-out pairs stay held out: no named shape has a
colour whose nearest name makes such a pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .shapes import BACKGROUNDS, HELD_OUT, LARGEST, SHAPES, SIDE, SMALLEST, Thing, nearest_hue

OUTLINES = ("heart", "cross", "ring", "diamond", "oval", "blob")
UNSEEN = ("arrow", "hexagon", "crescent")
"""Outlines for measuring only: no training scene has them."""
CONTRAST = 60.0  # RGB distance at least between a figure and its background

_NAMED_SHAPES = 0.4  # share of figures with the outline of a named shape
_NAMED_BACKGROUNDS = 0.4  # share of scenes with a background of the named scenes
_LARGEST_BY_NUMBER = {1: LARGEST, 2: 28, 3: 22, 4: 18, 5: 16, 6: 14}  # pixels, by figures
_SHARES_BY_NUMBER = (0.15, 0.2, 0.2, 0.2, 0.15, 0.1)  # of scenes with 1 to 6 figures
_GAP = 3.0  # pixels between the circles around two figures
_EDGE = 1.0  # pixels between a figure and the edge
_SAMPLES = 4  # samples per pixel and axis, for antialiased edges
_TRIES = 30  # places tried for a figure before the scene is abandoned
_ROUND = np.linspace(0, 2 * np.pi, 48, endpoint=False)  # radians, of a smooth outline's points

RGB = tuple[int, int, int]
Circle = tuple[float, float, float]  # x, y and radius in pixels


@dataclass(frozen=True)
class Figure:
    """A filled outline, perhaps with a hole. Points are x and y in pixels."""

    name: str
    rgb: RGB
    outline: np.ndarray  # (points, 2)
    hole: np.ndarray | None = None  # (points, 2)


@dataclass(frozen=True)
class OpenScene:
    """Figures that do not touch, and the background's colour."""

    figures: tuple[Figure, ...]
    background: RGB


def sample_open_scene(
    random: np.random.Generator,
    *,
    names: tuple[str, ...] | None = None,
    count: int | None = None,
) -> OpenScene:
    """Sample a scene of figures in any colours.

    It samples again while one of the figures has no place.

    Args:
        random: source of all randomness.
        names: outlines to choose from; None: the named shapes and ``OUTLINES``.
        count: number of figures, 1 to 6; None: a random one.
    """
    while True:
        # The number is drawn even if it is unused, so that the draws after it stay the same.
        sampled_count = 1 + int(random.choice(len(_SHARES_BY_NUMBER), p=_SHARES_BY_NUMBER))
        background = _sample_background(random)
        figures = _place(random, count or sampled_count, names, background)
        if figures is not None:
            return OpenScene(figures, background)


def _sample_background(random: np.random.Generator) -> RGB:
    """Sample a background: one of the named scenes', or any colour."""
    if random.random() < _NAMED_BACKGROUNDS:
        backgrounds = list(BACKGROUNDS.values())
        return backgrounds[int(random.integers(len(backgrounds)))]
    return _sample_rgb(random)


def _sample_rgb(random: np.random.Generator) -> RGB:
    """Sample any colour, uniformly in RGB."""
    red, green, blue = random.integers(0, 256, 3)
    return int(red), int(green), int(blue)


def _sample_figure_rgb(random: np.random.Generator, name: str, background: RGB) -> RGB:
    """Sample a colour that stands out from the background.

    It makes no held-out pair with the outline ``name``.
    """
    while True:
        rgb = _sample_rgb(random)
        stands_out = math.dist(rgb, background) >= CONTRAST
        if stands_out and (name, nearest_hue(rgb)) not in HELD_OUT:
            return rgb


def _place(
    random: np.random.Generator,
    count: int,
    names: tuple[str, ...] | None,
    background: RGB,
) -> tuple[Figure, ...] | None:
    """Place figures so that they do not touch; None if no place was found for one of them."""
    figures: list[Figure] = []
    circles: list[Circle] = []
    for _ in range(count):
        named = random.random() < _NAMED_SHAPES
        options = names or (SHAPES if named else OUTLINES)
        name = options[int(random.integers(len(options)))]
        circle = _sample_circle(random, _LARGEST_BY_NUMBER[count], circles)
        if circle is None:
            return None
        circles.append(circle)
        rgb = _sample_figure_rgb(random, name, background)
        is_upright = random.random() < 0.5
        angle = 0.0 if is_upright else float(random.uniform(0, 2 * np.pi))
        figures.append(make_figure(random, name, rgb, circle, angle))
    return tuple(figures)


def _sample_circle(
    random: np.random.Generator,
    largest: int,
    others: list[Circle],
) -> Circle | None:
    """Sample a circle that is apart from the others; None if no place was found.

    The circle gets a little smaller after each place that does not fit.

    Args:
        random: source of all randomness.
        largest: greatest diameter in pixels; the least is ``SMALLEST``.
        others: the circles in the scene so far.
    """
    share = math.sqrt(random.random())  # large ones are likelier
    radius = (SMALLEST + (largest - SMALLEST) * share) / 2
    for _ in range(_TRIES):
        low = radius + _EDGE
        x, y = random.uniform(low, SIDE - low, 2)
        if all(math.hypot(x - u, y - v) > radius + r + _GAP for u, v, r in others):
            return float(x), float(y), radius
        radius = max(SMALLEST / 2, 0.95 * radius)
    return None


def make_figure(
    random: np.random.Generator,
    name: str,
    rgb: RGB,
    circle: Circle,
    angle: float = 0.0,
) -> Figure:
    """Make a figure inside a circle.

    Args:
        random: for the details that a name leaves open, such as the width of a ring.
        name: one of ``SHAPES``, ``OUTLINES`` or ``UNSEEN``.
        rgb: its colour.
        circle: the circle around it.
        angle: rotation in radians, clockwise.
    """
    x, y, radius = circle
    cosine = math.cos(angle)
    sine = math.sin(angle)
    rotation = np.array([[cosine, sine], [-sine, cosine]])

    def placed(points: np.ndarray) -> np.ndarray:
        """Rotate points of the unit circle, and move them into ``circle``."""
        rotated: np.ndarray = points @ rotation
        return radius * rotated + np.array([x, y])

    outline, hole = _unit_outline(random, name)
    return Figure(name, rgb, placed(outline), None if hole is None else placed(hole))


def _unit_outline(
    random: np.random.Generator,
    name: str,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return an outline inside the unit circle, and its hole or None; y points down."""
    circle = _points(np.ones_like(_ROUND), _ROUND)
    if name in SHAPES:
        return _shape_outline(name, circle), None
    if name == "ring":
        return circle, circle * random.uniform(0.4, 0.65)
    if name == "blob":  # corners at about equal angles, and at unequal distances from the centre
        corners = int(random.integers(4, 10))
        angles = (np.arange(corners) + random.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners
        return _points(random.uniform(0.5, 1.0, corners), angles), None
    if name == "oval":
        return circle * np.array([1.0, random.uniform(0.45, 0.75)]), None
    return _FIXED_OUTLINES[name], None


def _shape_outline(name: str, circle: np.ndarray) -> np.ndarray:
    """Return the outline of an upright named shape inside the unit circle.

    ``circle`` holds the points of the unit circle.
    """
    if name == "circle":
        return circle
    thing = Thing(name, "red", size=1.0, x=0.0, y=0.0)
    return np.array(thing.outline()) / thing.radius


def _points(radii: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Convert polar coordinates to x and y: (n,), (n,) -> (n, 2)."""
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _heart() -> np.ndarray:
    """Return the outline of a heart: a well-known parametric curve."""
    x = 16 * np.sin(_ROUND) ** 3
    waves = (13, -5, -2, -1)
    y = -sum(wave * np.cos(k * _ROUND) for k, wave in enumerate(waves, 1))
    return np.stack([x, y - 1.0], axis=1) / 17.0  # moved and scaled into the unit circle


def _crescent() -> np.ndarray:
    """Return the outline of a crescent: the unit circle without the part inside another circle.

    The other circle has the radius 0.866 and its centre at (0.5, 0).
    """
    outer = _points(np.ones(33), np.linspace(np.pi / 3, 5 * np.pi / 3, 33))
    inner = _points(np.full(25, 0.866), np.linspace(3 * np.pi / 2, np.pi / 2, 25))
    return np.concatenate([outer, inner + np.array([0.5, 0.0])])


def _cross() -> np.ndarray:
    """Return the outline of a cross with equal arms."""
    half_width = 0.32
    reach = 0.94
    arm = np.array([(half_width, -reach), (half_width, -half_width), (reach, -half_width)])
    quarter_turn = np.array([[0, 1], [-1, 0]])
    arms = [arm @ np.linalg.matrix_power(quarter_turn, k) for k in range(4)]
    return np.concatenate(arms)


_FIXED_OUTLINES = {
    "heart": _heart(),
    "cross": _cross(),
    "crescent": _crescent(),
    "diamond": np.array([(0.0, -1.0), (0.65, 0.0), (0.0, 1.0), (-0.65, 0.0)]),
    "hexagon": _points(np.ones(6), np.arange(6) * np.pi / 3),
    "arrow": np.array(
        [
            (-0.95, -0.2),
            (0.1, -0.2),
            (0.1, -0.65),
            (1.0, 0.0),
            (0.1, 0.65),
            (0.1, 0.2),
            (-0.95, 0.2),
        ]
    ),
}


def render(scene: OpenScene) -> Image.Image:
    """Render a scene: RGB, ``SIDE`` x ``SIDE``, antialiased."""
    side = SIDE * _SAMPLES
    canvas = Image.new("RGB", (side, side), scene.background)
    draw = ImageDraw.Draw(canvas)
    for figure in scene.figures:
        _fill(draw, figure.outline, figure.rgb)
        if figure.hole is not None:
            _fill(draw, figure.hole, scene.background)
    return canvas.reduce(_SAMPLES)


def _fill(draw: ImageDraw.ImageDraw, outline: np.ndarray, rgb: RGB) -> None:
    """Fill an outline on the enlarged canvas."""
    # Pillow counts from the first pixel's centre, a scene from that pixel's corner.
    points = _SAMPLES * outline - 0.5
    draw.polygon([(x, y) for x, y in points.tolist()], fill=rgb)


def pixels(scene: OpenScene) -> np.ndarray:
    """Render a scene for the networks: (SIDE, SIDE, 3) float32 in [-1, 1]."""
    values = np.asarray(render(scene), dtype=np.float32)
    return values / 127.5 - 1.0
