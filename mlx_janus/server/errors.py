"""Errors as replies: every exception that a request can meet becomes OpenAI's error object."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from ..engine.messages import BusyError, StoppingError
from ..engine.pool import LoadError
from ..errors import (
    ContextLengthError,
    HubError,
    ImageError,
    JanusError,
    OptionError,
    OutOfMemoryError,
    PromptError,
    one_line,
)
from ..memory import format_size
from .schema import ErrorKind, ErrorReply, ErrorText

_LOG = logging.getLogger("mlx_janus.server")
CLIENT_LEFT = 499  # nginx's status for a client that left: never sent, only counted and logged
ANTHROPIC_PATH = "/v1/messages"  # the routes of Anthropic's API are here and below
_ANTHROPIC_KINDS = {  # status -> the type of Anthropic's error object
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_RETRY_LOADING = {"Retry-After": "30"}  # seconds, for a model that cannot be loaded at present
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

    def response(self, path: str = "") -> JSONResponse:
        """Return the reply in the form of the API of a path: Anthropic's, or else OpenAI's.

        Args:
            path: the path of the request; "": unknown.
        """
        body = self.anthropic_body if is_anthropic(path) else self.body
        return JSONResponse(body, self.status_code, self.headers)

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """Anthropic's error object, which has no field for ``param``."""
        kind = _ANTHROPIC_KINDS.get(self.status_code)
        if kind is None:
            kind = "api_error" if self.status_code >= 500 else "invalid_request_error"
        return {"type": "error", "error": {"type": kind, "message": one_line(self.detail)}}


def is_anthropic(path: str) -> bool:
    """Return whether a path is one of Anthropic's API."""
    return path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/")


@contextlib.contextmanager
def renamed_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Translate the ``param`` of an ``APIError`` that is raised in the context.

    Args:
        names: field of the chat request that a client's request was translated into -> field of the
            client's request.
    """
    try:
        yield
    except APIError as error:
        if error.param is not None:
            error.param = names.get(error.param, error.param)
        raise


def client_left() -> APIError:
    """Return the error that ends a request whose client has closed its connection."""
    return APIError(CLIENT_LEFT, "the client left")


def to_api_error(error: Exception, param: str | None = None) -> APIError:
    """Convert an exception to an API error. Return an ``APIError`` unchanged.

    The reply describes the client's own mistakes, a full queue, a shutdown and a lack of memory.
    Any other error is logged, and its reply says only "internal error".

    Args:
        error: any exception.
        param: the field of the body that the reply names if a prompt, image or option is refused;
            None: no field.
    """
    if isinstance(error, APIError):
        return error
    if isinstance(error, LoadError):
        return _to_load_api_error(error)
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


def _to_load_api_error(error: LoadError) -> APIError:
    """Convert the error of a model that cannot be loaded. The pool has logged the reason.

    Except for a lack of memory, the reply leaves out the reason, which may name files of this
    machine.
    """
    start = f"the model {error.name!r}"
    cause = error.cause
    if isinstance(cause, OutOfMemoryError | MemoryError):
        sizes = ""
        if isinstance(cause, OutOfMemoryError) and cause.needed:
            needed = format_size(cause.needed)
            sizes = f": it needs {needed} and {format_size(cause.free)} are free"
        message = f"{start} does not fit into memory{sizes}"
        return APIError(503, message, param="model", code="out_of_memory", headers=_RETRY_LOADING)
    message = f"{start} cannot be loaded: the server's log has the reason"
    if isinstance(cause, HubError):  # the Hub may be unreachable only for now
        return APIError(503, message, param="model", code="model_failed", headers=_RETRY_LOADING)
    return APIError(500, message, param="model", code="model_failed")


def _log_internal_error(error: Exception) -> None:
    """Log an error's type and traceback; if it is a ``JanusError``, log its message too.

    The messages of other errors are not logged, because they may repeat parts of the request.
    """
    reason = f": {error}" if isinstance(error, JanusError) else ""
    stack = "".join(traceback.format_tb(error.__traceback__))
    _LOG.error("internal error, %s%s\n%s", type(error).__name__, reason, stack.rstrip())


async def handle_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Reply to an ``APIError`` or to an HTTP exception of Starlette."""
    path = request.url.path
    if isinstance(error, APIError):
        return error.response(path)
    assert isinstance(error, HTTPException)
    # For these two statuses, Starlette's own text is only the status's name.
    messages = {
        404: f"there is no {path!r}: /openapi.json lists the routes",
        405: f"{path!r} does not support {request.method}",
    }
    message = messages.get(error.status_code, str(error.detail))
    return APIError(error.status_code, message, headers=error.headers).response(path)


async def handle_validation_error(request: Request, error: Exception) -> JSONResponse:
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
    # The schema's own checks raise ValueErrors, and pydantic puts "Value error, " before the text.
    reason = chosen["msg"].removeprefix("Value error, ")
    message = f"{field or 'the body'}: {reason}"
    return APIError(400, message, param=field).response(request.url.path)


# The names of the fields inside messages, items and ``stream_options``. Any other name that
# pydantic's location has inside them is the name of a union's branch.
_NESTED_FIELDS = {
    "role",
    "content",
    "type",
    "text",
    "image_url",
    "url",
    "detail",
    "include_usage",
    "source",
    "data",
    "media_type",
    "output",
    "format",
    "arguments",
    "call_id",
    "input",
}


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
