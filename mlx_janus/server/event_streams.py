"""The engine's events for a client: collected into one reply, or streamed one by one.

A ticket is a request in the engine. If the client leaves, the ticket is cancelled in either case.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TYPE_CHECKING

from pydantic import BaseModel
from starlette.requests import Request as HTTPRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..engine.messages import Event
from ..errors import JanusError
from .errors import client_left, to_api_error

if TYPE_CHECKING:
    from ..engine.tickets import Ticket


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


async def collect_events(
    ticket: Ticket, request: HTTPRequest, record: Callable[[Event], None], param: str
) -> list[Event]:
    """Return all events of a ticket. The ticket is cancelled as soon as the client leaves.

    Args:
        ticket: the request in the engine.
        request: the client's request, whose body has been read.
        record: called with each event.
        param: the field of the body that an error reply names.

    Raises:
        APIError: the request fails, or the client leaves.
    """

    async def collect() -> list[Event]:
        events = []
        async for event in ticket:
            record(event)
            events.append(event)
        return events

    collecting = asyncio.create_task(collect())
    disconnect = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({collecting, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise client_left()
        return collecting.result()
    except JanusError as error:
        raise to_api_error(error, param) from None
    finally:
        ticket.cancel()  # does nothing to a request that has ended
        collecting.cancel()
        disconnect.cancel()
        await asyncio.gather(collecting, disconnect, return_exceptions=True)


async def _wait_for_disconnect(request: HTTPRequest) -> None:
    """Return once the client has left; ignore other ASGI messages."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def server_sent_event(data: BaseModel | str, event: str | None = None) -> bytes:
    """Encode one server-sent event.

    Args:
        data: an object, which is sent as JSON, or one line of text.
        event: the event's name, if it has one.
    """
    text = data if isinstance(data, str) else data.model_dump_json()
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {text}\n\n".encode()


class EventStream(StreamingResponse):
    """A reply of server-sent events.

    An error becomes the last event, because the status has been sent by then.

    Args:
        events: the ticket's events, encoded by ``server_sent_event``.
        ticket: the request in the engine, cancelled after the last event or when the client leaves.
        heartbeat_seconds: seconds without an event after which a comment is sent, so that no proxy
            closes the connection.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], ticket: Ticket, heartbeat_seconds: float
    ):
        self._events = _add_heartbeats(_catch_error(events), heartbeat_seconds)
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


async def _catch_error(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes]:
    """Yield the events; turn an exception into a last event, named "error"."""
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                yield event
    except Exception as error:
        yield server_sent_event(json.dumps(to_api_error(error).body), "error")


async def _add_heartbeats(
    events: AsyncGenerator[bytes, None], seconds: float
) -> AsyncGenerator[bytes]:
    """Yield the events, and a comment after every ``seconds`` without an event."""
    next_event: asyncio.Task[bytes] | None = None  # waits for the next event
    try:
        while True:
            # After a comment, keep the same task, because cancelling it would end ``events``.
            next_event = next_event or asyncio.create_task(_next(events))
            done, _ = await asyncio.wait({next_event}, timeout=seconds)
            if not done:
                yield b": still at work\n\n"  # the colon marks a comment
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
