"""uvicorn's server, which ends together with the engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType

from uvicorn import Config, Server

_INTERRUPTED = 130


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
            os.write(2, b"stopped\n")  # print may have been interrupted itself
            os._exit(_INTERRUPTED)
        self.should_exit = True
        self.stopped_by = self.stopped_by or sig
