"""Sections of a config: checking, reading and writing them.

A section is a frozen dataclass. Its type hints give the JSON values that it allows: numbers, text,
lists (as tuples), literals, other sections and unions of these. The metadata of its fields adds
ranges.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from .errors import ConfigError
from .files import MAX_JSON_FILE, FileTooLargeError, is_git_pointer, parse_json, read_bounded

_MAX_SIZE = 1 << 20  # far above any width or vocabulary, far below an overflow
_MAX_NUMBER = 1e30  # largest absolute value of a float field without a range

LATER = {"later": True}
"""Metadata of a field that early releases did not write. At its default, it is not written."""


def size_field(
    default: Any = dataclasses.MISSING,
    *,
    low: int = 1,
    high: int = _MAX_SIZE,
    later: bool = False,
) -> Any:
    """Return a dataclass field for an integer in [low, high], or for a tuple of such integers.

    ``later`` adds the metadata ``LATER``.
    """
    limits = {"low": low, "high": high}
    return field(default=default, metadata=limits | LATER if later else limits)


def number_field(
    default: Any = dataclasses.MISSING,
    *,
    low: float = 0.0,
    high: float = 1e9,
    later: bool = False,
) -> Any:
    """Return a dataclass field for a float in [low, high], or for a tuple of such floats.

    ``later`` adds the metadata ``LATER``.
    """
    limits = {"low": low, "high": high}
    return field(default=default, metadata=limits | LATER if later else limits)


@dataclass(frozen=True)
class Section:
    """An object in ``config.json``; the constructor checks the types and ranges of the fields.

    Raises:
        ConfigError: a field has a wrong type or is out of range.
    """

    title: ClassVar[str] = "config"

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            value = getattr(self, f.name)
            hint = hints[f.name]
            refuse = functools.partial(self._refuse, f.name)  # the error names this field
            _check(value, hint, f.metadata, refuse)

    def _refuse(self, name: str, value: Any, allowed: str) -> typing.NoReturn:
        """Raise the error that ``error`` returns."""
        raise self.error(name, value, allowed)

    @classmethod
    def error(cls, name: str, value: Any, allowed: str) -> ConfigError:
        """Return the error of a field with a wrong value; ``allowed`` describes the right ones."""
        return ConfigError(f"{cls.title}: {name} must be {allowed}, got {shorten(value)}")

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Build a section from parsed JSON.

        Raises:
            ConfigError: the data is not an object, an entry is missing or unknown, or a value has a
                wrong type or is out of range.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"{cls.title} must be a JSON object, got {shorten(data)}")
        known = {f.name: f for f in fields(cls)}
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ConfigError(
                f"{cls.title} has an unknown entry {unknown[0]!r}: "
                "the folder is of a newer version?"
            )
        for name, f in known.items():
            if name not in data and _is_required(f):
                raise ConfigError(f"{cls.title} lacks {name!r}")
        hints = typing.get_type_hints(cls)
        values = {}
        for name, value in data.items():
            values[name] = _from_json(value, hints[name])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values by name, without ``LATER`` fields at their default."""
        values = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if "later" not in f.metadata or value != f.default:
                values[f.name] = _to_json(value)
        return values


def _is_required(f: dataclasses.Field[Any]) -> bool:
    """Return whether a dataclass field has no default, so that it needs a value."""
    missing = dataclasses.MISSING
    return f.default is missing and f.default_factory is missing


def shorten(value: Any) -> str:
    """Return the ``repr`` of a value, cut to 60 characters."""
    text = repr(value)
    if len(text) <= 60:
        return text
    return f"{text[:57]}..."


# Checking: one function per kind of hint

Refuse = Callable[[Any, str], typing.NoReturn]
"""Raises an error about a value. Its arguments are the value, and the allowed values as text."""
Range = Mapping[str, Any]
"""Metadata of a field: either both "low" and "high", or neither."""


def _check(value: Any, hint: Any, limits: Range, refuse: Refuse) -> None:
    """Refuse a value that does not match its type hint or is outside its range."""
    kind = typing.get_origin(hint) or hint  # tuple for tuple[int, ...], int for int
    check = _CHECKS.get(kind, _check_type)
    check(value, hint, limits, refuse)


def _check_union(value: Any, hint: Any, limits: Range, refuse: Refuse) -> None:
    """Check a value against the union's member that is its exact type, or else against the first.

    None is accepted if it is a member of the union.
    """
    if value is None and type(None) in typing.get_args(hint):
        return
    members = _union_members(hint)
    member = next((m for m in members if type(value) is m), members[0])
    _check(value, member, limits, refuse)


def _check_tuple(value: Any, hint: Any, limits: Range, refuse: Refuse) -> None:
    """Refuse a value that is not a tuple, has the wrong number of items, or has a wrong item."""
    # tuple[int, ...] allows one or more items, tuple[int, int] exactly two. All items have the type
    # of the first one.
    item_hints = typing.get_args(hint)
    length = None if item_hints[-1] is Ellipsis else len(item_hints)
    allowed = f"a list of {length or 'one or more'} values"
    if not isinstance(value, tuple) or not value:
        refuse(value, allowed)
    if length is not None and len(value) != length:
        refuse(value, allowed)
    for item in value:
        _check(item, item_hints[0], limits, refuse)


def _check_literal(value: Any, hint: Any, _: Range, refuse: Refuse) -> None:
    """Refuse a value that equals none of the literals."""
    allowed = typing.get_args(hint)
    if value not in allowed:
        refuse(value, " or ".join(map(repr, allowed)))


