"""Events to a client, whole or as they come, for as long as the client is there."""

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
from .errors import Problem, explained

if TYPE_CHECKING:
    from ..engine.tickets import Ticket

_CLIENT_LEFT = 499  # nginx's number: nobody gets it, the metrics and the log do


@contextlib.asynccontextmanager
async def watched(request: HTTPRequest) -> AsyncIterator[Callable[[], None]]:
    """Watches a client; gives what raises a ``Problem`` if nobody is there any more.

    Args:
        request: whose body has been read.
    """

    def check() -> None:
        if left.done():
            raise Problem(_CLIENT_LEFT, "the client left")

    left = asyncio.create_task(_left(request))
    try:
        yield check
    finally:
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)


async def whole(ticket: Ticket, request: HTTPRequest, heard: Callable[[Event], None], param: str) -> list[Event]:
    """All events of a ticket; it is cancelled as soon as the client leaves.

    Args:
        ticket: what the engine gave.
        request: whose client is watched; its body has been read.
        heard: is told each event as it comes.
        param: the field that an error is about.

    Raises:
        Problem: it failed, or nobody is there any more.
    """

    async def collect() -> list[Event]:
        events = []
        async for event in ticket:
            heard(event)
            events.append(event)
        return events

    work, left = asyncio.create_task(collect()), asyncio.create_task(_left(request))
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Problem(_CLIENT_LEFT, "the client left")
        return work.result()
    except JanusError as error:
        raise explained(error, param) from None
    finally:
        ticket.cancel()
        for task in (work, left):
            task.cancel()
        await asyncio.gather(work, left, return_exceptions=True)


async def _left(request: HTTPRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def server_sent(data: BaseModel | str, event: str | None = None) -> bytes:
    """One server-sent event. Text must be one line."""
    text = data if isinstance(data, str) else data.model_dump_json()
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {text}\n\n".encode()


class EventStream(StreamingResponse):
    """Server-sent events, the last of which is the error if there is one; the ticket ends with the connection.

    Args:
        events: made from the ticket's, each as ``server_sent`` has it.
        ticket: is cancelled when all are sent, or the client has left, even while it was slow to read.
        heartbeat_seconds: after which a comment is sent, so that nobody between takes the connection for dead.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], ticket: Ticket, heartbeat_seconds: float):
        self._events, self._ticket = _with_heartbeats(_with_error(events), heartbeat_seconds), ticket
        super().__init__(self._events, headers={"X-Accel-Buffering": "no"})  # nginx would hold events back

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.cancel()
            await self._events.aclose()


async def _with_error(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes]:
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                yield event
    except Exception as error:
        yield server_sent(json.dumps(explained(error).body), "error")


async def _with_heartbeats(items: AsyncGenerator[bytes, None], seconds: float) -> AsyncGenerator[bytes]:
    following: asyncio.Task[bytes] | None = None
    try:
        while True:
            following = following or asyncio.create_task(_next(items))
            done, _ = await asyncio.wait({following}, timeout=seconds)
            if not done:
                yield b": still at work\n\n"
                continue
            try:
                item = following.result()
            except StopAsyncIteration:
                return
            following = None
            yield item
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await items.aclose()


async def _next(items: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(items)
