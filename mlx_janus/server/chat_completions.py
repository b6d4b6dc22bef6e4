"""``/v1/chat/completions``: from a conversation to the model's answers."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, cast

from fastapi.responses import JSONResponse, Response
from PIL.Image import Image
from starlette.requests import Request as HTTPRequest

from ..decode.sampling import random_seed
from ..decode.text import TextOptions
from ..engine.messages import Answered, AnswerRequest, Event, Piece
from ..inference.results import TextResult
from ..limits import MAX_SEED
from ..processing.prompts import Turn
from .errors import APIError
from .event_streams import EventStream, collect_events, server_sent_event, watch_client
from .images import MAX_REQUEST_IMAGES, ImageReader
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
    ImagePart,
    Message,
    PromptDetails,
    SystemMessage,
    TextPart,
    Usage,
    UserMessage,
)
from .service import Service

if TYPE_CHECKING:
    from ..engine.tickets import Ticket

_DEFAULT_MAX_TOKENS = 512  # tokens of an answer, if the request gives no number


@dataclass(frozen=True)
class _Identity:
    """The fields of a reply that are the same in all chunks of a stream."""

    id: str
    created: int
    model: str
    system_fingerprint: str


async def complete_chat(body: ChatRequest, request: HTTPRequest, service: Service) -> Response:
    """Answer a conversation, in one object or as a stream.

    Raises:
        APIError: the request is refused or fails, or the client leaves.
    """
    service.check_model(body.model)
    engine_request = await _to_engine_request(body, service.image_reader, request)
    ticket = service.submit(engine_request, "messages")
    record = service.metrics.event_recorder()
    identity = _Identity(
        id=f"chatcmpl-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=service.engine.name,
        system_fingerprint=service.fingerprint,
    )
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = _chunks(ticket, identity, engine_request.n, with_usage, record)
        return EventStream(chunks, ticket, service.settings.heartbeat_seconds)
    events = await collect_events(ticket, request, record, "messages")
    return JSONResponse(_completion(events, identity).model_dump())


async def _to_engine_request(
    body: ChatRequest, reader: ImageReader, request: HTTPRequest
) -> AnswerRequest:
    """Convert the body to the engine's request.

    Images are read last, so that none is downloaded for a body that is refused here.

    Raises:
        APIError: the request is refused, an image cannot be read, or the client leaves.
    """
    if field := body.refused():
        raise APIError(400, f"{field} is not supported: leave it out", param=field)
    n = body.n or 1
    options = _options(body, n)
    system, rest = _split_system(body.messages)
    turns: list[Turn] = []
    urls: list[tuple[str, str]] = []
    for number, message in rest:
        message_urls = _image_urls(message, f"messages[{number}].content")
        role: Literal["user", "assistant"] = (
            "user" if isinstance(message, UserMessage) else "assistant"
        )
        turns.append(Turn(role, _text(message), len(message_urls)))
        urls += message_urls
    if not turns or turns[-1].role != "user":
        raise APIError(400, "the last message must be the user's: add a question", param="messages")
    if len(urls) > MAX_REQUEST_IMAGES:
        raise APIError(
            400,
            f"{len(urls)} images are too many: send at most {MAX_REQUEST_IMAGES}",
            param="messages",
        )
    images = await _read_images(urls, reader, request)
    return AnswerRequest(tuple(turns), images, options, system, n)


def _options(body: ChatRequest, n: int) -> TextOptions:
    """Return the options of n answers, with the first of n consecutive seeds.

    A body without a seed gets a random one. The default temperature is 0.

    Raises:
        APIError: the last seed is too large.
    """
    seed = random_seed() if body.seed is None else body.seed
    if seed + n - 1 > MAX_SEED:
        raise APIError(
            400,
            f"the last answer's seed would be above {MAX_SEED}: take a smaller one",
            param="seed",
        )
    return TextOptions(
        max_tokens=body.max_completion_tokens or body.max_tokens or _DEFAULT_MAX_TOKENS,
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=seed,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
    )


async def _read_images(
    urls: Sequence[tuple[str, str]], reader: ImageReader, request: HTTPRequest
) -> tuple[Image, ...]:
    """Read images in order; stop when the client leaves.

    The current image is finished first: its thread cannot be stopped, and two images must not be
    decoded at once.

    Args:
        urls: URL of each image, and the field of the body that holds it.
        reader: reads one image.
        request: the client's request.

    Raises:
        APIError: an image cannot be read, or the client leaves.
    """
    images: list[Image] = []
    async with watch_client(request) as check_client:
        for url, field in urls:
            images.append(await reader.read(url, field))
            check_client()
    return tuple(images)


def _split_system(
    messages: Sequence[Message],
) -> tuple[str | None, list[tuple[int, UserMessage | AssistantMessage]]]:
    """Return the system prompt, and each other message after its index in the body.

    The system prompt joins all system messages with blank lines; None: there are none. Error
    messages need the indices.

    Raises:
        APIError: a system message follows one of the other messages.
    """
    instructions: list[str] = []
    rest: list[tuple[int, UserMessage | AssistantMessage]] = []
    for number, message in enumerate(messages):
        if not isinstance(message, SystemMessage):
            rest.append((number, message))
        elif rest:
            raise APIError(
                400,
                "instructions must come before all other messages",
                param=f"messages[{number}].role",
            )
        else:
            instructions.append(_text(message))
    return ("\n\n".join(instructions) if instructions else None), rest


def _text(message: Message) -> str:
    """Return a message's text: its text parts as lines, and "" for an answer without content."""
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content or () if isinstance(part, TextPart))


