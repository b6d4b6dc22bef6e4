"""Tickets: the events of a request, written by the engine's thread, read on the event loop."""

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
    """An iterator over the events of a request; it raises the error of a failed request.

    Made by ``Engine.submit``, on the event loop that reads it.

    Args:
        on_cancel: called once if the request is cancelled.
        on_end: called once, in the engine's thread, with the seconds that the request took.
    """

    def __init__(self, on_cancel: Callable[[], None], on_end: Callable[[float], None]):
        self.cancelled = False
        self.ended = False  # the engine has sent the end of the events
        self._made = time.monotonic()  # when the request was submitted
        self._loop = asyncio.get_running_loop()
        # None is the end of the events, an exception their end by a failure
        self._events: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()
        self._on_cancel = on_cancel
        self._on_end = on_end
        self._all_read = False  # the reader has received the end of the events

    async def __anext__(self) -> Event:
        """Wait for the next event.

        Raises:
            StopAsyncIteration: the events have ended.
            BaseException: the error of a failed request, raised once.
        """
        if self._all_read:
            raise StopAsyncIteration
        event = await self._events.get()
        if event is None:
            self._all_read = True
            raise StopAsyncIteration
        if isinstance(event, BaseException):
            self._all_read = True
            raise event
        return event

    def cancel(self) -> None:
        """Cancel the request, which stops within a step. Further calls do nothing."""
        if not self.cancelled:
            self.cancelled = True
            self._on_cancel()

    # Called in the engine's thread

    def tell(self, event: Event) -> None:
        """Add an event."""
        self._put(event)

    def end(self, error: BaseException | None = None) -> None:
        """End the events, with an error if there is one, and call ``on_end``.

        Further calls do nothing.
        """
        if not self.ended:
            self.ended = True
            self._on_end(time.monotonic() - self._made)
            self._put(error)

    def _put(self, event: Event | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads the events
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


@dataclass(frozen=True)
class Counts:
    """The numbers of waiting requests, running answers and running images."""

    waiting: int = 0
    answering: int = 0
    drawing: int = 0


class _Work(Protocol):
    """An item of a queue: a request with its ticket."""

    ticket: Ticket


Work = TypeVar("Work", bound=_Work)


def end_waiting(queue: deque[Work], *, stopping: bool) -> None:
    """Remove and end a queue's cancelled requests, or all requests if the engine is stopping.

    Only the stopping of the engine is reported as an error.
    """
    for work in [work for work in queue if stopping or work.ticket.cancelled]:
        queue.remove(work)
        work.ticket.end(StoppingError() if stopping else None)
