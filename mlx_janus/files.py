"""Atomic writing: a file appears complete or not at all, even after a kill or on a full disk.

Also here: recognising the small text files that Git puts in place of large ones.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

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
