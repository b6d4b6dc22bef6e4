"""Progress notifications of a call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

from mcp.server.session import ServerSession

T = TypeVar("T")

_INTERVAL = 0.1  # seconds between two notifications
_HEARTBEAT = 5.0  # seconds of waiting after which a notification says that the call is alive
_HEARTBEAT_STEP = 0.001  # growth of the progress, which must increase with each notification


class ProgressReporter:
    """A reporter of one call's progress.

    Args:
        session: sends the notifications.
        wanted: whether the client asked for notifications. Otherwise none is sent.
    """

    def __init__(self, session: ServerSession, wanted: bool):
        self.wanted = wanted
        self._session = session
        self._progress = 0.0  # of the last notification
        self._sent_at = float("-inf")  # time of the last notification

    async def report(self, done: float, total: float, message: str) -> None:
        """Send a notification if the progress has grown.

        Within ``_INTERVAL`` seconds of the last notification, only the end of the work is reported.
        """
        now = time.monotonic()
        too_soon = now - self._sent_at < _INTERVAL and done < total
        if self.wanted and not too_soon and done > self._progress:
            await self._send(done, total, message)

    async def wait(self, awaitable: Awaitable[T], message: str) -> T:
        """Await a result and return it. Send a notification every few seconds while waiting.

        Clients may give up a call from which they hear nothing.
        """
        if not self.wanted:
            return await awaitable
        task = asyncio.ensure_future(awaitable)
        try:
            while True:
                done, _ = await asyncio.wait({task}, timeout=_HEARTBEAT)
                if done:
                    return task.result()
                await self._send(self._progress + _HEARTBEAT_STEP, None, message)
        finally:
            task.cancel()

    async def _send(self, progress: float, total: float | None, message: str) -> None:
        """Send a notification now; ``total`` is None if it is unknown."""
        self._progress = progress
        self._sent_at = time.monotonic()
        await self._session.report_progress(progress, total, message)
