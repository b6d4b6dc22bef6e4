"""Images to change, and the metadata of a changed image: which images were changed, and how.

The metadata name files without their folders, since an image may be passed on to strangers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..config import ImageConfig
from ..files import open_regular, parse_json
from ..processing.file_names import local_path
from ..processing.images import Box, ImageSource, letterbox, resize_and_pad

_TASK = "edit"  # the value of "task" in the metadata of a changed image
_CROP = {True: "yes", False: "no"}  # the value of "crop", by whether the result was cut


@dataclass(frozen=True)
class InputRecord:
    """An image that was changed, as the metadata of the result record it."""

    size: str  # pixels, such as "640x480"
    name: str | None = None  # of its file, without folders; None: it was no file
    sha256: str | None = None  # of its file or its bytes, in hexadecimal; None: it was neither


@dataclass(frozen=True)
class InputImage:
    """An image that a request brings, scaled and padded for the vision encoder.

    Args:
        image: upright and RGB, S x S pixels. S is the ``image_size`` of the model's config.
        box: the place of the image without its padding.
        record: for the metadata of a changed image.
    """

    image: Image.Image
    box: Box
    record: InputRecord


def input_image(image: Image.Image, source: ImageSource, config: ImageConfig) -> InputImage:
    """Scale and pad an image, and return it with its record.

    Args:
        image: the image of ``source``, upright and RGB.
        source: a path, the bytes of a file, or the image itself.
        config: the sizes of the preprocessing.
    """
    record = record_of(source, image.size)
    return InputImage(resize_and_pad(image, config), letterbox(image.size, config), record)


def record_of(source: ImageSource, size: tuple[int, int]) -> InputRecord:
    """Return the record of an image, from its source and its size in pixels."""
    pixels = f"{size[0]}x{size[1]}"
    if isinstance(source, bytes | bytearray | memoryview):
        return InputRecord(pixels, sha256=hashlib.sha256(source).hexdigest())
    if isinstance(source, str | os.PathLike):
        path = Path(local_path(os.fsdecode(source)))
        # An OSError means a pipe, or a file that was removed: only the size is known then.
        with suppress(OSError), open_regular(path) as file:
            return InputRecord(pixels, path.name, hashlib.file_digest(file, "sha256").hexdigest())
    return InputRecord(pixels)


def edit_facts(records: Sequence[InputRecord], *, cropped: bool) -> dict[str, str]:
    """Return the metadata of a changed image that say how it was made: task, inputs and crop.

    Args:
        records: the images that were changed. Unknown facts about them are left out.
        cropped: whether the result was cut to the shape of the first of these images.
    """
    known = []
    for record in records:
        facts = asdict(record)
        known.append({name: value for name, value in facts.items() if value is not None})
    inputs = json.dumps(known, ensure_ascii=False)
    return {"task": _TASK, "inputs": inputs, "crop": _CROP[cropped]}


def lacks_inputs(metadata: Mapping[str, str]) -> bool:
    """Return whether metadata are those of a changed image, but do not say which were changed."""
    return "cfg_weight2" in metadata and "task" not in metadata


def read_edit(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Read the settings of a changed image from the metadata of its file.

    Returns:
        ``cfg_weight2``, ``crop`` (whether the image was cut) and ``inputs``, a tuple of
        ``InputRecord``; None, None and () if the image was not made from others.

    Raises:
        KeyError, TypeError, ValueError: a setting is missing or not valid.
    """
    if lacks_inputs(metadata):
        raise ValueError
    if "task" not in metadata:
        return {"cfg_weight2": None, "crop": None, "inputs": ()}
    if metadata["task"] != _TASK:
        raise ValueError
    cropped_by_word = {word: cropped for cropped, word in _CROP.items()}
    items = parse_json(metadata["inputs"])
    records = tuple(InputRecord(**item) for item in items)
    texts = [value for record in records for value in asdict(record).values()]
    if not records or not all(isinstance(value, str | None) for value in texts):
        raise ValueError  # a changed image has at least one input, and its facts are texts
    return {
        "cfg_weight2": float(metadata["cfg_weight2"]),
        "crop": cropped_by_word[metadata["crop"]],
        "inputs": records,
    }
