"""Image files that a command has written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def png_text(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG file."""
    with Image.open(path) as image:
        image.load()
        return dict(image.text)  # type: ignore[attr-defined]


def pixels(path: str | Path) -> np.ndarray:
    """The pixels of an image file, (height, width, 3)."""
    with Image.open(path) as image:
        return np.array(image)
