"""CORS headers for the sites that the settings allow."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from ..errors import APIError
from ..settings import Settings


class CORSHeadersMiddleware(CORSMiddleware):
    """Starlette's CORS middleware, with OpenAI's error object for a refused preflight request.

    Args:
        app: the application inside.
        settings: ``allows_origin`` tells which sites are allowed.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        super().__init__(
            app,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("Retry-After", "X-Request-ID"),
            allow_private_network=True,
        )
        self._settings = settings

    def is_allowed_origin(self, origin: str) -> bool:
        """Return whether a site may read the server's replies."""
        return self._settings.allows_origin(origin)

    def preflight_response(self, request_headers: Headers) -> Response:
        """Return the reply to a CORS preflight request; status 400 if it is refused."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        return APIError(400, f"it may not be sent: {bytes(response.body).decode()}").response()
