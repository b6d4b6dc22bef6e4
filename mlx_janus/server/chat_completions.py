"""``/v1/chat/completions``: a conversation in, answers out."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

from fastapi.responses import JSONResponse, Response
from PIL.Image import Image
from starlette.requests import Request as HTTPRequest

from ..decode.sampling import random_seed
from ..decode.text import TextOptions
from ..engine.messages import Answered, AnswerRequest, Event, Piece
from ..inference.results import TextResult
from ..limits import MAX_SEED
from ..processing.prompts import Turn
from .errors import Problem
from .event_streams import EventStream, server_sent, watched, whole
from .pictures import MAX_PICTURES, PictureReader
from .schema import (
    AnswerMessage,
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Choice,
    ChunkChoice,
    Delta,
    FinishReason,
    Message,
    PicturePart,
    PromptDetails,
    SystemMessage,
    TextPart,
    Usage,
    UserMessage,
)
from .service import Service

if TYPE_CHECKING:
    from ..engine.tickets import Ticket


@dataclass(frozen=True)
class _Head:
    """What all of a reply's objects say."""

    id: str
    created: int
    model: str
    system_fingerprint: str


async def answer(body: ChatRequest, request: HTTPRequest, service: Service) -> Response:
    """The reply to a conversation: one object, or a stream of pieces.

    Raises:
        Problem: it is refused.
    """
    service.check_model(body.model)
    asked = await _to_request(body, service.reader, request)
    ticket, heard = service.submit(asked, "messages"), service.metrics.listener()
    head = _Head(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), service.engine.name, service.fingerprint)
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = _chunks(ticket, head, asked.n, with_usage, heard)
        return EventStream(chunks, ticket, service.settings.heartbeat_seconds)
    events = await whole(ticket, request, heard, "messages")
    results = {event.index: event.result for event in events if isinstance(event, Answered)}
    choices = [
        Choice(index=index, message=AnswerMessage(content=result.text), finish_reason=_reason(result))
        for index, result in sorted(results.items())
    ]
    reply = ChatCompletion(**asdict(head), choices=choices, usage=_usage(list(results.values())))
    return JSONResponse(reply.model_dump())


async def _to_request(body: ChatRequest, reader: PictureReader, request: HTTPRequest) -> AnswerRequest:
    if field := body.refused():
        raise Problem(400, f"{field} is not supported: leave it out", param=field)
    n, seed = body.n or 1, random_seed() if body.seed is None else body.seed
    if seed + n - 1 > MAX_SEED:
        raise Problem(400, f"the last answer's seed would be above {MAX_SEED}: take a smaller one", param="seed")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    options = TextOptions(
        max_tokens=body.max_completion_tokens or body.max_tokens or 512,
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=seed,
        stop=stop,
    )
    system, rest = _split_system(body.messages)
    turns, named = [], []
    for number, message in rest:
        urls = _pictures(message, f"messages[{number}].content")
        turns.append(Turn("user" if isinstance(message, UserMessage) else "assistant", _text(message), len(urls)))
        named += urls
    if not turns or turns[-1].role != "user":
        raise Problem(400, "the last message must be the user's: add a question", param="messages")
    if len(named) > MAX_PICTURES:
        raise Problem(400, f"{len(named)} pictures are too many: at most {MAX_PICTURES}", param="messages")
    return AnswerRequest(tuple(turns), await _read(named, reader, request), options, system, n)


async def _read(named: Sequence[tuple[str, str]], reader: PictureReader, request: HTTPRequest) -> tuple[Image, ...]:
    """Pictures, in order, and no more of them once the client has left.

    One that has been begun is finished, since a thread cannot be stopped, and two shall not be decoded at once.
    """
    pictures: list[Image] = []
    async with watched(request) as check:
        for url, place in named:
            pictures.append(await reader.read(url, place))
            check()
    return tuple(pictures)


def _split_system(
    messages: Sequence[Message],
) -> tuple[str | None, list[tuple[int, UserMessage | AssistantMessage]]]:
    """The system prompt, None if there is none, and the other messages with their numbers."""
    instructions: list[str] = []
    rest: list[tuple[int, UserMessage | AssistantMessage]] = []
    for number, message in enumerate(messages):
        if not isinstance(message, SystemMessage):
            rest.append((number, message))
        elif rest:
            raise Problem(400, "instructions must stand before all other messages", param=f"messages[{number}].role")
        else:
            instructions.append(_text(message))
    return ("\n\n".join(instructions) if instructions else None), rest


def _text(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content or () if isinstance(part, TextPart))


def _pictures(message: Message, place: str) -> list[tuple[str, str]]:
    """Its pictures' URLs, and the field that each stands in."""
    if isinstance(message.content, str):
        return []
    return [
        (part.image_url.url, f"{place}[{number}].image_url.url")
        for number, part in enumerate(message.content or ())
        if isinstance(part, PicturePart)
    ]


def _reason(result: TextResult) -> FinishReason:
    return cast(FinishReason, result.finish_reason)


def _usage(results: Sequence[TextResult]) -> Usage:
    """The prompt counts once, whatever the number of answers, and as read as it was for the first."""
    prompt, completion = results[0].prompt_tokens, sum(len(result.tokens) for result in results)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptDetails(cached_tokens=min(result.cached_tokens for result in results)),
    )


async def _chunks(
    ticket: Ticket, head: _Head, n: int, with_usage: bool, heard: Callable[[Event], None]
) -> AsyncGenerator[bytes, None]:
    def chunk(*choices: ChunkChoice, usage: Usage | None = None) -> bytes:
        return server_sent(ChatCompletionChunk(**asdict(head), choices=list(choices), usage=usage))

    for index in range(n):
        yield chunk(ChunkChoice(index=index, delta=Delta(role="assistant", content="")))
    results = []
    async for event in ticket:
        heard(event)
        if isinstance(event, Piece):
            yield chunk(ChunkChoice(index=event.index, delta=Delta(content=event.text)))
        elif isinstance(event, Answered):
            results.append(event.result)
            yield chunk(ChunkChoice(index=event.index, delta=Delta(), finish_reason=_reason(event.result)))
    if with_usage:
        yield chunk(usage=_usage(results))
    yield server_sent("[DONE]")
