"""Messages of the library for the command line: Python keywords become flags."""

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
"""Keywords in the library's messages, and the command options that set them."""

_VALUE = r'\.\.\.|True|\d+|"[\w./-]+"'
_KEYWORD = rf"(?:{'|'.join(_FLAGS)})=(?:{_VALUE})"
# A keyword follows a space. A file name that looks like a keyword is in quotes, or starts the
# message.
_KEYWORDS = re.compile(rf"(?<= ){_KEYWORD}(?:, {_KEYWORD})*(?=[\s,;:.)]|$)")


def to_flags(message: str) -> str:
    """Replace keywords with flags: ``bits=8, low_memory=True`` becomes ``--bits 8 --low-memory``.

    A keyword is replaced if it is in ``_FLAGS``, follows a space, and has a literal value, or
    ``...`` for any value.
    """
    return _KEYWORDS.sub(lambda found: " ".join(map(_to_flag, found[0].split(", "))), message)


def _to_flag(keyword: str) -> str:
    """Return the flag of one keyword: ``bits=8`` becomes ``--bits 8``, ``bits=...`` ``--bits``."""
    name, _, value = keyword.partition("=")
    if value in ("True", "..."):
        return _FLAGS[name]
    value = value.strip('"')
    return f"{_FLAGS[name]} {value}"


@contextlib.contextmanager
def logging_in_flags() -> Iterator[None]:
    """Replace keywords with flags in messages of the logger "mlx_janus" during the context.

    Loggers below it, such as "mlx_janus.server", are not changed.
    """
    log = logging.getLogger("mlx_janus")
    log.addFilter(_spell_flags)
    try:
        yield
    finally:
        log.removeFilter(_spell_flags)


def _spell_flags(record: logging.LogRecord) -> bool:
    """Rewrite a log record; True keeps it in the log."""
    record.msg = to_flags(record.getMessage())
    record.args = ()  # ``getMessage`` has put them into the message
    return True
