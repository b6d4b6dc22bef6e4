"""The limit of open files, and importing mlx_lm without its change of that limit.

``mlx_lm`` sets the limit to 2048 while it is imported. That raises an error if the system allows
less, and lowers a limit that is higher. This module imports it with the limit left alone, so
modules that use mlx_lm import this one first. The limit is only raised, as far as is allowed: a
server has a file for each connection, and macOS starts programs with 256.
"""

from __future__ import annotations

import contextlib
import resource

_WANTED = 2048  # open files


def _raise_limit() -> None:
    """Raise the limit to ``_WANTED``, or as far as is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _WANTED if hard == resource.RLIM_INFINITY else min(_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


_raise_limit()
_setrlimit = resource.setrlimit
resource.setrlimit = lambda *_: None
try:
    import mlx_lm.utils  # noqa: F401
finally:
    resource.setrlimit = _setrlimit
