"""Clients of MCP for tests that are no coroutines: the SDK's own, in a thread with a loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from mcp import Client, StdioServerParameters, stdio_client
from mcp_types import CallToolResult

from tests.support.programs import ROOT

T = TypeVar("T")
Notification = tuple[float, float | None, str | None]


class Connection:
    """A client that is connected.

    Args:
        loop: the loop of its thread.
        client: the SDK's client.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, client: Client):
        self.loop, self.client = loop, client

    def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def call(
        self, name: str, told: list[Notification] | None = None, **arguments: Any
    ) -> CallToolResult:
        """The result of a tool; ``told`` gets the notifications of its progress."""

        async def note(progress: float, total: float | None, message: str | None) -> None:
            assert told is not None
            told.append((progress, total, message))

        callback = None if told is None else note
        result = self.do(self.client.call_tool(name, arguments, progress_callback=callback))
        assert isinstance(result, CallToolResult)
        return result

    def cancel_a_call(self, name: str, **arguments: Any) -> None:
        """Begin a call, and cancel it at the first notification of its progress."""

        async def call() -> None:
            begun = asyncio.Event()

            async def note(*_: object) -> None:
                begun.set()

            calling = self.client.call_tool(name, arguments, progress_callback=note)
            task = asyncio.create_task(calling)
            await asyncio.wait_for(begun.wait(), 60)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

        self.do(call())


@contextlib.contextmanager
def connected(server: Callable[[], Any], mode: str = "legacy") -> Iterator[Connection]:
    """A client of a server.

    Args:
        server: gives an address, a transport or a server in this process; called in the loop.
        mode: "legacy" for the handshake that most programs use, "auto" for the newest protocol.
    """
    loop = asyncio.new_event_loop()
    ready: Future[Client] = Future()
    done = asyncio.Event()

    async def keep() -> None:
        try:
            async with Client(server(), mode=mode) as client:
                ready.set_result(client)
                await done.wait()
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    keeper = threading.Thread(target=lambda: loop.run_until_complete(keep()))
    keeper.start()
    try:
        yield Connection(loop, ready.result(60))
    finally:
        loop.call_soon_threadsafe(done.set)
        keeper.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@contextlib.contextmanager
def command(log: Path, *arguments: object) -> Iterator[Connection]:
    """A client of ``mlx-janus mcp`` in a process; ``log`` gets its stderr."""
    parameters = StdioServerParameters(
        command=sys.executable,
        args=["-m", "mlx_janus", "mcp", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
    )
    with (
        log.open("w", encoding="utf-8") as file,
        connected(lambda: stdio_client(parameters, errlog=file)) as connection,
    ):
        yield connection


def error_text(result: CallToolResult) -> str:
    """The one line of a failed call."""
    assert result.is_error
    (content,) = result.content
    assert content.type == "text"
    assert "\n" not in content.text
    return content.text
