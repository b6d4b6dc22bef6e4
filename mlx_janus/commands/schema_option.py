"""``--schema FILE``: answers in JSON that matches a JSON Schema, and their values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import click

from ..decode.grammar import ANY_OBJECT, check_installed, schema_grammar
from ..errors import OptionError
from ..sections import JsonError, read_json
from .options import complete_files


def _read_schema(
    _: click.Context, __: click.Parameter, value: str | None
) -> dict[str, Any] | str | None:
    """Return the JSON Schema in a file, or the word "json". click calls this function.

    Raises:
        click.BadParameter: the file cannot be read, or holds no JSON object, or one that is too
            large or too deep; or a package is missing.
    """
    if value is None:
        return None
    try:
        schema: dict[str, Any] | str = value
        if value != ANY_OBJECT:
            schema = read_json(Path(value))
        schema_grammar(schema)
        check_installed("schema")
    except JsonError as error:
        raise click.BadParameter(f"{error}: give a JSON Schema, or {ANY_OBJECT}.") from None
    except OptionError as error:
        raise click.BadParameter(f"{error}.") from None
    return schema


schema_option = click.option(
    "--schema",
    callback=_read_schema,
    metavar="FILE",
    shell_complete=complete_files,
    help="Answer in JSON that matches the JSON Schema in this file; json: any JSON object. The "
    "question does not show the schema to the model.",
)


def schema_digest(schema: dict[str, Any] | str) -> str:
    """Return the SHA-256 of a value of --schema, in hexadecimal; of the word "json", the word.

    White space in the file does not count. The order of properties does: answers follow it.
    """
    if isinstance(schema, str):
        return schema
    return hashlib.sha256(json.dumps(schema).encode()).hexdigest()


def json_value(text: str) -> Any:
    """Return the value of an answer in JSON; None if the answer was cut."""
    try:
        return json.loads(text)
    except ValueError:
        return None
