"""``/v1/completions``: texts that the model continues, without a chat's template."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from fastapi.responses import JSONResponse, Response
from starlette.requests import Request as HTTPRequest

from ..engine.messages import Answered, AnswerRequest, Event, Piece
from ..inference.results import TextResult, TokenLogprob
from .chat_completions import check_bias, text_options
from .completions_schema import (
    Completion,
    CompletionChoice,
    CompletionRequest,
    LegacyLogprobs,
)
from .errors import APIError
from .event_streams import EventStream, TicketGroup, complete_unless_left, server_sent_event
from .schema import ChatRequest, PromptDetails, SamplingFields, Usage, UserMessage
from .service import Service

if TYPE_CHECKING:
    from ..engine.tickets import Ticket

_DEFAULT_MAX_TOKENS = 16  # as in OpenAI's API


@dataclass(frozen=True)
class _CommonFields:
    """The fields of a reply that all events of a stream repeat."""

    id: str
    created: int
    model: str
    system_fingerprint: str


async def complete_text(
    body: CompletionRequest, request: HTTPRequest, service: Service
) -> Response:
    """Continue texts, in one object or as a stream.

    Raises:
        APIError: the request is refused, the client leaves, or a reply that is not streamed fails.
            A stream reports a failure in its last event.
    """
    if field := body.unsupported_field():
        raise APIError(400, f"{field} is not supported: leave it out", param=field)
    group = TicketGroup()
    answers = _Answers(body, _submit(body, group, service), service)
    if body.stream:
        return EventStream(answers.encoded(), group, service.settings.heartbeat_seconds)
    completion = await complete_unless_left(answers.complete(), group, request, param="prompt")
    return JSONResponse(completion.model_dump())


def _submit(body: CompletionRequest, group: TicketGroup, service: Service) -> list[Ticket]:
    """Hand each prompt to the engine, and return a ticket for each one, in order.

    Args:
        body: the request.
        group: receives the tickets too.
        service: the server's parts.

    Raises:
        APIError: an option or a prompt is refused. Then the earlier prompts are cancelled.
    """
    chat = _to_chat(body)
    check_bias(chat, service.engine.config.language.vocab_size)
    n = body.n or 1
    options = text_options(chat, n)
    tickets: list[Ticket] = []
    try:
        for prompt in _prompts(body):
            engine_request = AnswerRequest((), (), options, n=n, plain=prompt)
            ticket = service.submit(engine_request, param="prompt")
            tickets.append(ticket)
            group.add(ticket)
    except APIError:
        group.cancel()
        raise
    return tickets


def _prompts(body: CompletionRequest) -> list[str]:
    """Return the texts to continue."""
    return [body.prompt] if isinstance(body.prompt, str) else body.prompt


def _to_chat(body: CompletionRequest) -> ChatRequest:
    """Return a chat request with the same options, for the functions that check chat options."""
    # ``logprobs`` of a text completion is a number, which a chat request has in ``top_logprobs``.
    names = SamplingFields.model_fields.keys() - {"logprobs", "top_logprobs"}
    fields: dict[str, Any] = {name: getattr(body, name) for name in names}
    return ChatRequest(
        messages=[UserMessage(role="user", content="")],  # required, but not used
        max_tokens=body.max_tokens or _DEFAULT_MAX_TOKENS,
        seed=body.seed,
        stop=body.stop,
        logprobs=None if body.logprobs is None else True,
        top_logprobs=body.logprobs,
        **fields,
    )


class _Answers:
    """The answers to the prompts of a request, read from the engine one prompt after the other.

    The engine answers several prompts at the same time. The events of a later prompt wait in its
    ticket until the answers to the earlier prompts have ended.

    Args:
        body: the request.
        tickets: the prompts in the engine, in order.
        service: the server's parts.
    """

    def __init__(self, body: CompletionRequest, tickets: Sequence[Ticket], service: Service):
        self._prompts = _prompts(body)
        self._tickets = tickets
        self._n = body.n or 1
        self._with_top = bool(body.logprobs)
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._record: Callable[[Event], None] = service.metrics.event_recorder()
        self._results: list[list[TextResult]] = [[] for _ in tickets]  # of each prompt
        self._common = _CommonFields(
            id=f"cmpl-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=service.names[0],
            system_fingerprint=service.fingerprint,
        )

    async def complete(self) -> Completion:
        """Return all answers as one object."""
        choices: list[CompletionChoice] = []
        async for prompt_index, event in self._events():
            if isinstance(event, Answered):
                result = event.result
                logprobs = self._logprobs(prompt_index, result.logprobs, 0)
                choices.append(
                    self._choice(prompt_index, event.index, result.text, logprobs, result)
                )
        choices.sort(key=lambda choice: choice.index)
        return self._reply(choices, self._usage())

    async def encoded(self) -> AsyncGenerator[bytes, None]:
        """Yield the encoded events of a stream; the last one is "[DONE]"."""
        # By number of the prompt and of its answer: characters of the answer's tokens so far.
        lengths: dict[tuple[int, int], int] = {}
        async for prompt_index, event in self._events():
            if isinstance(event, Piece):
                length = lengths.get((prompt_index, event.index), 0)
                tokens = event.logprobs or None  # (): log-probabilities were not asked for
                logprobs = self._logprobs(prompt_index, tokens, length)
                lengths[prompt_index, event.index] = length + _characters(event.logprobs)
                choice = self._choice(prompt_index, event.index, event.text, logprobs)
                yield server_sent_event(self._reply([choice]))
            elif isinstance(event, Answered):
                choice = self._choice(prompt_index, event.index, "", None, event.result)
                yield server_sent_event(self._reply([choice]))
        if self._with_usage:
            yield server_sent_event(self._reply([], self._usage()))
        yield server_sent_event("[DONE]")

    async def _events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """Yield the number of a prompt with each of its events; record events and results."""
        for prompt_index, ticket in enumerate(self._tickets):
            async for event in ticket:
                self._record(event)
                if isinstance(event, Answered):
                    self._results[prompt_index].append(event.result)
                yield prompt_index, event

    def _choice(
        self,
        prompt_index: int,
        index: int,
        text: str,
        logprobs: LegacyLogprobs | None,
        result: TextResult | None = None,
    ) -> CompletionChoice:
        """Return an answer or its new part.

        Args:
            prompt_index: number of the prompt, from 0.
            index: number of the answer to this prompt, from 0.
            text: the text of the answer or of its new part.
            logprobs: the log-probabilities of the text's tokens; None: not asked for, or no text.
            result: the finished answer; None: the answer is not finished.
        """
        reason = None if result is None else cast(Literal["stop", "length"], result.finish_reason)
        number = prompt_index * self._n + index
        return CompletionChoice(text=text, index=number, logprobs=logprobs, finish_reason=reason)

    def _logprobs(
        self, prompt_index: int, tokens: Sequence[TokenLogprob] | None, length: int
    ) -> LegacyLogprobs | None:
        """Return log-probabilities as a part of the reply; None if they were not asked for.

        Args:
            prompt_index: number of the prompt, from 0.
            tokens: tokens of an answer, with their log-probabilities.
            length: characters of the answer's earlier tokens.
        """
        if tokens is None:
            return None
        offsets = []
        offset = len(self._prompts[prompt_index]) + length
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        top = [{likely.text: likely.logprob for likely in token.top} for token in tokens]
        return LegacyLogprobs(
            tokens=[token.text for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=top if self._with_top else None,
            text_offset=offsets,
        )

    def _reply(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(**asdict(self._common), choices=choices, usage=usage)

    def _usage(self) -> Usage:
        """Count the tokens of all answers, and of each prompt once.

        A prompt's count of cached tokens is that of its answer with the fewest, as in a chat.
        """
        prompt_tokens = sum(results[0].prompt_tokens for results in self._results)
        answers = [result for results in self._results for result in results]
        completion_tokens = sum(len(result.tokens) for result in answers)
        cached = sum(min(r.cached_tokens for r in results) for results in self._results)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptDetails(cached_tokens=cached),
        )


def _characters(tokens: Sequence[TokenLogprob]) -> int:
    """Return the number of characters of the tokens' texts."""
    return sum(len(token.text) for token in tokens)
