"""uvicorn with limits: for the number of connections, and for the time that a client may take.

uvicorn has no settings for these limits, so this module overrides methods of its HTTP protocol and
of its server, and reads attributes that are not part of its public interface.
``tests/server/test_connections.py`` lists these private parts, and ``pyproject.toml`` has an upper
bound for uvicorn's version.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType
from typing import Any

import h11
from starlette.types import ASGIApp
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import APIError
from .settings import Settings

GRACE = 30.0  # seconds that running requests have to finish when the server stops
_LINGER = 5  # further seconds for clients that read slowly
_INTERRUPTED = 130  # exit code after Ctrl-C
_BACKLOG = 128  # connections that are accepted together, before any of them is counted
_SEND_BUFFER = 128 << 10  # bytes of a reply that the system buffers for a client
_OTHER_FILES = 128  # files that the process opens besides connections: the model's, downloads
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # errors of accept()
_WARNING_INTERVAL = 60  # seconds between two warnings about such errors
_LOG = logging.getLogger("mlx_janus.server")


def uvicorn_config(app: ASGIApp, settings: Settings) -> Config:
    """Return uvicorn's configuration: HTTP only, no access log and no Server header."""

    # uvicorn makes a protocol object for each connection, so the limits are class attributes.
    class Protocol(_LimitedProtocol):
        client_seconds = settings.body_seconds
        max_connections = _allowed_connections(settings.most_connections)

    return Config(
        app,
        lifespan="off",
        http=Protocol,
        backlog=_BACKLOG,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(GRACE) + _LINGER,
    )


def _allowed_connections(wanted: int) -> int:
    """Return how many connections the limit of open files allows, from 1 to ``wanted``.

    If the process's soft limit is too low, first raise it to the number of files needed, or to the
    hard limit if that is lower.
    """
    if sys.platform == "win32":  # Windows has no such limit
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed_files = wanted + _BACKLOG + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed_files:
        return wanted
    new_soft = needed_files if hard == resource.RLIM_INFINITY else min(needed_files, hard)
    with contextlib.suppress(OSError, ValueError):  # the system may enforce a lower limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (new_soft, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(wanted, max(soft - _BACKLOG - _OTHER_FILES, 1))


