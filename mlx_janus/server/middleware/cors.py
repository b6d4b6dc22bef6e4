"""CORS headers for the sites that the settings allow."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from ..errors import APIError


class CORSHeadersMiddleware(CORSMiddleware):
    """Starlette's CORS middleware, with OpenAI's error object for a refused preflight request."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Return the reply to a CORS preflight request; status 400 if it is refused."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        return APIError(400, f"it may not be sent: {bytes(response.body).decode()}").response()
