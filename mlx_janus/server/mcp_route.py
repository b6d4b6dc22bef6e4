"""``/mcp``: the MCP tools over streamable HTTP, on the same engine as the other routes.

The middlewares in front of this route check the Host, the Origin, the key and the size of the body.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..engine.messages import Event, StoppingError
from ..inference.input_records import InputImage
from ..inference.results import GeneratedImage
from ..mcp.package import is_installed
from ..processing.data_urls import as_data_url
from .errors import to_api_error
from .images import ImageSource
from .served_models import ServedModels

if TYPE_CHECKING:
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

    from ..engine.engine import Engine

PATH = "/mcp"
_MAX_SESSIONS = 256  # clients at the same time; a further one is refused
_IDLE_SECONDS = 30 * 60.0  # of a session without requests, after which it ends
_LAST_REPLIES = 5.0  # seconds for the replies of the last calls when the server stops


def add_mcp_route(app: FastAPI, models: ServedModels) -> None:
    """Add the route, if the extra "mcp" is installed."""
    if is_installed():
        endpoint = MCPEndpoint(models)
        route = Route(PATH, endpoint, include_in_schema=False)
        endpoint.route = route
        app.router.routes.append(route)


class ServerHost:
    """The HTTP server as the MCP tools' ``Host``.

    Args:
        models: the server's models and metrics. The tools use the first model.
    """

    saves_images = False

    def __init__(self, models: ServedModels):
        self._models = models

    @contextlib.asynccontextmanager
    async def engine(self) -> AsyncIterator[Engine]:
        """Yield the engine of the first model; load the model if it was unloaded.

        Raises:
            JanusError: the model cannot be loaded.
        """
        model = self._models.first
        engine = await self._models.pool.acquire(model)
        try:
            yield engine
        finally:
            self._models.pool.release(model)

    async def read_image(self, source: str, engine: Engine) -> InputImage:
        """Return the image of a data URL or base64, or of an address if the settings allow it.

        Raises:
            APIError: the image cannot be read, or ``source`` is a path.
        """
        content = as_data_url(source)
        reader = self._models.service(self._models.first, engine).image_reader
        return await reader.read(ImageSource(content, "image"))

    async def save(self, image: GeneratedImage) -> Path | None:
        """Save nothing: the client may be on another machine."""
        return None

    def recorder(self) -> Callable[[Event], None]:
        """Return a function that adds the events of one request to the metrics."""
        return self._models.metrics.event_recorder()

    def explain(self, error: Exception) -> str:
        """Return the message with which the other routes would report an error."""
        return to_api_error(error).detail


class MCPEndpoint:
    """An ASGI application for ``/mcp``. Its sessions end when the pool of models has closed.

    The first request starts the sessions' manager, so the package ``mcp`` is not imported before.

    Args:
        models: the server's models.
    """

    route: Route | None = None  # shown in the access log

    def __init__(self, models: ServedModels):
        self._models = models
        self._sessions: asyncio.Task[None] | None = None  # None: no request so far
        self._manager: asyncio.Future[StreamableHTTPSessionManager] | None = None
        self._open_posts = 0  # POST requests whose reply has not ended
        self._no_posts = asyncio.Event()  # set while there are no such requests
        self._no_posts.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request.

        Raises:
            StoppingError: the server is stopping.
        """
        scope["route"] = self.route
        if self._models.pool.stopping:
            raise StoppingError
        manager = await self._running_manager()
        posts = 1 if scope["method"] == "POST" else 0  # a GET is a stream without an end
        self._change_open_posts(posts)
        try:
            await manager.handle_request(scope, receive, send)
        finally:
            self._change_open_posts(-posts)

    def _change_open_posts(self, change: int) -> None:
        """Add a number to the count of open POST requests, and update ``_no_posts``."""
        self._open_posts += change
        if self._open_posts:
            self._no_posts.clear()
        else:
            self._no_posts.set()

    async def _running_manager(self) -> StreamableHTTPSessionManager:
        """Return the manager of the sessions. The first call, and one after a failure, starts it.

        Raises:
            Exception: the manager could not be started.
        """
        if self._manager is None or _has_failed(self._manager):
            self._manager = asyncio.get_running_loop().create_future()
            self._sessions = asyncio.create_task(self._run_sessions(self._manager))
        # All requests wait for this future. A request that is cancelled must not cancel it.
        return await asyncio.shield(self._manager)

    def _create_manager(self) -> StreamableHTTPSessionManager:
        from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

        from ..mcp.protocol import create_server

        return StreamableHTTPSessionManager(
            create_server(ServerHost(self._models)),
            max_request_body_size=self._models.settings.body_limit,
            session_idle_timeout=_IDLE_SECONDS,
            max_sessions=_MAX_SESSIONS,
        )

    async def _run_sessions(self, started: asyncio.Future[StreamableHTTPSessionManager]) -> None:
        """Run the sessions until the pool has closed.

        Then wait for the replies to open POST requests, for at most ``_LAST_REPLIES`` seconds.

        Args:
            started: gets the manager, or the error if the manager cannot be started.
        """
        try:
            # Importing the package takes a second, in which the loop serves other requests.
            manager = await asyncio.to_thread(self._create_manager)
            async with manager.run():
                started.set_result(manager)
                await self._models.pool.wait_for_end()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LAST_REPLIES):
                        await self._no_posts.wait()
        except Exception as error:
            if started.done():
                raise
            started.set_exception(error)


def _has_failed(started: asyncio.Future[StreamableHTTPSessionManager]) -> bool:
    """Return whether the start of a manager has ended with an error."""
    return started.done() and started.exception() is not None
