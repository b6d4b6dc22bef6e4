"""Names of files: as people and programs give them, and as messages show them."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from urllib.parse import unquote_to_bytes

from ..errors import ImageError, escape

_ADDRESS = re.compile(r"file:(?://([^/]*)|(?!//))(/.*)", re.IGNORECASE | re.DOTALL)
"""A file:// address with an absolute path. Groups: the host (None if absent) and the path."""


def local_path(name: str) -> str:
    """Return the path of a file:// address; return any other name unchanged.

    File managers and browsers write such addresses: ``file:///home/me/a%20b.png`` is the path
    ``/home/me/a b.png``. A host may name this machine: ``file://localhost/a.png``.

    Raises:
        ImageError: the address has no full path, or names another machine.
    """
    address = _ADDRESS.fullmatch(name)
    if address is not None:
        host, path = address.groups(default="")
        if _is_this_machine(host):
            return os.fsdecode(unquote_to_bytes(os.fsencode(path)))
    if address is not None or name[:7].lower() == "file://":
        shown = printable(name)
        raise ImageError(f"{shown} is no file of this machine: write file:// and a full path")
    return name


def _is_this_machine(host: str) -> bool:
    """Return whether the host of an address, which may be empty, is this machine."""
    return host.lower() in ("", "localhost", socket.gethostname().lower())


def names_folder(name: str | os.PathLike[str]) -> bool:
    """Return whether a name is that of an existing folder, or ends in "/"."""
    try:
        return os.fspath(name).endswith("/") or Path(name).is_dir()
    except (OSError, ValueError):
        return False  # the caller's use of the name fails too, with a message about the reason


def printable(text: str) -> str:
    """Return a path or a name as one line: escaped, and cut in the middle above 160 characters."""
    return escape(text, 160)
