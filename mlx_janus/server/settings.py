"""The settings of a server, apart from its model."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from ..errors import OptionError
from .origins import check_pattern, is_allowed

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
        cors_origins: sites, desktop apps and extensions that may use the server from a browser,
            such as "https://chat.example.org" or "chrome-extension://*"; see
            ``origins.check_pattern``. ``origins.APPS`` need not be named.
        served_names: the model's names in lists and replies; empty: its own name.
        model_aliases: further names of the model that requests may use; lists leave them out.
        upscale_to_size: enlarge images to the size that a request asks for, if it is a size that
            OpenAI's API offers.
        body_limit: most bytes of one request's body.
        bodies_limit: most bytes of all bodies held at once.
        body_seconds: most seconds for a body to arrive, and also most seconds for a client to read
            the next part of a reply.
        image_limit: most bytes of one image file.
        most_requests: number of open POST requests, including those in the queue; further ones
            are refused.
        most_connections: number of open connections, idle ones included; further ones are closed.
            The system's limit of open files may lower it.
        heartbeat_seconds: seconds without an event after which a stream sends a comment.
        log_requests: log one line per request: method, route, status, sizes and seconds, but no
            content.

    Raises:
        OptionError: the key is not 1 to 512 printable ASCII characters without spaces; the host is
            empty; ``cors_origins`` has an item that ``origins.check_pattern`` refuses; or there is
            no key and the host is not a loopback address.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    allow_url_images: bool = False
    cors_origins: tuple[str, ...] = ()
    served_names: tuple[str, ...] = ()
    model_aliases: tuple[str, ...] = ()
    upscale_to_size: bool = False
    body_limit: int = 64_000_000
    bodies_limit: int = 256_000_000
    body_seconds: float = 60.0
    image_limit: int = 40_000_000
    most_requests: int = 256
    most_connections: int = 512
    heartbeat_seconds: float = 15.0
    log_requests: bool = False

    def __post_init__(self) -> None:
        """Check the key, the host and ``cors_origins``."""
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
        for pattern in self.cors_origins:
            check_pattern(pattern, has_key=self.api_key is not None)

    def allows_origin(self, origin: str) -> bool:
        """Return whether a page or program of this origin may use the server from a browser."""
        return is_allowed(origin, self.cors_origins, has_key=self.api_key is not None)


def is_loopback(host: str) -> bool:
    """Return whether a host's name or address, without a port, is loopback."""
    host = host.strip("[]").lower()  # an IPv6 address may have brackets
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, not an address
        return host == "localhost"
