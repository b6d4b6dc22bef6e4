"""Folders that appear complete or not at all, even after a kill.

A folder is written under a hidden name beside its final one, and renamed at the end. An earlier
folder of that name is first renamed aside, and removed last. Folders of both kinds hold a mark: a
file that only this module writes, with the folder's own name. So what a killed process left behind
is told from the folders of other programs and people, which are never touched.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from ..errors import OutputError
from ..files import read_bounded

MARK_FILE = ".mlx_janus-mark.tmp"
"""File name of the mark."""
_MARK_BYTES = 4096  # of the largest mark that is read
_NAME = re.compile(r"\.(.+)\.([0-9]{1,9})\.([0-9a-f]{8})\.(partial|old)", re.DOTALL)
_LOG = logging.getLogger(__name__)

State = Literal["partial", "complete", "old"]
"""Of a hidden folder: being written or removed, written to its end, or moved aside."""


@dataclass(frozen=True)
class Leftover:
    """A hidden folder of this module."""

    path: Path
    output_name: str  # name of the folder that it was to become, or that it was
    pid: int  # of the process that made it
    state: State

    @property
    def is_abandoned(self) -> bool:
        """Whether the process that made it has ended."""
        return not psutil.pid_exists(self.pid)


def read_leftover(path: Path) -> Leftover | None:
    """Return what a hidden folder is; None if it is not a folder of this module."""
    name = _NAME.fullmatch(path.name)
    if name is None or path.is_symlink():
        return None
    try:
        mark = read_bounded(path / MARK_FILE, _MARK_BYTES).decode()
    except (OSError, ValueError):
        return None
    for state in ("partial", "complete", "old"):
        if mark == _mark_text(path, state):
            return Leftover(path, name[1], int(name[2]), state)
    return None


def leftovers_of(output: Path) -> list[Leftover]:
    """Return the hidden folders of ``output`` whose process has ended, in the order of names."""
    try:
        paths = sorted(output.parent.iterdir())
    except (OSError, ValueError):  # ValueError: the name holds a NUL character
        return []
    found = []
    for path in paths:
        leftover = read_leftover(path) if path.name.startswith(f".{output.name}.") else None
        if leftover and leftover.output_name == output.name and leftover.is_abandoned:
            found.append(leftover)
    return found


def move_aside(folder: Path, output_name: str) -> Path:
    """Rename a folder that is to be removed to a hidden name; return its new path.

    Raises:
        OSError: it cannot be renamed.
    """
    hidden = _hidden_path(folder.with_name(output_name), "partial")
    # The mark is in the folder before it is renamed: a kill never leaves it unmarked.
    _write_mark(folder, "partial", hidden=hidden)
    folder.rename(hidden)
    return hidden


@contextlib.contextmanager
def atomic_folder(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder next to ``output``; rename it on success, remove it on failure.

    With ``overwrite``, the renamed folder replaces an existing one. What a killed process left of
    an earlier call for ``output`` is first brought to an end, as by ``recover``.

    Raises:
        OutputError: the temporary folder cannot be created or renamed.
    """
    output = output.resolve()
    recover(output)
    folder = _hidden_path(output, "partial")
    try:
        folder.mkdir()
        _write_mark(folder, "partial")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise OutputError(
            f"{output} cannot be made ({error.strerror}): choose another folder"
        ) from None
    try:
        yield folder
        _put_in_place(folder, output, overwrite)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def recover(output: Path) -> None:
    """Bring to an end what a killed process left of writing ``output``.

    If ``output`` is missing, the complete new folder takes its place, or else the folder that was
    moved aside. All other leftovers are removed.
    """
    leftovers = leftovers_of(output)
    if not os.path.lexists(output):
        for state in ("complete", "old"):
            whole = next((one for one in leftovers if one.state == state), None)
            if whole is None:
                continue
            try:
                whole.path.rename(output)
            except OSError:  # such as a folder that may only be read
                return
            leftovers.remove(whole)
            which = "new" if state == "complete" else "earlier"
            _LOG.warning(
                "%s was being replaced when a process was killed: its %s model is back",
                output,
                which,
            )
            break
    _remove_mark(output)
    for leftover in leftovers:
        shutil.rmtree(leftover.path, ignore_errors=True)


def _put_in_place(folder: Path, output: Path, overwrite: bool) -> None:
    """Rename a finished folder to ``output``. With ``overwrite``, replace an existing folder.

    The existing folder is first moved aside, and removed at the end. If renaming the
    finished folder fails or is interrupted, the existing folder is moved back.

    Raises:
        OutputError: a rename fails.
    """
    old = _hidden_path(output, "old")
    try:
        _write_mark(folder, "complete")
        if overwrite and output.exists():
            _write_mark(output, "old", hidden=old)
            output.rename(old)
        # A rename never replaces a folder with files. It fails if another process has just written
        # the output.
        folder.rename(output)
    except BaseException as error:  # KeyboardInterrupt too
        if old.exists() and not output.exists():
            old.rename(output)
        if folder.exists():  # otherwise the output's mark is its own
            _remove_mark(output)
        if not isinstance(error, OSError):
            raise
        raise OutputError(
            f"{output} cannot be put in place ({error.strerror}): choose another folder"
        ) from None
    _remove_mark(output)
    shutil.rmtree(old, ignore_errors=True)


def _hidden_path(output: Path, suffix: Literal["partial", "old"]) -> Path:
    """Return a new hidden path next to ``output``.

    The name holds this process's pid, so another process can tell whether this one has ended.
    """
    return output.with_name(f".{output.name}.{os.getpid()}.{secrets.token_hex(4)}.{suffix}")


def _mark_text(hidden: Path, state: State) -> str:
    """Return the content of the mark of a hidden folder."""
    return f"mlx_janus: {hidden.name.encode(errors='replace').decode()}: {state}\n"


def _write_mark(folder: Path, state: State, *, hidden: Path | None = None) -> None:
    """Write the mark of a folder, which has the path ``hidden`` or will soon have it."""
    (folder / MARK_FILE).write_text(_mark_text(hidden or folder, state), encoding="utf-8")


def _remove_mark(folder: Path) -> None:
    """Remove the mark of a folder in its final place, if there is one."""
    with contextlib.suppress(OSError):
        (folder / MARK_FILE).unlink(missing_ok=True)