def _image_urls(message: Message, field: str) -> list[tuple[str, str]]:
    """Return the URL of each image of a message, and the field of the body that holds it."""
    if isinstance(message.content, str):
        return []
    return [
        (part.image_url.url, f"{field}[{number}].image_url.url")
        for number, part in enumerate(message.content or ())
        if isinstance(part, ImagePart)
    ]


def _completion(events: Sequence[Event], identity: _Identity) -> ChatCompletion:
    """Return the reply as one object, its answers sorted by index: they finish in any order."""
    answers = [event for event in events if isinstance(event, Answered)]
    answers.sort(key=lambda answer: answer.index)
    choices = [
        Choice(
            index=answer.index,
            message=AnswerMessage(content=answer.result.text),
            finish_reason=_finish_reason(answer.result),
        )
        for answer in answers
    ]
    usage = _usage([answer.result for answer in answers])
    return ChatCompletion(**asdict(identity), choices=choices, usage=usage)


async def _chunks(
    ticket: Ticket, identity: _Identity, n: int, with_usage: bool, record: Callable[[Event], None]
) -> AsyncGenerator[bytes, None]:
    """Yield the encoded events of a streamed reply; the last one is "[DONE]".

    Args:
        ticket: the request in the engine.
        identity: the fields that all chunks have in common.
        n: number of answers.
        with_usage: whether to add a chunk with the token counts at the end.
        record: called with each of the engine's events.
    """

    def chunk(*choices: ChunkChoice, usage: Usage | None = None) -> bytes:
        fields = asdict(identity)
        return server_sent_event(ChatCompletionChunk(**fields, choices=list(choices), usage=usage))

    # As in OpenAI's streams, an answer begins with a chunk that has only the role.
    for index in range(n):
        yield chunk(ChunkChoice(index=index, delta=Delta(role="assistant", content="")))
    results = []
    async for event in ticket:
        record(event)
        if isinstance(event, Piece):
            yield chunk(ChunkChoice(index=event.index, delta=Delta(content=event.text)))
        elif isinstance(event, Answered):
            results.append(event.result)
            reason = _finish_reason(event.result)
            yield chunk(ChunkChoice(index=event.index, delta=Delta(), finish_reason=reason))
    if with_usage:
        yield chunk(usage=_usage(results))
    yield server_sent_event("[DONE]")


def _finish_reason(result: TextResult) -> FinishReason:
    return cast(FinishReason, result.finish_reason)


def _usage(results: Sequence[TextResult]) -> Usage:
    """Count the tokens of a request.

    The prompt counts once for all answers. The cached tokens are those of the answer that began
    first. It has the fewest, since later answers read the complete prompt from the cache.
    """
    prompt_tokens = results[0].prompt_tokens
    completion_tokens = sum(len(result.tokens) for result in results)
    cached_tokens = min(result.cached_tokens for result in results)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=cached_tokens),
    )
