"""Images from the web: over https, within limits of size and time.

``fetch`` takes addresses from the person at the keyboard. ``fetch_public`` takes them from
strangers, who must not reach anything through it that only this machine can reach.
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

MAX_BYTES = 50_000_000  # bytes of a download by ``fetch``
MAX_SECONDS = 30.0  # seconds for a download by ``fetch``
_MAX_REDIRECTS = 5  # redirects that ``fetch`` follows
_BLOCK = 1 << 16  # bytes read at once
_HEADERS = {"User-Agent": f"mlx_janus/{__version__}", "Accept": "image/*"}

_MAX_PUBLIC_REDIRECTS = 3  # redirects that ``fetch_public`` follows
_MAX_ADDRESSES = 8  # addresses of one host that are tried in turn
_MAX_URL = 4096  # characters of an address
# IPv4-only hosts, as networks without IPv4 address them.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_UNICAST = ipaddress.IPv6Network("2000::/3")  # all public IPv6 addresses of single hosts
# Relays, tunnels and documentation. Depending on Python's version, is_global accepts some of them.
_NEVER_PUBLIC = (
    ipaddress.ip_network("192.0.0.0/24"),
    ipaddress.ip_network("192.88.99.0/24"),
    ipaddress.ip_network("2001::/23"),
    ipaddress.ip_network("2002::/16"),
    ipaddress.ip_network("3fff::/20"),
)


@dataclass(frozen=True)
class _Limits:
    """Limits of a download, and the advice in its errors.

    Args:
        max_bytes: largest size of the content.
        seconds: time for the complete download.
        advice: advice after a timeout.
        certificate_advice: advice after a certificate that is not trusted.
    """

    max_bytes: int
    seconds: float
    advice: str
    certificate_advice: str


def fetch(url: str) -> bytes:
    """Download an https address, and follow redirects to https: at most 50 MB in 30 seconds.

    Raises:
        ImageError: the download fails; the message is one line.
    """
    limits = _Limits(
        MAX_BYTES,
        MAX_SECONDS,
        advice="download the image and give its file",
        certificate_advice="set SSL_CERT_FILE to a file of trusted certificates",
    )

    def download(deadline: float) -> bytes:
        request = urllib.request.Request(url, headers=_HEADERS)
        with _opener().open(request, timeout=limits.seconds) as response:
            return _content(response, url, deadline, limits)

    return _run_in_time(download, url, limits)


def fetch_public(url: str, *, max_bytes: int = 20_000_000, seconds: float = 10.0) -> bytes:
    """Download an https address that a stranger names, from hosts of the public internet only.

    Uses port 443, no user name, no proxy, and at most three redirects, each checked in the same
    way. A host's name is looked up once. All its addresses must be public, and the connection uses
    one of these addresses. The checks cannot detect one case: a host with a public address that a
    firewall reserves for this network.

    Args:
        url: an address from anybody.
        max_bytes: largest size of the content.
        seconds: time for the complete download.

    Raises:
        ImageError: the download fails; the message is one line. A host that is not public and
            a host that does not exist give the same message.
    """
    advice = "send the image itself"
    limits = _Limits(max_bytes, seconds, advice, advice)
    opened: list[_PublicConnection] = []

    def download(deadline: float) -> bytes:
        # Redirects are followed here: urllib would look up their names without the checks.
        here = url  # the address of the present request
        for _ in range(1 + _MAX_PUBLIC_REDIRECTS):
            host, target = _host_and_target(here)
            connection = _PublicConnection(host, _public_addresses(here, host), deadline)
            opened.append(connection)
            with contextlib.closing(connection):
                connection.request("GET", target, headers=_HEADERS)
                with connection.getresponse() as response:
                    if response.status == 200:
                        return _content(response, _shown(here), deadline, limits)
                    location = response.headers.get("Location")
                    if response.status not in (301, 302, 303, 307, 308) or location is None:
                        raise ImageError(f"{_shown(here)} is not given: HTTP {response.status}")
                    here = urljoin(here, location)
        reason = f"redirects more than {_MAX_PUBLIC_REDIRECTS} times"
        raise ImageError(f"{_shown(url)} {reason}: {advice}")

    try:
        return _run_in_time(download, _shown(url), limits)
    finally:
        # After a timeout, the download's thread may still read: cutting the connection ends it.
        for connection in opened:
            connection.cut()


def _run_in_time(download: Callable[[float], bytes], url: str, limits: _Limits) -> bytes:
    """Run ``download`` in a thread of its own and return its result.

    Args:
        download: gets its deadline by ``time.monotonic``; may go on after the timeout.
        url: the address in error messages.
        limits: the time, and the advice in error messages.

    Raises:
        ImageError: the download fails or takes too long.
    """
    outcome: list[bytes | Exception] = []

    def run() -> None:
        try:
            outcome.append(download(time.monotonic() + limits.seconds))
        except Exception as error:  # raised below, in the caller's thread
            outcome.append(error)

    # A thread can be left at the timeout: neither the look-up of a name nor the wait for a slow
    # server's headers has a time limit of its own.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limits.seconds)
    result = outcome[0] if outcome else TimeoutError()  # no outcome: the thread still runs
    if isinstance(result, bytes):
        return result
    raise _to_image_error(result, url, limits) from None


def _content(response: HTTPResponse, url: str, deadline: float, limits: _Limits) -> bytes:
    """Read a response to its end, within the limits of size and time.

    Raises:
        ImageError: the content is too large, or the connection broke off.
        TimeoutError: the deadline has passed.
    """
    if (response.length or 0) > limits.max_bytes:  # the length that the server announces
        raise _too_large(url, limits)
    data = bytearray()
    while block := response.read1(_BLOCK):
        data += block
        if len(data) > limits.max_bytes:
            raise _too_large(url, limits)
        if time.monotonic() > deadline:  # the caller has given up: end this thread
            raise TimeoutError
    if response.length:  # announced bytes that did not arrive
        raise ImageError(f"{url} broke off after {len(data)} bytes: try again")
    return bytes(data)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """A handler that follows a few redirects, and only to https."""

    max_redirections = _MAX_REDIRECTS

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        """Return the request to follow.

        Raises:
            ImageError: the new address is not https.
        """
        if urlsplit(newurl).scheme != "https":
            fp.close()
            reason = f"redirects to {newurl}, which is not https"
            raise ImageError(f"{req.full_url} {reason}: download the image yourself")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener that knows https only; ``build_opener`` would add http, ftp and file."""
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
    """A connection to one of the checked addresses; the name is not looked up a second time.

    Args:
        host: name for the Host header and the certificate.
        addresses: the addresses to try in turn.
        deadline: end of all attempts, by ``time.monotonic``.
    """

    def __init__(
        self, host: str, addresses: Sequence[tuple[socket.AddressFamily, str]], deadline: float
    ):
        self.tls = ssl.create_default_context()
        super().__init__(host, 443, context=self.tls)
        self.addresses = addresses
        self.deadline = deadline
        self.wire: socket.socket | None = None  # the socket that ``cut`` shuts down

    def connect(self) -> None:
        """Try the addresses in turn until one answers.

        A TCP connection may take an equal share of the remaining time, its TLS handshake all of it.

        Raises:
            OSError, ValueError: the error of the last address, if all fail.
        """
        for number, (family, address) in enumerate(self.addresses):
            left = len(self.addresses) - number
            self.wire = socket.socket(family, socket.SOCK_STREAM)
            try:
                self.wire.settimeout(self._remaining() / left)
                self.wire.connect((address, self.port))
                self.wire.settimeout(self._remaining())
                # ``wire`` is set before the handshake, so that ``cut`` can end the handshake.
                encrypted = self.tls.wrap_socket(
                    self.wire, server_hostname=self.host, do_handshake_on_connect=False
                )
                self.sock = encrypted
                self.wire = encrypted
                encrypted.do_handshake()
                return
            except (OSError, ValueError):  # ValueError: a name that no certificate can have
                self.wire.close()
                if left == 1:
                    raise

    def cut(self) -> None:
        """End the connection, even while another thread reads from it."""
        if self.wire is not None:
            with contextlib.suppress(OSError):
                # ``SSLSocket.shutdown`` would also drop the TLS state that the reader uses.
                socket.socket.shutdown(self.wire, socket.SHUT_RDWR)

    def _remaining(self) -> float:
        # A timeout of 0 would make the socket non-blocking, and one below 0 is an error.
        return max(self.deadline - time.monotonic(), 0.001)


