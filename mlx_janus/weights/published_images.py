"""Reading the image preprocessing of a published model.

Unusual here: the reference never reads the ``background_color`` that it writes. It computes the
colour of the padding from ``image_mean``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import ImageConfig
from ..errors import ConfigError
from ..sections import shorten
from .published_values import (
    Layout,
    errors_about,
    json_or_empty,
    notes_on_others,
    refuse_others,
    tuple_if_list,
)

PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
_BICUBIC = (3, "bicubic")  # PIL's number and its name

Triple = tuple[float, float, float]


def read_image_options(folder: Path, layout: Layout) -> tuple[Path, Mapping[str, Any]]:
    """Return the file with a folder's options of image preprocessing, and these options.

    They are in ``preprocessor_config.json``, or in the section ``image_processor`` of
    ``processor_config.json``. If both have some, transformers takes the section. Without either,
    the options are empty.

    Raises:
        ConfigError: a file is malformed.
    """
    own_file = folder / PREPROCESSOR_FILE
    shared_file = folder / PROCESSOR_FILE
    own = json_or_empty(own_file)
    section = json_or_empty(shared_file).get("image_processor") or {}
    if not isinstance(section, dict):
        raise ConfigError(f"{shared_file}: image_processor must be a JSON object")
    if section and (layout == "transformers" or not own):
        return shared_file, section
    return own_file, own


def read_preprocessing(
    folder: Path, layout: Layout, image: ImageConfig
) -> tuple[ImageConfig, list[str]]:
    """Replace the default image preprocessing by a folder's, where the folder has values.

    Returns:
        The preprocessing, and notes for the user about options that are not followed.

    Raises:
        ConfigError: a file is malformed, or a value is impossible.
        UnsupportedModelError: an option is not supported.
    """
    path, options = read_image_options(folder, layout)
    with errors_about(path):
        if layout == "transformers":
            _refuse_unsupported(options)
        given = {
            "min_size": options.get("min_size"),
            "mean": tuple_if_list(options.get("image_mean")),
            "std": tuple_if_list(options.get("image_std")),
        }
        # The constructor checks the values.
        image = replace(image, **{key: value for key, value in given.items() if value is not None})
        image, notes = _with_background(image, options, path.name)
        image = _with_rescaling(image, options, layout)
        notes += _size_notes(options, layout, image.image_size, path.name)
    for key in ("image_mean", "image_std"):
        if options and options.get(key) is None:
            notes.append(f"{path.name}: {key} is missing; 0.5 is used, as published")
    if options.get("do_normalize") is False:
        notes.append(
            f"{path.name}: do_normalize is false, which is an error of old copies of Janus-1.3B; "
            "images are normalized"
        )
    return image, notes


def _refuse_unsupported(options: Mapping[str, Any]) -> None:
    """Refuse transformers' options that change the pixels and are not supported.

    DeepSeek's code does not have them.

    Raises:
        UnsupportedModelError: an option is not supported.
    """
    refuse_others(options, "resample", _BICUBIC)
    refuse_others(options, "do_resize", (True,))
    refuse_others(options, "do_pad", (True,))


def _size_notes(options: Mapping[str, Any], layout: Layout, size: int, file: str) -> list[str]:
    """Return a note for the user if the options give images another size than the encoder has.

    Args:
        options: the options.
        layout: whose options they are.
        size: pixels per side of the encoder's images.
        file: the name of the options' file.
    """
    if layout == "deepseek":
        return notes_on_others(options, "image_size", size, file)
    if options.get("size") == size:
        return []
    return notes_on_others(options, "size", {"height": size, "width": size}, file)


def _with_background(
    image: ImageConfig, options: Mapping[str, Any], file: str
) -> tuple[ImageConfig, list[str]]:
    """Return the preprocessing with the colour of the padding, and notes for the user.

    The colour is the mean's, as in the reference. A ``background_color`` that is neither the mean's
    nor the published models' is somebody's choice, so it is followed, and noted.

    Args:
        image: the preprocessing, with the mean that the file gives.
        options: the options.
        file: the file's name, for the note.

    Raises:
        ConfigError: the colour is impossible.
    """
    red, green, blue = (int(channel * 255) for channel in image.mean)
    of_mean = (red, green, blue)
    given = tuple_if_list(options.get("background_color"))
    if given is None or given in (of_mean, ImageConfig.background):
        return replace(image, background=of_mean), []
    image = replace(image, background=given)
    note = f"{file}: background_color {list(given)} is used; DeepSeek's code pads with the colour "
    return image, [f"{note}of image_mean, {list(of_mean)}"]


def _with_rescaling(image: ImageConfig, options: Mapping[str, Any], layout: Layout) -> ImageConfig:
    """Return the preprocessing with the effect of ``rescale_factor`` in the mean and the std.

    The reference computes (x * factor - mean) / std of a pixel x from 0 to 255, and this package
    (x / 255 - mean) / std. Both are equal if mean and std are divided by 255 * factor.

    Raises:
        ConfigError: the factor is not a number, or far from 1 / 255.
    """
    factor = options.get("rescale_factor")
    # DeepSeek's code has no option to leave out the rescaling.
    if layout == "transformers" and options.get("do_rescale") is False:
        factor = 1.0
    if factor is None:
        return image
    if type(factor) not in (int, float) or not 1e-6 <= factor <= 1e6:
        raise ConfigError(f"rescale_factor must be a number near 1 / 255, got {shorten(factor)}")
    unit = 255 * factor
    if math.isclose(unit, 1.0, rel_tol=1e-6):  # 1 / 255, as published
        return image
    return replace(image, mean=_divided(image.mean, unit), std=_divided(image.std, unit))


def _divided(values: Triple, divisor: float) -> Triple:
    """Return three numbers, each divided by ``divisor``."""
    first, second, third = values
    return first / divisor, second / divisor, third / divisor
