"""The settings of a server, apart from its model."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from ..errors import OptionError

_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"  # a part of a host name, between dots
_ORIGIN = re.compile(
    rf"https?://(\[(?P<ipv6>[0-9a-f:.]+)\]|{_LABEL}(\.{_LABEL})*)(:(?P<port>[1-9]\d{{0,4}}))?"
)
_KEY = re.compile(r"[!-~]{1,512}")  # printable ASCII without spaces


@dataclass(frozen=True)
class Settings:
    """Address, access and limits of a server.

    Args:
        host: address or name to listen on. Without a key it must be a loopback address.
        port: port to listen on; 0: any free port.
        api_key: key that every request must send, except to read the page ``/`` or ``/health``;
            None: no key.
        allow_url_images: fetch images from https addresses that a request names.
        cors_origins: sites whose pages may use the server from a browser, such as
            "https://chat.example.org".
        body_limit: bytes of one request's body.
        bodies_limit: bytes of all bodies held at once.
        body_seconds: seconds for a body to arrive, and for a client to read the next part of a
            reply.
        image_limit: bytes of one image file.
        most_requests: number of requests at once, including those in the queue.
        most_connections: number of open connections, idle ones included; further ones are closed.
            The system's limit of open files may lower it.
        heartbeat_seconds: seconds without an event after which a stream sends a comment.
        log_requests: log one line per request: method, route, status, sizes and seconds, but no
            content.

    Raises:
        OptionError: the host is empty, or not loopback without a key; the key is not 1 to 512
            printable ASCII characters without spaces; or a site is not an origin.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    allow_url_images: bool = False
    cors_origins: tuple[str, ...] = ()
    body_limit: int = 64_000_000
    bodies_limit: int = 256_000_000
    body_seconds: float = 60.0
    image_limit: int = 20_000_000
    most_requests: int = 256
    most_connections: int = 512
    heartbeat_seconds: float = 15.0
    log_requests: bool = False

    def __post_init__(self) -> None:
        """Check the key, the host and the sites."""
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            raise OptionError(
                "the key, of api_key=... or MLX_JANUS_API_KEY, must be 1 to 512 letters, digits "
                "and signs, without spaces"
            )
        if not self.host.strip():
            raise OptionError("the host is empty: give an address or a name, or leave host=... out")
        if self.api_key is None and not is_loopback(self.host):
            fix = "set a key with api_key=..., or leave host=... out"
            raise OptionError(f"other machines can reach {self.host}: {fix}")
        for origin in self.cors_origins:
            if not _is_origin(origin):
                raise OptionError(
                    f"{origin!r} is not an origin: give the scheme, the host in lower case, the "
                    "port if it has one, and no path, such as https://chat.example.org"
                )


def _is_origin(text: str) -> bool:
    """Return whether a text is an origin in the form that browsers send."""
    match = _ORIGIN.fullmatch(text)
    if match is None:
        return False
    if match["port"] is not None and int(match["port"]) > 65535:
        return False
    if match["ipv6"] is not None:
        try:
            ipaddress.IPv6Address(match["ipv6"])
        except ValueError:
            return False
    return True


def is_loopback(host: str) -> bool:
    """Return whether a host's name or address, without a port, is loopback."""
    host = host.strip("[]").lower()  # an IPv6 address may have brackets
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
