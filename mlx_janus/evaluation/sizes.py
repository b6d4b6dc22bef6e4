"""The sizes of the shapes benchmark, and its reports of progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[str, int, int], None]
"""Called with a part's name, its finished items and all its items."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of images and prompts in each part."""

    # Existence: images, the same for each strategy. Attributes: questions per attribute.
    pictures: int = 200
    prompts: int = 24  # prompts per drawing task
    drawn: int = 4  # images per prompt
    reconstructed: int = 400  # images for the codec
