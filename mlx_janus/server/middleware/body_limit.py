"""Limits for request bodies."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import APIError, client_left
from ..settings import Settings
from .base import HTTPMiddleware

_RETRY_AFTER = 5  # seconds, in the Retry-After header


class BodyLimitMiddleware(HTTPMiddleware):
    """Limits for POST requests, whose complete bodies are read before the application is called.

    The limits are the bytes of one body, the bytes of all bodies together, the number of requests
    at once, and the seconds for a body to arrive.

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

    def _check_size(self, size: int) -> None:
        """Refuse a body that has more bytes than the limit.

        Raises:
            APIError: the body is too large (413).
        """
        if size > self._settings.body_limit:
            limit = f"{self._settings.body_limit / 1e6:g} MB"
            raise APIError(413, f"the body is larger than {limit}: send fewer or smaller images")


def _too_many_requests() -> APIError:
    headers = {"Retry-After": str(_RETRY_AFTER)}
    return APIError(429, "too much is being asked at once: try again later", headers=headers)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return an ASGI ``receive`` that first gives a body, and then what ``receive`` gives.

    So the application inside can read the body although it has been read already.
    """
    pending: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
