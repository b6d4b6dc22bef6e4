"""Limits for request bodies."""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..bodies import FORM, media_type
from ..errors import APIError, client_left
from ..settings import Settings
from .base import HTTPMiddleware

_MAX_VALUES = 2_000_000  # values of a JSON body, far more than any context needs; parsed in 0.2 s
_RETRY_AFTER = 5  # seconds, in the Retry-After header


class BodyLimitMiddleware(HTTPMiddleware):
    """Limits for POST requests, whose complete bodies are read before the application is called.

    The limits are the bytes of one body, the values in its JSON, the bytes of all bodies together,
    the number of requests at once, and the seconds for a body to arrive.

    Args:
        app: the application inside.
        settings: the limits.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        super().__init__(app)
        self._settings = settings
        self._open_requests = 0
        self._held_bytes = 0  # bytes in the bodies of all open requests

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body of a POST request within the limits, then serve the request.

        The request and its body count towards the limits until the end of the reply.

        Raises:
            APIError: a limit is exceeded, or the client leaves.
        """
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        # Refuse a body before reading it if Content-Length is too large. h11 has checked that the
        # header is a number.
        self._check_size(int(Headers(scope=scope).get("content-length", "0")))
        if self._open_requests >= self._settings.most_requests:
            raise _too_many_requests()
        body = bytearray()
        self._open_requests += 1
        try:
            await self._read_body(body, receive)
            self._decompress(body, Headers(scope=scope).get("content-encoding", ""))
            # A form is no JSON, and any byte of its files may be a comma.
            if media_type(Headers(scope=scope)) != FORM:
                check_value_count(body)
            await self.app(scope, _replay(bytes(body), receive), send)
        finally:
            self._open_requests -= 1
            self._held_bytes -= len(body)

    async def _read_body(self, body: bytearray, receive: Receive) -> None:
        """Read the request's body into ``body``, which is empty at first.

        The bytes are added to ``_held_bytes`` as they arrive. The caller subtracts them when the
        request ends, even if reading fails.

        Raises:
            APIError: a limit is exceeded, or the client leaves.
        """
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise client_left()
                    piece = message.get("body", b"")
                    self._check_size(len(body) + len(piece))
                    self._held_bytes += len(piece)
                    body += piece
                    if self._held_bytes > self._settings.bodies_limit:
                        raise _too_many_requests()
                    more = message.get("more_body", False)
        except TimeoutError:
            seconds = f"{self._settings.body_seconds:g}"
            raise APIError(408, f"the body did not arrive in {seconds} seconds") from None

    def _decompress(self, body: bytearray, encoding: str) -> None:
        """Decompress a gzip body in place. Leave an uncompressed body unchanged.

        Raises:
            APIError: the encoding is not gzip (415), the gzip is damaged (400), the content is too
                large (413), or all bodies together are too large (429).
        """
        if encoding.strip().lower() in ("", "identity"):
            return
        if encoding.strip().lower() not in ("gzip", "x-gzip"):
            message = "the body's Content-Encoding must be gzip or none"
            raise APIError(415, message, headers={"Accept-Encoding": "gzip"})
        decompressor = zlib.decompressobj(wbits=31)  # 31: the gzip format, not zlib's
        try:
            # One byte above the limit is enough to see that the content is too large.
            content = decompressor.decompress(bytes(body), self._settings.body_limit + 1)
        except zlib.error:
            raise APIError(400, "the body is damaged: its gzip cannot be read") from None
        self._check_size(len(content))
        if not decompressor.eof or decompressor.unused_data:
            raise APIError(400, "the body is damaged: its gzip ends too early or too late")
        self._held_bytes += len(content) - len(body)
        body[:] = content
        if self._held_bytes > self._settings.bodies_limit:
            raise _too_many_requests()

    def _check_size(self, size: int) -> None:
        """Refuse a body that has more bytes than the limit.

        Raises:
            APIError: the body is too large (413).
        """
        if size > self._settings.body_limit:
            limit = f"{self._settings.body_limit / 1e6:g} MB"
            raise APIError(413, f"the body is larger than {limit}: send fewer or smaller images")


def check_value_count(body: bytearray) -> None:
    """Refuse a body whose JSON has so many values that parsing it would hold up other requests.

    An image in base64 is one value. Each value except the first follows a comma or an opening
    bracket, so these are counted.

    Raises:
        APIError: there are too many (413).
    """
    values = body.count(b",") + body.count(b"[") + body.count(b"{")
    if values > _MAX_VALUES:
        raise APIError(413, f"the body has more than {_MAX_VALUES:,} values: send fewer")


def _too_many_requests() -> APIError:
    """Return the error for a full server (429)."""
    headers = {"Retry-After": str(_RETRY_AFTER)}
    return APIError(429, "too much is being asked at once: try again later", headers=headers)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return an ASGI ``receive`` that first gives a complete body, then passes messages on.

    The application inside can then read the body, although this middleware has read it already.
    """
    pending: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
