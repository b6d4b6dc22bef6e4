"""Checks of the paths that a command writes to, before it spends minutes on a model."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import OutputError


def output_file(value: str, example: str) -> Path:
    """Return the file that the option --output names.

    Args:
        value: the value of --output.
        example: a file name, for the message of the error.

    Raises:
        OutputError: the value names a folder.
    """
    from ..processing.file_names import names_folder

    if names_folder(value):
        folder = value or "."  # an empty value is the working folder
        raise OutputError(f"{folder} is a folder: give the name of a file in it, such as {example}")
    return Path(value)


def check_writable(path: Path, flag: str = "--output") -> None:
    """Check that a file can be written at ``path``, the value of the option ``flag``.

    Only the folder of the file is checked. The file itself may exist.

    Raises:
        OutputError: the folder does not exist or is not writable.
    """
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"{folder} is not a folder: make it first, or name another with {flag}")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder} cannot be written to: name another folder with {flag}")


def make_folder(path: Path, flag: str = "--output") -> None:
    """Make the folder ``path``, the value of the option ``flag``, unless it exists.

    Raises:
        OutputError: the folder cannot be made or is not writable.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be made ({error.strerror}): name another folder with {flag}"
        ) from None
    any_file = path / "image.png"  # only the folder of this file is checked
    check_writable(any_file, flag)