def _host_and_target(url: str) -> tuple[str, str]:
    """Split an https address into the host, in ASCII, and the target of the request.

    Raises:
        ImageError: the address is not plain https, or too long.
    """
    if len(url) > _MAX_URL:  # first, since converting a long name to ASCII takes long
        rule = f"an address may have at most {_MAX_URL} characters"
        raise ImageError(f"{_shown(url)} is not fetched: {rule}")
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode("ascii")
        plain = parts.scheme == "https" and parts.port in (None, 443) and "@" not in parts.netloc
    except ValueError:
        host = ""
        plain = False
    # isprintable: urlsplit drops line ends and tabs, so the checked address would not be the one
    # that was sent. "%" begins the zone of a link-local address.
    if not plain or not host or "%" in host or not url.isprintable():
        rule = "only https addresses are, on port 443, without a user name"
        raise ImageError(f"{_shown(url)} is not fetched: {rule}")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return host, quote(target, safe="!#$%&'()*+,/:;=?@[]~")


def _public_addresses(url: str, host: str) -> list[tuple[socket.AddressFamily, str]]:
    """Look up a host's addresses, all of which must be public.

    A host that does not exist gets the same error as one that is not public, so that nobody can
    find out which hosts exist.

    Raises:
        ImageError: an address is not public, or there is none.
    """
    try:
        found = socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        found = []
    addresses: list[tuple[socket.AddressFamily, str]] = [
        (family, str(address[0])) for family, _, _, _, address in found
    ]
    if not addresses or not all(is_public(address) for _, address in addresses):
        raise ImageError(f"{_shown(url)} is not a public address: send the image itself")
    return addresses[:_MAX_ADDRESSES]


