"""What a request is refused with: OpenAI's error object, of every error that can come up."""

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
_LONGEST = 400  # characters of a message, which may repeat what was sent
_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
}


class Problem(HTTPException):
    """A request that is not done.

    Args:
        status: of HTTP.
        message: one sentence for a person: what is wrong, what is allowed.
        param: the field of the body that it is about.
        code: for programs; None: the status's own, if it has one.
        headers: of the reply.
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
        """The error object."""
        kind: ErrorKind = "invalid_request_error"
        if self.status_code == 429:
            kind = "rate_limit_error"
        elif self.status_code >= 500:
            kind = "server_error"
        text = ErrorText(message=self.detail[:_LONGEST], type=kind, param=self.param, code=self.code)
        return ErrorReply(error=text).model_dump()

    def response(self) -> JSONResponse:
        """The reply."""
        return JSONResponse(self.body, self.status_code, self.headers)


def explained(error: Exception, param: str | None = None) -> Problem:
    """What an error is to the one who asked; a bug, or what concerns the server alone, is "internal error" and logged.

    Args:
        error: anything.
        param: the field that a refused prompt, picture or option stands in.
    """
    if isinstance(error, Problem):
        return error
    if isinstance(error, BusyError):
        return Problem(429, str(error), headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, StoppingError):
        return Problem(503, str(error), code="shutting_down")
    if isinstance(error, PromptError | ImageError | OptionError):
        return Problem(400, " ".join(str(error).split()), param=param)
    if isinstance(error, OutOfMemoryError | MemoryError):
        return Problem(503, "there is not enough memory for this request: ask for less at once", code="out_of_memory")
    log_bug(error)
    return Problem(500, "internal error", code="internal_error")


def log_bug(error: Exception) -> None:
    """Where it happened, without its message, which may repeat what was sent."""
    reason = f": {error}" if isinstance(error, JanusError) else ""
    places = "".join(traceback.format_tb(error.__traceback__))
    _LOG.error("internal error, %s%s\n%s", type(error).__name__, reason, places.rstrip())


async def answer_refusal(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler of its own refusals and of ours."""
    if isinstance(error, Problem):
        return error.response()
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is no {request.url.path!r}: /openapi.json lists what there is",
        405: f"{request.url.path!r} is not for {request.method}",
    }
    message = messages.get(error.status_code, str(error.detail))
    return Problem(error.status_code, message, headers=error.headers).response()


async def answer_invalid(_: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler of a body that is not as the schema has it: 400, as OpenAI's, and not 422."""
    assert isinstance(error, RequestValidationError)
    # Of a union's branches the one that was meant: what goes further in, or is of the right type but too long or short.
    worst = max(error.errors(), key=lambda one: (len(one["loc"]), one["type"].startswith(("too_", "string_too_"))))
    place = param_of(worst["loc"])
    what = worst["msg"].removeprefix("Value error, ")
    return Problem(400, f"{place or 'the body'}: {what}", param=place).response()


def param_of(location: Sequence[int | str]) -> str | None:
    """A place in the body, such as "messages[0].content": pydantic's without the names of branches of unions."""
    text, item = "", False
    for part in location[1:]:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not text:
            text = part
        elif part in _FIELDS and not item:  # after a number comes the kind of message or part
            text += f".{part}"
        item = isinstance(part, int)
    return text or None


_FIELDS = {"role", "content", "type", "text", "image_url", "url", "detail", "include_usage"}
