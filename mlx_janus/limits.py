"""Bounds of options that several layers check, and the functions that check them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from numbers import Integral, Real
from typing import Any

from .errors import OptionError

MAX_SEED = 2**63 - 1
RANDOM_SEED = -1  # a given seed that means: choose a random one
MAX_TEMPERATURE = 1000
MAX_CFG_WEIGHT = 1000  # weight of classifier-free guidance
MAX_TOKENS = 1 << 20  # tokens per answer; no context is as long
MAX_PENALTY = 2  # frequency and presence penalty, either sign
MIN_REPETITION_PENALTY = 0.01
MAX_REPETITION_PENALTY = 100
MAX_LOGIT_BIAS = 100  # either sign
MAX_TOP_LOGPROBS = 20  # likeliest tokens reported for each token of an answer
MAX_TOP_K = 2**31 - 1  # any number above the vocabulary keeps all tokens
ALL_TOKENS = -1  # as a top_k: sample from all tokens, as with 0
MAX_LOOKUP = 64  # draft tokens per forward pass of an answer
MAX_STEPS = 1000  # steps of a rectified flow
MAX_WINDOW = 64  # positions per forward pass of an image
MAX_IMAGES = 10_000  # images per prompt and call
MAX_BEST_OF = 1000  # images of a prompt among which the best are chosen
MAX_REFLECT = 10  # times that an image is judged and drawn again
MAX_UPSCALE = 4  # factor of width and height
MAX_DECODED_BYTES = 400_000_000  # bytes of the pixels of an image that is read; 4 for each pixel


def check_number(
    name: str, value: Any, low: float, high: float, *, above_low: bool = False
) -> float:
    """Check that an option's value is a number in [low, high], and return it as a Python number.

    With ``above_low``, the range is (low, high]. NumPy's numbers are accepted.

    Raises:
        OptionError: the value is not a number in this range, or is a bool.
    """
    number = _to_python(value, (int, float), Real)
    in_range = number is not None and low <= number <= high
    if above_low and number == low:
        in_range = False
    if not in_range:
        bounds = f"above {low:g} and at most {high:g}" if above_low else f"from {low:g} to {high:g}"
        raise OptionError(f"{name} must be a number {bounds}, got {value!r}")
    return number


def check_int(name: str, value: Any, low: int, high: int) -> int:
    """Check that an option's value is an integer in [low, high], and return it as a Python int.

    NumPy's integers are accepted.

    Raises:
        OptionError: the value is not an integer in this range, or is a bool.
    """
    number = _to_python(value, (int,), Integral)
    if number is None or not low <= number <= high:
        raise OptionError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return number


def _to_python(value: Any, builtin_types: tuple[type, ...], accepted: type) -> Any:
    """Return a number as a Python number, or None if the value is not a number.

    Args:
        value: any value.
        builtin_types: types of the result. Numbers of other types, such as NumPy's, are converted
            to the last one.
        accepted: abstract type of the accepted numbers. A bool is not accepted, although Python
            counts it as an integer.
    """
    if type(value) in builtin_types:
        return value
    if isinstance(value, bool) or not isinstance(value, accepted):
        return None
    return builtin_types[-1](value)


def check_text(name: str, value: Any) -> str:
    """Check that an option's value is a str, and return it.

    Raises:
        OptionError: the value has another type.
    """
    if not isinstance(value, str):
        raise OptionError(f"{name} must be text (str), got {type(value).__name__}")
    return value


def check_keywords(function: str, given: Iterable[str], known: Collection[str]) -> None:
    """Check the names of further keyword arguments.

    Args:
        function: the function's name, for the error message.
        given: the names that the caller gives.
        known: the names that the function has.

    Raises:
        TypeError: the function has no such argument, as Python says it of its own arguments.
    """
    for name in given:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def set_checked(record: object, **values: object) -> None:
    """Set fields of a frozen dataclass in its ``__post_init__``, where plain assignment fails."""
    for name, value in values.items():
        object.__setattr__(record, name, value)
