"""Image files out: generated images with their settings as metadata, under unused names."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from ..errors import OutputError
from ..files import draft_beside, parse_json
from .file_names import names_folder, printable
from .images import check_size, read_file

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_SETTINGS: dict[str, dict[str, Any]] = {  # of PIL's encoders
    "JPEG": {"quality": 95, "subsampling": "4:4:4"},
    "WEBP": {"quality": 95},
}
_ASCII_COMMENT = b"ASCII\0\0\0"  # EXIF's mark of the characters that follow
_LARGEST_JPEG_EXIF = 65_527  # bytes; a segment holds 65,533, and "Exif" with two NULs takes six
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,4}")  # longer ones, or numbers, belong to the name


def read_metadata(path: str | os.PathLike[Any]) -> dict[str, str]:
    """Return the metadata of an image file by key, as ``save_image`` wrote them.

    They are the text chunks of a PNG, or the JSON object in the EXIF of a JPEG or WebP. The result
    is empty if there are none, or if they cannot be read. A file of another program may have any
    keys.

    Raises:
        ImageError: the image is missing, unreadable, empty, damaged, in an unsupported format, or
            above 100 megapixels.
    """
    return read_file(path, _metadata, with_text=True)


def _metadata(image: Image.Image, name: str) -> dict[str, str]:
    """Return the metadata of an opened image; {} if it has none that can be read.

    Raises:
        ImageError: the image has no pixels, or more than 100 million.
    """
    check_size(image, name)
    image.load()  # also reads the chunks that follow the pixels
    if image.format == "PNG":
        return {key: str(value) for key, value in getattr(image, "text", {}).items()}
    try:
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
        metadata = parse_json(comment.removeprefix(_ASCII_COMMENT))
    except Exception:  # PIL raises nearly every kind for broken EXIF
        return {}
    if not isinstance(metadata, dict):
        return {}
    return {str(key): str(value) for key, value in metadata.items()}


def encode_image(
    image: Image.Image,
    metadata: Mapping[str, str],
    suffix: str = ".png",
    quality: int | None = None,
) -> bytes:
    """Return the bytes of an image file with metadata, which are sorted by key.

    A PNG holds them as text chunks; a JPEG or WebP as one JSON object in EXIF's UserComment.

    Args:
        image: in a mode that the format can hold.
        metadata: texts by key. NULs are dropped, and lone surrogates become "?".
        suffix: ".png", ".jpg", ".jpeg" or ".webp".
        quality: of a JPEG or WebP, from 0 to 100; None: 95.

    Raises:
        OSError: the format cannot hold the image's mode.
        ValueError: the metadata are too long for a JPEG, which holds 64 KB.
    """
    clean = {key: storable(value) for key, value in sorted(metadata.items())}
    buffer = io.BytesIO()
    if suffix == ".png":
        chunks = PngImagePlugin.PngInfo()
        for key, value in clean.items():
            chunks.add_text(key, value)
        image.save(buffer, "PNG", pnginfo=chunks)
        return buffer.getvalue()
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = clean.get("version", "mlx_janus")
    exif_ifd = exif.get_ifd(ExifTags.IFD.Exif)
    exif_ifd[ExifTags.Base.UserComment] = _ASCII_COMMENT + json.dumps(clean).encode()
    format_name = FORMATS[suffix]
    if format_name == "JPEG" and len(exif.tobytes()) > _LARGEST_JPEG_EXIF:
        raise ValueError("its metadata exceed the 64 KB of a JPEG, name it .png or .webp")
    settings = _SETTINGS[format_name]
    if quality is not None:
        settings = settings | {"quality": quality}
    image.save(buffer, format_name, exif=exif, **settings)
    return buffer.getvalue()


def storable(value: str) -> str:
    """Return a text without NULs, and with "?" for each lone surrogate."""
    # A PNG's text must not contain NUL. A lone surrogate, such as an undecodable byte of a command
    # line, cannot be encoded.
    return value.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def save_image(
    image: Image.Image, path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> Path:
    """Write an image with metadata, and return the path of the file that was written.

    An existing file is kept: if ``out.png`` exists, the new file is ``out_2.png``, then
    ``out_3.png``. The file appears complete or not at all. Processes that save to the same path at
    the same time write different files.

    Args:
        image: in a mode that the format can hold.
        path: a file in an existing folder. Its suffix (.png, .jpg, .jpeg or .webp) decides the
            format; a name without one gets .png.
        metadata: see ``encode_image``.

    Raises:
        OutputError: the path is a folder or has another suffix, its folder is missing, there is no
            permission or no space, or the format cannot hold the image. Nothing is left behind.
    """
    target = _target(path)
    try:
        data = encode_image(image, metadata, target.suffix.lower())
        with draft_beside(target) as draft:
            with draft.open("xb") as file:
                file.write(data)
            return _move_to_free_name(draft, target)
    except (OSError, ValueError) as error:
        raise OutputError(_why_not_written(error, target)) from error


def numbered_paths(path: str | os.PathLike[str], n: int) -> list[Path]:
    """Return paths for n images: ``out.png`` for one, or ``out-1.png`` to ``out-n.png``.

    The files may exist already: ``save_image`` keeps them and chooses another name.

    Raises:
        OutputError: the path is a folder or has another suffix.
    """
    target = _target(path)
    if n == 1:
        return [target]
    return [target.with_name(f"{target.stem}-{i}{target.suffix}") for i in range(1, n + 1)]


def _target(name: str | os.PathLike[str]) -> Path:
    """Return the path of a file to write; ".png" is added if its name has no suffix.

    Raises:
        OutputError: the name is a folder's or has the suffix of another format.
    """
    if names_folder(name):
        raise OutputError(
            f"{printable(str(name))} is a folder: give the name of a file in it, such as janus.png"
        )
    return with_suffix(Path(name))


def with_suffix(path: Path) -> Path:
    """Return a path that ends in the suffix of a format; ".png" is added if it has none.

    A suffix has two to five letters or digits, the first a letter. So the "5" of "cat v1.5" is not
    a suffix, and the file is named "cat v1.5.png".

    Raises:
        OutputError: the path has the suffix of another format.
    """
    if path.suffix.lower() in FORMATS:
        return path
    if not _SUFFIX.fullmatch(path.suffix):
        return path.with_name(f"{path.name}.png")
    name = printable(str(path))
    raise OutputError(
        f"{name}: only .png, .jpg and .webp are written, got {printable(path.suffix)}: "
        f"name it {path.stem}.png"
    )


def _move_to_free_name(draft: Path, target: Path) -> Path:
    """Move the finished file ``draft`` to the first unused name, and return its new path.

    The names are ``target``, then target_2, target_3 and so on. An empty file, created exclusively,
    reserves a name; the draft then replaces it. A hard link would need no empty file, but not every
    file system has hard links.
    """
    for i in itertools.count(1):
        candidate = target if i == 1 else target.with_name(f"{target.stem}_{i}{target.suffix}")
        try:
            os.close(os.open(candidate, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        try:
            return draft.replace(candidate)
        except BaseException:  # includes Ctrl-C
            with contextlib.suppress(OSError):
                if draft.exists():  # otherwise the move has succeeded, so the file is kept
                    candidate.unlink()
            raise
    raise AssertionError("itertools.count ends")  # pragma: no cover


def _why_not_written(error: OSError | ValueError, target: Path) -> str:
    """Return the message for a file that cannot be written: the reason and the fix."""
    name = printable(str(target))
    folder = printable(str(target.parent))
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.ENOENT:
        return f"{name} cannot be written: make the folder {folder} first"
    if code == errno.ENOTDIR:
        return f"{name} cannot be written: {folder} is not a folder"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{name} cannot be written: {folder} allows no new files, choose another folder"
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"{name} cannot be written: the disk is full, free some space"
    if code == errno.ENAMETOOLONG:
        return f"{name} cannot be written: give it a shorter name"
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return f"{name} cannot be written ({reason}): choose another file or folder"
