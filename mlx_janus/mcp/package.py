"""Whether the package of the optional extra "mcp" is installed."""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import JanusError
from ..installation import install_command


def is_installed() -> bool:
    """Return whether version 2 or later of the package ``mcp`` is installed."""
    return find_spec("mcp_types") is not None  # version 1 has no package of this name


def check_installed() -> None:
    """Check that the package is installed.

    Raises:
        JanusError: it is missing, or its version is 1.
    """
    if not is_installed():
        raise JanusError(f"mcp, version 2 or later, is not installed: {install_command('mcp')}")