def is_public(address: str) -> bool:
    """Return whether an IPv4 or IPv6 address is that of one host on the public internet."""
    ip = ipaddress.ip_address(address)
    if ip in _NAT64:
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)  # the last 32 bits are the IPv4 address
    # ``_UNICAST`` excludes the IPv6 forms that contain an IPv4 address, except 6to4 and Teredo.
    # ``_NEVER_PUBLIC`` lists these two.
    if ip.version == 6 and ip not in _UNICAST:
        return False
    if any(ip in network for network in _NEVER_PUBLIC):
        return False
    return ip.is_global and not ip.is_multicast


def _shown(text: str) -> str:
    """Return the start of a stranger's text in one line; unprintable characters are escaped."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:200])
    return line if len(text) <= 200 else f"{line}..."


def _too_large(url: str, limits: _Limits) -> ImageError:
    size = f"{limits.max_bytes / 1e6:g} MB"
    return ImageError(f"{url} is larger than {size}: download it and make it smaller")


def _to_image_error(error: Exception, url: str, limits: _Limits) -> Exception:
    """Return an ImageError for a network failure; return any other exception, a bug, as it is."""
    if isinstance(error, ImageError):
        return error
    if isinstance(error, HTTPError):
        error.close()
        return ImageError(f"{url} is not given: HTTP {error.code} {_shown(str(error.reason))}")
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, TimeoutError):
        return ImageError(f"{url} took longer than {limits.seconds:g} seconds: {limits.advice}")
    if isinstance(reason, ssl.SSLCertVerificationError):
        why = reason.verify_message.rstrip(".")
        return ImageError(f"{url} is not trusted ({why}): {limits.certificate_advice}")
    if isinstance(error, OSError | HTTPException | ValueError):  # ValueError: not an address at all
        advice = "check the address and the connection"
        return ImageError(f"{url} cannot be fetched ({_shown(str(reason))}): {advice}")
    return error
