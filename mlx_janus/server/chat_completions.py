"""``/v1/chat/completions``: from a conversation to the model's answers."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from fastapi.responses import JSONResponse, Response
from starlette.requests import Request as HTTPRequest

from ..decode.sampling import random_seed
from ..decode.text import TextOptions
from ..engine.messages import Answered, AnswerRequest, Event, Piece
from ..errors import JanusError
from ..inference.results import TextResult, TokenLogprob
from ..limits import MAX_SEED, MAX_TOKENS
from .conversations import Conversation, read_conversation
from .errors import APIError
from .event_streams import EventStream, collect_events, server_sent_event
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
from .structured_answers import AnswerForm, CallReader, answer_form

if TYPE_CHECKING:
    from ..engine.tickets import Ticket
    from ..inference.input_records import InputImage

_LOG = logging.getLogger("mlx_janus.server")
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
    answers = await begin_answers(body, request, service)
    ticket = answers.ticket
    form = answers.form
    record = service.metrics.event_recorder()
    common_fields = _CommonFields(
        id=f"chatcmpl-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=service.names[0],
        system_fingerprint=service.fingerprint,
    )
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        readers = [CallReader(form.tools) for _ in range(answers.request.n)]
        chunks = _chunks(ticket, common_fields, readers, with_usage, record)
        return EventStream(chunks, ticket, service.settings.heartbeat_seconds)
    events = await collect_events(ticket, request, record, param="messages")
    return JSONResponse(_completion(events, common_fields, form).model_dump())


@dataclass(frozen=True)
class Answers:
    """The answers to a request, while the engine generates them."""

    ticket: Ticket
    request: AnswerRequest
    form: AnswerForm
    images: tuple[InputImage, ...] = ()  # those of the request, with their records


async def begin_answers(
    body: ChatRequest,
    request: HTTPRequest,
    service: Service,
    format_field: str = "response_format",
) -> Answers:
    """Check a request, and hand it to the engine.

    Images are read last, so that no image is downloaded for a body that is refused here.

    Args:
        body: the request.
        request: the client's HTTP request.
        service: the server's parts.
        format_field: the name of ``response_format`` in the client's API, for error messages.

    Raises:
        APIError: the request is refused, an image cannot be read, or the client leaves.
    """
    if field := body.unsupported_field():
        raise APIError(400, f"{field} is not supported: leave it out", param=field)
    check_bias(body, service.engine.config.language.vocab_size)
    form, conversation = await read_prompt(body, service, format_field)
    n = body.n or 1
    options = replace(text_options(body, n), grammar=form.grammar)
    images = await service.image_reader.read_all(conversation.images, request, param="messages")
    engine_request = AnswerRequest(
        tuple(conversation.turns),
        tuple(one.image for one in images),
        options,
        conversation.system,
        n,
    )
    ticket = service.submit(engine_request, param="messages")
    return Answers(ticket, engine_request, form, images)


async def read_prompt(
    body: ChatRequest, service: Service, format_field: str = "response_format"
) -> tuple[AnswerForm, Conversation]:
    """Return the form of a request's answers, and its conversation.

    The conversation's system prompt ends with the tools. If the model need not call a tool, and the
    context has no room for the tools, they are left out, and the form allows any text: some clients
    send dozens of tools with every request.

    Args:
        body: the request.
        service: the server's parts.
        format_field: the name of ``response_format`` in the client's API, for error messages.

    Raises:
        APIError: the conversation has no question, or the form is refused.
    """
    form = await answer_form(body, service, format_field)
    conversation = _with_tools(body, form, service)
    may_leave_out = form.allows_words and bool(form.tools)
    if may_leave_out and not await asyncio.to_thread(_fits, conversation, service):
        _LOG.warning("the context has no room for %d tools: left out", len(form.tools))
        form = AnswerForm()
        conversation = _with_tools(body, form, service)
    return form, conversation


def _with_tools(body: ChatRequest, form: AnswerForm, service: Service) -> Conversation:
    """Return a request's conversation, with the tools at the end of the system prompt.

    Raises:
        APIError: the conversation has no question.
    """
    conversation = read_conversation(body.messages)
    conversation.system = service.system(conversation.system)
    if form.tools:
        without_tools = conversation.system
        if without_tools is None:
            without_tools = service.engine.config.prompt.system
        conversation.system = form.system(without_tools)
    return conversation


def _fits(conversation: Conversation, service: Service) -> bool:
    """Return whether the context has room for a conversation and one token of an answer."""
    try:
        ids = service.engine.conversation_ids(conversation.turns, conversation.system)
    except JanusError:  # far too long, or a mistake that ``submit`` reports
        return False
    return len(ids) < service.engine.config.language.max_position_embeddings


def text_options(body: ChatRequest, n: int) -> TextOptions:
    """Return the options for ``n`` answers, with the seed of the first answer.

    The other answers use the following numbers as seeds. A body without a seed gets a random one.

    Raises:
        APIError: the last answer's seed would be too large, or ``top_logprobs`` is given without
            ``logprobs``.
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
        APIError: ``top_logprobs`` is given without ``logprobs``.
    """
    if body.top_logprobs and not body.logprobs:
        raise APIError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    fields = {name: getattr(body, name) for name in SamplingFields.model_fields}
    given = {name: value for name, value in fields.items() if value is not None}
    if body.logit_bias is not None:
        given["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    return given


def check_bias(body: ChatRequest, vocab_size: int) -> None:
    """Refuse a ``logit_bias`` with token ids that the model does not have.

    Args:
        body: the request.
        vocab_size: the number of the model's tokens.

    Raises:
        APIError: a token id is ``vocab_size`` or more.
    """
    for token in body.logit_bias or {}:
        if int(token) >= vocab_size:
            reason = f"this model's token ids are 0 to {vocab_size - 1}, got {token}"
            raise APIError(400, f"logit_bias: {reason}", param="logit_bias")


def _completion(
    events: Sequence[Event], common_fields: _CommonFields, form: AnswerForm
) -> ChatCompletion:
    """Return all answers as one object, sorted by index."""
    answers = [event for event in events if isinstance(event, Answered)]
    answers.sort(key=lambda answer: answer.index)
    choices = [_choice(answer, CallReader(form.tools)) for answer in answers]
    usage = _usage([answer.result for answer in answers])
    return ChatCompletion(**asdict(common_fields), choices=choices, usage=usage)


def _choice(answer: Answered, reader: CallReader) -> Choice:
    """Return an answer as a part of the reply.

    Args:
        answer: the answer.
        reader: a new reader, to which this function adds the whole answer.
    """
    reader.add(answer.result.text)
    call = reader.call
    message = AnswerMessage(content=answer.result.text)
    if call is not None:
        message = AnswerMessage(content=None, tool_calls=[call])
    return Choice(
        index=answer.index,
        message=message,
        finish_reason=_finish_reason(answer.result, reader),
        logprobs=choice_logprobs(answer.result.logprobs),
    )


async def _chunks(
    ticket: Ticket,
    common_fields: _CommonFields,
    readers: Sequence[CallReader],
    with_usage: bool,
    record: Callable[[Event], None],
) -> AsyncGenerator[bytes, None]:
    """Yield the encoded events of a streamed reply; the last one is "[DONE]".

    Args:
        ticket: the request in the engine.
        common_fields: the fields that all chunks repeat.
        readers: a new reader of calls for each answer.
        with_usage: whether to add a chunk with the token counts at the end.
        record: called with each of the engine's events.
    """

    def encode_chunk(*choices: ChunkChoice, usage: Usage | None = None) -> bytes:
        fields = asdict(common_fields)
        return server_sent_event(ChatCompletionChunk(**fields, choices=list(choices), usage=usage))

    # As in OpenAI's streams, each answer begins with a chunk that has the role and no text.
    for index in range(len(readers)):
        yield encode_chunk(ChunkChoice(index=index, delta=Delta(role="assistant", content="")))
    results = []
    async for event in ticket:
        record(event)
        if isinstance(event, Piece):
            delta = readers[event.index].add(event.text)
            tokens = event.logprobs or None  # (): log-probabilities were not asked for
            logprobs = choice_logprobs(tokens)
            yield encode_chunk(ChunkChoice(index=event.index, delta=delta, logprobs=logprobs))
        elif isinstance(event, Answered):
            results.append(event.result)
            reader = readers[event.index]
            reason = _finish_reason(event.result, reader)
            rest = reader.finish()
            if rest.model_dump():  # {} if nothing is left to send
                yield encode_chunk(ChunkChoice(index=event.index, delta=rest))
            yield encode_chunk(ChunkChoice(index=event.index, delta=Delta(), finish_reason=reason))
    if with_usage:
        # As in OpenAI's streams, this chunk has no choices.
        yield encode_chunk(usage=_usage(results))
    yield server_sent_event("[DONE]")


def choice_logprobs(tokens: Sequence[TokenLogprob] | None) -> ChoiceLogprobs | None:
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


def _finish_reason(result: TextResult, reader: CallReader) -> FinishReason:
    return "tool_calls" if reader.complete else cast(FinishReason, result.finish_reason)


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
