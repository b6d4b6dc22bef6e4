"""Grammars of answers: JSON that matches a JSON Schema, or calls of tools.

A grammar is text in the form of llguidance, an optional package, which ``decode/constraint.py``
imports. JSON is compact: it has no white space outside strings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError
from ..installation import install_command

ANY_OBJECT = "json"  # as a schema: any JSON object
MAX_SCHEMA_BYTES = 1 << 16  # bytes of a schema as JSON, or of all schemas of a request
_MAX_DEPTH = 64  # objects and lists inside each other in a schema
# Where only one text can follow, allow every way to split it into tokens, not a single one.
_HEAD = '%llguidance {"no_forcing": true}'
# A space may precede an answer, because most tokens that begin a word begin with a space.
_SPACE = '" "?'


@dataclass(frozen=True)
class Grammar:
    """The texts that an answer may be.

    Args:
        source: the grammar in llguidance's form of Lark.
        subject: the option that it comes from, for messages.
        allows_words: whether an answer may also be any text that does not begin with "{".
    """

    source: str
    subject: str = "schema"
    allows_words: bool = False


@dataclass(frozen=True)
class Tool:
    """A function that an answer may call.

    Args:
        name: the function's name.
        parameters: a JSON Schema of the arguments, which are an object; None: no arguments.
        lenient: as for ``schema_grammar``.
        description: the purpose of the function, for the prompt.
    """

    name: str
    parameters: Mapping[str, Any] | None = None
    lenient: bool = False
    description: str = ""

    @property
    def call_start(self) -> str:
        """The text of a call before its arguments. After them, "}" ends the call."""
        return f'{{"name":{json.dumps(self.name)},"arguments":'


def schema_grammar(schema: Any, *, lenient: bool = False, subject: str = "schema") -> Grammar:
    """Return the grammar of JSON that matches a schema.

    Args:
        schema: a JSON Schema as a dict, a pydantic model, or "json" for any JSON object.
        lenient: whether to ignore keywords that cannot be enforced. Otherwise they are refused
            when the grammar is compiled.
        subject: the option that the schema comes from, for messages.

    Raises:
        OptionError: the schema has another type, holds a value that JSON does not have, or is too
            deep or too large.
    """
    text = _schema_text(_as_dict(schema, subject), lenient, subject)
    _check_size([text], subject)
    return Grammar(f"{_HEAD}\nstart: {_SPACE} json\njson: %json {text}\n", subject)


def call_grammar(tools: Sequence[Tool], *, allows_words: bool = False) -> Grammar:
    """Return the grammar of a call of one of several tools.

    A call is JSON: {"name": ..., "arguments": ...}.

    Args:
        tools: the tools, at least one.
        allows_words: whether an answer may be words in place of a call. Words do not begin with
            "{", so the first token that is not a space decides.

    Raises:
        OptionError: the parameters of a tool are no object, are too deep or hold a value that JSON
            does not have, or the parameters of all tools are too large.
    """
    rules = []
    texts = []
    for index, tool in enumerate(tools):
        text = _schema_text(_object_schema(tool), tool.lenient, "tools")
        texts.append(text)
        rules.append(f'call{index}: {json.dumps(tool.call_start)} arguments{index} "}}"')
        rules.append(f"arguments{index}: %json {text}")
    _check_size(texts, "tools")
    calls = " | ".join(f"call{index}" for index in range(len(tools)))
    start = f"start: {_SPACE} call"
    if allows_words:
        start += " | WORDS"
        rules.append(r"WORDS: /(\s*[^{\s](.|\n)*)?/")
    source = "\n".join([_HEAD, start, f"call: {calls}", *rules, ""])
    return Grammar(source, "tools", allows_words)


def _object_schema(tool: Tool) -> dict[str, Any]:
    """Return the schema of a tool's arguments, which matches objects only.

    Many programs leave the type out, or write a list of types that has "object".

    Raises:
        OptionError: the schema has another type.
    """
    parameters = tool.parameters
    if parameters is None:
        return {"type": "object", "additionalProperties": False}
    kind = parameters.get("type")
    kinds = kind if isinstance(kind, list | tuple) else [kind]
    if kind is not None and "object" not in kinds:
        reason = f'the arguments of {tool.name!r} must have the type "object"'
        raise OptionError(f"tools: {reason}, got {str(kind)[:40]!r}")
    return {**parameters, "type": "object"}


def check_installed(subject: str) -> None:
    """Check that llguidance is installed.

    Args:
        subject: the option that needs it, for the message.

    Raises:
        OptionError: it is not installed.
    """
    try:
        import llguidance  # noqa: F401
    except ImportError:
        fix = install_command("schema")
        raise OptionError(f"{subject} needs the package llguidance: {fix}") from None


def _as_dict(schema: Any, subject: str) -> Mapping[str, Any]:
    """Return a schema as a mapping.

    Raises:
        OptionError: it is neither a mapping, nor a pydantic model, nor "json".
    """
    if schema == ANY_OBJECT:
        return {"type": "object"}
    to_schema = getattr(schema, "model_json_schema", None)  # of a pydantic model
    value = to_schema() if callable(to_schema) else schema
    if not isinstance(value, Mapping):
        kinds = f'a JSON Schema as a dict, a pydantic model or "{ANY_OBJECT}"'
        raise OptionError(f"{subject} must be {kinds}, got {type(schema).__name__}")
    return value


def _schema_text(schema: Mapping[str, Any], lenient: bool, subject: str) -> str:
    """Return a schema as JSON, with llguidance's options.

    Raises:
        OptionError: it is too deep, or holds a value that JSON does not have.
    """
    _check_depth(schema, subject)
    options = {
        "whitespace_flexible": False,
        "item_separator": ",",
        "key_separator": ":",
        "lenient": lenient,
    }
    try:
        return json.dumps({**schema, "x-guidance": options}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{subject} must hold values of JSON only: {error}") from None


def _check_depth(schema: Mapping[str, Any], subject: str) -> None:
    """Refuse a schema that is too deep.

    Raises:
        OptionError: more than ``_MAX_DEPTH`` objects and lists are inside each other.
    """
    level: list[Any] = [schema]  # the objects and lists of one depth
    for _ in range(_MAX_DEPTH):
        inner: list[Any] = []
        for container in level:
            inner += container.values() if isinstance(container, Mapping) else container
        level = [value for value in inner if isinstance(value, Mapping | list | tuple)]
        if not level:
            return
        if len(level) > MAX_SCHEMA_BYTES:  # a schema that refers to itself may grow at each depth
            break
    limit = f"{_MAX_DEPTH} levels of objects and lists"
    raise OptionError(f"{subject} is too deep: at most {limit} may be inside each other")


def _check_size(texts: Sequence[str], subject: str) -> None:
    """Refuse schemas that are too large together.

    Raises:
        OptionError: they have more than ``MAX_SCHEMA_BYTES``.
    """
    size = sum(map(len, texts))  # bytes, as ``json.dumps`` writes ASCII
    if size > MAX_SCHEMA_BYTES:
        raise OptionError(
            f"{subject} is too large: {size} bytes of JSON, at most {MAX_SCHEMA_BYTES} are allowed"
        )
