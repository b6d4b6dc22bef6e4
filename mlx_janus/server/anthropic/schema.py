"""Bodies of requests and replies of ``/v1/messages``, as Anthropic defines them.

Fields beyond Anthropic's: ``seed``, ``min_p``, ``frequency_penalty``, ``presence_penalty``,
``repetition_penalty`` and ``logit_bias``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from ..request_parts import SHORT_LIST, OnlyNeutral, RequestBody, RequestPart
from ..schema import MAX_MESSAGES, MAX_STOPS, MAX_TOOLS, SamplingFields, Seed, TokenLimit

# Requests


class TextBlock(RequestPart):
    """A text."""

    type: Literal["text"]
    text: str


class Base64Source(RequestPart):
    """An image file in base64."""

    type: Literal["base64"]
    media_type: str | None = Field(
        default=None, description="Ignored: the file itself tells its format."
    )
    data: str = Field(examples=["iVBORw0KGgo="])


class URLSource(RequestPart):
    """The address of an image."""

    type: Literal["url"]
    url: str = Field(description="An https address, if the server allows it, or a data URL.")


class ImageBlock(RequestPart):
    """An image in a message of the user. It keeps its place among the texts as in a chat."""

    type: Literal["image"]
    source: Annotated[Base64Source | URLSource, Field(discriminator="type")]


class ToolUseBlock(RequestPart):
    """An earlier call of a tool. It is left out of the prompt."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


ResultBlock = Annotated[TextBlock | ImageBlock, Field(discriminator="type")]


class ToolResultBlock(RequestPart):
    """The result of a tool. It joins the next question."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[ResultBlock], SHORT_LIST] | None = None
    is_error: bool | None = Field(default=None, description="Ignored.")


class ThinkingBlock(RequestPart):
    """The reasoning of another model. It is ignored."""

    type: Literal["thinking", "redacted_thinking"]


Block = Annotated[
    TextBlock | ImageBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock,
    Field(discriminator="type"),
]


class MessageParam(RequestPart):
    """A message of the user, an earlier answer, or instructions amid the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], SHORT_LIST]


class CustomTool(RequestPart):
    """A function that an answer may call."""

    type: str | None = Field(
        default=None, description="`custom`, the default. Other types are refused."
    )
    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = Field(default=None, description="Purpose, for the prompt.")
    input_schema: dict[str, Any] | None = Field(
        default=None,
        description="A JSON Schema of the input, which is an object. Default: no input.",
    )
    strict: bool | None = Field(
        default=None,
        description="Whether a schema is refused if it has keywords that cannot be enforced. "
        "Otherwise they are ignored. Default: false.",
    )


class ToolChoice(RequestPart):
    """`auto`: the model decides; `any`: the answer is a call; `none`: it is none."""

    type: Literal["auto", "any", "none"]


class NamedToolChoice(RequestPart):
    """The answer is a call of one tool."""

    type: Literal["tool"]
    name: str


class JSONFormat(RequestPart):
    """Answers in JSON that matches a schema."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema", description="The JSON Schema.")


class OutputConfig(RequestPart):
    """The form of an answer. `effort` has no effect."""

    format: JSONFormat | None = Field(default=None, description="Default: any text.")


class PromptFields(RequestBody):
    """The fields of a prompt, which counting tokens needs, too."""

    messages: Annotated[
        list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ] = Field(
        description="The conversation so far. If it ends with an answer, the model continues it."
    )
    model: str | None = Field(default=None, description="Name of the model, as in a chat request.")
    system: str | Annotated[list[TextBlock], SHORT_LIST] | None = Field(
        default=None, description="System prompt. Default: the model's own."
    )
    tools: Annotated[list[CustomTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        default=None, description="Functions that an answer may call. Default: none."
    )
    tool_choice: Annotated[ToolChoice | NamedToolChoice, Field(discriminator="type")] | None = (
        Field(default=None, description="Default: `auto`.")
    )
    output_config: OutputConfig | None = None
    mcp_servers: Annotated[Any, OnlyNeutral([])] = None
    container: Annotated[Any, OnlyNeutral()] = None


class CountRequest(PromptFields):
    """A conversation whose tokens are to be counted."""


class MessagesRequest(PromptFields, SamplingFields):
    """A conversation for the model to continue."""

    max_tokens: TokenLimit | None = Field(
        default=None,
        description="Maximum number of tokens in the answer; -1: no limit but the model's context. "
        "Default: 512.",
    )
    stop_sequences: Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = (
        Field(
            default=None,
            description="Strings that end the answer. They are not part of it. Empty ones are "
            "ignored.",
        )
    )
    seed: Seed | None = Field(
        default=None, description="Seed of the answer. -1, the default: random."
    )
    stream: bool | None = Field(
        default=None,
        description="Whether the answer is sent in pieces, as server-sent events. Default: false.",
    )
    logprobs: Annotated[Any, OnlyNeutral(False)] = None
    top_logprobs: Annotated[Any, OnlyNeutral(0)] = None


# Replies


class AnthropicErrorText(BaseModel):
    """The reason why a request was refused or failed."""

    type: str
    message: str = Field(description="One sentence for a person.")


class AnthropicError(BaseModel):
    """The reply to a request that was refused or failed."""

    type: Literal["error"] = "error"
    error: AnthropicErrorText


class AnswerText(BaseModel):
    """An answer in words."""

    type: Literal["text"] = "text"
    text: str
    citations: None = None


class AnswerCall(BaseModel):
    """A call of a tool."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any] = Field(
        description="The input; empty if `max_tokens` has cut it, since a part of it is no JSON."
    )


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessagesUsage(BaseModel):
    """Token counts of a message."""

    input_tokens: int = Field(description="Tokens of the prompt that were not in the cache.")
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = Field(
        default=0,
        description="Tokens at the beginning of the prompt that were read from the cache.",
    )
    output_tokens: int


class MessageReply(BaseModel):
    """The message that the model answered with."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Annotated[AnswerText | AnswerCall, Field(discriminator="type")]]
    stop_reason: StopReason | None
    stop_sequence: str | None = Field(description="The stop sequence that ended the answer.")
    usage: MessagesUsage


class CountReply(BaseModel):
    """The number of a prompt's tokens."""

    input_tokens: int = Field(description="Tokens of the prompt, images and tools included.")
