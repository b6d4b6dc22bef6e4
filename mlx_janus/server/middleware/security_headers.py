"""Headers that keep browsers from misusing a reply."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from .base import HTTPMiddleware

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class SecurityHeadersMiddleware(HTTPMiddleware):
    """Security headers for every reply; a header that the reply sets itself is kept."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, and add the missing security headers to its reply."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)  # keeps the web page's own policy
            await send(message)

        await self.app(scope, receive, send_with_headers)