def warn_of_failed_accepts(loop: asyncio.AbstractEventLoop) -> None:
    """Make a loop log one warning a minute, not tracebacks, while it cannot accept connections."""
    last_warning = float("-inf")  # the loop's time in seconds

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log a warning about a failed accept(); handle any other error as asyncio does."""
        nonlocal last_warning
        error = context.get("exception")
        # asyncio reports a failed accept() with the listening socket.
        if "socket" in context and isinstance(error, OSError) and error.errno in _OUT_OF_RESOURCES:
            if loop.time() - last_warning > _WARNING_INTERVAL:
                last_warning = loop.time()
                _LOG.warning("no connection can be accepted for now: %s", error.strerror)
        else:
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)


class _LimitedProtocol(H11Protocol):
    """A connection that is closed if its client is too slow to send a request or to read a reply.

    The time that the server takes for a reply is not limited. A client that keeps reading may take
    any time for the whole reply. A subclass sets ``client_seconds`` and ``max_connections``.
    """

    client_seconds: float  # seconds for the client to send a request, or to read some of a reply
    max_connections: int
    _timer: asyncio.TimerHandle | None = None  # None: not running
    _unsent = 0  # bytes in the write buffer when the timer was started
    _waiting_since = 0.0  # the loop's time when the timer was started, in seconds

    def connection_made(self, transport: Any) -> None:
        """Start the connection's timer. If there are too many connections, close one of them."""
        super().connection_made(transport)  # adds this connection to self.connections
        if len(self.connections) > self.max_connections:
            others: Any = self.connections - {self}  # all are of this class
            idle = [other for other in others if other._is_idle]
            if not idle:  # all others are in use: close this one
                transport.abort()
                return
            # Close the connection that has been idle longest, so that a program that opens
            # connections and sends nothing does not lock others out.
            longest_idle = min(idle, key=lambda other: other._waiting_since)
            longest_idle.transport.abort()
        tcp_socket = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # the connection may be closed already
            # Turn off Nagle's algorithm: it holds a small packet back until the client has
            # confirmed the previous packet, and many clients take 40 ms to do so. asyncio sets the
            # option only if the listening socket was created with the protocol number of TCP.
            tcp_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # By default the system buffers megabytes of a reply, and the timer cannot tell whether
            # the client reads them.
            tcp_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._update_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._update_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def send_400_response(self, msg: str) -> None:
        """Reply with OpenAI's error object to malformed HTTP, unless another reply has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # no reply has begun
            reply = APIError(400, "this is not a valid HTTP request").response()
            headers = [*reply.raw_headers, (b"connection", b"close")]
            head = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            self.transport.write(self.conn.send(head))
            self.transport.write(self.conn.send(h11.Data(data=bytes(reply.body))))
            self.conn.send(h11.EndOfMessage())  # changes h11's state; there are no bytes to write
        self.transport.close()

    @property
    def _is_making_reply(self) -> bool:
        """Whether the reply to the last request has not ended.

        ``cycle`` is uvicorn's object for the last request and its reply; None: no request so far.
        """
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _is_idle(self) -> bool:
        """Whether no request is being answered, and the connection is not closing already."""
        return not self._is_making_reply and not self.transport.is_closing()

    def _update_timer(self) -> None:
        """Run the timer while the server waits for the client, and only then."""
        # A transport that is closing still waits for the client to read the remaining bytes.
        client_must_read = self.flow.write_paused or self.transport.is_closing()
        if self._is_making_reply and not client_must_read:
            self._stop_timer()  # the client waits for the server, whose time is not limited
        elif self._timer is None:  # a running timer goes on: a few bytes do not restart it
            self._start_timer()

    def _start_timer(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._waiting_since = self.loop.time()
        self._timer = self.loop.call_later(self.client_seconds, self._on_timeout)

    def _on_timeout(self) -> None:
        """Close the connection, unless the client has read some bytes since the timer's start."""
        if self.transport.get_write_buffer_size() < self._unsent:
            self._start_timer()
        else:
            self.transport.abort()  # close() would wait for the client to read the remaining bytes

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class StopSignals:
    """A context manager that handles SIGINT and SIGTERM.

    The first signal sets the event ``arrived``. A later SIGINT ends the process at once. Enter the
    context in the main thread, in a coroutine of the loop that waits for the event.
    """

    def __init__(self) -> None:
        self.first = 0  # number of the first signal; 0: no signal so far
        self.arrived = asyncio.Event()  # set by the first signal

    def __enter__(self) -> StopSignals:
        """Replace the handlers of both signals until the end of the context."""
        self._loop = asyncio.get_running_loop()
        self._previous_handlers = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        """Handle a signal. Python calls this in the main thread, between any two operations."""
        if self.first and number == signal.SIGINT:
            os.write(2, b"\nstopped\n")  # 2: stderr; the signal may have interrupted a print
            os._exit(_INTERRUPTED)
        self.first = self.first or number  # a later SIGTERM changes nothing
        # Unlike a plain call of set(), this wakes the loop.
        self._loop.call_soon_threadsafe(self.arrived.set)


class StoppableServer(Server):
    """A server that stops together with its engine. Its caller handles signals.

    Args:
        config: uvicorn's configuration.
        close_engine: closes the engine and gives running requests time to finish.
        on_ready: called when connections are accepted.
    """

    def __init__(
        self,
        config: Config,
        close_engine: Callable[[], Awaitable[None]],
        on_ready: Callable[[], None],
    ):
        super().__init__(config)
        self._close_engine = close_engine
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections, then call ``on_ready``."""
        warn_of_failed_accepts(asyncio.get_running_loop())
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the server and the engine together.

        Queued requests fail. Running requests get time to finish.
        """
        await asyncio.gather(self._close_engine(), super().shutdown(sockets))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture no signals, because uvicorn would raise them again after it has stopped."""
        yield

    async def stop_after(self, event: asyncio.Event) -> None:
        """Stop the server once an event is set."""
        await event.wait()
        self.should_exit = True
