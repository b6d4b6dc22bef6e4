"""Protection against request smuggling."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import Scope

from ..errors import APIError
from .base import CheckMiddleware


class FramingMiddleware(CheckMiddleware):
    """A check for requests that state the length of their body in two ways.

    A proxy in front of the server might use one of these lengths, and the server the other.
    """

    def check(self, scope: Scope) -> None:
        """Refuse a request with both Content-Length and Transfer-Encoding.

        Raises:
            APIError: the request has both headers.
        """
        if {"content-length", "transfer-encoding"} <= set(Headers(scope=scope).keys()):
            message = "Content-Length does not go with Transfer-Encoding: send one of them"
            raise APIError(400, message, headers={"Connection": "close"})
