"""``/v1/tokenize`` and ``/v1/detokenize``: texts and conversations as token ids, and back.

The bodies are those of vLLM.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

from pydantic import BaseModel, Field

from ..errors import JanusError
from .chat_completions import read_prompt
from .errors import APIError, to_api_error
from .request_parts import RequestPart
from .schema import MAX_MESSAGES, MAX_TOOLS, ChatRequest, FunctionTool, Message
from .service import Service

_MAX_IDS = 1_000_000  # token ids of a request


class TokenizeRequest(RequestPart):
    """A text, or a conversation in a chat's form. One of them is needed."""

    prompt: str | None = Field(default=None, description="A text, read without a template.")
    messages: (
        Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
        | None
    ) = Field(default=None, description="A conversation. Its images are counted, but not read.")
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = (
        Field(default=None, description="Functions, which are a part of a conversation's prompt.")
    )
    model: str | None = Field(default=None, description="Name of the model, as in a chat request.")
    add_special_tokens: bool | None = Field(
        default=None,
        description="Whether the token that begins every prompt comes before a text. Default: "
        "true. A conversation always has it.",
    )
    return_token_strs: bool | None = Field(
        default=None, description="Whether the reply has the tokens' texts. Default: false."
    )


class TokenizeReply(BaseModel):
    """The token ids of a text or a conversation."""

    count: int
    max_model_len: int = Field(description="Positions of the model's context.")
    tokens: list[int]
    token_strs: list[str] | None = Field(
        default=None, description="Texts of the tokens, with U+FFFD for incomplete characters."
    )


class DetokenizeRequest(RequestPart):
    """Token ids."""

    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=_MAX_IDS, fail_fast=True)]
    model: str | None = Field(default=None, description="Name of the model, as in a chat request.")


class DetokenizeReply(BaseModel):
    """The text of token ids."""

    prompt: str = Field(description="The text, with the spellings of control tokens.")


async def tokenize(body: TokenizeRequest, service: Service) -> TokenizeReply:
    """Return the token ids of a text or a conversation.

    Raises:
        APIError: there is neither a text nor a conversation, or both; the conversation has no
            question; the tools are refused; or the texts are far longer than the context.
    """
    # Neither is given, or both are.
    if (body.prompt is None) == (body.messages is None):
        raise APIError(400, "send one of prompt and messages", param="prompt")
    engine = service.engine
    if body.messages is not None:
        chat = ChatRequest(messages=body.messages, tools=body.tools)
        ids = await chat_ids(chat, service)
    else:
        assert body.prompt is not None  # one of them is there
        with_bos = body.add_special_tokens is not False  # None: the default, true
        try:
            ids = await asyncio.to_thread(engine.text_ids, body.prompt, with_bos=with_bos)
        except JanusError as error:
            raise to_api_error(error, "prompt") from None
    texts = [engine.spelling(token) for token in ids] if body.return_token_strs else None
    context = engine.config.language.max_position_embeddings
    return TokenizeReply(count=len(ids), max_model_len=context, tokens=ids, token_strs=texts)


async def chat_ids(chat: ChatRequest, service: Service) -> list[int]:
    """Return the token ids of a chat request's prompt. Its images are not read.

    Raises:
        APIError: the conversation has no question, the tools are refused, or the texts are far
            longer than the context.
    """
    _, conversation = await read_prompt(chat, service)
    to_ids = service.engine.conversation_ids
    try:
        return await asyncio.to_thread(to_ids, conversation.turns, conversation.system)
    except JanusError as error:
        raise to_api_error(error, "messages") from None


async def detokenize(body: DetokenizeRequest, service: Service) -> DetokenizeReply:
    """Return the text of token ids.

    Raises:
        APIError: a token id is the size of the vocabulary or more.
    """
    vocab_size = service.engine.config.language.vocab_size
    highest = max(body.tokens, default=0)
    if highest >= vocab_size:
        message = f"this model's token ids are 0 to {vocab_size - 1}, got {highest}"
        raise APIError(400, message, param="tokens")
    text = await asyncio.to_thread(service.engine.text_of, body.tokens)
    return DetokenizeReply(prompt=text)
