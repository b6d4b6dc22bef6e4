"""Bounds of options that several layers check, and the functions that check them."""

from __future__ import annotations

from .errors import OptionError

MAX_SEED = 2**63 - 1
MAX_TEMPERATURE = 1000
MAX_CFG_WEIGHT = 1000
MAX_TOKENS = 1 << 20  # tokens per answer; no context is as long
MAX_LOOKUP = 64  # draft tokens per forward pass of an answer
MAX_WINDOW = 64  # positions per forward pass of an image
MAX_IMAGES = 10_000  # images per prompt and call
MAX_UPSCALE = 4  # factor of width and height


def check_number(
    name: str, value: float, low: float, high: float, *, above_low: bool = False
) -> None:
    """Refuse a number outside [low, high], or outside (low, high] with ``above_low``.

    Raises:
        OptionError: the value is no number in this range.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or (above_low and value == low):
        bounds = f"above {low:g} and at most {high:g}" if above_low else f"from {low:g} to {high:g}"
        raise OptionError(f"{name} must be a number {bounds}, got {value!r}")


def check_int(name: str, value: int, low: int, high: int) -> None:
    """Refuse anything except an integer in [low, high].

    Raises:
        OptionError: the value is no integer in this range.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise OptionError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
