"""Reads a picture of the shapes world back into objects, from its pixels alone.

The background is the commonest colour of the edge. What differs from it falls into connected regions. Within a region,
each pixel's share of the object's colour gives a soft mask, which is precise to a fraction of a pixel. The mask, moved
to its centre and scaled to unit area, is compared with rendered templates of every shape at several angles and sizes.
"""

from __future__ import annotations

import colorsys
import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from .shapes import COLOURS, SHAPES, SIDE, Thing, render
from .shapes import Scene as _Scene

_DIFFERENT = 45.0  # distance in RGB from the background that makes a pixel part of something
_LEAST_AREA = 12.0  # pixels: half of the smallest shape
_GRID = 20  # samples on a side of a normalised mask
_REACH = 1.15  # half the side of that grid, in square roots of the area
_ILL_FORMED = 0.15  # squared distance per unit area beyond which a region is no shape


@dataclass(frozen=True)
class Seen:
    """One object as read from a picture; ``shape`` is "none" for what looks like no shape."""

    shape: str
    colour: str
    size: float  # pixels, as in ``shapes.Thing``
    x: float
    y: float
    misfit: float  # squared distance from the best template, per unit area

    @property
    def name(self) -> tuple[str, str]:
        return self.shape, self.colour


def read(picture: Image.Image | np.ndarray) -> list[Seen]:
    """The objects of a picture, largest first.

    Args:
        picture: RGB, ``SIDE`` x ``SIDE``, as an image or (H, W, 3) bytes.
    """
    rgb = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture, dtype=np.float64)
    background = _background(rgb)
    away = np.linalg.norm(rgb - background, axis=-1)
    regions, count = ndimage.label(away > _DIFFERENT, structure=np.ones((3, 3)))
    seen = [_read_region(rgb, away, background, regions == i + 1) for i in range(count)]
    return sorted((s for s in seen if s is not None), key=lambda s: -s.size)


def _background(rgb: np.ndarray) -> np.ndarray:
    edge = np.concatenate([rgb[:2].reshape(-1, 3), rgb[-2:].reshape(-1, 3), rgb[:, :2].reshape(-1, 3)])
    edge = np.concatenate([edge, rgb[:, -2:].reshape(-1, 3)])
    return np.median(edge, axis=0)


def _read_region(rgb: np.ndarray, away: np.ndarray, background: np.ndarray, region: np.ndarray) -> Seen | None:
    inside = away >= np.quantile(away[region], 0.6)
    core = np.median(rgb[region & inside], axis=0)
    towards = core - background
    share = ((rgb - background) @ towards / (towards @ towards)).clip(0, 1)
    mask = np.where(ndimage.binary_dilation(region, np.ones((3, 3)), iterations=1), share, 0.0)
    area = float(mask.sum())
    if area < _LEAST_AREA:
        return None
    y, x = ndimage.center_of_mass(mask)
    normal = _normalise(mask, x, y, area)
    masks, labels, sizes = _templates()
    misfit = ((masks - normal.ravel()) ** 2).sum(1) * (2 * _REACH / _GRID) ** 2
    best = int(misfit.argmin())
    shape = labels[best] if misfit[best] < _ILL_FORMED else "none"
    return Seen(shape, _name_colour(core), sizes[best] * math.sqrt(area), x + 0.5, y + 0.5, float(misfit[best]))


def _normalise(mask: np.ndarray, x: float, y: float, area: float) -> np.ndarray:
    """(_GRID, _GRID): the mask around its centre, scaled to unit area."""
    steps = (np.arange(_GRID) + 0.5) / _GRID * 2 - 1
    offsets = steps * _REACH * math.sqrt(area)
    rows, columns = np.meshgrid(y + offsets, x + offsets, indexing="ij")
    return ndimage.map_coordinates(mask, [rows, columns], order=1, mode="constant")


@functools.cache
def _templates() -> tuple[np.ndarray, list[str], list[float]]:
    """Normalised masks, their shapes, and each one's size over the square root of its area."""
    masks, labels, sizes = [], [], []
    turns = {"circle": [0.0], "square": range(-45, 45, 9), "triangle": range(-60, 60, 8), "star": range(-36, 36, 9)}
    for shape in SHAPES:
        for angle in turns[shape]:
            for size in (8.0, 9.0, 11.0, 14.0, 20.0, 30.0):
                for shift in (0.0, 0.5):
                    centre = SIDE / 2 + shift
                    thing = Thing(shape, "red", size, centre, centre, float(angle), (255, 255, 255))
                    mask = np.asarray(render(_Scene((thing,), (0, 0, 0))), dtype=np.float64)[..., 0] / 255
                    area = mask.sum()
                    y, x = ndimage.center_of_mass(mask)
                    masks.append(_normalise(mask, x, y, area).ravel())
                    labels.append(shape)
                    sizes.append(size / math.sqrt(area))
    return np.array(masks), labels, sizes


def _name_colour(rgb: np.ndarray) -> str:
    """The named colour of the nearest hue; the world's colours are far apart in hue."""
    hue = colorsys.rgb_to_hsv(*(rgb / 255))[0]
    hues = {name: colorsys.rgb_to_hsv(*(v / 255 for v in value))[0] for name, value in COLOURS.items()}
    return min(hues, key=lambda name: abs((hue - hues[name] + 0.5) % 1 - 0.5))
