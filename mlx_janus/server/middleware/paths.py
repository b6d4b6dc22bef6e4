"""Paths as clients spell them: with a final slash, without ``/v1``, or as a complete URL."""

from __future__ import annotations

from urllib.parse import quote, urlsplit

from starlette.types import Receive, Scope, Send

from .base import HTTPMiddleware

_PREFIX = "/v1"
_ROUTES = ("/chat/completions", "/images/generations", "/models")  # under _PREFIX


class PathMiddleware(HTTPMiddleware):
    """A middleware that replaces a path by the route's own spelling."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request under the route's own path."""
        path = canonical_path(scope["path"])
        # The scope is changed in place, so that the access log finds the route in it.
        scope["path"] = path
        scope["raw_path"] = quote(path).encode("ascii")
        await self.app(scope, receive, send)


def canonical_path(path: str) -> str:
    """Return the path of the route that a client means.

    A client's base URL may end in "/", lack "/v1" or have it twice. A request line may hold a
    complete URL (RFC 9112, section 3.2.2).
    """
    if path.startswith(("http://", "https://")):
        path = urlsplit(path).path
    path = path.rstrip("/") or "/"
    while path.startswith(f"{_PREFIX}{_PREFIX}/"):
        path = path.removeprefix(_PREFIX)
    if path.startswith(_ROUTES):
        path = f"{_PREFIX}{path}"
    return path
