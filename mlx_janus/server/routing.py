"""Routes that take JSON, and the descriptions that routes share in ``/openapi.json``."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from .bodies import JSON, media_type, parse_json
from .errors import APIError
from .schema import ErrorReply

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "The request is refused."},
    "5XX": {"model": ErrorReply, "description": "The server cannot complete the request."},
}


class _StrictRequest(Request):
    """A request whose body must be JSON without NaN, lone surrogates or excessive depth."""

    async def json(self) -> Any:
        """Parse the body. FastAPI calls this before it validates the result.

        Raises:
            APIError: the body is not JSON, or has NaN, a lone surrogate or excessive depth (400).
        """
        return parse_json(await self.body())


class JSONRoute(APIRoute):
    """A route that accepts only JSON, so that no form on another site's page can use it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return a handler that checks the content type (415) and then calls FastAPI's handler."""
        handle_with_fastapi = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            if media_type(request.headers) != JSON:
                raise APIError(415, "the body must be JSON: send 'Content-Type: application/json'")
            return await handle_with_fastapi(_StrictRequest(request.scope, request.receive))

        return handle_json


def streamed_responses(stream_description: str) -> dict[int | str, dict[str, Any]]:
    """Return a route's OpenAPI responses, by status: the streamed reply and the errors."""
    return {200: event_stream(stream_description), **ERROR_RESPONSES}


def event_stream(description: str) -> dict[str, Any]:
    """Return OpenAPI's description of a streamed reply."""
    # The schema has no type: some tools would read it as the type of the whole stream, others as
    # the type of one event.
    return {"content": {"text/event-stream": {"schema": {"description": description}}}}
