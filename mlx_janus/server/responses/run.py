"""A response in the making: its items so far, and the events that tell a client of them."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ...engine.messages import Answered, Drawn, Event, Partial, Piece
from ...inference.results import TokenLogprob
from ..chat_completions import Answers, choice_logprobs
from ..errors import APIError
from ..event_streams import TicketGroup, server_sent_event
from ..schema import ChatTokenLogprob, Delta, ToolCallDelta
from ..structured_answers import CallReader
from .drawing import Drawing
from .reply_schema import (
    IncompleteDetails,
    InputDetails,
    OutputCall,
    OutputImage,
    OutputMessage,
    OutputTextPart,
    ResponseFailure,
    ResponsesReply,
    ResponsesUsage,
)
from .tools import IMAGE_TOOL

if TYPE_CHECKING:
    from ...engine.tickets import Ticket

_Events = AsyncGenerator[dict[str, Any], None]


class ResponseRun:
    """One response with one item: a message, a call of a function, or an image.

    The response begins with an answer in the engine, unless it is an image in any case. If the
    answer is a call to draw, the image follows, and the answer becomes no item.

    Args:
        reply: the reply without items; this object changes it.
        answers: the answer in the engine; None: there is only an image.
        begin_drawing: returns the image with its ticket, once; None: the response has no image.
        record: called with each of the engine's events.
        keep_model: returns a context that keeps the model in memory.
    """

    def __init__(
        self,
        reply: ResponsesReply,
        answers: Answers | None,
        begin_drawing: Callable[[], tuple[Drawing, Ticket]] | None,
        record: Callable[[Event], None],
        keep_model: Callable[[], AbstractContextManager[None]],
    ):
        self.reply = reply
        self.tickets = TicketGroup()
        self._answers = answers
        self._begin_drawing = begin_drawing
        self._record = record
        self._keep_model = keep_model
        self._draws = answers is None  # whether an image follows
        self._message: OutputMessage | None = None
        self._call: OutputCall | None = None
        self._event_count = 0  # number of events so far
        if answers is not None:
            self.tickets.add(answers.ticket)

    async def events(self) -> _Events:
        """Yield OpenAI's events, as JSON objects, and complete ``reply``.

        Raises:
            APIError: the engine refuses the image.
            JanusError: the engine fails.
        """
        yield self._reply_event("response.created")
        yield self._reply_event("response.in_progress")
        if self._answers is not None:
            async with contextlib.aclosing(self._answer(self._answers)) as events:
                async for event in events:
                    yield event
        if self._draws and self._begin_drawing is not None:
            async with contextlib.aclosing(self._draw(*self._begin_drawing())) as events:
                async for event in events:
                    yield event
        if self.reply.incomplete_details is None:
            self.reply.status = "completed"
            self.reply.completed_at = int(time.time())
        else:
            self.reply.status = "incomplete"
        yield self._reply_event(f"response.{self.reply.status}")

    async def encoded(self) -> AsyncGenerator[bytes, None]:
        """Yield the events as server-sent events."""
        # Between the answer and the image, no request of this response runs in the engine. Without
        # ``keep_model``, the model could be unloaded then.
        with self._keep_model():
            async with contextlib.aclosing(self.events()) as events:
                async for event in events:
                    yield _encode(event)

    def encode_error(self, error: APIError) -> bytes:
        """Return the last two events of a response that fails: the error and the failed reply.

        Some clients read only one of these events. The first has the error in both of OpenAI's
        forms: its fields in the event itself, and an ``error`` object.
        """
        details = error.body["error"]
        flat = {name: details[name] for name in ("code", "message", "param")}
        code = details["code"] or details["type"]
        self.reply.status = "failed"
        self.reply.error = ResponseFailure(code=code, message=details["message"])
        events = (self._event("error", **flat, error=details), self._reply_event("response.failed"))
        return b"".join(map(_encode, events))

    # The answer

    async def _answer(self, answers: Answers) -> _Events:
        """Yield the events of the answer's item, unless the answer is a call to draw."""
        reader = CallReader(answers.form.tools)
        async for event in answers.ticket:
            self._record(event)
            if isinstance(event, Piece):
                for item_event in self._add(reader.add(event.text), event.logprobs):
                    yield item_event
            elif isinstance(event, Answered):
                result = event.result
                for item_event in self._add(reader.finish(), ()):
                    yield item_event
                self._count_tokens(result.prompt_tokens, len(result.tokens), result.cached_tokens)
                # A call to draw has no arguments, so nothing is missing if ``max_tokens`` cut it.
                if result.finish_reason == "length" and not self._draws:
                    self.reply.incomplete_details = IncompleteDetails()
        for item_event in self._end_item():
            yield item_event

    def _add(self, delta: Delta, logprobs: tuple[TokenLogprob, ...]) -> Iterator[dict[str, Any]]:
        """Add a new part of the answer, and yield its events."""
        for part in delta.tool_calls or ():
            if part.function.name == IMAGE_TOOL and self._begin_drawing is not None:
                self._draws = True
            elif not self._draws:
                yield from self._add_to_call(part)
        # A token without text is added if it has a log-probability.
        if delta.content is not None and (delta.content or logprobs):
            yield from self._add_to_message(delta.content, logprobs)

    def _add_to_call(self, part: ToolCallDelta) -> Iterator[dict[str, Any]]:
        """Add a new part of a call, and yield its events. The first part begins the call's item."""
        if self._call is None:
            self._call = OutputCall(
                id=_new_id("fc"),
                status="in_progress",
                call_id=part.id or "",
                name=part.function.name or "",
                arguments="",
            )
            yield self._event("response.output_item.added", output_index=0, item=_dump(self._call))
        if part.function.arguments:
            self._call.arguments += part.function.arguments
            yield self._item_event(
                "response.function_call_arguments.delta",
                self._call.id,
                delta=part.function.arguments,
            )

    def _add_to_message(
        self, text: str, logprobs: tuple[TokenLogprob, ...]
    ) -> Iterator[dict[str, Any]]:
        """Add words to the message, and yield the events; the first words begin the message."""
        yield from self._begin_message()
        message = self._message
        assert message is not None  # it has begun
        found = choice_logprobs(logprobs)
        tokens: list[ChatTokenLogprob] = [] if found is None else found.content
        message.content[0].text += text
        message.content[0].logprobs += tokens
        yield self._item_event(
            "response.output_text.delta",
            message.id,
            content_index=0,
            delta=text,
            logprobs=[token.model_dump() for token in tokens],
        )

    def _begin_message(self) -> Iterator[dict[str, Any]]:
        """Begin the message unless it has begun, and yield the events of its beginning."""
        if self._message is not None:
            return
        self._message = OutputMessage(id=_new_id("msg"), status="in_progress", content=[])
        yield self._event("response.output_item.added", output_index=0, item=_dump(self._message))
        part = OutputTextPart(text="", logprobs=[])
        self._message.content.append(part)
        yield self._item_event(
            "response.content_part.added", self._message.id, content_index=0, part=_dump(part)
        )

    def _end_item(self) -> Iterator[dict[str, Any]]:
        """Yield the last events of the answer's item. An empty answer becomes an empty message.

        There are no events if the answer is a call to draw.
        """
        if self._draws:
            return
        is_cut = self.reply.incomplete_details is not None
        if self._call is not None:
            item: OutputCall | OutputMessage = self._call
            yield self._item_event(
                "response.function_call_arguments.done",
                self._call.id,
                name=self._call.name,
                arguments=self._call.arguments,
            )
        else:
            yield from self._begin_message()
            assert self._message is not None  # it has begun
            item = self._message
            part = _dump(self._message.content[0])
            yield self._item_event(
                "response.output_text.done",
                item.id,
                content_index=0,
                text=part["text"],
                logprobs=part["logprobs"],
            )
            yield self._item_event(
                "response.content_part.done", item.id, content_index=0, part=part
            )
        item.status = "incomplete" if is_cut else "completed"
        self.reply.output.append(item)
        yield self._event("response.output_item.done", output_index=0, item=_dump(item))

    # The image

    async def _draw(self, drawing: Drawing, ticket: Ticket) -> _Events:
        """Yield the events of an image's item."""
        self.tickets.add(ticket)
        item = OutputImage(
            id=_new_id("ig"),
            status="in_progress",
            action=drawing.action,
            revised_prompt=drawing.request.prompt,
            output_format=drawing.file_format.name,
            size=drawing.size,
            result=None,
            seed=drawing.request.seed,
        )
        yield self._event("response.output_item.added", output_index=0, item=_dump(item))
        for step in ("in_progress", "generating"):
            yield self._item_event(f"response.image_generation_call.{step}", item.id)
        async for event in ticket:
            self._record(event)
            if isinstance(event, Partial):
                preview = await drawing.file_format.encode_base64(event.image, {})  # no metadata
                yield self._item_event(
                    "response.image_generation_call.partial_image",
                    item.id,
                    partial_image_index=event.number,
                    partial_image_b64=preview,
                    **item.model_dump(include={"background", "output_format", "quality", "size"}),
                )
            elif isinstance(event, Drawn):
                image = event.image
                item.result = await drawing.file_format.encode_base64(image.image, image.metadata)
                # A step counts as an output token.
                self._count_tokens(event.prompt_tokens, image.steps, cached_tokens=0)
        item.status = "completed"
        self.reply.output.append(item)
        yield self._item_event("response.image_generation_call.completed", item.id)
        yield self._event("response.output_item.done", output_index=0, item=_dump(item))

    # Usage and events

    def _count_tokens(self, prompt_tokens: int, output_tokens: int, cached_tokens: int) -> None:
        """Add the tokens of an answer or of an image to the usage."""
        usage = self.reply.usage or ResponsesUsage(
            input_tokens=0,
            input_tokens_details=InputDetails(cached_tokens=0),
            output_tokens=0,
            total_tokens=0,
        )
        usage.input_tokens += prompt_tokens
        usage.input_tokens_details.cached_tokens += cached_tokens
        usage.output_tokens += output_tokens
        usage.total_tokens += prompt_tokens + output_tokens
        self.reply.usage = usage

    def _reply_event(self, kind: str) -> dict[str, Any]:
        """Return an event with the whole reply as it is now."""
        return self._event(kind, response=_dump(self.reply))

    def _item_event(self, kind: str, item_id: str, **fields: Any) -> dict[str, Any]:
        """Return an event about the response's one item."""
        return self._event(kind, item_id=item_id, output_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Return an event with the next number, and count it."""
        event = {"type": kind, "sequence_number": self._event_count, **fields}
        self._event_count += 1
        return event


def _dump(part: Any) -> dict[str, Any]:
    """Return a copy of a part of the reply, as the values of a JSON object."""
    fields: dict[str, Any] = part.model_dump()
    return fields


def _encode(event: dict[str, Any]) -> bytes:
    """Return an event as a server-sent event of its type."""
    return server_sent_event(event, event["type"])


def _new_id(kind: str) -> str:
    """Return a new id, such as "msg_0123..."."""
    return f"{kind}_{secrets.token_hex(12)}"
