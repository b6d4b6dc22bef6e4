"""The arguments of ``generate_images`` beside the options of a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy.typing as npt

from ..processing.images import ImageSource


class ImageArguments(TypedDict, total=False):
    """Keyword arguments of ``generate_images``: images to change, plans, and choices among images.

    All may be left out.
    """

    images: Sequence[ImageSource] | ImageSource
    """An image or several to change. A model that was not trained for it, by
    ``trained_for_editing``, logs a warning and does it."""
    cfg_weight2: float | None
    """Weight of the prompt against the details of ``images``; None (the default): 5."""
    crop: bool | None
    """Whether to cut each result to the shape of the first of ``images``. The model sees and
    generates an image that is not square between grey bars. None (the default): if there is one
    image."""
    plan: bool | str | None
    """Whether the model first writes a plan for each image, and draws by it. T2I-R1 was trained for
    it. None (the default): if the model is T2I-R1. A text is the plan itself."""
    reflect: int
    """How often, at most, the model judges an image and draws it again if it does not match the
    prompt. Janus-Pro-R1 was trained for it. The default is 0."""
    best_of: int | None
    """Number of images of each prompt to draw, at most 1000. The ``n`` best are returned, the best
    first, with their ``score`` and ``rank``. The score is how likely the model finds the prompt as
    words for the image. Prompts are drawn one after the other. None (the default): draw ``n``."""
    steps: int | None
    """Steps of a rectified flow (JanusFlow). None (the default): the model's own, 30."""
    latents: npt.ArrayLike | None
    """Where the images of each prompt begin in a rectified flow, in place of the noise of their
    seeds: (n, side / 8, side / 8, 4), or ``best_of`` of them, usually of standard deviation 1. None
    (the default): the noise."""


@dataclass(frozen=True)
class ImageRequest:
    """The values of ``ImageArguments``, unchecked, with the defaults of those that are left out."""

    images: Sequence[ImageSource] | ImageSource = ()
    cfg_weight2: float | None = None
    crop: bool | None = None
    plan: bool | str | None = None
    reflect: int = 0
    best_of: int | None = None
    steps: int | None = None
    latents: npt.ArrayLike | None = None
