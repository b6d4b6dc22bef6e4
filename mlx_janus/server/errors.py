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
from ..errors import (
    ContextLengthError,
    ImageError,
    JanusError,
    OptionError,
    OutOfMemoryError,
    PromptError,
    one_line,
)
from .schema import ErrorKind, ErrorReply, ErrorText

_LOG = logging.getLogger("mlx_janus.server")
CLIENT_LEFT = 499  # nginx's status for a client that left: never sent, only counted and logged
_DEFAULT_CODES = {  # status -> ``APIError.code``
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
        param: the field of the body that caused the error; None: no particular field.
        code: the error's name for programs; None: the status's default, if there is one.
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
        self.code = code or _DEFAULT_CODES.get(status)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object, as the JSON body of the reply.

        Its message is one line of at most 400 printable characters, since it may repeat parts of
        the request.
        """
        kind: ErrorKind = "invalid_request_error"
        if self.status_code == 429:
            kind = "rate_limit_error"
        elif self.status_code >= 500:
            kind = "server_error"
        text = ErrorText(message=one_line(self.detail), type=kind, param=self.param, code=self.code)
        return ErrorReply(error=text).model_dump()

    def response(self) -> JSONResponse:
        """Return the reply."""
        return JSONResponse(self.body, self.status_code, self.headers)


def client_left() -> APIError:
    """Return the error that ends a request whose client has closed its connection."""
    return APIError(CLIENT_LEFT, "the client left")


def to_api_error(error: Exception, param: str | None = None) -> APIError:
    """Convert an exception to an API error. Return an ``APIError`` unchanged.

    The reply describes the client's own mistakes, a full queue, a shutdown and a lack of memory.
    Any other error is logged, and its reply says only "internal error".

    Args:
        error: any exception.
        param: the field of the request to name in the reply, if a prompt, image or option is
            refused.
    """
    if isinstance(error, APIError):
        return error
    if isinstance(error, BusyError):
        return APIError(429, str(error), headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, StoppingError):
        return APIError(503, str(error), code="shutting_down")
    if isinstance(error, PromptError | ImageError | OptionError):
        message = " ".join(str(error).split())  # one line
        if isinstance(error, ContextLengthError):
            # "the prompt is 900 tokens long" -> "the prompt is too long: 900 tokens long".
            # LangChain recognizes this error by the words "prompt is too long".
            message = f"the prompt is too long: {message.removeprefix('the prompt is ')}"
            return APIError(400, message, param=param, code="context_length_exceeded")
        return APIError(400, message, param=param)
    if isinstance(error, OutOfMemoryError | MemoryError):
        return APIError(
            503,
            "there is not enough memory for this request: ask for less at once",
            code="out_of_memory",
        )
    _log_internal_error(error)
    return APIError(500, "internal error", code="internal_error")


def _log_internal_error(error: Exception) -> None:
    """Log an error's type and its traceback, and the message of one of this package's errors.

    The messages of other errors are not logged, because they may repeat parts of the request.
    """
    reason = f": {error}" if isinstance(error, JanusError) else ""
    stack = "".join(traceback.format_tb(error.__traceback__))
    _LOG.error("internal error, %s%s\n%s", type(error).__name__, reason, stack.rstrip())


async def handle_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Reply to an ``APIError`` or to an HTTP exception of Starlette."""
    if isinstance(error, APIError):
        return error.response()
    assert isinstance(error, HTTPException)
    # For these two statuses, Starlette's own text is only the status's name.
    messages = {
        404: f"there is no {request.url.path!r}: /openapi.json lists the routes",
        405: f"{request.url.path!r} does not support {request.method}",
    }
    message = messages.get(error.status_code, str(error.detail))
    return APIError(error.status_code, message, headers=error.headers).response()


async def handle_validation_error(_: Request, error: Exception) -> JSONResponse:
    """Reply to a body that does not match the schema.

    The status is 400, as in OpenAI's API. FastAPI's default would be 422.
    """
    assert isinstance(error, RequestValidationError)

    def relevance(mistake: dict[str, Any]) -> tuple[int, bool]:
        """Return the mistake's depth in the body, and whether only a length is wrong."""
        only_length = mistake["type"].startswith(("too_", "string_too_"))
        return len(mistake["loc"]), only_length

    # For a union, pydantic reports the mistakes of every branch. Reply with the deepest mistake,
    # because it is probably in the branch that the client meant. Among equally deep mistakes,
    # prefer a wrong length.
    chosen = max(error.errors(), key=relevance)
    field = _field_path(chosen["loc"])
    reason = chosen["msg"].removeprefix("Value error, ")
    return APIError(400, f"{field or 'the body'}: {reason}", param=field).response()


# The names of the fields inside messages and ``stream_options``. Any other name that pydantic's
# location has inside them is the name of a union's branch.
_NESTED_FIELDS = {"role", "content", "type", "text", "image_url", "url", "detail", "include_usage"}


def _field_path(location: Sequence[int | str]) -> str | None:
    """Return a field's path, such as "messages[0].content", from a location of pydantic.

    Pydantic's location also names the branches of unions. The path leaves these names out.

    Returns:
        The path; None if the location is the body itself.
    """
    path = ""
    after_index = False
    for part in location[1:]:  # the first part is always "body"
        if isinstance(part, int):
            path += f"[{part}]"
        elif not path:
            path = part
        # Directly after an index, "text" or "image_url" is a branch, not the field of that name.
        elif part in _NESTED_FIELDS and not after_index:
            path += f".{part}"
        after_index = isinstance(part, int)
    return path or None
