"""How a section of a config is checked, read and written.

A section is a frozen dataclass. Its type hints say which JSON values it takes: numbers, text, lists (as tuples),
literals, other sections and unions of these. The metadata of its fields adds ranges.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from .errors import ConfigError

_MAX_SIZE = 1 << 20  # far above any width or vocabulary, far below an overflow
_MAX_NUMBER = 1e30  # of a field without a range
_MAX_FILE = 64 << 20  # bytes of a JSON file


def size_field(default: Any = dataclasses.MISSING, *, low: int = 1, high: int = _MAX_SIZE) -> Any:
    """Declare a whole number from low to high (for a tuple: each of its entries)."""
    return field(default=default, metadata={"low": low, "high": high})


def number_field(default: Any = dataclasses.MISSING, *, low: float = 0.0, high: float = 1e9) -> Any:
    """Declare a finite number from low to high."""
    return field(default=default, metadata={"low": low, "high": high})


LATER = {"later": True}
"""Metadata of a field that the first releases did not write: it is left out of a file where it has its default."""


@dataclass(frozen=True)
class Section:
    """One object of ``config.json``: checks its fields' types and ranges when made."""

    title: ClassVar[str] = "config"

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            refuse = functools.partial(self._refuse, f.name)
            _check(getattr(self, f.name), hints[f.name], f.metadata, refuse)

    def _refuse(self, name: str, value: Any, allowed: str) -> typing.NoReturn:
        raise self.error(name, value, allowed)

    @classmethod
    def error(cls, name: str, value: Any, allowed: str) -> ConfigError:
        """Make the error of a field that does not have an allowed value."""
        return ConfigError(f"{cls.title}: {name} must be {allowed}, got {shorten(value)}")

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Build from parsed JSON. Unknown keys are refused: they would be sizes silently ignored.

        Raises:
            ConfigError: no object, an entry that is missing or unknown, or a value out of its range.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"{cls.title} must be a JSON object, got {shorten(data)}")
        known = {f.name: f for f in fields(cls)}
        if unknown := sorted(set(data) - set(known)):
            raise ConfigError(
                f"{cls.title} has an unknown entry {unknown[0]!r}: the folder is of a newer version?"
            )
        for name, f in known.items():
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and name not in data:
                raise ConfigError(f"{cls.title} lacks {name!r}")
        hints = typing.get_type_hints(cls)
        return cls(**{name: _from_json(value, hints[name]) for name, value in data.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values of every field, except those of ``LATER`` at their defaults."""
        written = [
            f
            for f in fields(self)
            if "later" not in f.metadata or getattr(self, f.name) != f.default
        ]
        return {f.name: _to_json(getattr(self, f.name)) for f in written}


def shorten(value: Any) -> str:
    """Return the ``repr`` of a value in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# Checking: one function for each kind of hint

Refuse = Callable[[Any, str], typing.NoReturn]
"""Called with a value and the values that are allowed, as text."""
Range = Mapping[str, Any]
"""The metadata of a field: "low" and "high", both or none."""


def _check(value: Any, hint: Any, limits: Range, refuse: Refuse) -> None:
    """Refuse a value that is not of its hint, or outside its limits."""
    check = _CHECKS.get(typing.get_origin(hint) or hint, _check_type)
    check(value, hint, limits, refuse)


def _check_union(value: Any, hint: Any, limits: Range, refuse: Refuse) -> None:
    members = _members(hint)
    if value is not None and type(value) not in members:
        _check(value, members[0], limits, refuse)


def _check_tuple(value: Any, hint: Any, limits: Range, refuse: Refuse) -> None:
    items = typing.get_args(hint)
    length = None if items[-1] is Ellipsis else len(items)
    if not isinstance(value, tuple) or not value or (length is not None and len(value) != length):
        refuse(value, f"a list of {length or 'one or more'} values")
    for item in value:
        _check(item, items[0], limits, refuse)


def _check_literal(value: Any, hint: Any, _: Range, refuse: Refuse) -> None:
    allowed = typing.get_args(hint)
    if value not in allowed:
        refuse(value, " or ".join(map(repr, allowed)))


def _check_float(value: Any, hint: Any, limits: Range, refuse: Refuse) -> None:
    if type(value) is not int:  # JSON may spell 1.0 as 1
        _check_type(value, hint, limits, refuse)
    low = limits.get("low", -_MAX_NUMBER)
    high = limits.get("high", _MAX_NUMBER)
    if not low <= value <= high:
        refuse(value, f"a number from {low:g} to {high:g}")


def _check_int(value: Any, hint: Any, limits: Range, refuse: Refuse) -> None:
    _check_type(value, hint, limits, refuse)
    if "low" in limits and not limits["low"] <= value <= limits["high"]:
        refuse(value, f"a whole number from {limits['low']} to {limits['high']}")


def _check_type(value: Any, hint: Any, _: Range, refuse: Refuse) -> None:
    if not isinstance(hint, type) or type(value) is hint:
        return
    if not (issubclass(hint, Section) and isinstance(value, hint)):
        refuse(value, f"a {hint.__name__}")


_CHECKS: dict[Any, Callable[[Any, Any, Range, Refuse], None]] = {
    types.UnionType: _check_union,
    typing.Union: _check_union,
    tuple: _check_tuple,
    Literal: _check_literal,
    float: _check_float,
    int: _check_int,
}


def _members(union: Any) -> tuple[Any, ...]:
    """Return the members of a union, without None."""
    return tuple(hint for hint in typing.get_args(union) if hint is not type(None))


# From JSON and back


def _from_json(value: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _from_json(value, _pick_member(_members(hint), value))
    if origin is tuple and isinstance(value, list):
        return tuple(_from_json(v, typing.get_args(hint)[0]) for v in value)
    if isinstance(hint, type) and issubclass(hint, Section):
        return _pick_variant(hint, value).from_dict(value)
    return value


def _pick_variant(section: type[Section], value: Any) -> type[Section]:
    """Pick the subclass of a section whose ``kind`` matches the value's; the section itself if it has none."""
    variants = {kind: variant for variant in section.__subclasses__() for kind in _kinds(variant)}
    if not variants or not isinstance(value, dict):
        return section
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in variants:
        raise section.error("kind", kind, " or ".join(map(repr, sorted(variants))))
    return variants[kind]


def _kinds(section: type[Section]) -> tuple[str, ...]:
    return typing.get_args(typing.get_type_hints(section).get("kind"))


def _pick_member(hints: tuple[Any, ...], value: Any) -> Any:
    """Pick the union member whose ``kind`` matches the value's; else the first."""
    kind = value.get("kind") if isinstance(value, dict) else None
    for hint in hints:
        if kind is not None and kind in _kinds(hint):
            return hint
    return hints[0]


def _to_json(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_to_json(v) for v in value]
    return value


# Files

Fault = Literal["missing", "unreadable", "too large", "invalid", "no object"]


class JsonError(ConfigError):
    """A file that does not hold a JSON object.

    The message is the reason alone, since the fix depends on the file: callers that know it use ``advise``.
    """

    def __init__(self, reason: str, fault: Fault):
        super().__init__(reason)
        self.fault = fault

    def advise(self, advice: Mapping[Fault, str]) -> str:
        """Return the reason, and after it the advice for this fault if there is one."""
        return f"{self}: {advice[self.fault]}" if self.fault in advice else str(self)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of at most 64 MiB.

    Raises:
        JsonError: the file is missing, unreadable, too large, no JSON, or no object.
    """
    try:
        if path.stat().st_size > _MAX_FILE:
            raise JsonError(f"{path} is larger than {_MAX_FILE >> 20} MiB", "too large")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JsonError(f"{path} is missing", "missing") from None
    except OSError as error:
        raise JsonError(f"{path} cannot be read: {error.strerror}", "unreadable") from None
    except (ValueError, RecursionError) as error:
        raise JsonError(f"{path} is not valid JSON ({error})", "invalid") from None
    if not isinstance(data, dict):
        raise JsonError(f"{path} must hold a JSON object, got {shorten(data)}", "no object")
    return data
