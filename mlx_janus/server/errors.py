"""Errors as replies: every exception that a request can meet becomes OpenAI's error object."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from ..engine.messages import BusyError, StoppingError
from ..errors import ImageError, JanusError, OptionError, OutOfMemoryError, PromptError
from .schema import ErrorKind, ErrorReply, ErrorText

_LOG = logging.getLogger("mlx_janus.server")
CLIENT_LEFT = 499  # nginx's status for a client that left: never sent, only counted and logged
_MAX_MESSAGE = 400  # characters kept of a message, which may repeat parts of the request
_CODES = {  # a status to its default ``APIError.code``
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
}


class APIError(HTTPException):
    """A refused or failed request, with the reply that its client gets.

    Args:
        status: the HTTP status.
        message: one sentence for a person: the mistake and the allowed values.
        param: the field of the body that caused it.
        code: for programs; None: the default of the status, if it has one.
        headers: headers of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, dict(headers or {}))
        self.param = param
        self.code = code or _CODES.get(status)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind: ErrorKind = "invalid_request_error"
        if self.status_code == 429:
            kind = "rate_limit_error"
        elif self.status_code >= 500:
            kind = "server_error"
        text = ErrorText(
            message=self.detail[:_MAX_MESSAGE], type=kind, param=self.param, code=self.code
        )
        return ErrorReply(error=text).model_dump()

    def response(self) -> JSONResponse:
        """Return the reply."""
        return JSONResponse(self.body, self.status_code, self.headers)


def client_left() -> APIError:
    """Return the error that ends a request whose client has closed its connection."""
    return APIError(CLIENT_LEFT, "the client left")


def to_api_error(error: Exception, param: str | None = None) -> APIError:
    """Convert an exception to an API error.

    The reply describes the client's own mistakes, a full queue, a shutdown and a lack of memory.
    Any other error is logged, and the reply is "internal error".

    Args:
        error: any exception.
        param: the field of the body that a refused prompt, image or option came from.
    """
    if isinstance(error, APIError):
        return error
    if isinstance(error, BusyError):
        return APIError(429, str(error), headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, StoppingError):
        return APIError(503, str(error), code="shutting_down")
    if isinstance(error, PromptError | ImageError | OptionError):
        return APIError(400, " ".join(str(error).split()), param=param)
    if isinstance(error, OutOfMemoryError | MemoryError):
        return APIError(
            503,
            "there is not enough memory for this request: ask for less at once",
            code="out_of_memory",
        )
    _log_internal_error(error)
    return APIError(500, "internal error", code="internal_error")


def _log_internal_error(error: Exception) -> None:
    """Log where an error was raised.

    Only our own errors' messages are logged: others may repeat parts of the request.
    """
    reason = f": {error}" if isinstance(error, JanusError) else ""
    places = "".join(traceback.format_tb(error.__traceback__))
    _LOG.error("internal error, %s%s\n%s", type(error).__name__, reason, places.rstrip())


async def handle_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Reply to an HTTP exception, Starlette's or ours."""
    if isinstance(error, APIError):
        return error.response()
    assert isinstance(error, HTTPException)
    # For these two statuses, Starlette's own text is only the name of the status.
    messages = {
        404: f"there is no {request.url.path!r}: /openapi.json lists the routes",
        405: f"{request.url.path!r} does not support {request.method}",
    }
    message = messages.get(error.status_code, str(error.detail))
    return APIError(error.status_code, message, headers=error.headers).response()


async def handle_validation_error(_: Request, error: Exception) -> JSONResponse:
    """Reply 400 to a body that does not match the schema, as OpenAI does; FastAPI's own is 422."""
    assert isinstance(error, RequestValidationError)
    # A union reports an error for each branch. The intended branch is the one that matched deepest.
    # Among equally deep ones, it is one whose value is only too long or too short.
    intended = max(
        error.errors(),
        key=lambda one: (len(one["loc"]), one["type"].startswith(("too_", "string_too_"))),
    )
    field = _field_path(intended["loc"])
    reason = intended["msg"].removeprefix("Value error, ")
    return APIError(400, f"{field or 'the body'}: {reason}", param=field).response()


# Fields inside messages and options. Any other name in there is that of a union's branch.
_FIELDS = {"role", "content", "type", "text", "image_url", "url", "detail", "include_usage"}


def _field_path(location: Sequence[int | str]) -> str | None:
    """Return a field's path, such as "messages[0].content", from a location of pydantic.

    Pydantic's location also names the branches of unions, which are left out.
    """
    path = ""
    after_index = False
    for part in location[1:]:  # the first part is always "body"
        if isinstance(part, int):
            path += f"[{part}]"
        elif not path:
            path = part
        # Directly after an index, even the name of a field, such as "text", is that of a branch.
        elif part in _FIELDS and not after_index:
            path += f".{part}"
        after_index = isinstance(part, int)
    return path or None
