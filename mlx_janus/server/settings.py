"""What a server is set to, apart from its model."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from ..errors import OptionError

_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_ORIGIN = re.compile(rf"https?://(\[(?P<six>[0-9a-f:.]+)\]|{_LABEL}(\.{_LABEL})*)(:(?P<port>[1-9]\d{{0,4}}))?")
_KEY = re.compile(r"[!-~]{1,512}")


@dataclass(frozen=True)
class Settings:
    """Where a server listens, whom it answers, and how much it takes.

    Args:
        host: address or name that is listened at; one of this machine alone, unless there is a key.
        port: 0: a free one.
        api_key: what every request but those of the page and of ``/health`` must bring; None: nothing.
        allow_url_images: fetch pictures that a request names by an https address.
        cors_origins: sites whose pages may use the server from a browser, such as "https://chat.example.org".
        body_limit: bytes of a request's body.
        bodies_limit: bytes of all bodies that are held at once.
        body_seconds: in which a body has to arrive, and the next piece of a reply to be read.
        picture_limit: bytes of one picture, as a file.
        most_requests: under way at once, those that wait included.
        most_connections: open at once, whether something is asked on them or not; others are cut.
        heartbeat_seconds: after which a stream that has nothing to say says so.
        log_requests: log one line a request: method, route, status, sizes and seconds, nothing of its content.

    Raises:
        OptionError: no host, or one that others reach without a key; a key that no header carries; or no origin.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    allow_url_images: bool = False
    cors_origins: tuple[str, ...] = ()
    body_limit: int = 64_000_000
    bodies_limit: int = 256_000_000
    body_seconds: float = 60.0
    picture_limit: int = 20_000_000
    most_requests: int = 256
    most_connections: int = 512
    heartbeat_seconds: float = 15.0
    log_requests: bool = False

    def __post_init__(self) -> None:
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            raise OptionError(
                "the key, of --api-key or MLX_JANUS_API_KEY, must be 1 to 512 letters, digits and signs, without spaces"
            )
        if not self.host.strip():
            raise OptionError("the host is empty: give an address or a name, or leave --host out")
        if self.api_key is None and not is_loopback(self.host):
            raise OptionError(
                f"{self.host} is reached by other machines: set a key with --api-key, or leave --host out"
            )
        for origin in self.cors_origins:
            if not _is_origin(origin):
                raise OptionError(
                    f"{origin!r} is no origin: give scheme, host in small letters and port if it has one, and no path, "
                    "such as https://chat.example.org"
                )


def _is_origin(text: str) -> bool:
    """Whether a text is an origin as browsers send it."""
    found = _ORIGIN.fullmatch(text)
    if found is None or int(found["port"] or 1) > 65535:
        return False
    try:
        return found["six"] is None or bool(ipaddress.IPv6Address(found["six"]))
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether a name or an address, without a port, is this machine's own."""
    name = host.strip("[]").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
