"""The image that ``--config-from`` draws again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..inference.input_records import InputRecord


@dataclass(frozen=True)
class Origin:
    """The image that --config-from draws again: its file, settings and model."""

    file: str
    prompt: str
    seed: int
    cfg_weight: float
    temperature: float | None  # None: drawn by a rectified flow
    top_p: float | None  # None: drawn by a rectified flow
    upscale: int
    model: str  # the model's name
    dtype: str | None  # None: drawn by an earlier release, which did not store it
    bits: int | None  # None: float weights, or a recipe
    recipe: str | None
    roles: str | None = None  # None: the model's own
    steps: int | None = None  # None: drawn as image tokens
    # Of a changed image:
    cfg_weight2: float | None = None
    crop: bool | None = None
    inputs: tuple[InputRecord, ...] = ()  # the images that were changed; (): it was drawn
    # Of an image with a plan or rounds:
    plan: str | None = None  # None: drawn without a plan
    reflect: int = 0


def read_origin(file: str) -> Origin:
    """Read an image's settings from its metadata.

    Raises:
        ImageError: the file is not an image, its settings are missing or not valid, or the image
            began from given latents.
    """
    from ..inference.results import read_settings

    return Origin(file=file, **read_settings(file))
