"""Bounds that several layers check, each in one place.

``check_number``, ``check_int`` and ``check_text`` refuse a value of another type or outside its bounds.

The functions stand beside the bounds and not in the sampler, since the engine and the pipeline check numbers too.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from .errors import OptionError

MAX_SEED = 2**63 - 1
MAX_TEMPERATURE = 1000
MAX_CFG_WEIGHT = 1000
MAX_TOKENS = 1 << 20  # tokens of an answer: more than any context holds
MAX_LOOKUP = 64  # draft tokens read in one pass of an answer
MAX_WINDOW = 64  # positions read in one pass of an image
MAX_IMAGES = 10_000  # images of one prompt in one call
MAX_UPSCALE = 4  # times as wide and high


def check_number(
    name: str, value: Any, low: float, high: float, *, above_low: bool = False
) -> float:
    """Return a number in [low, high] (or (low, high]) as a Python number; NumPy's are taken too.

    Raises:
        OptionError: with the range.
    """
    number = _as_python(value, (int, float), Real)
    if number is None or not low <= number <= high or (above_low and number == low):
        bounds = f"above {low:g} and at most {high:g}" if above_low else f"from {low:g} to {high:g}"
        raise OptionError(f"{name} must be a number {bounds}, got {value!r}")
    return (
        value
        if isinstance(value, int | float) and type(value).__module__ == "builtins"
        else float(value)
    )


def check_int(name: str, value: Any, low: int, high: int) -> int:
    """Return an integer in [low, high] as a Python integer; NumPy's are taken too.

    Raises:
        OptionError: with the range.
    """
    number = _as_python(value, (int,), Integral)
    if number is None or not low <= number <= high:
        raise OptionError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return int(number)


def _as_python(value: Any, kinds: tuple[type, ...], number: type) -> Any:
    """Return a number as one of Python's own kinds, or None if it is not of the kind asked for."""
    if type(value) in kinds:
        return value
    if isinstance(value, bool) or not isinstance(value, number):
        return None
    return kinds[-1](value)


def check_text(name: str, value: Any) -> str:
    """Return a value that is text.

    Raises:
        OptionError: it is not.
    """
    if not isinstance(value, str):
        raise OptionError(f"{name} must be text (str), got {type(value).__name__}")
    return value


def set_checked(record: object, **values: object) -> None:
    """Store checked values in a frozen dataclass while it is being made."""
    for name, value in values.items():
        object.__setattr__(record, name, value)
