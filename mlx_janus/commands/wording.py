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
    "roles": "--roles",
}
"""Keywords in the library's messages, and the command options that set them."""

_VALUE = r'\.\.\.|True|\d+|"[\w./-]+"'
_KEYWORD = rf"(?:{'|'.join(_FLAGS)})=(?:{_VALUE})"
# A keyword follows a space. A file name that looks like a keyword does not, because messages
# put file names in quotes or at their beginning.
_KEYWORD_LIST = re.compile(rf"(?<= ){_KEYWORD}(?:, {_KEYWORD})*(?=[\s,;:.)]|$)")


def to_flags(message: str) -> str:
    """Replace keywords with flags: ``bits=8, low_memory=True`` becomes ``--bits 8 --low-memory``.

    A keyword is replaced if it is in ``_FLAGS``, follows a space, and has a literal value, or
    ``...`` for any value.
    """

    def flags_of_list(found: re.Match[str]) -> str:
        keywords = found.group().split(", ")
        return " ".join(_to_flag(keyword) for keyword in keywords)

    return _KEYWORD_LIST.sub(flags_of_list, message)


def _to_flag(keyword: str) -> str:
    """Return the flag of one keyword: ``--bits 8`` for ``bits=8``, ``--bits`` for ``bits=...``."""
    name, _, value = keyword.partition("=")
    if value in ("True", "..."):
        return _FLAGS[name]
    value = value.strip('"')
    return f"{_FLAGS[name]} {value}"


@contextlib.contextmanager
def flags_in_log_messages() -> Iterator[None]:
    """Replace keywords with flags in messages of the logger "mlx_janus" during the context.

    Messages of its child loggers, such as "mlx_janus.server", are not changed.
    """
    log = logging.getLogger("mlx_janus")
    log.addFilter(_replace_keywords)
    try:
        yield
    finally:
        log.removeFilter(_replace_keywords)


def _replace_keywords(record: logging.LogRecord) -> bool:
    """Replace keywords with flags in a log record.

    Returns:
        True, so that the logger keeps the record.
    """
    record.msg = to_flags(record.getMessage())
    record.args = ()  # ``getMessage`` has put the arguments into the message
    return True
