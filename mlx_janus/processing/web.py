"""Pictures from the web, over https, within limits of size and time.

``fetch`` takes addresses from the person at the keyboard, ``fetch_public`` from strangers, who shall reach nothing
through it that only this machine can.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urljoin, urlsplit

from ..errors import ImageError
from ..version import __version__

MAX_BYTES = 50_000_000
MAX_SECONDS = 30.0
_MAX_REDIRECTS = 5
_BLOCK = 1 << 16
_HEADERS = {"User-Agent": f"mlx_janus/{__version__}", "Accept": "image/*"}

_PUBLIC_REDIRECTS = 3
_MOST_ADDRESSES = 8  # that are tried one after the other
_LONGEST_URL = 4096
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # how networks without IPv4 name the hosts that have nothing else
_UNICAST = ipaddress.IPv6Network("2000::/3")
_NEVER = tuple(  # is_global lets them pass in one release of Python or another: relays, tunnels, documentation
    map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16", "3fff::/20"))
)


@dataclass(frozen=True)
class _Bounds:
    """How much a download may give and how long it may take, and what its errors advise."""

    most_bytes: int
    seconds: float
    instead: str
    trust: str


def fetch(url: str) -> bytes:
    """The content of an https address: at most 50 MB, in at most 30 seconds, redirects to https included.

    Raises:
        ImageError: why not, in one line.
    """
    trust = "SSL_CERT_FILE names a file of the certificates that are"
    bounds = _Bounds(MAX_BYTES, MAX_SECONDS, "download the picture and give its file", trust)

    def work(deadline: float) -> bytes:
        with _opener().open(urllib.request.Request(url, headers=_HEADERS), timeout=bounds.seconds) as response:
            return _content(response, url, deadline, bounds)

    return _in_time(work, url, bounds)


def fetch_public(url: str, *, most_bytes: int = 20_000_000, seconds: float = 10.0) -> bytes:
    """The content of an https address that a stranger names, from a host of the public internet alone.

    Port 443, no user name, no proxy, at most three redirects, each checked alike. A name is looked up once, must have
    public addresses only, and one of these very addresses is connected to. What cannot be told apart from outside is a
    host with a public address that a firewall keeps for this network.

    Args:
        url: from anybody.
        most_bytes: of the content.
        seconds: for all of it.

    Raises:
        ImageError: why not, in one line, and the same line for every host that is not public, there or not.
    """
    instead = "send the picture itself"
    bounds = _Bounds(most_bytes, seconds, instead, instead)
    opened: list[_PublicConnection] = []

    def work(deadline: float) -> bytes:
        here = url
        for _ in range(1 + _PUBLIC_REDIRECTS):
            host, target = _host_and_target(here)
            connection = _PublicConnection(host, _public_addresses(here, host), deadline)
            opened.append(connection)
            with contextlib.closing(connection):
                connection.request("GET", target, headers=_HEADERS)
                with connection.getresponse() as response:
                    if response.status == 200:
                        return _content(response, _shown(here), deadline, bounds)
                    location = response.headers.get("Location")
                    if response.status not in (301, 302, 303, 307, 308) or location is None:
                        raise ImageError(f"{_shown(here)} is not given: HTTP {response.status}")
                    here = urljoin(here, location)
        raise ImageError(f"{_shown(url)} leads on more than {_PUBLIC_REDIRECTS} times: {instead}")

    try:
        return _in_time(work, _shown(url), bounds)
    finally:
        for connection in opened:
            connection.cut()


def _in_time(work: Callable[[float], bytes], url: str, bounds: _Bounds) -> bytes:
    """What ``work`` gives, which is told the moment when its time is over."""
    outcome: list[bytes | Exception] = []

    def run() -> None:
        try:
            outcome.append(work(time.monotonic() + bounds.seconds))
        except Exception as error:  # raised again below, where somebody sees it
            outcome.append(error)

    # In a thread, since the looking up of a name and the headers of a slow server know no limit in all.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(bounds.seconds)
    result = outcome[0] if outcome else TimeoutError()
    if isinstance(result, bytes):
        return result
    raise _explained(result, url, bounds) from None


def _content(response: HTTPResponse, url: str, deadline: float, bounds: _Bounds) -> bytes:
    if (response.length or 0) > bounds.most_bytes:  # what the server promises
        raise _too_large(url, bounds)
    data = bytearray()
    while block := response.read1(_BLOCK):
        data += block
        if len(data) > bounds.most_bytes:
            raise _too_large(url, bounds)
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:  # what it promised beyond what came
        raise ImageError(f"{url} broke off after {len(data)} bytes: try again")
    return bytes(data)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """A few, and none that leaves https."""

    max_redirections = _MAX_REDIRECTS

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme != "https":
            fp.close()
            raise ImageError(f"{req.full_url} leads to {newurl}, which is not https: download the picture yourself")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Knows https and nothing else: no http, ftp or file."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


class _PublicConnection(HTTPSConnection):
    """To one of the addresses that were checked, never to what another look-up of the name would give."""

    def __init__(self, host: str, addresses: Sequence[tuple[socket.AddressFamily, str]], deadline: float):
        self.tls = ssl.create_default_context()
        super().__init__(host, 443, context=self.tls)
        self.addresses, self.deadline = addresses, deadline
        self.wire: socket.socket | None = None

    def connect(self) -> None:
        for left, (family, address) in zip(range(len(self.addresses), 0, -1), self.addresses, strict=True):
            self.wire = socket.socket(family, socket.SOCK_STREAM)
            try:
                self.wire.settimeout(self._remaining() / left)
                self.wire.connect((address, self.port))
                self.wire.settimeout(self._remaining())
                # The handshake comes when the socket is known here, so that it can be cut, too.
                self.sock = self.wire = self.tls.wrap_socket(
                    self.wire, server_hostname=self.host, do_handshake_on_connect=False
                )
                self.sock.do_handshake()
                return
            except (OSError, ValueError):  # ValueError: a name that no certificate can be for
                self.wire.close()
                if left == 1:
                    raise

    def cut(self) -> None:
        """End what another thread still reads."""
        if self.wire is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self.wire, socket.SHUT_RDWR)  # TLS would say goodbye, and wait

    def _remaining(self) -> float:
        return max(self.deadline - time.monotonic(), 0.001)


def _host_and_target(url: str) -> tuple[str, str]:
    """The host to ask, in ASCII, and what to ask it for.

    Raises:
        ImageError: it is no plain https address.
    """
    if len(url) > _LONGEST_URL:  # first, since names take long to be put in ASCII
        raise ImageError(f"{_shown(url)} is not fetched: an address may have {_LONGEST_URL} characters at most")
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode("ascii")
        plain = parts.scheme == "https" and parts.port in (None, 443) and "@" not in parts.netloc
    except ValueError:
        host, plain = "", False
    # urlsplit drops line ends and tabs: what is checked shall be what was sent. "%": the zone of a link-local address.
    if not plain or not host or "%" in host or not url.isprintable():
        raise ImageError(f"{_shown(url)} is not fetched: only https addresses are, on port 443, without a user name")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return host, quote(target, safe="!#$%&'()*+,/:;=?@[]~")


def _public_addresses(url: str, host: str) -> list[tuple[socket.AddressFamily, str]]:
    try:
        found = socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        found = []
    addresses: list[tuple[socket.AddressFamily, str]] = [(one[0], str(one[4][0])) for one in found]
    if not addresses or not all(is_public(address) for _, address in addresses):
        raise ImageError(f"{_shown(url)} is not a public address: send the picture itself")
    return addresses[:_MOST_ADDRESSES]


def is_public(address: str) -> bool:
    """Whether a numeric address, IPv4 or IPv6, is that of one host that anybody on the internet may reach."""
    ip = ipaddress.ip_address(address)
    if ip in _NAT64:
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if ip.version == 6 and ip not in _UNICAST:  # with it all forms that hold an IPv4 address but 6to4 and Teredo
        return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _NEVER)


def _shown(text: str) -> str:
    """What anybody may have written, as part of one line."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:200])
    return line if len(text) <= 200 else f"{line}..."


def _too_large(url: str, bounds: _Bounds) -> ImageError:
    return ImageError(f"{url} is larger than {bounds.most_bytes / 1e6:g} MB: download it and make it smaller")


def _explained(error: Exception, url: str, bounds: _Bounds) -> Exception:
    """One line for what the network does; anything else is a bug and stays what it is."""
    if isinstance(error, ImageError):
        return error
    if isinstance(error, HTTPError):
        error.close()
        return ImageError(f"{url} is not given: HTTP {error.code} {_shown(str(error.reason))}")
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, TimeoutError):
        return ImageError(f"{url} took longer than {bounds.seconds:g} seconds: {bounds.instead}")
    if isinstance(reason, ssl.SSLCertVerificationError):
        why = reason.verify_message.rstrip(".")
        return ImageError(f"{url} is not trusted ({why}): {bounds.trust}")
    if isinstance(error, OSError | HTTPException | ValueError):  # ValueError: an address that is none
        return ImageError(f"{url} cannot be fetched ({_shown(str(reason))}): check the address and the connection")
    return error
