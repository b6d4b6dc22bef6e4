"""The API key."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Scope

from ..errors import APIError
from .base import CheckMiddleware

PUBLIC_PATHS = ("/", "/health")  # paths that GET and HEAD may read without a key


class APIKeyMiddleware(CheckMiddleware):
    """A check for the key, which all requests need except those that read ``/`` or ``/health``.

    Args:
        app: the application inside.
        key: ASCII text, expected as ``Authorization: Bearer KEY``.
    """

    def __init__(self, app: ASGIApp, key: str):
        super().__init__(app)
        self._key = key.encode("ascii")

    def check(self, scope: Scope) -> None:
        """Refuse a wrong or missing key.

        Raises:
            APIError: the key is wrong or missing (status 401).
        """
        if scope["path"] in PUBLIC_PATHS and scope["method"] in ("GET", "HEAD"):
            return
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        # Several headers are refused like a missing one, since it is unclear which one counts.
        authorization = values[0] if len(values) == 1 else b""
        scheme, _, key = authorization.partition(b" ")
        if not (hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"):
            message = "the key is wrong or missing: send it as 'Authorization: Bearer KEY'"
            raise APIError(401, message, headers={"WWW-Authenticate": "Bearer"})
