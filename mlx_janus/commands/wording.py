"""The library's words at the command line: a Python keyword in a message is shown as the flag that sets it."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

_FLAGS = {
    "api_key": "--api-key",
    "bits": "--bits",
    "host": "--host",
    "low_memory": "--low-memory",
    "overwrite": "--overwrite",
    "path_or_hub_id": "--model",
    "port": "--port",
    "private": "--private",
    "recipe": "--recipe",
    "repo_id": "--upload",
}
"""Keywords that a message of the library may name, and the options of the commands that set them."""

_VALUE = r'\.\.\.|True|\d+|"[\w./-]+"'
_KEYWORD = rf"(?:{'|'.join(_FLAGS)})=(?:{_VALUE})"
# The space before tells a keyword from a file with such a name: a message begins with the file, or has it in quotes.
_KEYWORDS = re.compile(rf"(?<= ){_KEYWORD}(?:, {_KEYWORD})*(?=[\s,;:.)]|$)")


def to_flags(message: str) -> str:
    """Spell keywords as flags: ``bits=8, low_memory=True`` becomes ``--bits 8 --low-memory``.

    Only keywords of the table with a literal value, or with ``...`` for any, are touched, and only after a space.
    """
    return _KEYWORDS.sub(lambda found: " ".join(map(_to_flag, found[0].split(", "))), message)


def _to_flag(keyword: str) -> str:
    name, _, value = keyword.partition("=")
    if value in ("True", "..."):
        return _FLAGS[name]
    value = value.strip('"')
    return f"{_FLAGS[name]} {value}"


@contextlib.contextmanager
def logging_in_flags() -> Iterator[None]:
    """Let the library's log speak in flags too, while a command runs."""
    log = logging.getLogger("mlx_janus")
    log.addFilter(_spell_flags)
    try:
        yield
    finally:
        log.removeFilter(_spell_flags)


def _spell_flags(record: logging.LogRecord) -> bool:
    record.msg = to_flags(record.getMessage())
    record.args = ()
    return True
