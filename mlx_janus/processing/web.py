"""Download images over https, within limits of size and time.

``fetch`` takes URLs from the person at the keyboard. ``fetch_public`` takes them from strangers,
who must not reach anything through it that only this machine can reach.
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
_MAX_URL_LENGTH = 4096  # characters of a URL
# IPv6 addresses that stand for IPv4 hosts, in networks without IPv4.
_NAT64_PREFIX = ipaddress.IPv6Network("64:ff9b::/96")
_IPV6_UNICAST = ipaddress.IPv6Network("2000::/3")  # all public IPv6 addresses of single hosts
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
    """Download the content of an https URL, at most 50 MB in 30 seconds.

    Follows redirects to other https URLs.

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
        """Return the content, read before the deadline (a ``time.monotonic`` value)."""
        request = urllib.request.Request(url, headers=_HEADERS)
        with _https_opener().open(request, timeout=limits.seconds) as response:
            return _read_content(response, url, deadline, limits)

    return _run_with_timeout(download, url, limits)


def fetch_public(url: str, *, max_bytes: int = 20_000_000, seconds: float = 10.0) -> bytes:
    """Download the content of an https URL that a stranger names.

    All IP addresses of the host must be public. The connection uses one of the checked addresses,
    port 443 and no proxy. At most three redirects are followed, each checked in the same way. A
    host with a public IP address passes the checks even if a firewall shields it from the internet.

    Args:
        url: the URL, from anybody.
        max_bytes: largest size of the content.
        seconds: time for the complete download.

    Raises:
        ImageError: the download fails; the message is one line. A host that is not public and
            a host that does not exist give the same message.
    """
    advice = "send the image itself"
    limits = _Limits(max_bytes, seconds, advice, advice)
    connections: list[_PublicConnection] = []  # one for each request

    def download(deadline: float) -> bytes:
        """Return the content, read before the deadline (a ``time.monotonic`` value)."""
        # Redirects are followed here: urllib would not check that each address is public.
        current = url
        for _ in range(1 + _MAX_PUBLIC_REDIRECTS):
            host, target = _split_url(current)
            connection = _PublicConnection(host, _public_addresses(current, host), deadline)
            connections.append(connection)  # for the end of this function, after a timeout
            with contextlib.closing(connection):
                connection.request("GET", target, headers=_HEADERS)
                with connection.getresponse() as response:
                    status = response.status
                    if status == 200:
                        return _read_content(response, _printable(current), deadline, limits)
                    location = response.headers.get("Location")
                    if status not in (301, 302, 303, 307, 308) or location is None:
                        raise ImageError(
                            f"{_printable(current)} cannot be downloaded: HTTP {status}"
                        )
                    current = urljoin(current, location)
        limit = f"{_MAX_PUBLIC_REDIRECTS} times"
        raise ImageError(f"{_printable(url)} redirects more than {limit}: {advice}")

    try:
        return _run_with_timeout(download, _printable(url), limits)
    finally:
        # After a timeout, the download's thread may still read. Cutting its connection ends it.
        for connection in connections:
            connection.cut()


def _run_with_timeout(download: Callable[[float], bytes], url: str, limits: _Limits) -> bytes:
    """Run ``download`` in its own thread, and wait for its result until the timeout.

    Args:
        download: called with its deadline, a ``time.monotonic`` value. A result after the deadline
            is ignored.
        url: the URL for error messages.
        limits: the timeout, and the advice for error messages.

    Raises:
        ImageError: the download fails or takes too long.
    """
    outcome: list[bytes | Exception] = []  # empty while the thread runs, then one entry

    def run() -> None:
        """Put the downloaded content, or the exception, into ``outcome``."""
        try:
            outcome.append(download(time.monotonic() + limits.seconds))
        except Exception as error:  # raised below, in the caller's thread
            outcome.append(error)

    # The look-up of a name and the wait for a slow server's headers have no time limit of their
    # own. So the download runs in a thread, which can be abandoned at the timeout.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limits.seconds)
    result = outcome[0] if outcome else TimeoutError()
    if isinstance(result, bytes):
        return result
    raise _to_image_error(result, url, limits) from None