def _check_float(value: Any, hint: Any, limits: Range, refuse: Refuse) -> None:
    """Refuse a value that is not a number or is out of range.

    An int is accepted too, since JSON may spell 1.0 as 1. NaN and infinity are always out of range.
    """
    if type(value) is not int:
        _check_type(value, hint, limits, refuse)
    low = limits.get("low", -_MAX_NUMBER)
    high = limits.get("high", _MAX_NUMBER)
    if not low <= value <= high:
        refuse(value, f"a number from {low:g} to {high:g}")


def _check_int(value: Any, hint: Any, limits: Range, refuse: Refuse) -> None:
    """Refuse a value that is not an int or is out of range. Without a range, any int is allowed."""
    _check_type(value, hint, limits, refuse)
    if "low" not in limits:
        return
    low = limits["low"]
    high = limits["high"]
    if not low <= value <= high:
        refuse(value, f"a whole number from {low} to {high}")


def _check_type(value: Any, hint: Any, _: Range, refuse: Refuse) -> None:
    """Refuse a value whose type is not exactly ``hint``, such as a bool where an int is needed.

    For a section, a subclass is allowed. A hint that is not a class, such as ``dict[str, int]``,
    allows every value.
    """
    if not isinstance(hint, type) or type(value) is hint:
        return
    if issubclass(hint, Section) and isinstance(value, hint):
        return
    refuse(value, f"a {hint.__name__}")


_CHECKS: dict[Any, Callable[[Any, Any, Range, Refuse], None]] = {
    types.UnionType: _check_union,
    typing.Union: _check_union,
    tuple: _check_tuple,
    Literal: _check_literal,
    float: _check_float,
    int: _check_int,
}


def _union_members(union: Any) -> tuple[Any, ...]:
    """Return the members of a union, without None."""
    hints = typing.get_args(union)
    return tuple(hint for hint in hints if hint is not type(None))


# From JSON and back


def _from_json(value: Any, hint: Any) -> Any:
    """Turn a JSON list into a tuple, or a JSON object into a section, as the type hint demands.

    Other values are returned unchanged. The constructor of the section that holds them refuses
    wrong ones later.

    Raises:
        ConfigError: a section inside the value cannot be built.
    """
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        member = _pick_member(_union_members(hint), value)
        return _from_json(value, member)
    if origin is tuple and isinstance(value, list):
        item_hint = typing.get_args(hint)[0]
        return tuple(_from_json(item, item_hint) for item in value)
    if isinstance(hint, type) and issubclass(hint, Section):
        variant = _pick_variant(hint, value)
        return variant.from_dict(value)
    return value


def _pick_variant(section: type[Section], value: Any) -> type[Section]:
    """Return the class to build from a JSON value: the subclass with the value's ``kind``.

    A section without subclasses is returned itself. A value that is not a JSON object also gets the
    section itself, whose ``from_dict`` then refuses the value.

    Raises:
        ConfigError: there are subclasses, but none has the value's ``kind``.
    """
    variants = {}
    for variant in section.__subclasses__():
        for kind in _kinds(variant):
            variants[kind] = variant
    if not variants or not isinstance(value, dict):
        return section
    chosen = value.get("kind")
    if not isinstance(chosen, str) or chosen not in variants:
        allowed = " or ".join(map(repr, sorted(variants)))
        raise section.error("kind", chosen, allowed)
    return variants[chosen]


def _kinds(section: type[Section]) -> tuple[str, ...]:
    """Return the values that the field ``kind`` of a section allows.

    They are the literals of its type hint. The tuple is empty if a section has no such field.
    """
    hints = typing.get_type_hints(section)
    return typing.get_args(hints.get("kind"))


def _pick_member(members: tuple[Any, ...], value: Any) -> Any:
    """Return the union member that allows the ``kind`` of a JSON value, or else the first member.

    A value without a ``kind`` also gets the first member.
    """
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind is None:
        return members[0]
    for member in members:
        if kind in _kinds(member):
            return member
    return members[0]


def _to_json(value: Any) -> Any:
    """Turn sections into dicts and tuples into lists, at every depth."""
    if isinstance(value, Section):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return value


# Files

Fault = Literal["missing", "unreadable", "too large", "pointer", "invalid", "no object"]


class JsonError(ConfigError):
    """A file that does not hold a JSON object.

    The message gives only the reason. The fix depends on the file, so callers add it by ``advise``.

    Args:
        reason: the message.
        fault: the kind of the problem, by which ``advise`` picks the fix.
    """

    def __init__(self, reason: str, fault: Fault):
        super().__init__(reason)
        self.fault = fault

    def advise(self, advice: Mapping[Fault, str]) -> str:
        """Return the message, followed by the advice for its fault if ``advice`` has any."""
        if self.fault not in advice:
            return str(self)
        fix = advice[self.fault]
        return f"{self}: {fix}"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of at most 64 MiB.

    Raises:
        JsonError: the file is missing, unreadable, too large, a Git LFS pointer, or does not hold a
            JSON object.
    """
    try:
        content = read_bounded(path, MAX_JSON_FILE)
        if is_git_pointer(content):
            raise JsonError(f"{path} is a Git LFS pointer and not the file itself", "pointer")
        data = parse_json(content)
    except FileNotFoundError:
        raise JsonError(f"{path} is missing", "missing") from None
    except FileTooLargeError as error:
        raise JsonError(f"{path} is larger than {error.limit}", "too large") from None
    except OSError as error:
        raise JsonError(f"{path} cannot be read: {error.strerror}", "unreadable") from None
    except ValueError as error:
        raise JsonError(f"{path} is not valid JSON ({error})", "invalid") from None
    if not isinstance(data, dict):
        raise JsonError(f"{path} must hold a JSON object, got {shorten(data)}", "no object")
    return data
