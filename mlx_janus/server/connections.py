"""uvicorn, with limits for connections and for how long clients are waited for; it ends together with the engine."""

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

from .errors import Problem
from .settings import Settings

GRACE = 30.0  # seconds that what is under way gets when the server is asked to stop
_LINGER = 5  # seconds that those get then who read slowly
_INTERRUPTED = 130
_BACKLOG = 128  # connections that are accepted at one go, before any of them is counted
_SYSTEM_BUFFER = 128 << 10  # bytes of a reply
_OTHER_FILES = 128  # of the process, beside connections: the model's, what is fetched
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # what accept() fails with then
_LOG = logging.getLogger("mlx_janus.server")


def configured(app: ASGIApp, settings: Settings) -> Config:
    """How uvicorn is to serve: HTTP alone, with no log of its own, and no word of what it is."""

    class Protocol(_TimedProtocol):
        seconds = settings.body_seconds
        most_connections = _room_for(settings.most_connections)

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


def _room_for(connections: int) -> int:
    """How many connections there may be, up to a number, since each is a file to the system."""
    if sys.platform == "win32":
        return connections
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _BACKLOG + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):  # a system's own limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        connections = min(connections, max(soft - _BACKLOG - _OTHER_FILES, 1))
    return connections


def say_when_full(loop: asyncio.AbstractEventLoop) -> None:
    """Have a loop say in one line that it can accept no connection, and not in a traceback for each."""
    said = float("-inf")

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal said
        error = context.get("exception")
        if not ("socket" in context and isinstance(error, OSError) and error.errno in _FULL):
            loop.default_exception_handler(context)
        elif loop.time() - said > 60:
            said = loop.time()
            _LOG.warning("no connection can be taken for now: %s", error.strerror)

    loop.set_exception_handler(handle)


class _TimedProtocol(H11Protocol):
    """A connection with a limit to how long its client is waited for: to ask, and to read what it was sent.

    There is no limit while an answer is made, nor to a reply as long as some of it is read.
    """

    seconds: float
    most_connections: int
    _timer: asyncio.TimerHandle | None = None
    _unsent = 0  # bytes, when the timer was started

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            transport.abort()
            return
        # Otherwise the system takes megabytes, in which nobody sees whether the client reads.
        with contextlib.suppress(OSError):  # it is closed already
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SYSTEM_BUFFER)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def send_400_response(self, msg: str) -> None:
        """What comes is not HTTP: uvicorn's, as an error of OpenAI's, unless a reply has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            reply = Problem(400, "this is no valid HTTP request").response()
            headers = [*reply.raw_headers, (b"connection", b"close")]
            self.transport.write(self.conn.send(h11.Response(status_code=400, headers=headers, reason=b"Bad Request")))
            self.transport.write(self.conn.send(h11.Data(data=bytes(reply.body))))
            self.conn.send(h11.EndOfMessage())
        self.transport.close()

    def _watch(self) -> None:
        """Have the timer run exactly while it is the client's turn."""
        under_way = self.cycle is not None and not self.cycle.response_complete
        if under_way and not (self.flow.write_paused or self.transport.is_closing()):
            self._forget()
        elif self._timer is None:
            self._start()

    def _start(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._timer = self.loop.call_later(self.seconds, self._end)

    def _end(self) -> None:
        """Time is over: go on if some of a reply was read meanwhile."""
        if self.transport.get_write_buffer_size() < self._unsent:
            self._start()
        else:
            self.transport.abort()  # close() would wait for what is not read

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class StopSignals:
    """SIGINT and SIGTERM, while it is entered: the first sets an event, a SIGINT after it ends the process at once.

    To be entered in the main thread, on the loop that shall hear of it.
    """

    def __init__(self) -> None:
        self.number = 0  # of the first
        self.came = asyncio.Event()

    def __enter__(self) -> StopSignals:
        self._loop = asyncio.get_running_loop()
        self._before = {stop: signal.signal(stop, self._hear) for stop in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for stop, handler in self._before.items():
            signal.signal(stop, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            os.write(2, b"\nstopped\n")  # print may have been interrupted itself
            os._exit(_INTERRUPTED)
        self.number = self.number or number
        self._loop.call_soon_threadsafe(self.came.set)  # which wakes it, too


class StoppableServer(Server):
    """Ends when it is told to: takes nothing new, has the engine close and replies end. Signals are its caller's.

    Args:
        config: of uvicorn.
        close: has what is under way finish.
        ready: called when connections are taken.
    """

    def __init__(self, config: Config, close: Callable[[], Awaitable[None]], ready: Callable[[], None]):
        super().__init__(config)
        self._close, self._ready = close, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, and says so."""
        say_when_full(asyncio.get_running_loop())
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, beside the engine's: replies that wait end with an error, those under way are finished."""
        await asyncio.gather(self._close(), super().shutdown(sockets))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None; uvicorn would raise them anew at the end."""
        yield

    async def stop_after(self, event: asyncio.Event) -> None:
        """End once something has happened."""
        await event.wait()
        self.should_exit = True
