"""The ASGI interface that the middlewares share."""

from __future__ import annotations

from abc import ABC, abstractmethod

from starlette.types import ASGIApp, Receive, Scope, Send


class HTTPMiddleware(ABC):
    """A middleware for HTTP requests. Other connections pass through unchanged.

    Args:
        app: the application inside.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self.handle(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    @abstractmethod
    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""


class CheckMiddleware(HTTPMiddleware):
    """A middleware that refuses some requests by their headers and leaves the others unchanged."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, then serve it."""
        self.check(scope)
        await self.app(scope, receive, send)

    @abstractmethod
    def check(self, scope: Scope) -> None:
        """Check a request's headers; return if the request may pass.

        Raises:
            APIError: the request is refused.
        """