def _read_content(response: HTTPResponse, url: str, deadline: float, limits: _Limits) -> bytes:
    """Read a response to its end, within the limits of size and time; ``url`` is for messages.

    Raises:
        ImageError: the content is too large, or the connection broke off.
        TimeoutError: the deadline has passed.
    """
    # ``response.length`` is the rest of the announced length, None if the server announced none.
    if (response.length or 0) > limits.max_bytes:
        raise _too_large_error(url, limits)
    data = bytearray()
    while block := response.read1(_BLOCK):
        data += block
        if len(data) > limits.max_bytes:
            raise _too_large_error(url, limits)
        if time.monotonic() > deadline:  # nobody waits for this thread any more
            raise TimeoutError
    if response.length:  # some of the announced bytes did not arrive
        raise ImageError(f"{url} broke off after {len(data)} bytes: try again")
    return bytes(data)


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
    """A handler that follows at most five redirects, and only to https URLs."""

    max_redirections = _MAX_REDIRECTS

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        """Return the request for ``newurl``, the URL that ``req`` was redirected to.

        Raises:
            ImageError: ``newurl`` is not https.
        """
        if urlsplit(newurl).scheme != "https":
            fp.close()
            reason = f"redirects to {newurl}, which is not https"
            raise ImageError(f"{req.full_url} {reason}: download the image yourself")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _https_opener() -> urllib.request.OpenerDirector:
    """Return an opener for https only; one from ``build_opener`` would also open http and files."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),  # raises an error for other schemes
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _HttpsRedirects(),
    ):
        opener.add_handler(handler)
    return opener


class _PublicConnection(HTTPSConnection):
    """An https connection to a host, at one of its checked IP addresses.

    The host's name is not looked up again, since the second answer could be an unchecked address.

    Args:
        host: name for the Host header and the certificate.
        addresses: the checked IP addresses, each with its family.
        deadline: end of all attempts, a ``time.monotonic`` value.
    """

    def __init__(
        self, host: str, addresses: Sequence[tuple[socket.AddressFamily, str]], deadline: float
    ):
        self.tls_context = ssl.create_default_context()
        super().__init__(host, 443, context=self.tls_context)
        self.addresses = addresses
        self.deadline = deadline
        self.current_socket: socket.socket | None = None  # the latest attempt's

    def connect(self) -> None:
        """Try the IP addresses in turn until a TLS handshake succeeds.

        The remaining time is shared equally among the TCP connections still to be tried. After one
        of them succeeds, its handshake may take all the remaining time.

        Raises:
            OSError, ValueError: the error of the last address, if all fail.
        """
        for index, (family, address) in enumerate(self.addresses):
            attempts_left = len(self.addresses) - index
            tcp_socket = socket.socket(family, socket.SOCK_STREAM)
            self.current_socket = tcp_socket
            try:
                tcp_socket.settimeout(self._remaining_seconds() / attempts_left)
                tcp_socket.connect((address, self.port))
                tcp_socket.settimeout(self._remaining_seconds())
                tls_socket = self.tls_context.wrap_socket(
                    tcp_socket, server_hostname=self.host, do_handshake_on_connect=False
                )
                self.sock = tls_socket
                self.current_socket = tls_socket  # before the handshake, so that ``cut`` can end it
                tls_socket.do_handshake()
                return
            except (OSError, ValueError):  # ValueError: a name that no certificate can have
                self.current_socket.close()
                if attempts_left == 1:  # this was the last address
                    raise

    def cut(self) -> None:
        """End the connection, even while another thread reads from it."""
        if self.current_socket is not None:
            with contextlib.suppress(OSError):
                # ``SSLSocket.shutdown`` would also drop the TLS state, which the other thread uses.
                socket.socket.shutdown(self.current_socket, socket.SHUT_RDWR)

    def _remaining_seconds(self) -> float:
        """Return the seconds until the deadline, at least 0.001."""
        # A timeout of 0 would make the socket non-blocking, and one below 0 is an error.
        return max(self.deadline - time.monotonic(), 0.001)


def _split_url(url: str) -> tuple[str, str]:
    """Return the host of an https URL, in ASCII, and the URL's path and query for the request.

    Raises:
        ImageError: the URL is too long or not https, has a port other than 443 or a user name, or
            is invalid.
    """
    if len(url) > _MAX_URL_LENGTH:  # checked first: converting a long name to ASCII takes long
        raise ImageError(
            f"{_printable(url)} is not fetched: "
            f"an address may have at most {_MAX_URL_LENGTH} characters"
        )
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode("ascii")
        allowed = parts.scheme == "https" and parts.port in (None, 443) and "@" not in parts.netloc
    except ValueError:
        host = ""
        allowed = False
    # "%" in a host begins the zone of a link-local address.
    has_plain_host = host != "" and "%" not in host
    # Line ends and tabs are not printable. urlsplit drops them, so that the URL checked here would
    # differ from the given one.
    if not (allowed and has_plain_host and url.isprintable()):
        raise ImageError(
            f"{_printable(url)} is not fetched: "
            "only https addresses are, on port 443, without a user name"
        )
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    # Escapes spaces and letters such as "ä"; "%" is safe so that existing escapes stay.
    return host, quote(target, safe="!#$%&'()*+,/:;=?@[]~")


def _public_addresses(url: str, host: str) -> list[tuple[socket.AddressFamily, str]]:
    """Look up a host, and return up to eight of its IP addresses, each with its family.

    A host that does not exist gets the same error as one that is not public, so that the error does
    not tell which names exist in a private network.

    Raises:
        ImageError: one of the addresses is not public, or there is none; the message names ``url``.
    """
    try:
        answers = socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        answers = []
    addresses: list[tuple[socket.AddressFamily, str]] = [
        (family, str(address_and_port[0])) for family, _, _, _, address_and_port in answers
    ]
    if not addresses or not all(is_public(address) for _, address in addresses):
        raise ImageError(f"{_printable(url)} is not a public address: send the image itself")
    return addresses[:_MAX_ADDRESSES]


def is_public(address: str) -> bool:
    """Return whether an IPv4 or IPv6 address belongs to a single host on the public internet."""
    ip = ipaddress.ip_address(address)
    if ip in _NAT64_PREFIX:
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)  # the IPv4 address in the last 32 bits
    # ``_IPV6_UNICAST`` excludes most IPv6 forms that contain an IPv4 address. ``_NEVER_PUBLIC``
    # lists the other two, 6to4 and Teredo.
    if ip.version == 6 and ip not in _IPV6_UNICAST:
        return False
    if any(ip in network for network in _NEVER_PUBLIC):
        return False
    return ip.is_global and not ip.is_multicast


def _printable(text: str) -> str:
    """Return the first 200 characters of a text, with unprintable characters escaped."""
    start = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:200])
    return start if len(text) <= 200 else f"{start}..."


def _too_large_error(url: str, limits: _Limits) -> ImageError:
    """Return the error for content above the limit of size."""
    size = f"{limits.max_bytes / 1e6:g} MB"
    return ImageError(f"{url} is larger than {size}: download it and make it smaller")


def _to_image_error(error: Exception, url: str, limits: _Limits) -> Exception:
    """Return the ImageError for a failed download.

    An exception that no failed download raises is a bug, and is returned unchanged.
    """
    if isinstance(error, ImageError):
        return error
    if isinstance(error, HTTPError):
        error.close()
        return ImageError(
            f"{url} cannot be downloaded: HTTP {error.code} {_printable(str(error.reason))}"
        )
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, TimeoutError):
        return ImageError(f"{url} took longer than {limits.seconds:g} seconds: {limits.advice}")
    if isinstance(cause, ssl.SSLCertVerificationError):
        problem = cause.verify_message.rstrip(".")
        return ImageError(f"{url} is not trusted ({problem}): {limits.certificate_advice}")
    if isinstance(error, OSError | HTTPException | ValueError):  # ValueError: no valid URL
        advice = "check the address and the connection"
        return ImageError(f"{url} cannot be fetched ({_printable(str(cause))}): {advice}")
    return error
