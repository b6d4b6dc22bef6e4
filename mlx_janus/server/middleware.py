"""What a request passes before a route sees it, each an ASGI middleware: whose it is, and how much of it there is.

A server on a loopback address is still within reach of every web page that is open on the same machine. Pages of other
sites are told by their Origin, by Sec-Fetch-Site, or, where they had their own name point to this machine (DNS
rebinding), by the Host.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import Problem, explained
from .metrics import Metrics
from .settings import Settings, is_loopback

_LOG = logging.getLogger("mlx_janus.server.requests")
OPEN_PATHS = ("/", "/health")  # to be read without a key
_PORTS = {"http": 80, "https": 443}
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class Porter:
    """The outermost: counts, logs, and adds headers for browsers.

    Args:
        app: the rest.
        settings: whether requests are logged.
        metrics: to count in.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics):
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, sizes = time.perf_counter(), 0, [0, 0]

        async def counted() -> Message:
            message = await receive()
            sizes[0] += len(message.get("body", b""))
            return message

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            sizes[1] += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, counted, sent)
        finally:
            self._note(scope, status, sizes, time.perf_counter() - started)

    def _note(self, scope: Scope, status: int, sizes: list[int], seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in ("GET", "POST", "OPTIONS", "HEAD") else "other"
        self._metrics.replied(method, route, status, seconds)
        if self._settings.log_requests:
            _LOG.info("%s %s %d, %d bytes in, %d out, %.3f s", method, route, status, *sizes, seconds)


class Explainer:
    """Makes an exception of what is inside of it a reply.

    Args:
        app: the rest.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def sent(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, sent)
        except Exception as error:
            problem = explained(error)
            if begun:  # the reply can only break off
                raise ConnectionAbortedError from None
            await problem.response()(scope, receive, send)


class FramingGuard:
    """Refuses a request that says in two ways how long it is, which something before the server may read otherwise.

    Args:
        app: the rest.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and {"content-length", "transfer-encoding"} <= set(Headers(scope=scope).keys()):
            message = "Content-Length does not go with Transfer-Encoding: send one of them"
            raise Problem(400, message, headers={"Connection": "close"})
        await self._app(scope, receive, send)


class BrowserGuard:
    """Refuses what a web page of another site has a browser send, unless that site is named.

    Args:
        app: the rest.
        settings: with a key the Host may be any, since no other site's page knows the key.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            self._check_host(headers.getlist("host"))
            self._check_origin(scope, headers)
        await self._app(scope, receive, send)

    def _check_host(self, hosts: list[str]) -> None:
        if len(hosts) != 1:
            raise Problem(400, "there must be one Host header")
        name = _split_port(hosts[0])[0]
        if self._settings.api_key is None and not is_loopback(name):  # the host is, without a key
            raise Problem(403, "this Host is not served: use the address that the server printed", code="wrong_host")

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        named = headers.getlist("origin")
        if named:
            known = all(origin in self._settings.cors_origins for origin in named)
            if known or (len(named) == 1 and _same_site(named[0], headers["host"])):
                return
        else:
            link = scope["method"] == "GET" and scope["path"] == "/"
            if link or headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
                return
        message = "other sites' pages may not use this server: name them with --cors-origin"
        raise Problem(403, message, code="wrong_origin")


def _split_port(host: str) -> tuple[str, int | None]:
    """A Host header's name in small letters, and its port."""
    try:
        parts = urlsplit(f"//{host}")
        return (parts.hostname or ""), parts.port
    except ValueError:
        return "", None


def _same_site(origin: str, host: str) -> bool:
    """Whether a page's origin is what a request is sent to."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return False
    usual = _PORTS.get(parts.scheme)
    name, asked = _split_port(host)
    return usual is not None and (parts.hostname, port or usual) == (name, asked or usual)


class SitesGuard(CORSMiddleware):
    """Starlette's, with refusals as all others are."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """What a browser is told that asks before it sends a request."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        return Problem(400, f"it may not be sent: {bytes(response.body).decode()}").response()


class KeyGuard:
    """Refuses what does not bring the key, but for reading the page and ``/health``.

    Args:
        app: the rest.
        key: that is asked for.
    """

    def __init__(self, app: ASGIApp, key: str):
        self._app, self._key = app, key.encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not (scope["path"] in OPEN_PATHS and scope["method"] in ("GET", "HEAD")):
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
            if not (hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"):
                message = "the key is wrong or missing: send it as 'Authorization: Bearer KEY'"
                raise Problem(401, message, headers={"WWW-Authenticate": "Bearer"})
        await self._app(scope, receive, send)


class BodyGuard:
    """Reads a body before anything else is done: in time, and no more than may be, of one request and of all.

    Args:
        app: the rest.
        settings: the limits.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app, self._settings = app, settings
        self._inside, self._held = 0, 0  # requests, and bytes of their bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        self._check_size(int(Headers(scope=scope).get("content-length", "0")))  # the server has seen that it is one
        if self._inside >= self._settings.most_requests:
            raise _too_much()
        body = bytearray()
        self._inside += 1
        try:
            await self._read(body, receive)
            await self._app(scope, _replayed(bytes(body), receive), send)
        finally:
            self._inside -= 1
            self._held -= len(body)

    async def _read(self, body: bytearray, receive: Receive) -> None:
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Problem(499, "the client left")
                    piece = message.get("body", b"")
                    self._check_size(len(body) + len(piece))
                    self._held += len(piece)
                    body += piece
                    if self._held > self._settings.bodies_limit:
                        raise _too_much()
                    more = message.get("more_body", False)
        except TimeoutError:
            seconds = f"{self._settings.body_seconds:g}"
            raise Problem(408, f"the body did not arrive in {seconds} seconds") from None

    def _check_size(self, size: int) -> None:
        if size > self._settings.body_limit:
            limit = f"{self._settings.body_limit / 1e6:g} MB"
            raise Problem(413, f"the body is larger than {limit}: send fewer or smaller pictures")


def _too_much() -> Problem:
    return Problem(429, "too much is being asked at once: try again later", headers={"Retry-After": "5"})


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What gives a body that was read, and then whatever comes after it."""
    pending: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


def layers(settings: Settings, metrics: Metrics) -> list[Middleware]:
    """All of them, outermost first."""
    guards = [
        Middleware(Porter, settings=settings, metrics=metrics),
        Middleware(Explainer),
        Middleware(FramingGuard),
        Middleware(BrowserGuard, settings=settings),
    ]
    if settings.cors_origins:
        guards += [
            Middleware(
                SitesGuard,
                allow_origins=settings.cors_origins,
                allow_methods=("GET", "POST"),
                allow_headers=("*",),
                expose_headers=("Retry-After",),
                allow_private_network=True,
            ),
            Middleware(Explainer),  # what is refused further in is for those sites to read, too
        ]
    if settings.api_key is not None:
        guards.append(Middleware(KeyGuard, key=settings.api_key))
    return [*guards, Middleware(BodyGuard, settings=settings)]
