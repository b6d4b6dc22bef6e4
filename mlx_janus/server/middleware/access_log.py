"""Metrics and the access log."""

from __future__ import annotations

import logging
import secrets
import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..metrics import Metrics
from .base import HTTPMiddleware

_LOG = logging.getLogger("mlx_janus.server.requests")
# Any other method is counted as "other", since a client may invent names.
_METHODS = ("GET", "POST", "OPTIONS", "HEAD")


class AccessLogMiddleware(HTTPMiddleware):
    """The metrics and the log of all requests: method, route, status, sizes, seconds and id.

    The id is random and stands in the reply's header X-Request-ID.

    Args:
        app: the application inside.
        metrics: counts the requests.
        log_requests: whether each request is logged.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, log_requests: bool):
        super().__init__(app)
        self._metrics = metrics
        self._log_requests = log_requests

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add an id to a request's reply. Then count and log the request, even if it fails."""
        started = time.perf_counter()
        status = 0  # stays 0 if no reply begins
        bytes_in = 0
        bytes_out = 0
        request_id = f"req_{secrets.token_hex(12)}"

        async def counting_receive() -> Message:
            nonlocal bytes_in
            message = await receive()
            bytes_in += len(message.get("body", b""))
            return message

        async def counting_send(message: Message) -> None:
            nonlocal status, bytes_out
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            bytes_out += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, counting_receive, counting_send)
        finally:
            seconds = time.perf_counter() - started
            # The router has added the route to the scope by now, if it found one.
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.count_request(method, route, status, seconds)
            if self._log_requests:
                sizes = f"{bytes_in} bytes in, {bytes_out} out"
                _LOG.info(
                    "%s %s %d, %s, %.3f s, %s", method, route, status, sizes, seconds, request_id
                )
