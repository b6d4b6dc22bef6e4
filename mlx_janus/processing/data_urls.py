"""Images as text: data URLs, and the base64 in them."""

from __future__ import annotations

import base64
import binascii
import re
import string

from ..errors import ImageError

_DATA_URL = re.compile(
    r"data:(image/[a-z0-9.+-]{1,40}|application/octet-stream)?(;[a-z0-9=.-]{1,40})?;base64,",
    re.IGNORECASE,
)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_SIGNATURES = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkqA", "TU0AK", "AAAA")
"""The base64 of the first bytes of PNG, JPEG, GIF, WebP, BMP, TIFF (two orders), AVIF and HEIC."""
_LEAST_BASE64 = 64  # characters; a shorter text is no image


def base64_part(url: str, max_bytes: int) -> str | None:
    """Return the base64 part of an image's data URL; None if the text is no such URL.

    Args:
        url: any text.
        max_bytes: largest size of the image file.

    Raises:
        ImageError: the image is certainly larger; ``decode_base64`` checks the exact size.
    """
    prefix = _DATA_URL.match(url)
    if prefix is None:
        return None
    encoded = url[prefix.end() :]
    # Four characters are three bytes, and up to two characters are padding. Line breaks and spaces
    # do not count.
    characters = len(encoded) - sum(map(encoded.count, string.whitespace))
    if characters * 3 // 4 > max_bytes + 2:
        raise too_large(max_bytes)
    return encoded


def decode_base64(text: str) -> bytes:
    """Return the bytes of an image in base64, which may have line breaks and lack its padding.

    Raises:
        ImageError: the base64 is damaged.
    """
    try:
        joined = "".join(text.split())  # some programs break the base64 into lines
        padding = "=" * (-len(joined) % 4)  # some programs leave the padding out
        return base64.b64decode(joined + padding, validate=True)
    except (binascii.Error, ValueError):  # ValueError: not ASCII
        message = "the image's base64 is damaged or cut short: send it again"
        raise ImageError(message) from None


def as_data_url(text: str) -> str:
    """Put a data URL's head before the base64 of an image; return any other text unchanged.

    The text must have the first bytes of a known format, so the path of a file is not changed.
    """
    is_base64 = (
        len(text) >= _LEAST_BASE64
        and text.startswith(_SIGNATURES)
        and _BASE64.fullmatch(text) is not None
    )
    return f"data:;base64,{text}" if is_base64 else text


def too_large(max_bytes: int) -> ImageError:
    """Return the error for an image file of more bytes than allowed."""
    return ImageError(f"the image is larger than {max_bytes / 1e6:g} MB: make it smaller")
