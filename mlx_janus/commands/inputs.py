"""Inputs other than files: images from the web and from stdin, a prompt from stdin.

Only the commands accept them. The library opens only paths.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..errors import PromptError
from ..processing.web import fetch
from .options import STDIN

if TYPE_CHECKING:
    from PIL import Image


def is_file(source: str) -> bool:
    """Return whether the source of an image is a file, not an https address or stdin ("-")."""
    return source != STDIN and not is_web(source)


def is_web(source: str) -> bool:
    """Return whether the source of an image is an https address."""
    return source[:8].lower() == "https://"


def read_image(source: str) -> Image.Image:
    """Return the image of a file, of an https address, or of stdin ("-").

    The image is upright, opaque and in RGB.

    Raises:
        ImageError: the image cannot be fetched or read.
    """
    from ..processing.images import decode_image, open_image

    if source == STDIN:
        return decode_image(_read_stdin(), "the image on stdin")
    if is_web(source):
        return decode_image(fetch(source), source)
    return open_image(source)


def read_prompt() -> str:
    """Return all of stdin as a prompt.

    Raises:
        PromptError: stdin is empty or not text.
    """
    try:
        text = _read_stdin().decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise PromptError("the prompt on stdin is not UTF-8 text: save it as UTF-8") from None
    if not text:
        raise PromptError("there is no prompt on stdin: pipe one in, or write it after --prompt")
    return text


def _read_stdin() -> bytes:
    return b"" if sys.stdin is None else sys.stdin.buffer.read()  # sys.stdin is None if closed
