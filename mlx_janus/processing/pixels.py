"""Decoded pixels: an image of any of PIL's modes becomes opaque RGB.

The work is done in bands of rows, so that the steps before the result take little memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

_ROWS = 256  # rows of a band


def opaque_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image to RGB, laid over white where it is transparent.

    Memory holds the image, the result, and one band of each step between them.
    """
    to_rgb: Callable[[Image.Image], Image.Image] = _lay_over_white
    if image.mode == "F" or image.mode.startswith("I"):  # more than 8 bits per pixel
        black, white = _grey_range(image)
        to_rgb = functools.partial(_deep_grey_to_rgb, black=black, white=white)
    elif not image.has_transparency_data:
        return image.convert("RGB")
    result = Image.new("RGB", image.size)
    for top, band in bands(image):
        result.paste(to_rgb(band), (0, top))
    return result


def _lay_over_white(image: Image.Image) -> Image.Image:
    """Convert an image with transparency to RGB."""
    # PIL cannot convert La (grey multiplied by its alpha) to RGBA, but it can convert LA.
    straight = image.convert("LA") if image.mode == "La" else image
    white = Image.new("RGBA", image.size, "white")
    opaque = Image.alpha_composite(white, straight.convert("RGBA"))
    return opaque.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image, black: float, white: float) -> Image.Image:
    """Convert grey of 16 or 32 bits to RGB. PIL's own conversion would clip it to [0, 255].

    Args:
        image: the image.
        black: the value that becomes black.
        white: the value that becomes white.
    """
    values = np.asarray(image)
    # A PNG's tRNS chunk gives an int: the grey value of transparent pixels, which become white.
    transparent = image.info.get("transparency")
    finite = np.nan_to_num(values.astype(np.float64), nan=black, posinf=white, neginf=black)
    scaled = (finite - black) / (white - black or 1)
    grey = (scaled * 255 + 0.5).astype(np.uint8)  # + 0.5 rounds, since the conversion truncates
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _grey_range(image: Image.Image) -> tuple[float, float]:
    """Return two grey values: the one that becomes black, and the one that becomes white.

    Values that are not finite are ignored.
    """
    low = float("inf")
    high = float("-inf")
    for _, band in bands(image):
        values = np.asarray(band)
        finite = values[np.isfinite(values)]
        if finite.size:
            low = min(low, float(finite.min()))
            high = max(high, float(finite.max()))
    if low > high:
        return 0.0, 1.0  # any range will do, since no value is finite
    # Floats are usually up to 1 or 255; integers have 16 bits, which PIL may hold as 32.
    usual_whites = (1.0, 255.0) if image.mode == "F" else (65535.0,)
    # Take the narrowest usual range that holds all values, or else the range of the values.
    for white in usual_whites:
        if low >= 0 and high <= white:
            return 0.0, white
    return low, high


def bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield an image in bands of some rows from top to bottom, each with its first row."""
    width, height = image.size
    for top in range(0, height, _ROWS):
        yield top, image.crop((0, top, width, min(top + _ROWS, height)))
