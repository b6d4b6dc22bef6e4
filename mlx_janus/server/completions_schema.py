"""Bodies of requests and replies of ``/v1/completions``, as OpenAI defines them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from ..limits import MAX_TOP_LOGPROBS
from .request_parts import OnlyNeutral, RequestBody
from .schema import (
    MAX_ANSWERS,
    MAX_STOPS,
    SamplingFields,
    Seed,
    StreamOptions,
    TokenLimit,
    Usage,
    WholeNumber,
)

MAX_PROMPTS = 16  # prompts of a request


class _UnsupportedFields(RequestBody):
    """Unsupported fields that would change a text: OpenAI's, then those of other servers."""

    echo: Annotated[Any, OnlyNeutral(False)] = None
    suffix: Annotated[Any, OnlyNeutral("")] = None
    best_of: Annotated[Any, OnlyNeutral(1)] = None
    top_logprobs: Annotated[Any, OnlyNeutral()] = None
    prompt_logprobs: Annotated[Any, OnlyNeutral()] = None
    prompt_embeds: Annotated[Any, OnlyNeutral()] = None
    response_format: Annotated[Any, OnlyNeutral({"type": "text"})] = None
    guided_json: Annotated[Any, OnlyNeutral()] = None
    guided_regex: Annotated[Any, OnlyNeutral()] = None
    guided_choice: Annotated[Any, OnlyNeutral()] = None
    guided_grammar: Annotated[Any, OnlyNeutral()] = None
    structured_outputs: Annotated[Any, OnlyNeutral()] = None


class CompletionRequest(_UnsupportedFields, SamplingFields):
    """A text for the model to continue, without a chat's template."""

    prompt: (
        str | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    ) = Field(
        description="A text to continue, or several, each of which gets its own answers. Token ids "
        "are not supported."
    )
    model: str | None = Field(default=None, description="Name of the model, as in a chat request.")
    max_tokens: TokenLimit | None = Field(
        default=None,
        description="Maximum number of tokens to add; -1: no limit but the model's context. "
        "Default: 16, as in OpenAI's API.",
    )
    n: Annotated[WholeNumber, Field(ge=1, le=MAX_ANSWERS)] | None = Field(
        default=None, description="Number of answers to each prompt. Default: 1."
    )
    seed: Seed | None = Field(
        default=None,
        description="Seed of the first answer to each prompt; the others use the following "
        "numbers. -1, the default: random.",
    )
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = Field(
        default=None,
        description="Strings that end an answer. They are not part of it. Empty ones are ignored.",
    )
    stream: bool | None = Field(
        default=None,
        description="Whether the text is sent in pieces, as server-sent events. Default: false.",
    )
    stream_options: StreamOptions | None = None
    logprobs: Annotated[WholeNumber, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(  # type: ignore[assignment]
        default=None,
        description="Number of the likeliest tokens to report for each token; 0: only the "
        "log-probability of the token. Default: none are reported.",
    )


class LegacyLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens, or of its new part."""

    tokens: list[str] = Field(
        description="The tokens' texts, with U+FFFD for incomplete characters."
    )
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None = Field(
        description="For each token, the likeliest tokens in its place."
    )
    text_offset: list[int] = Field(
        description="For each token, the number of characters before it, those of the prompt "
        "included."
    )


class CompletionChoice(BaseModel):
    """An answer, or its new part."""

    text: str
    index: int = Field(description="Number of the answer, from 0. Those of a prompt are together.")
    logprobs: LegacyLogprobs | None = Field(
        default=None, description="Only if the request asks for them."
    )
    finish_reason: Literal["stop", "length"] | None = Field(
        default=None, description="As in a chat. In a stream, set in the last event of an answer."
    )


class Completion(BaseModel):
    """The answers to all prompts, or an event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(description="Creation time of the reply, in seconds since 1970.")
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = Field(
        default=None,
        exclude_if=lambda usage: usage is None,
        description="In a stream, only in the last event, if `stream_options.include_usage` is "
        "true.",
    )
    system_fingerprint: str
