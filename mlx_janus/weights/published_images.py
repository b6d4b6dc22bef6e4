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
    ``processor_config.json``. If both have some, transformers takes the section and DeepSeek's code
    the file. If neither has any, the options are empty.

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
    """Read a folder's image preprocessing. A value that the folder lacks keeps its default.

    Args:
        folder: the model folder.
        layout: its layout.
        image: the default preprocessing.

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

    DeepSeek's code has no such options.

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
    if options.get("size") == size:  # one number for both sides
        return []
    return notes_on_others(options, "size", {"height": size, "width": size}, file)


def _with_background(
    image: ImageConfig, options: Mapping[str, Any], file: str
) -> tuple[ImageConfig, list[str]]:
    """Return the preprocessing with the colour of the padding, and notes for the user.

    As in the reference, the colour is ``image.mean`` times 255. If ``background_color`` is neither
    this colour nor the published models', somebody has chosen it. So it is followed, with a note.

    Args:
        image: the preprocessing, with the mean that the file gives.
        options: the options.
        file: the file's name, for the note.

    Raises:
        ConfigError: the colour is impossible.
    """
    red, green, blue = (int(channel * 255) for channel in image.mean)
    mean_colour = (red, green, blue)
    given = tuple_if_list(options.get("background_color"))
    if given is None or given in (mean_colour, ImageConfig.background):
        return replace(image, background=mean_colour), []
    image = replace(image, background=given)
    note = f"{file}: background_color {list(given)} is used; DeepSeek's code pads with the colour "
    return image, [f"{note}of image_mean, {list(mean_colour)}"]


def _with_rescaling(image: ImageConfig, options: Mapping[str, Any], layout: Layout) -> ImageConfig:
    """Return the preprocessing with ``rescale_factor`` folded into its mean and std.

    For a pixel x from 0 to 255, the reference computes (x * factor - mean) / std, and this package
    computes (x / 255 - mean) / std. Here mean and std are divided by 255 * factor, which makes both
    results equal.

    Raises:
        ConfigError: the factor is not a number, or not between 1e-6 and 1e6.
    """
    factor = options.get("rescale_factor")
    # Only transformers can leave out the rescaling, which is the same as a factor of 1.
    if layout == "transformers" and options.get("do_rescale") is False:
        factor = 1.0
    if factor is None:
        return image
    if type(factor) not in (int, float) or not 1e-6 <= factor <= 1e6:
        raise ConfigError(f"rescale_factor must be a number near 1 / 255, got {shorten(factor)}")
    divisor = 255 * factor
    if math.isclose(divisor, 1.0, rel_tol=1e-6):  # the factor is 1 / 255, as published
        return image
    return replace(image, mean=_divided(image.mean, divisor), std=_divided(image.std, divisor))


def _divided(values: Triple, divisor: float) -> Triple:
    """Return three numbers, each divided by ``divisor``."""
    first, second, third = values
    return first / divisor, second / divisor, third / divisor
