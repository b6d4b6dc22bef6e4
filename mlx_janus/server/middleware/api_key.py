"""The API key."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Scope

from ..errors import APIError
from ..image_store import PATH as IMAGES_PATH
from .base import CheckMiddleware

_PUBLIC_PATHS = ("/", "/health")


def is_public(path: str) -> bool:
    """Return whether GET and HEAD may read a path without a key.

    Generated images need no key, because their names are secrets themselves.
    """
    return path in _PUBLIC_PATHS or path.startswith(IMAGES_PATH)


class APIKeyMiddleware(CheckMiddleware):
    """A check for the key, which all requests need except those that read a public path.

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
        if is_public(scope["path"]) and scope["method"] in ("GET", "HEAD"):
            return
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        # Several headers are refused like a missing one, since it is unclear which one counts.
        authorization = values[0] if len(values) == 1 else b""
        scheme, _, key = authorization.partition(b" ")
        if not (hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"):
            message = "the key is wrong or missing: send it as 'Authorization: Bearer KEY'"
            raise APIError(401, message, headers={"WWW-Authenticate": "Bearer"})
