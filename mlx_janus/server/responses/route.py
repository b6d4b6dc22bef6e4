"""``/v1/responses``: from a request to a response, in one object or as a stream."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse, Response
from starlette.requests import Request as HTTPRequest

from ..chat_completions import begin_answers
from ..errors import APIError, renamed_fields
from ..event_streams import EventStream, complete_unless_left
from ..request_parts import RequestPart
from ..schema import (
    ChatRequest,
    NamedSchema,
    ObjectFormat,
    SamplingFields,
    SchemaFormat,
    TextFormat,
)
from ..service import Service
from .conversation import ResponsesInput, read_input
from .drawing import Drawing, check_drawing, images_to_change, make_drawing
from .reply_schema import ResponsesReply
from .run import ResponseRun
from .schema import LOGPROBS, NamedSchemaFormat, ResponsesRequest
from .tools import ToolPlan, plan_tools

if TYPE_CHECKING:
    from ...engine.tickets import Ticket

_FORMAT_FIELD = "text.format"
_STORED_FIELDS = ("previous_response_id", "conversation", "prompt", "background")
_FIELDS = {"messages": "input"}  # names of a chat's fields -> names here


async def create_response(
    body: ResponsesRequest, request: HTTPRequest, service: Service
) -> Response:
    """Answer a conversation, call a function or draw an image.

    Raises:
        APIError: the request is refused, the client leaves, or a reply that is not streamed fails.
            A stream reports a failure in its last two events.
        OptionError: the model does not support an option of the image.
    """
    if field := body.unsupported_field():
        fix = "leave it out"
        if field in _STORED_FIELDS:
            fix = "nothing is stored here, so send the whole conversation as input"
        raise APIError(400, f"{field} is not supported: {fix}", param=field)
    plan = plan_tools(body)
    found = read_input(body)
    if plan.draws_at_once:
        run = await _begin_image(body, plan, found, request, service)
    else:
        run = await _begin_answer(body, plan, found, request, service)
    if body.stream:
        return EventStream(
            run.encoded(),
            run.tickets,
            service.settings.heartbeat_seconds,
            encode_error=run.encode_error,
        )

    async def complete() -> None:
        """Generate the response, which completes ``run.reply``."""
        async for _ in run.events():
            pass

    await complete_unless_left(complete(), run.tickets, request, param="input")
    return JSONResponse(run.reply.model_dump())


async def _begin_image(
    body: ResponsesRequest,
    plan: ToolPlan,
    found: ResponsesInput,
    request: HTTPRequest,
    service: Service,
) -> ResponseRun:
    """Return the run of a response that is an image in any case.

    Raises:
        APIError: the request is refused, an image cannot be read, or the client leaves.
        OptionError: the model does not support an option.
    """
    tool = plan.image
    assert tool is not None  # the plan is to draw
    check_drawing(body, tool, service)
    candidates = found.images or [image for image in (found.last_image,) if image is not None]
    sources = images_to_change(tool, found, candidates, service)
    images = await service.image_reader.read_all(sources, request, param="input")
    drawing = make_drawing(body, tool, found.prompt, images, service)
    ticket = service.submit(drawing.request, param="input")
    run = ResponseRun(
        _new_reply(body, service),
        answers=None,
        begin_drawing=lambda: (drawing, ticket),
        record=service.metrics.event_recorder(),
        keep_model=service.keep,
    )
    run.tickets.add(ticket)
    return run


async def _begin_answer(
    body: ResponsesRequest,
    plan: ToolPlan,
    found: ResponsesInput,
    request: HTTPRequest,
    service: Service,
) -> ResponseRun:
    """Return the run of a response that is an answer, or an image if the model decides so.

    Raises:
        APIError: the request is refused, an image cannot be read, or the client leaves.
        OptionError: the model does not support an option of the image.
    """
    tool = plan.image
    if tool is not None:
        # Refuse an image that cannot be drawn now, before the model decides whether to draw it. The
        # images to change are chosen in ``begin_drawing``.
        check_drawing(body, tool, service)
        candidates = [image for image in (found.last_image,) if image is not None]
        images_to_change(tool, found, candidates, service)
    with renamed_fields(_FIELDS):
        chat = _to_chat(body, plan, found)
        answers = await begin_answers(chat, request, service, format_field=_FORMAT_FIELD)

    def begin_drawing() -> tuple[Drawing, Ticket]:
        """Hand the image to the engine."""
        assert tool is not None  # otherwise the grammar has no call to draw
        images = images_to_change(tool, found, answers.images, service)
        drawing = make_drawing(body, tool, found.prompt, images, service)
        return drawing, service.submit(drawing.request, param="input")

    return ResponseRun(
        _new_reply(body, service),
        answers=answers,
        begin_drawing=None if tool is None else begin_drawing,
        record=service.metrics.event_recorder(),
        keep_model=service.keep,
    )


def _to_chat(body: ResponsesRequest, plan: ToolPlan, found: ResponsesInput) -> ChatRequest:
    """Return the chat request that asks for the same answer.

    Args:
        body: the request.
        plan: the request's tools.
        found: the request's input.
    """
    sampling = {name: getattr(body, name) for name in SamplingFields.model_fields}
    if LOGPROBS in (body.include or ()) or body.top_logprobs:
        sampling["logprobs"] = True
    return ChatRequest(
        messages=found.messages,
        max_completion_tokens=body.max_output_tokens,
        seed=body.seed,
        stop=body.stop,
        response_format=_chat_format(body),
        tools=list(plan.functions),
        tool_choice=plan.choice,
        **sampling,
    )


def _chat_format(body: ResponsesRequest) -> TextFormat | ObjectFormat | SchemaFormat | None:
    """Return the form of the answer as a chat's ``response_format``."""
    wanted = body.text.format if body.text else None
    if not isinstance(wanted, NamedSchemaFormat):
        return wanted
    schema = NamedSchema(schema=wanted.json_schema, strict=wanted.strict)
    return SchemaFormat(type="json_schema", json_schema=schema)


def _new_reply(body: ResponsesRequest, service: Service) -> ResponsesReply:
    """Return a reply without items, which repeats the request's fields."""
    wanted = body.text.format if body.text else None
    choice = body.tool_choice or "auto"
    return ResponsesReply(
        id=f"resp_{secrets.token_hex(12)}",
        created_at=int(time.time()),
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        model=service.names[0],
        output=[],
        temperature=body.temperature or 0.0,
        text={"format": {"type": "text"} if wanted is None else _given(wanted)},
        tool_choice=choice if isinstance(choice, str) else _given(choice),
        tools=[_given(tool) for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        metadata=body.metadata or {},
    )


def _given(part: RequestPart) -> dict[str, Any]:
    """Return the fields of a part of the request that are not null."""
    return part.model_dump(by_alias=True, exclude_none=True)
