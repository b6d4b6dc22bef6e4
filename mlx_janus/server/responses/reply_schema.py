"""Bodies of replies of ``/v1/responses``, as OpenAI defines them, and the ``seed`` of an image."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from ..schema import ChatTokenLogprob, ImageFormat


class OutputTextPart(BaseModel):
    """The text of an answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[ChatTokenLogprob] = Field(
        default=[], description="Only if the request asks for them."
    )


class OutputMessage(BaseModel):
    """An answer in words."""

    id: str
    type: Literal["message"] = "message"
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] = "assistant"
    content: list[OutputTextPart]


class OutputCall(BaseModel):
    """A call of a function."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: Literal["in_progress", "completed", "incomplete"]
    call_id: str
    name: str
    arguments: str = Field(description="The arguments as JSON text.")


class OutputImage(BaseModel):
    """A generated image."""

    id: str
    type: Literal["image_generation_call"] = "image_generation_call"
    status: Literal["in_progress", "completed"]
    action: Literal["generate", "edit"]
    revised_prompt: str = Field(description="The prompt of the image.")
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    quality: Literal["auto"] = "auto"
    size: str
    result: str | None = Field(description="An image file in base64.")
    seed: int


OutputItem = Annotated[OutputMessage | OutputCall | OutputImage, Field(discriminator="type")]


class InputDetails(BaseModel):
    """Details of the input's token count."""

    cached_tokens: int = Field(
        description="Tokens at the beginning of the prompt that were read from the cache."
    )
    cache_write_tokens: int = 0


class OutputDetails(BaseModel):
    """Details of the output's token count."""

    reasoning_tokens: int = 0


class ResponsesUsage(BaseModel):
    """Token counts of a response. Those of an image count, too."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class IncompleteDetails(BaseModel):
    """The reason why an answer is incomplete."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseFailure(BaseModel):
    """The reason why a streamed response failed."""

    code: str
    message: str


class ResponsesReply(BaseModel):
    """A response: its items, and the request's fields as they were understood."""

    id: str
    object: Literal["response"] = "response"
    created_at: int = Field(description="Creation time of the reply, in seconds since 1970.")
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False] = False
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None = None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: Literal[False] = Field(
        default=False, description="A response has one call at most."
    )
    previous_response_id: None = None
    reasoning: dict[str, Any] = {"effort": None, "summary": None}
    service_tier: Literal["default"] = "default"
    store: Literal[False] = Field(default=False, description="Nothing is stored.")
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponsesUsage | None = None
    user: None = None
    metadata: dict[str, str]
