"""Bounds that several layers check, each in one place.

``check_number`` and ``check_int`` refuse a number outside its bounds.

The functions stand beside the bounds and not in the sampler, since the engine and the pipeline check numbers too.
"""

from __future__ import annotations

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
    name: str, value: float, low: float, high: float, *, above_low: bool = False
) -> None:
    """Refuse a number outside [low, high] (or (low, high]).

    Raises:
        OptionError: with the range.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or (above_low and value == low):
        bounds = f"above {low:g} and at most {high:g}" if above_low else f"from {low:g} to {high:g}"
        raise OptionError(f"{name} must be a number {bounds}, got {value!r}")


def check_int(name: str, value: int, low: int, high: int) -> None:
    """Refuse anything but an integer in [low, high].

    Raises:
        OptionError: with the range.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise OptionError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
