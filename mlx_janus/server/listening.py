"""uvicorn, with a limit for the head of a request, and an end together with the engine's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType
from typing import Any

from starlette.types import ASGIApp
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from .settings import Settings

GRACE = 30.0  # seconds that what is under way gets when the server is asked to stop
_LINGER = 5  # seconds that those get then who read slowly
_INTERRUPTED = 130


def configured(app: ASGIApp, settings: Settings) -> Config:
    """How uvicorn is to serve: HTTP alone, with no log of its own, and no word of what it is."""

    class Protocol(_TimedProtocol):
        head_seconds = settings.body_seconds

    return Config(
        app,
        lifespan="off",
        http=Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(GRACE) + _LINGER,
    )


class _TimedProtocol(H11Protocol):
    """A connection on which nothing is asked, or half a head, is closed after some time."""

    head_seconds: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def _watch(self) -> None:
        """Have the timer run exactly while no request is under way."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(self.head_seconds, self.transport.close)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class StoppableServer(Server):
    """Ends at SIGINT or SIGTERM: takes nothing new, has the engine close and replies end; at once at a second SIGINT.

    Args:
        config: of uvicorn.
        close: has what is under way finish.
        ready: called when connections are taken.
    """

    def __init__(self, config: Config, close: Callable[[], Awaitable[None]], ready: Callable[[], None]):
        super().__init__(config)
        self._close, self._ready = close, ready
        self.stopped_by = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, and says so."""
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, beside the engine's: replies that wait end with an error, those under way are finished."""
        await asyncio.gather(self._close(), super().shutdown(sockets))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals while it serves; uvicorn would raise them anew at the end."""
        before = {stop: signal.signal(stop, self.handle_exit) for stop in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for stop, handler in before.items():
                signal.signal(stop, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        if self.should_exit and sig == signal.SIGINT:
            os.write(2, b"\nstopped\n")  # print may have been interrupted itself
            os._exit(_INTERRUPTED)
        self.should_exit = True
        self.stopped_by = self.stopped_by or sig
