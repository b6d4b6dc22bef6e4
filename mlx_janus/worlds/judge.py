"""The judge of the shapes world: reads an image back into objects, from its pixels only.

The background is the median colour of the edge. Pixels that differ from it fall into connected
regions. In a region, each pixel's share of the object's colour gives a soft mask, which is precise
to a fraction of a pixel. The mask, centred and scaled to unit area, is compared with rendered
templates of every shape at several angles and sizes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from .shapes import SHAPES, SIDE, Scene, Thing, nearest_hue, render

_DIFFERENT = 45.0  # RGB distance from the background that makes a pixel part of an object
_LEAST_AREA = 12.0  # pixels: about half the area of the smallest shape
_GRID = 20  # samples per side of a normalised mask
_REACH = 1.15  # half the side of a normalised mask, in square roots of the area
_ILL_FORMED = 0.15  # squared distance per unit area beyond which a region is no shape
_ANGLES = {  # degrees, of the templates: up to where a shape looks the same again
    "circle": [0.0],
    "square": range(-45, 45, 9),
    "triangle": range(-60, 60, 8),
    "star": range(-36, 36, 9),
}
_SIZES = (8.0, 9.0, 11.0, 14.0, 20.0, 30.0)  # pixels, of the templates
_SHIFTS = (0.0, 0.5)  # pixels from the centre of the image
_NEIGHBOURS = np.ones((3, 3))  # a pixel and all eight around it


@dataclass(frozen=True)
class Detection:
    """An object found in an image; ``shape`` is "none" if it resembles no shape."""

    shape: str
    colour: str
    size: float  # pixels, as in ``shapes.Thing``
    x: float  # pixels, of the centre
    y: float
    misfit: float  # squared distance from the best template, per unit area

    @property
    def name(self) -> tuple[str, str]:
        """Shape and colour."""
        return self.shape, self.colour


def read(image: Image.Image | np.ndarray) -> list[Detection]:
    """Find the objects in an image, largest first.

    Args:
        image: RGB, ``SIDE`` x ``SIDE``, as an image or an (H, W, 3) array of values from 0 to 255.
    """
    if isinstance(image, Image.Image):
        image = image.convert("RGB")
    rgb = np.asarray(image, dtype=np.float64)
    background = _background(rgb)
    distance = np.linalg.norm(rgb - background, axis=-1)
    different = distance > _DIFFERENT
    regions, count = ndimage.label(different, structure=_NEIGHBOURS)
    found = []
    for number in range(1, count + 1):
        region = regions == number
        detection = _read_region(rgb, distance, background, region)
        if detection is not None:
            found.append(detection)
    return sorted(found, key=lambda one: -one.size)


def _background(rgb: np.ndarray) -> np.ndarray:
    """Return the median colour of the outermost two pixels on each side: (3,)."""
    sides = (rgb[:2], rgb[-2:], rgb[:, :2], rgb[:, -2:])
    edge = np.concatenate([side.reshape(-1, 3) for side in sides])
    return np.median(edge, axis=0)


def _read_region(
    rgb: np.ndarray,
    distance: np.ndarray,
    background: np.ndarray,
    region: np.ndarray,
) -> Detection | None:
    """Read the object in one connected region; None if it is too small to be a shape.

    Args:
        rgb: (H, W, 3), the image.
        distance: (H, W), each pixel's distance from the background.
        background: (3,), the background's colour.
        region: (H, W), True inside the region.
    """
    # The object's colour is the median of the 40 % of its pixels that differ most from the
    # background. The other pixels may be of the edge, where both colours are blended.
    least = np.quantile(distance[region], 0.6)
    inside = region & (distance >= least)
    object_rgb = np.median(rgb[inside], axis=0)

    # Each pixel's share of the object's colour: 0 is the background. The faintest pixels of the
    # edge are not in the region, but next to it.
    contrast = object_rgb - background
    projected = (rgb - background) @ contrast / (contrast @ contrast)
    share = projected.clip(0, 1)
    near = ndimage.binary_dilation(region, _NEIGHBOURS, iterations=1)
    mask = np.where(near, share, 0.0)
    area = float(mask.sum())
    if area < _LEAST_AREA:
        return None
    y, x = ndimage.center_of_mass(mask)

    normalised = _normalise(mask, x, y, area).ravel()
    masks, squared_norms, shapes, size_ratios = _templates()
    # With a template's mask m and the normalised mask n, |m - n|^2 is |m|^2 - 2 m.n + |n|^2. This
    # needs no array of the differences from all templates, which is large.
    squares = squared_norms - 2 * (masks @ normalised) + normalised @ normalised
    step = 2 * _REACH / _GRID  # between samples, in square roots of the object's area
    misfits = squares * step**2  # from sums over samples to integrals over the area
    best = int(misfits.argmin())
    misfit = float(misfits[best])
    return Detection(
        shape=shapes[best] if misfit < _ILL_FORMED else "none",
        colour=nearest_hue(object_rgb),
        size=size_ratios[best] * math.sqrt(area),
        x=x + 0.5,  # from pixel indices to coordinates, where pixel 0 is centred at 0.5
        y=y + 0.5,
        misfit=misfit,
    )


def _normalise(mask: np.ndarray, x: float, y: float, area: float) -> np.ndarray:
    """Centre a mask and scale it to unit area: (_GRID, _GRID).

    Args:
        mask: (H, W), from 0 to 1.
        x: the column of the mask's centre, as a fractional index.
        y: the row of the mask's centre, as a fractional index.
        area: the sum of the mask.
    """
    centres = np.arange(_GRID) + 0.5
    steps = centres / _GRID * 2 - 1  # from -1 to 1
    offsets = steps * _REACH * math.sqrt(area)
    grid = np.meshgrid(y + offsets, x + offsets, indexing="ij")
    return ndimage.map_coordinates(mask, grid, order=1, mode="constant")


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray, list[str], list[float]]:
    """Return the normalised masks of all templates, and the facts about each template.

    Returns:
        One entry per template in each of four sequences: the mask, flattened; the mask's squared
        norm; the name of the shape; the size ratio. The size ratio is ``Thing.size`` divided by
        the square root of the thing's area.
    """
    masks = []
    shapes = []
    size_ratios = []
    for thing in _template_things():
        scene = Scene((thing,), (0, 0, 0))  # white on black: any channel is the mask
        values = np.asarray(render(scene), dtype=np.float64)
        mask = values[..., 0] / 255
        area = mask.sum()
        y, x = ndimage.center_of_mass(mask)
        normalised = _normalise(mask, x, y, area)
        masks.append(normalised.ravel())
        shapes.append(thing.shape)
        size_ratios.append(thing.size / math.sqrt(area))
    stacked = np.array(masks)
    return stacked, (stacked**2).sum(1), shapes, size_ratios


def _template_things() -> Iterator[Thing]:
    """Yield a white thing for every shape, angle, size and shift."""
    for shape in SHAPES:
        variants = itertools.product(_ANGLES[shape], _SIZES, _SHIFTS)
        for angle, size, shift in variants:
            centre = SIDE / 2 + shift
            yield Thing(
                shape,
                colour="red",  # any name: ``rgb`` is drawn
                size=size,
                x=centre,
                y=centre,
                angle=float(angle),
                rgb=(255, 255, 255),
            )
