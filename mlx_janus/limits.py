"""Bounds of options that several layers check, and the functions that check them."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from .errors import OptionError

MAX_SEED = 2**63 - 1
MAX_TEMPERATURE = 1000
MAX_CFG_WEIGHT = 1000  # weight of classifier-free guidance
MAX_TOKENS = 1 << 20  # tokens per answer; no context is as long
MAX_LOOKUP = 64  # draft tokens per forward pass of an answer
MAX_WINDOW = 64  # positions per forward pass of an image
MAX_IMAGES = 10_000  # images per prompt and call
MAX_UPSCALE = 4  # factor of width and height


def check_number(
    name: str, value: Any, low: float, high: float, *, above_low: bool = False
) -> float:
    """Return a number in [low, high], or in (low, high] with ``above_low``, as a Python number.

    Numbers of NumPy are accepted.

    Raises:
        OptionError: the value is no number in this range, or a bool.
    """
    number = _to_python(value, (int, float), Real)
    if number is None or not low <= number <= high or (above_low and number == low):
        bounds = f"above {low:g} and at most {high:g}" if above_low else f"from {low:g} to {high:g}"
        raise OptionError(f"{name} must be a number {bounds}, got {value!r}")
    return number


def check_int(name: str, value: Any, low: int, high: int) -> int:
    """Return an integer in [low, high] as a Python integer. Integers of NumPy are accepted.

    Raises:
        OptionError: the value is no integer in this range, or a bool.
    """
    number = _to_python(value, (int,), Integral)
    if number is None or not low <= number <= high:
        raise OptionError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return number


def _to_python(value: Any, types: tuple[type, ...], kind: type) -> Any:
    """Turn a number of NumPy into one of Python.

    Args:
        value: any value.
        types: Python's types that are returned unchanged; others are converted to the last one.
        kind: abstract type of the numbers that are accepted.

    Returns:
        A Python number; None for a bool, and for a value that is not of ``kind``.
    """
    if type(value) in types:
        return value
    if isinstance(value, bool) or not isinstance(value, kind):
        return None
    return types[-1](value)


def check_text(name: str, value: Any) -> str:
    """Return the value if it is text.

    Raises:
        OptionError: the value has another type.
    """
    if not isinstance(value, str):
        raise OptionError(f"{name} must be text (str), got {type(value).__name__}")
    return value


def set_checked(record: object, **values: object) -> None:
    """Set fields in the ``__post_init__`` of a frozen dataclass, which refuses assignments."""
    for name, value in values.items():
        object.__setattr__(record, name, value)
