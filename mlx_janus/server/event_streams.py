"""The engine's events for a client: collected into one reply, or streamed one by one.

A ticket is a request in the engine. If the client leaves, the ticket is cancelled in either case.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import BaseModel
from starlette.requests import Request as HTTPRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..engine.messages import Event
from ..errors import JanusError
from .errors import APIError, client_left, to_api_error

if TYPE_CHECKING:
    from ..engine.tickets import Ticket

_Result = TypeVar("_Result")
_COMMENT = b": still at work\n\n"  # the colon marks a comment


class Cancellable(Protocol):
    """One request in the engine, or several."""

    def cancel(self) -> None:
        """Cancel all that has not ended."""


class TicketGroup:
    """The tickets of one HTTP request, which are cancelled together."""

    def __init__(self) -> None:
        self._tickets: list[Ticket] = []

    def add(self, ticket: Ticket) -> None:
        """Add a ticket."""
        self._tickets.append(ticket)

    def cancel(self) -> None:
        """Cancel all tickets that have not ended."""
        for ticket in self._tickets:
            ticket.cancel()


@contextlib.asynccontextmanager
async def watch_client(request: HTTPRequest) -> AsyncIterator[Callable[[], None]]:
    """Watch a client; yield a function that raises an ``APIError`` if the client has left.

    Args:
        request: the client's request, whose body has been read.
    """
    disconnect = asyncio.create_task(_wait_for_disconnect(request))

    def raise_if_client_left() -> None:
        if disconnect.done():
            raise client_left()

    try:
        yield raise_if_client_left
    finally:
        disconnect.cancel()
        await asyncio.gather(disconnect, return_exceptions=True)


async def unless_client_leaves(work: Coroutine[Any, Any, _Result], request: HTTPRequest) -> _Result:
    """Return the result of a coroutine, which is cancelled if the client leaves first.

    Args:
        work: the coroutine. Its exceptions are raised unchanged.
        request: the client's request, whose body has been read.

    Raises:
        APIError: the client has left.
    """
    working = asyncio.create_task(work)
    disconnect = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({working, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise client_left()
        return working.result()
    finally:
        working.cancel()
        disconnect.cancel()
        await asyncio.gather(working, disconnect, return_exceptions=True)


async def collect_events(
    ticket: Ticket, request: HTTPRequest, record: Callable[[Event], None], param: str
) -> list[Event]:
    """Return all events of a ticket. The ticket is cancelled as soon as the client leaves.

    Args:
        ticket: the request in the engine.
        request: the client's request, whose body has been read.
        record: called with each event.
        param: a field of the body. The error names it if the engine refuses a prompt or an option.

    Raises:
        APIError: the request fails, or the client leaves.
    """

    async def collect() -> list[Event]:
        """Wait for the end of the events; record and return them."""
        events = []
        async for event in ticket:
            record(event)
            events.append(event)
        return events

    return await complete_unless_left(collect(), ticket, request, param)


async def complete_unless_left(
    work: Coroutine[Any, Any, _Result], ticket: Cancellable, request: HTTPRequest, param: str
) -> _Result:
    """Return the result of a coroutine, which is cancelled as soon as the client leaves.

    Args:
        work: a coroutine that reads the events of ``ticket``.
        ticket: the request or requests in the engine, cancelled at the end in any case.
        request: the client's request, whose body has been read.
        param: a field of the body. The error names it if the engine refuses a prompt or an option.

    Raises:
        APIError: the request fails, or the client leaves.
    """
    try:
        return await unless_client_leaves(work, request)
    except JanusError as error:
        raise to_api_error(error, param) from None
    finally:
        ticket.cancel()  # does nothing to a request that has ended


async def _wait_for_disconnect(request: HTTPRequest) -> None:
    """Return once the client has left; ignore other ASGI messages."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def server_sent_event(data: BaseModel | Mapping[str, Any] | str, event: str | None = None) -> bytes:
    """Encode one server-sent event.

    Args:
        data: an object, which is sent as JSON, or one line of text.
        event: the event's name, if it has one.
    """
    if isinstance(data, BaseModel):
        text = data.model_dump_json()
    elif isinstance(data, str):
        text = data
    else:
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {text}\n\n".encode()


def _error_event(error: APIError) -> bytes:
    """Return an error as an encoded event of the name "error"."""
    return server_sent_event(error.body, "error")


class EventStream(StreamingResponse):
    """A reply of server-sent events.

    An error becomes the last event, because the status has been sent by then.

    Args:
        events: the ticket's events, encoded by ``server_sent_event``.
        ticket: the request in the engine, cancelled after the last event or when the client leaves.
        heartbeat_seconds: seconds without an event after which a heartbeat is sent, so that no
            proxy closes the connection.
        encode_error: encodes an error as the last event.
        heartbeat: the encoded heartbeat, by default a comment.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        ticket: Cancellable,
        heartbeat_seconds: float,
        *,
        encode_error: Callable[[APIError], bytes] = _error_event,
        heartbeat: bytes = _COMMENT,
    ):
        caught = _catch_error(events, encode_error)
        self._events = _add_heartbeats(caught, heartbeat_seconds, heartbeat)
        self._ticket = ticket
        # Without this header nginx would buffer the events.
        super().__init__(self._events, headers={"X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; then cancel the ticket and close the generator, even after a failure."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.cancel()
            await self._events.aclose()  # Starlette may leave the generator open


async def _catch_error(
    events: AsyncGenerator[bytes, None], encode_error: Callable[[APIError], bytes]
) -> AsyncGenerator[bytes]:
    """Yield the events; turn an exception into a last event."""
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                yield event
    except Exception as error:
        yield encode_error(to_api_error(error))


async def _add_heartbeats(
    events: AsyncGenerator[bytes, None], seconds: float, heartbeat: bytes
) -> AsyncGenerator[bytes]:
    """Yield the events, and a heartbeat after every ``seconds`` without an event."""
    next_event: asyncio.Task[bytes] | None = None  # waits for the next event
    try:
        while True:
            # After a heartbeat, keep the same task, because cancelling it would end ``events``.
            next_event = next_event or asyncio.create_task(_next(events))
            done, _ = await asyncio.wait({next_event}, timeout=seconds)
            if not done:
                yield heartbeat
                continue
            try:
                event = next_event.result()
            except StopAsyncIteration:
                return
            next_event = None
            yield event
    finally:
        if next_event is not None:
            next_event.cancel()
            await asyncio.gather(next_event, return_exceptions=True)
        await events.aclose()


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    """Return the next event. A task needs a coroutine, and ``anext`` does not return one."""
    return await anext(events)
