"""Reading unchecked values from the JSON files of a published model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from ..config import read_model_json
from ..errors import ConfigError, UnsupportedModelError
from ..sections import shorten

Layout = Literal["deepseek", "transformers"]


def json_or_empty(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; return an empty one if there is no file.

    Raises:
        ConfigError: the file is malformed.
    """
    return read_model_json(path) if path.exists() else {}


def tuple_if_list(value: Any) -> Any:
    """Return a tuple for a JSON list, since configs are frozen, and other values as they are."""
    return tuple(value) if isinstance(value, list) else value


def token_text(token: Any) -> str | None:
    """Return a token's text from its JSON value: a string, or an object with ``content``.

    Returns:
        None for any other value.
    """
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def refuse_others(
    data: Mapping[str, Any], key: str, allowed: tuple[Any, ...], place: str = ""
) -> None:
    """Refuse an option whose value is not one of ``allowed``.

    This is for options that change the reference's numbers. A missing option and null are accepted.

    Args:
        data: the object that may have the option.
        key: the option's name.
        allowed: the supported values.
        place: the part of the model that the option belongs to, for the message; "" for none.

    Raises:
        UnsupportedModelError: the option has another value. The message begins with its verb;
            ``errors_about`` puts the file's path before it.
    """
    value = data.get(key)
    if value is None or value in allowed:
        return
    where = f" in its {place}" if place else ""
    supported = " or ".join(map(repr, allowed))
    raise UnsupportedModelError(f"has {key} {shorten(value)}{where}; only {supported} is supported")


def notes_on_others(data: Mapping[str, Any], key: str, used: Any, file: str) -> list[str]:
    """Return a note for the user if an option contradicts the value that is used.

    This is for options with which the reference would fail if they had another value. So another
    value is taken for a mistake.

    Args:
        data: the object that may have the option; null counts as absent.
        key: the option's name.
        used: the value that is used.
        file: the name of the option's file.
    """
    value = data.get(key)
    if value is None or value == used:
        return []
    return [f"{file}: {key} is {shorten(value)}; {shorten(used)} is used"]


@contextlib.contextmanager
def errors_about(path: Path) -> Iterator[None]:
    """Put the path of a file before the messages of errors about its content.

    The message of an ``UnsupportedModelError`` begins with a verb, so the path becomes its subject.
    A ``ConfigError`` that names a file of the folder already stays as it is.
    """
    try:
        yield
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path} {error}") from None
    except ConfigError as error:
        if str(path.parent) in str(error):
            raise
        raise ConfigError(f"{path}: {error}") from None
