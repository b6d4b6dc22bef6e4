"""Bodies of requests: JSON, and forms (multipart/form-data) in bounded memory."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json
from python_multipart.exceptions import FormParserError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from .errors import APIError

FORM = "multipart/form-data"
JSON = "application/json"
_MAX_FILES = 64  # files of a form
_MAX_FIELDS = 64  # fields of a form that are not files
_MAX_FIELD_BYTES = 1_000_000  # bytes of a field that is not a file
_PIECE = 1 << 20  # bytes parsed before other requests get a turn
_BOUNDARY = re.compile(
    r';\s*boundary=(?:"([^"\\]{1,200})"|([^\s";,]{1,200}))\s*(?:;|$)', re.IGNORECASE
)


def media_type(headers: Headers) -> str:
    """Return the media type of a body in lower case, without parameters; "" if it is not named."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def parse_json(body: bytes) -> Any:
    """Parse a body that must be JSON without NaN, lone surrogates or excessive depth.

    Raises:
        APIError: the body is not JSON, or has one of these (400).
    """
    try:
        # from_json always refuses lone surrogates and excessive depth.
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise APIError(400, f"the body is not JSON: {error}") from None


@dataclass
class Form:
    """The parts of a form.

    Args:
        fields: the name and the text of each field that is not a file, in order. Empty fields are
            left out.
        files: the field's name and the bytes of each file, in order. Empty files without a file
            name are left out: a browser sends one for a file field in which nothing is chosen.
    """

    fields: list[tuple[str, str]] = field(default_factory=list)
    files: list[tuple[str, bytes]] = field(default_factory=list)


async def read_form(request: Request) -> Form:
    """Parse a form, whose bytes are all in memory and whose size has been checked.

    Raises:
        APIError: the form has no boundary, is damaged or cut short, or has too many or too large
            parts (400).
    """
    boundary = _BOUNDARY.search(request.headers["content-type"])
    if boundary is None:
        raise APIError(400, f"the form has no boundary: send 'Content-Type: {FORM}; boundary=...'")
    quoted, unquoted = boundary.groups()  # one of them is None
    # Leave the header's other parameters out, because a charset might name any of Python's codecs.
    headers = Headers({"content-type": f'{FORM}; boundary="{quoted or unquoted}"'})
    parser = _Parser(
        headers,
        _pieces(request),
        max_files=_MAX_FILES,
        max_fields=_MAX_FIELDS,
        max_part_size=_MAX_FIELD_BYTES,
    )
    try:
        parts = await parser.parse()
    except MultiPartException as error:
        reason = error.message.rstrip(".")
        raise APIError(400, f"the form cannot be read: {reason[:1].lower()}{reason[1:]}") from None
    except FormParserError:
        raise APIError(400, "the form cannot be read: invalid multipart data") from None
    form = Form()
    try:
        for name, value in parts.multi_items():
            if isinstance(value, UploadFile):
                if value.filename or value.size:
                    form.files.append((name, await value.read()))
            elif value:
                form.fields.append((name, value))
    finally:
        await parts.close()
    return form


class _Parser(MultiPartParser):
    """Starlette's parser of forms, which keeps files in memory and refuses a form without an end.

    Args:
        headers: the Content-Type with the boundary.
        stream: the form's bytes.
        limits: the keyword arguments of Starlette's parser.
    """

    spool_max_size = 0  # bytes of a file before it is written to disk; 0: never

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None], **limits: int):
        super().__init__(headers, self._to_the_end(stream), **limits)
        self._complete = False

    def on_end(self) -> None:
        """Note that the last boundary has been read."""
        self._complete = True

    async def _to_the_end(self, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """Yield the form's bytes, and then check that the parser has found the form's end.

        The parser parses each piece before it asks for the next one.

        Raises:
            MultiPartException: the last boundary is missing. The parser then closes all files.
        """
        async for piece in stream:
            yield piece
        if not self._complete:
            raise MultiPartException("It is cut short, without its last boundary.")


async def _pieces(request: Request) -> AsyncGenerator[bytes, None]:
    """Yield the body in pieces, and give other requests a turn after each."""
    async for chunk in request.stream():
        for start in range(0, len(chunk), _PIECE):
            yield chunk[start : start + _PIECE]
            await asyncio.sleep(0)
