"""Reading and writing files, whoever made them.

Reading is bounded: only regular files are opened, a size limit is checked before memory is taken,
and JSON may not be nested deeply. Writing is atomic: a file appears complete or not at all, even
after a kill or on a full disk.

Also here: recognising the small text files that Git puts in place of large ones.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

MAX_JSON_DEPTH = 100
"""Most levels of nesting in JSON. A model's config has about 5."""
MAX_JSON_FILE = 64 << 20
"""Bytes of a JSON file: a config, an index, a tokenizer, a saved conversation."""
MAX_TEMPLATE_FILE = 1 << 20
"""Bytes of a chat template."""
MAX_RECORDS_FILE = 1 << 30
"""Bytes of a file of JSON lines or of prompts."""
_MAX_INTEGER = 2**63 - 1  # largest absolute value of an integer in JSON
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # the escape of a half of a character pair

POINTER_ADVICE = "run git lfs pull, or download the file itself"
"""The fix for a pointer file, at the end of an error message."""

# First bytes of the pointers of Git LFS, of its predecessor Hawser, and of git-annex.
_POINTER_HEADS = (b"version https://git-lfs", b"version https://hawser", b"/annex/objects/")


def is_git_pointer(head: bytes) -> bool:
    """Return whether a file is a pointer, which Git LFS or git-annex puts in place of a large file.

    Args:
        head: the file's first 32 bytes or more; the entire file if it is shorter.
    """
    return head.startswith(_POINTER_HEADS)


def open_regular(path: Path) -> FileIO:
    """Open a regular file for reading, unbuffered.

    A pipe would block until somebody writes into it, and a device such as /dev/zero has no end.

    Raises:
        OSError: the file cannot be opened, or is not a regular file; ``strerror`` says which.
    """
    # O_NONBLOCK: opening a pipe returns at once. It has no effect on a regular file.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return FileIO(descriptor)
    is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    if is_folder:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes.

    Raises:
        FileTooLargeError: the file is larger.
        OSError: the file cannot be read, or is not a regular file; ``strerror`` says which.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise FileTooLargeError(limit, path)
        parts = []
        left = limit + 1  # a file may grow while it is read
        while left and (part := file.read(left)):
            parts.append(part)
            left -= len(part)
    if not left:
        raise FileTooLargeError(limit, path)
    return b"".join(parts)


class FileTooLargeError(OSError):
    """A file is larger than the limit for its kind."""

    def __init__(self, limit: int, path: Path):
        self.limit = f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit:,} bytes"
        super().__init__(errno.EFBIG, f"it is larger than {self.limit}", str(path))


def parse_json(content: bytes | str, *, surrogates: bool = False) -> Any:
    """Return the value of a JSON text from a file.

    Args:
        content: the text.
        surrogates: whether halves of surrogate pairs are allowed. They stand for the bytes of a
            file's name that is not UTF-8, and cannot be printed or encoded.

    Raises:
        ValueError: the text is not JSON or not UTF-8, is nested more than ``MAX_JSON_DEPTH`` deep,
            or holds an integer beyond 64 bits or a surrogate that is not allowed.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep") from None
    _check_json(value)
    if not surrogates and _SURROGATE.search(content):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair") from None
    return value


def _check_json(value: Any) -> None:
    """Check the depth and the integers of a JSON value.

    Raises:
        ValueError: the value is nested too deeply, or an integer is too large.
    """
    level = [value]  # the values at one depth
    depth = 0
    while level:
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep")
        next_level: list[Any] = []
        for item in level:
            if isinstance(item, list):
                next_level += item
            elif isinstance(item, dict):
                next_level += item.values()
            elif isinstance(item, int) and abs(item) > _MAX_INTEGER:
                raise ValueError("it holds an integer beyond 64 bits")
        level = next_level
        depth += 1


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write or replace a file; text is written as UTF-8. A failure leaves the old file unchanged.

    Raises:
        OSError: the file cannot be written.
    """
    with draft_beside(path) as draft:
        draft.write_bytes(data.encode() if isinstance(data, str) else data)
        draft.replace(path)


@contextlib.contextmanager
def draft_beside(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """Yield a path for a temporary file, the draft of ``path``. The caller writes and renames it.

    A draft that was not renamed is removed at the end, so only a killed process leaves one behind.
    The draft is a hidden file in the same folder.

    Args:
        path: the final file.
        suffix: suffix of the draft. MLX writes only files with a suffix that it knows.
    """
    # The draft's name does not contain that of ``path``, which may already have the maximum length.
    draft = path.parent / f".mlx_janus-{secrets.token_hex(8)}{suffix}"
    try:
        yield draft
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
