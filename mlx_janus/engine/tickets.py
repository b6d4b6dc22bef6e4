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
        self._submitted_at = time.monotonic()
        self._loop = asyncio.get_running_loop()
        # The last item is not an event: it is the error of a failed request, otherwise None.
        self._events: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()
        self._on_cancel = on_cancel
        self._on_end = on_end
        self._all_read = False  # the reader has received the end of the events

    async def __anext__(self) -> Event:
        """Wait for the next event.

        Raises:
            StopAsyncIteration: the events have ended.
            BaseException: the error of a failed request. Further calls raise StopAsyncIteration.
        """
        if self._all_read:
            raise StopAsyncIteration
        item = await self._events.get()
        if item is None:
            self._all_read = True
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            self._all_read = True
            raise item
        return item

    def cancel(self) -> None:
        """Cancel the request, which stops within a step. Further calls do nothing."""
        if not self.cancelled:
            self.cancelled = True
            self._on_cancel()

    # Called in the engine's thread

    def add_event(self, event: Event) -> None:
        """Add an event for the reader."""
        self._put(event)

    def end(self, error: BaseException | None = None) -> None:
        """End the events and call ``on_end``. Further calls do nothing.

        Args:
            error: the error to raise in the reader; None: the request did not fail.
        """
        if not self.ended:
            self.ended = True
            self._on_end(time.monotonic() - self._submitted_at)
            self._put(error)

    def _put(self, item: Event | BaseException | None) -> None:
        """Add an item to the queue of events, from the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads the events
            self._loop.call_soon_threadsafe(self._events.put_nowait, item)


@dataclass(frozen=True)
class Counts:
    """The numbers of waiting requests, running answers and running images."""

    waiting: int = 0
    answering: int = 0
    drawing: int = 0


class _HasTicket(Protocol):
    """A request in a queue, with its ticket."""

    ticket: Ticket


Task = TypeVar("Task", bound=_HasTicket)


def end_waiting(queue: deque[Task], *, stopping: bool) -> None:
    """Remove requests from a queue and end them.

    If the engine is stopping, all requests end with a StoppingError. Otherwise only the cancelled
    ones end, without an error.
    """
    for task in list(queue):
        if stopping or task.ticket.cancelled:
            queue.remove(task)
            task.ticket.end(StoppingError() if stopping else None)
