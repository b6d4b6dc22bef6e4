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
        key: ASCII text, expected as ``Authorization: Bearer KEY`` or, as Anthropic's clients send
            it, as ``X-API-Key: KEY``.
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
        scheme, _, key = _header(scope, b"authorization").partition(b" ")
        is_bearer = hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"
        is_plain = hmac.compare_digest(_header(scope, b"x-api-key").strip(), self._key)
        if not (is_bearer or is_plain):
            message = "the key is wrong or missing: send it as 'Authorization: Bearer KEY'"
            raise APIError(401, message, headers={"WWW-Authenticate": "Bearer"})


def _header(scope: Scope, name: bytes) -> bytes:
    """Return the value of a header; b"" if it is missing.

    Several headers of one name count as missing, since it is unclear which one counts.
    """
    values = [value for header, value in scope["headers"] if header == name]
    return values[0] if len(values) == 1 else b""
