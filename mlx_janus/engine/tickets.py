"""What becomes of a request: told by the thread that owns the device, read on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from .messages import Event, StoppingError


class Ticket(AsyncIterator[Event]):
    """The events of a request, in order; iterating raises what the request failed with.

    Made by ``Engine.submit``, on the event loop that reads it.

    Args:
        on_cancel: called once if the request is given up.
        on_end: called once, in the device's thread, with the seconds that the request took.
    """

    def __init__(self, on_cancel: Callable[[], None], on_end: Callable[[float], None]):
        self.cancelled = False
        self.ended = False
        self._made = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()
        self._on_cancel, self._on_end = on_cancel, on_end
        self._read = False  # to the end

    async def __anext__(self) -> Event:
        if self._read:
            raise StopAsyncIteration
        event = await self._events.get()
        if event is None:
            self._read = True
            raise StopAsyncIteration
        if isinstance(event, BaseException):
            self._read = True
            raise event
        return event

    def cancel(self) -> None:
        """Nobody waits any more: the work stops within a step. Any number of calls, at any time."""
        if not self.cancelled:
            self.cancelled = True
            self._on_cancel()

    # From the device's thread

    def tell(self, event: Event) -> None:
        """Pass an event on."""
        self._put(event)

    def end(self, error: BaseException | None = None) -> None:
        """Nothing follows, or an error does; what comes after the first call is not heard."""
        if not self.ended:
            self.ended = True
            self._on_end(time.monotonic() - self._made)
            self._put(error)

    def _put(self, event: Event | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


@dataclass(frozen=True)
class Counts:
    """What there is to do: requests that wait, answers and pictures under way."""

    waiting: int = 0
    answering: int = 0
    drawing: int = 0


class _Work(Protocol):
    ticket: Ticket


Work = TypeVar("Work", bound=_Work)


def end_waiting(queue: deque[Work], *, stopping: bool) -> None:
    """End those of a queue that were given up, or all of them as the engine is stopping."""
    for work in [work for work in queue if stopping or work.ticket.cancelled]:
        queue.remove(work)
        work.ticket.end(StoppingError() if stopping else None)
