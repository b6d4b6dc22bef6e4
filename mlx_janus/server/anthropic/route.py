"""``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.requests import Request as HTTPRequest

from ...engine.messages import Answered, Event, Piece
from ...inference.results import TextResult
from ..chat_completions import Answers, begin_answers
from ..errors import APIError
from ..event_streams import EventStream, collect_events, server_sent_event
from ..schema import Delta, ToolCallDelta
from ..service import Service
from ..structured_answers import CallReader
from ..tokens import chat_ids
from .conversation import FORMAT_FIELD, to_chat
from .schema import (
    AnswerCall,
    AnswerText,
    CountReply,
    CountRequest,
    MessageReply,
    MessagesRequest,
    MessagesUsage,
    PromptFields,
    StopReason,
)


async def create_message(body: MessagesRequest, request: HTTPRequest, service: Service) -> Response:
    """Answer a conversation, in one object or as a stream.

    Raises:
        APIError: the request is refused, the client leaves, or a reply that is not streamed fails.
            A stream reports a failure in its last event.
    """
    _check_fields(body)
    chat = to_chat(body)
    answers = await begin_answers(chat, request, service, format_field=FORMAT_FIELD)
    record = service.metrics.event_recorder()
    if body.stream:
        ids = service.engine.conversation_ids(answers.request.turns, answers.request.system)
        run = _Stream(_new_reply(service, len(ids)), answers, record)
        return EventStream(
            run.encoded(),
            answers.ticket,
            service.settings.heartbeat_seconds,
            encode_error=_encode_error,
            heartbeat=_encode({"type": "ping"}),
        )
    events = await collect_events(answers.ticket, request, record, param="messages")
    results = [event.result for event in events if isinstance(event, Answered)]
    return JSONResponse(_complete_reply(results[0], answers, service).model_dump())


async def count_tokens(body: CountRequest, service: Service) -> CountReply:
    """Count the tokens of a conversation's prompt, images and tools included.

    Raises:
        APIError: the request is refused.
    """
    _check_fields(body)
    return CountReply(input_tokens=len(await chat_ids(to_chat(body), service)))


def _check_fields(body: PromptFields) -> None:
    """Refuse a field that is not supported.

    Raises:
        APIError: a field is not supported (400).
    """
    if field := body.unsupported_field():
        raise APIError(400, f"{field} is not supported: leave it out", param=field)


def _new_reply(service: Service, input_tokens: int) -> MessageReply:
    """Return a reply without content."""
    return MessageReply(
        id=f"msg_{secrets.token_hex(12)}",
        model=service.names[0],
        content=[],
        stop_reason=None,
        stop_sequence=None,
        usage=MessagesUsage(input_tokens=input_tokens, output_tokens=0),
    )


def _complete_reply(result: TextResult, answers: Answers, service: Service) -> MessageReply:
    """Return an answer as a message."""
    reader = CallReader(answers.form.tools)
    reader.add(result.text)
    reply = _new_reply(service, 0)
    call = reader.call
    if call is not None:
        # The arguments of a call that was cut are no JSON.
        arguments = json.loads(call.function.arguments) if reader.complete else {}
        block = AnswerCall(id=_tool_use_id(call.id), name=call.function.name, input=arguments)
        reply.content.append(block)
    elif result.text:
        reply.content.append(AnswerText(text=result.text))
    reply.stop_reason = _stop_reason(result, reader)
    reply.stop_sequence = result.stop
    reply.usage = _usage(result)
    return reply


class _Stream:
    """The events of a streamed message.

    Args:
        reply: the reply without content, for the first event.
        answers: the answer in the engine.
        record: called with each of the engine's events.
    """

    def __init__(self, reply: MessageReply, answers: Answers, record: Callable[[Event], None]):
        self._reply = reply
        self._answers = answers
        self._record = record
        self._begun = False  # whether the only block of the content has begun

    async def encoded(self) -> AsyncGenerator[bytes, None]:
        """Yield the encoded events."""
        yield _encode({"type": "message_start", "message": self._reply.model_dump()})
        yield _encode({"type": "ping"})
        reader = CallReader(self._answers.form.tools)
        async for event in self._answers.ticket:
            self._record(event)
            if isinstance(event, Piece):
                for item in self._add(reader.add(event.text)):
                    yield item
            elif isinstance(event, Answered):
                for item in self._add(reader.finish()):
                    yield item
                for item in self._end(event.result, reader):
                    yield item

    def _add(self, delta: Delta) -> Iterator[bytes]:
        """Yield the events of a new part of the answer."""
        for part in delta.tool_calls or ():
            yield from self._add_to_call(part)
        if delta.content:
            yield from self._begin({"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": delta.content})

    def _add_to_call(self, part: ToolCallDelta) -> Iterator[bytes]:
        """Yield the events of a new part of a call."""
        if part.id is not None:
            block = AnswerCall(id=_tool_use_id(part.id), name=part.function.name or "", input={})
            yield from self._begin(block.model_dump())
        if part.function.arguments:
            yield self._delta({"type": "input_json_delta", "partial_json": part.function.arguments})

    def _begin(self, block: dict[str, Any]) -> Iterator[bytes]:
        """Yield the event that begins the block, unless it has begun."""
        if not self._begun:
            self._begun = True
            yield _encode({"type": "content_block_start", "index": 0, "content_block": block})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        """Return the event of a new part of the block."""
        return _encode({"type": "content_block_delta", "index": 0, "delta": delta})

    def _end(self, result: TextResult, reader: CallReader) -> Iterator[bytes]:
        """Yield the events after the answer's last part."""
        if self._begun:
            yield _encode({"type": "content_block_stop", "index": 0})
        delta = {"stop_reason": _stop_reason(result, reader), "stop_sequence": result.stop}
        usage = _usage(result).model_dump()
        yield _encode({"type": "message_delta", "delta": delta, "usage": usage})
        yield _encode({"type": "message_stop"})


def _stop_reason(result: TextResult, reader: CallReader) -> StopReason:
    """Return the reason why an answer ended. A complete call has "tool_use" in any case.

    Args:
        result: the answer.
        reader: has read the answer's entire text.
    """
    if reader.complete:
        return "tool_use"
    if result.finish_reason == "length":
        return "max_tokens"
    return "end_turn" if result.stop is None else "stop_sequence"


def _usage(result: TextResult) -> MessagesUsage:
    """Return the token counts. Anthropic's ``input_tokens`` excludes tokens from the cache."""
    return MessagesUsage(
        input_tokens=result.prompt_tokens - result.cached_tokens,
        cache_read_input_tokens=result.cached_tokens,
        output_tokens=len(result.tokens),
    )


def _tool_use_id(call_id: str) -> str:
    """Return the id of a call in Anthropic's form: "toolu_..." instead of "call_..."."""
    return call_id.replace("call_", "toolu_", 1)


def _encode_error(error: APIError) -> bytes:
    """Return an error as an encoded event."""
    return _encode(error.anthropic_body)


def _encode(event: dict[str, Any]) -> bytes:
    """Return an event as a server-sent event of its type."""
    return server_sent_event(event, event["type"])
