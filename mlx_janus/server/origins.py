"""Origins: the pages, desktop apps and browser extensions from which a browser sends requests.

An origin is a scheme and a host, such as "https://chat.example.org" or "chrome-extension://ID". A
page without one, such as a sandboxed frame, sends "null".
"""

from __future__ import annotations

import ipaddress
import re

from ..errors import OptionError

ANY = "*"
APPS = ("app://*", "tauri://*", "vscode-webview://*")
"""Desktop apps (Electron, Tauri, VS Code), allowed without being named: no web page has these."""

_WEB = re.compile(r"https?://")
_FORGEABLE = ("null", "file://")  # a web page can open a frame or a saved page with these origins
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"  # a part of a host name, between dots
_WEB_ORIGIN = re.compile(
    rf"https?://(\[(?P<ipv6>[0-9a-f:.]+)\]|\*|(\*\.)?{_LABEL}(\.{_LABEL})*)"
    rf"(:(?P<port>\*|[1-9]\d{{0,4}}))?"
)
_OTHER_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[A-Za-z0-9._~*-]+(:\d{1,5})?")
_MAX_PORT = 65535
_ALL_WEB_PAGES = re.compile(r"https?://\*(:.*)?")


def check_pattern(pattern: str, *, has_key: bool) -> None:
    """Check an origin, or a pattern of origins, that an owner allows.

    Args:
        pattern: an origin, "null", "file://", or "*" for all origins. In an origin, "*" stands for
            any host, for the first labels of a host name, or for any port.
        has_key: whether requests need a key. Without one, a pattern such as "https://*" is refused.

    Raises:
        OptionError: the pattern has another form, or allows every web host although no key is set.
    """
    if pattern in (ANY, *_FORGEABLE):  # without a key, ``is_allowed`` limits "*"
        return
    if not _is_pattern(pattern):
        raise OptionError(
            f"{pattern!r} is not an origin: give the scheme, the host in lower case, the port if "
            "it has one, and no path, such as https://chat.example.org"
        )
    if _ALL_WEB_PAGES.fullmatch(pattern) and not has_key:
        raise OptionError(
            f"{pattern!r} lets every web page use the server: set a key with api_key=..., or name "
            "the host"
        )


def _is_pattern(text: str) -> bool:
    """Return whether a text is an origin as browsers send it, or such a text with "*"."""
    if not _WEB.match(text):  # the origin of an app or a browser extension
        return _OTHER_ORIGIN.fullmatch(text) is not None
    match = _WEB_ORIGIN.fullmatch(text)
    if match is None:
        return False
    port = match["port"]
    if port not in (None, ANY) and int(port) > _MAX_PORT:
        return False
    if match["ipv6"] is not None:
        try:
            ipaddress.IPv6Address(match["ipv6"])
        except ValueError:  # the characters of an address, but no address
            return False
    return True


def is_allowed(origin: str, patterns: tuple[str, ...], *, has_key: bool) -> bool:
    """Return whether an origin is one of ``APPS``, or one that the owner allows.

    Args:
        origin: the value of an Origin header.
        patterns: checked by ``check_pattern``.
        has_key: whether requests need a key. Without one, "*" allows only origins that no web page
            can have.
    """
    if ANY in patterns:
        if has_key:  # pages that do not know the key are refused later
            return True
        may_be_web_page = origin in _FORGEABLE or _WEB.match(origin)
        if not may_be_web_page and _OTHER_ORIGIN.fullmatch(origin):
            return True
    return any(_matches(pattern, origin) for pattern in (*APPS, *patterns))


def _matches(pattern: str, origin: str) -> bool:
    """Return whether an origin fits a pattern; "*" stands for one or more characters, not "/"."""
    if pattern == ANY:
        return False  # ``is_allowed`` has already handled "*"
    parts = (re.escape(part) for part in pattern.split("*"))
    return re.fullmatch("[^/]+".join(parts), origin) is not None
