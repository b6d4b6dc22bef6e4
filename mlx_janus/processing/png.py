"""PNG files out: generated images with their settings in text chunks, under unused names."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ..errors import OutputError
from ..files import draft_beside
from .images import check_size, printable, read_file


def read_text_chunks(path: str | os.PathLike[Any]) -> dict[str, str]:
    """Return the text chunks of a PNG file; an image in another format has none.

    Raises:
        ImageError: the image is missing, unreadable, empty, damaged, in an unsupported format, or
            above 100 megapixels.
    """
    return read_file(path, _text_chunks)


def _text_chunks(image: Image.Image, name: str) -> dict[str, str]:
    """Return the text chunks of an opened image; {} if its format has none.

    Raises:
        ImageError: the image has no pixels, or more than 100 million.
    """
    check_size(image, name)
    image.load()  # also reads the chunks that follow the pixels
    return {key: str(value) for key, value in getattr(image, "text", {}).items()}


def png_bytes(image: Image.Image, text: Mapping[str, str]) -> bytes:
    """Return the bytes of a PNG file with the text chunks of ``text``, sorted by key.

    Raises:
        OSError: PNG cannot hold the image's mode.
    """
    chunks = PngImagePlugin.PngInfo()
    for key, value in sorted(text.items()):
        # A PNG's text must not contain NUL, so NULs are dropped. A lone surrogate, such as an
        # undecodable byte of a command line, cannot be encoded: it becomes "?".
        valid = value.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
        chunks.add_text(key, valid)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def save_png(image: Image.Image, path: str | os.PathLike[str], text: Mapping[str, str]) -> Path:
    """Write a PNG with text chunks, and return the path of the file that was written.

    A path without a suffix gets ``.png``. An existing file is kept: if ``out.png`` exists, the new
    file is ``out_2.png``, then ``out_3.png``. The file appears complete or not at all. Processes
    that save to the same path at the same time write different files.

    Args:
        image: in a mode that PNG can hold.
        path: a file in an existing folder.
        text: text chunks by key. They are stored as Latin-1 if possible, otherwise as UTF-8.

    Raises:
        OutputError: the path is a folder or has another suffix, its folder is missing, there is no
            permission or no space, or PNG cannot hold the image. Nothing is left behind.
    """
    target = _with_png_suffix(Path(path))
    try:
        data = png_bytes(image, text)
        with draft_beside(target) as draft:
            with draft.open("xb") as file:
                file.write(data)
            return _move_to_free_name(draft, target)
    except (OSError, ValueError) as error:
        raise OutputError(_why_not_written(error, target)) from error


def numbered_paths(path: str | os.PathLike[str], n: int) -> list[Path]:
    """Return paths for n images: ``out.png`` for one, or ``out-1.png`` to ``out-n.png``.

    The files may exist already: ``save_png`` keeps them and chooses another name.

    Raises:
        OutputError: the path is a folder or has another suffix.
    """
    path = _with_png_suffix(Path(path))
    if n == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(1, n + 1)]


def _with_png_suffix(path: Path) -> Path:
    """Return a path with the suffix ``.png``, which is added if the path has no suffix.

    Raises:
        OutputError: the path is a folder or has another suffix.
    """
    try:
        is_folder = path.is_dir()
    except OSError:
        is_folder = False  # writing the file will fail too, with a message that gives the reason
    if is_folder:
        raise OutputError(
            f"{printable(str(path))} is a folder: give the name of a file in it, such as janus.png"
        )
    if not path.suffix:
        return path.with_name(f"{path.name}.png")
    if path.suffix.lower() != ".png":
        name = printable(str(path))
        raise OutputError(
            f"{name}: only .png is written, got {printable(path.suffix)}: name it {path.stem}.png"
        )
    return path


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
