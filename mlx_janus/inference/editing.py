"""Changing images: reading the images to change, and warning of a model not trained for it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence

from ..errors import OptionError
from ..processing.images import ImageSource, as_images, open_image, preprocess
from .input_records import InputImage, edit_facts, input_image
from .loaded import LoadedModel
from .pathway import InputImages

_LOG = logging.getLogger("mlx_janus")
_warned: weakref.WeakSet[LoadedModel] = weakref.WeakSet()  # models whose warning was logged


def read_inputs(
    janus: LoadedModel, images: Sequence[ImageSource] | ImageSource, crop: bool | None
) -> InputImages | None:
    """Read the images that a request changes.

    Args:
        janus: the model.
        images: an image or several, or an empty sequence.
        crop: whether to cut each result to the shape of the first image; None: cut it if there is
            exactly one image.

    Returns:
        The images; None if there are none.

    Raises:
        ImageError: an image cannot be read.
        OptionError: ``images`` has a wrong type, ``crop`` is no bool, or there is no image to crop
            to.
    """
    if not isinstance(crop, bool | None):
        raise OptionError(f"crop must be True, False or None, got {crop!r}")
    sources = as_images(images)
    if not sources:
        if crop is not None:
            raise OptionError("crop is for changing images: give images, or leave crop out")
        return None
    is_cropped = len(sources) == 1 if crop is None else crop
    config = janus.config.image
    inputs: list[InputImage] = []
    for source in sources:  # one at a time, since an image may take 400 MB
        inputs.append(input_image(open_image(source), source, config))
    return InputImages(
        pixels=tuple(preprocess(one.image, config) for one in inputs),
        crop=inputs[0].box if is_cropped else None,
        facts=edit_facts([one.record for one in inputs], cropped=is_cropped),
    )


def warn_if_untrained(janus: LoadedModel) -> None:
    """Log a warning, once for each model, if it was not trained to change images."""
    if janus.trained_for_editing or janus in _warned:
        return
    _warned.add(janus)
    _LOG.warning(
        "%s was not trained to change images and may ignore them; "
        "FreedomIntelligence/Janus-4o-7B was trained for it",
        janus.name,
    )
