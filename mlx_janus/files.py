"""Files that appear whole or not at all, also under a kill, on a full disk and after Ctrl-C."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file, text as UTF-8, and replace the one that is there; a failure leaves that one as it was.

    Raises:
        OSError: it cannot be written.
    """
    with draft_beside(path) as draft:
        draft.write_bytes(data.encode() if isinstance(data, str) else data)
        draft.replace(path)


@contextlib.contextmanager
def draft_beside(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """Yield a new hidden name beside ``path``, to write to and then to rename; what still has it at the end is removed.

    Only a kill can leave it behind. It does not begin with the name of ``path``, which may be as long as the file
    system allows.

    Args:
        path: the file to be.
        suffix: of the draft. The default keeps it from whoever looks for files of a kind; MLX writes only to a suffix
            that it knows.
    """
    draft = path.parent / f".mlx_janus-{secrets.token_hex(8)}{suffix}"
    try:
        yield draft
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
