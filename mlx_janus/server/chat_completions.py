"""``/v1/chat/completions``: from a conversation to the model's answers."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from fastapi.responses import JSONResponse, Response
from PIL.Image import Image
from starlette.requests import Request as HTTPRequest

from ..decode.sampling import random_seed
from ..decode.text import TextOptions
from ..engine.messages import Answered, AnswerRequest, Event, Piece
from ..inference.results import TextResult, TokenLogprob
from ..limits import MAX_SEED, MAX_TOKENS
from .conversations import ImageSource, read_conversation
from .errors import APIError
from .event_streams import EventStream, collect_events, server_sent_event, watch_client
from .images import MAX_REQUEST_IMAGES, ImageReader
from .schema import (
    NO_LIMIT,
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    ChatTokenLogprob,
    ChatTopLogprob,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    FinishReason,
    PromptDetails,
    SamplingFields,
    Usage,
)
from .service import Service

if TYPE_CHECKING:
    from ..engine.tickets import Ticket

DEFAULT_MAX_TOKENS = 512  # tokens of an answer, if the request gives no number


@dataclass(frozen=True)
class _CommonFields:
    """The fields of a reply that all chunks of a stream repeat."""

    id: str
    created: int
    model: str
    system_fingerprint: str


async def complete_chat(body: ChatRequest, request: HTTPRequest, service: Service) -> Response:
    """Answer a conversation, in one object or as a stream.

    Raises:
        APIError: the request is refused, the client leaves, or a reply that is not streamed fails.
            A stream reports a failure in its last event.
    """
    service.check_model(body.model)
    _check_bias(body, service.engine.config.language.vocab_size)
    engine_request = await _to_engine_request(body, service.image_reader, request)
    ticket = service.submit(engine_request, param="messages")
    record = service.metrics.event_recorder()
    common_fields = _CommonFields(
        id=f"chatcmpl-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=service.names[0],
        system_fingerprint=service.fingerprint,
    )
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = _chunks(ticket, common_fields, engine_request.n, with_usage, record)
        return EventStream(chunks, ticket, service.settings.heartbeat_seconds)
    events = await collect_events(ticket, request, record, param="messages")
    return JSONResponse(_completion(events, common_fields).model_dump())


async def _to_engine_request(
    body: ChatRequest, reader: ImageReader, request: HTTPRequest
) -> AnswerRequest:
    """Convert the body to the engine's request.

    Images are read last, so that no image is downloaded for a body that is refused here.

    Raises:
        APIError: the request is refused, an image cannot be read, or the client leaves.
    """
    if field := body.unsupported_field():
        raise APIError(400, f"{field} is not supported: leave it out", param=field)
    n = body.n or 1
    options = _text_options(body, n)
    conversation = read_conversation(body.messages)
    sources = conversation.images
    if len(sources) > MAX_REQUEST_IMAGES:
        raise APIError(
            400,
            f"{len(sources)} images are too many: send at most {MAX_REQUEST_IMAGES}",
            param="messages",
        )
    images = await _read_images(sources, reader, request)
    return AnswerRequest(tuple(conversation.turns), images, options, conversation.system, n)


def _text_options(body: ChatRequest, n: int) -> TextOptions:
    """Return the options for ``n`` answers, with the seed of the first answer.

    The other answers use the following numbers as seeds. A body without a seed gets a random one.

    Raises:
        APIError: the last answer's seed would be too large, or ``top_logprobs`` lacks ``logprobs``.
    """
    seed = random_seed() if body.seed is None else body.seed
    if seed + n - 1 > MAX_SEED:
        raise APIError(
            400,
            f"the last answer's seed would be above {MAX_SEED}: take a smaller one",
            param="seed",
        )
    max_tokens = body.max_completion_tokens or body.max_tokens or DEFAULT_MAX_TOKENS
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return TextOptions(
        max_tokens=MAX_TOKENS if max_tokens == NO_LIMIT else max_tokens,
        seed=seed,
        stop=tuple(text for text in stop if text),
        **_sampling_options(body),
    )


def _sampling_options(body: SamplingFields) -> dict[str, Any]:
    """Return the sampling fields that a body gives, as fields of ``TextOptions``.

    Raises:
        APIError: ``top_logprobs`` lacks ``logprobs``.
    """
    if body.top_logprobs and not body.logprobs:
        raise APIError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    fields = {name: getattr(body, name) for name in SamplingFields.model_fields}
    given = {name: value for name, value in fields.items() if value is not None}
    if body.logit_bias is not None:
        given["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    return given


def _check_bias(body: ChatRequest, vocabulary: int) -> None:
    """Refuse a bias of tokens that the model does not have.

    Args:
        body: the request.
        vocabulary: number of the model's tokens.

    Raises:
        APIError: an id is beyond the vocabulary.
    """
    for token in body.logit_bias or {}:
        if int(token) >= vocabulary:
            reason = f"this model's token ids are 0 to {vocabulary - 1}, got {token}"
            raise APIError(400, f"logit_bias: {reason}", param="logit_bias")


async def _read_images(
    sources: Sequence[ImageSource], reader: ImageReader, request: HTTPRequest
) -> tuple[Image, ...]:
    """Read images in order. If the client leaves, stop after the current image.

    The current image is not cancelled, because its thread would decode it to the end anyway.

    Args:
        sources: the images' URLs and the fields that hold them.
        reader: reads one image.
        request: the client's request.

    Raises:
        APIError: an image cannot be read, or the client leaves.
    """
    images: list[Image] = []
    async with watch_client(request) as raise_if_client_left:
        for source in sources:
            images.append(await reader.read(source.url, source.field))
            raise_if_client_left()
    return tuple(images)


def _completion(events: Sequence[Event], common_fields: _CommonFields) -> ChatCompletion:
    """Return all answers as one object, sorted by index."""
    answers = [event for event in events if isinstance(event, Answered)]
    answers.sort(key=lambda answer: answer.index)
    choices = [
        Choice(
            index=answer.index,
            message=AnswerMessage(content=answer.result.text),
            finish_reason=_finish_reason(answer.result),
            logprobs=_choice_logprobs(answer.result.logprobs),
        )
        for answer in answers
    ]
    usage = _usage([answer.result for answer in answers])
    return ChatCompletion(**asdict(common_fields), choices=choices, usage=usage)


async def _chunks(
    ticket: Ticket,
    common_fields: _CommonFields,
    n: int,
    with_usage: bool,
    record: Callable[[Event], None],
) -> AsyncGenerator[bytes, None]:
    """Yield the encoded events of a streamed reply; the last one is "[DONE]".

    Args:
        ticket: the request in the engine.
        common_fields: the fields that all chunks repeat.
        n: number of answers.
        with_usage: whether to add a chunk with the token counts at the end.
        record: called with each of the engine's events.
    """

    def encode_chunk(*choices: ChunkChoice, usage: Usage | None = None) -> bytes:
        fields = asdict(common_fields)
        return server_sent_event(ChatCompletionChunk(**fields, choices=list(choices), usage=usage))

    # As in OpenAI's streams, each answer begins with a chunk that has the role and no text.
    for index in range(n):
        yield encode_chunk(ChunkChoice(index=index, delta=Delta(role="assistant", content="")))
    results = []
    async for event in ticket:
        record(event)
        if isinstance(event, Piece):
            delta = Delta(content=event.text)
            logprobs = _choice_logprobs(event.logprobs or None)
            yield encode_chunk(ChunkChoice(index=event.index, delta=delta, logprobs=logprobs))
        elif isinstance(event, Answered):
            results.append(event.result)
            reason = _finish_reason(event.result)
            yield encode_chunk(ChunkChoice(index=event.index, delta=Delta(), finish_reason=reason))
    if with_usage:
        # As in OpenAI's streams, this chunk has no choices.
        yield encode_chunk(usage=_usage(results))
    yield server_sent_event("[DONE]")


def _choice_logprobs(tokens: Sequence[TokenLogprob] | None) -> ChoiceLogprobs | None:
    """Return log-probabilities as a part of the reply; None if they were not asked for."""
    if tokens is None:
        return None
    content = [
        ChatTokenLogprob(
            **_logprob_fields(token),
            top_logprobs=[ChatTopLogprob(**_logprob_fields(likely)) for likely in token.top],
        )
        for token in tokens
    ]
    return ChoiceLogprobs(content=content)


def _logprob_fields(token: TokenLogprob) -> dict[str, Any]:
    """Return the fields that describe a token and its log-probability."""
    utf8 = None if token.utf8 is None else list(token.utf8)
    return {"token": token.text, "bytes": utf8, "logprob": token.logprob}


def _finish_reason(result: TextResult) -> FinishReason:
    return cast(FinishReason, result.finish_reason)


def _usage(results: Sequence[TextResult]) -> Usage:
    """Count the tokens of a request's answers and of its prompt, which counts once.

    The count of cached tokens is that of the answer with the fewest. Later answers usually have
    more, because the first answer has put the prompt into the cache.
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
