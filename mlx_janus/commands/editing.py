"""The options of ``generate`` to change images, and the checks of the images to change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import ImageError, OutputError
from ..processing.web import fetch
from .inputs import is_web, read_stdin
from .options import SETTINGS, STDIN, stack
from .runner import note

if TYPE_CHECKING:
    from .image_folder import PlannedImage
    from .origin import Origin

cfg_weight2_option = click.option(
    "--cfg-weight2",
    type=SETTINGS["cfg_weight2"],
    metavar="W",
    help="Second guidance, to change images: how freely the result leaves the details of the "
    "images; 0: it keeps the most.  [default: 5]",
)

editing_options = stack(
    cfg_weight2_option,
    click.option(
        "--crop/--no-crop",
        default=None,
        help="Cut a changed image to the shape of the first --image, which the model sees as a "
        "square with grey bars. --no-crop keeps the square.  [default: --crop with one --image]",
    ),
)


def read_sources(names: Sequence[str]) -> list[str | bytes]:
    """Check that images can be read, and return them for ``JanusPipeline.stream_images``.

    A file stays a name, because the metadata of a changed image record the name. An image on stdin,
    on the web or in a pipe becomes bytes, because reading it again could give another image or
    none.

    Args:
        names: files, https addresses, or "-" for stdin.

    Raises:
        ImageError: an image cannot be fetched or read.
    """
    from ..processing.images import decode_image, open_image

    sources: list[str | bytes] = []
    for name in names:
        # Open or decode the image only to check that it can be read.
        data = _read_once(name)
        if data is None:
            open_image(name)
            sources.append(name)
        else:
            decode_image(data, "the image on stdin" if name == STDIN else name)
            sources.append(data)
    return sources


def _read_once(name: str) -> bytes | None:
    """Read an image on stdin, on the web or in a pipe, and return its bytes; None: it is a file."""
    from ..processing.file_names import local_path

    if name == STDIN:
        return read_stdin()
    if is_web(name):
        return fetch(name)
    path = Path(local_path(name))
    try:
        return path.read_bytes() if path.is_fifo() else None
    except OSError:  # ``open_image`` gives the reason
        return None


def require_inputs(origin: Origin, images: Sequence[str]) -> None:
    """Check that images are given if the image of --config-from was made from images.

    Raises:
        click.UsageError: none is given.
    """
    from ..processing.file_names import printable

    if origin.inputs and not images:
        names = [printable(record.name) for record in origin.inputs if record.name]
        made_from = ", ".join(names) or "another image"
        raise click.UsageError(
            f"{origin.file} was made from {made_from}: add --image FILE and --output FILE.png."
        )


def note_if_made_from_others(origin: Origin | None, sources: Sequence[str | bytes]) -> None:
    """Print a note if the image of --config-from was made from other images than the given ones.

    A recorded image without a hash, such as one of a chat, matches any given image.
    """
    if origin is None or not origin.inputs:
        return
    stored = [record.sha256 for record in origin.inputs]
    given = _hashes(sources)
    pairs = zip(stored, given, strict=False)
    differs = any(recorded not in (None, sha256) for recorded, sha256 in pairs)
    if len(stored) != len(given) or differs:
        note(f"{origin.file} was made from other images: only the same ones give the same image")


def check_inputs(images: Sequence[PlannedImage], sources: Sequence[str | bytes]) -> None:
    """Check that the existing files of a folder were made by changing the given images.

    Args:
        images: the images whose files exist.
        sources: the images to change; none: nothing is checked.

    Raises:
        OutputError: a file was made from other images, or drawn.
    """
    from ..inference.input_records import read_edit
    from ..processing.saved_images import read_metadata

    if not sources:
        return
    hashes = _hashes(sources)
    for image in images:
        try:
            records = read_edit(read_metadata(image.path))["inputs"]
        except (ImageError, KeyError, TypeError, ValueError):  # no image that records its inputs
            records = ()
        # A given image without a hash cannot be read, so it is not known to be the recorded one.
        if None in hashes or [record.sha256 for record in records] != hashes:
            raise OutputError(
                f"{image.path} was not made from these images: name another folder with --output"
            )


def _hashes(sources: Sequence[str | bytes]) -> list[str | None]:
    """Return the SHA-256 of each image of ``read_sources``; None: a file that cannot be read."""
    from ..inference.input_records import record_of

    any_size = (0, 0)  # the hash does not depend on it
    return [record_of(source, any_size).sha256 for source in sources]
