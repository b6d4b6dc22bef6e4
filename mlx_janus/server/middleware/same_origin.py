"""Protection against web pages of other sites.

Every web page that is open on the same machine can reach a server on a loopback address. The
Origin header or Sec-Fetch-Site identifies a page of another site. The Host header identifies DNS
rebinding: a foreign name whose owner has set it to this machine's address.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Scope

from ..errors import APIError
from ..image_store import PATH as IMAGES_PATH
from ..settings import Settings, is_loopback
from .base import CheckMiddleware

_DEFAULT_PORTS = {"http": 80, "https": 443}


class SameOriginMiddleware(CheckMiddleware):
    """A check for requests that a browser sends for a page of another site.

    Args:
        app: the application inside.
        settings: ``allows_origin`` tells which other sites are allowed. If there is an
            ``api_key``, any Host is accepted, because other sites' pages do not know the key.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        super().__init__(app)
        self._settings = settings

    def check(self, scope: Scope) -> None:
        """Refuse a request whose Host or Origin header is foreign.

        Raises:
            APIError: another site's page sent the request, or the request does not have exactly
                one Host header.
        """
        headers = Headers(scope=scope)
        self._check_host(headers.getlist("host"))
        self._check_origin(scope, headers)

    def _check_host(self, hosts: list[str]) -> None:
        """Refuse a Host that is not this machine's own, unless requests need a key.

        Raises:
            APIError: the Host is foreign (403), or there is not exactly one Host header (400).
        """
        if len(hosts) != 1:
            raise APIError(400, "there must be one Host header")
        name, _ = _split_port(hosts[0])
        # Without a key the server listens only on loopback, so any other Host is foreign.
        if self._settings.api_key is None and not is_loopback(name):
            raise APIError(
                403,
                "this Host is not served: use the address that the server printed",
                code="wrong_host",
            )

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """Refuse a request of another site's page, unless the settings allow the site.

        Raises:
            APIError: another site's page sent the request (403).
        """
        origins = headers.getlist("origin")
        if origins:
            allowed = all(map(self._settings.allows_origin, origins))
            # A browser sends one Origin header. Several are refused unless all are allowed.
            own_page = len(origins) == 1 and _is_same_server(origins[0], headers["host"])
            if allowed or own_page:
                return
        else:
            # A browser's GET may lack Origin: then Sec-Fetch-Site tells which site's page sent it.
            # Programs send neither header and pass, as does an address typed by hand ("none").
            fetch_site = headers.get("sec-fetch-site", "none")
            # Any site may link to this server's page ("/"), and any site's page may show a
            # generated image, because the image's name is a secret.
            path = scope["path"]
            open_to_all = scope["method"] == "GET" and (path == "/" or path.startswith(IMAGES_PATH))
            if open_to_all or fetch_site in ("none", "same-origin"):
                return
        message = "other sites' pages may not use this server: name them with --cors-origin"
        raise APIError(403, message, code="wrong_origin")


def _split_port(host: str) -> tuple[str, int | None]:
    """Return the name, in lower case, and the port of a Host header.

    The port is None if the header has none. A malformed header gives "" and None.
    """
    try:
        parts = urlsplit(f"//{host}")
        return (parts.hostname or ""), parts.port
    except ValueError:
        return "", None


def _is_same_server(origin: str, host: str) -> bool:
    """Return whether an Origin and a Host header name the same host and port."""
    try:
        parts = urlsplit(origin)
        origin_port = parts.port
    except ValueError:  # a malformed Origin
        return False
    default_port = _DEFAULT_PORTS.get(parts.scheme)
    if default_port is None:  # not http or https, such as the Origin "null" of a sandboxed page
        return False
    name, port = _split_port(host)
    # Both headers may leave out the default port of the page's scheme.
    return (parts.hostname, origin_port or default_port) == (name, port or default_port)
