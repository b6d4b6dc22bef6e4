"""Bodies of requests of ``/v1/responses``, as OpenAI defines them.

Fields beyond OpenAI's: ``seed``, ``stop`` and all of chat's ``SamplingFields``; of the tool
``image_generation``, ``cfg_weight``, ``cfg_weight2``, ``temperature``, ``top_p`` and ``steps``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from ...limits import MAX_STEPS
from ..request_parts import SHORT_LIST, OnlyNeutral, RequestBody, RequestPart
from ..schema import (
    MAX_MESSAGES,
    MAX_STOPS,
    MAX_TOOLS,
    Guidance,
    ImageFormat,
    ObjectFormat,
    SamplingFields,
    Seed,
    Temperature,
    TextFormat,
    TokenLimit,
    TopP,
    WholeNumber,
)

LOGPROBS = "message.output_text.logprobs"  # the value of ``include`` that has an effect
_MAX_METADATA = 16  # values of ``metadata``, as in OpenAI's API


class InputText(RequestPart):
    """A text in a message."""

    type: Literal["input_text"]
    text: str


class InputImage(RequestPart):
    """An image in a message."""

    type: Literal["input_image"]
    image_url: str = Field(
        description="A data URL, `data:image/png;base64,...`, or an https address if the server "
        "allows it. Files by `file_id` are not stored here.",
        examples=["data:image/png;base64,iVBORw0KGgo="],
    )
    detail: str | None = Field(
        default=None, description="Ignored: every image is scaled to the size that the model reads."
    )


class OutputText(RequestPart):
    """A text of an earlier answer."""

    type: Literal["output_text"]
    text: str


class Refusal(RequestPart):
    """A refusal of another model. It is ignored."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[InputText | InputImage | OutputText | Refusal, Field(discriminator="type")]


class MessageItem(RequestPart):
    """A message: instructions, a question with or without images, or an earlier answer."""

    type: Literal["message"] | None = None
    role: Literal["user", "system", "developer", "assistant"]
    content: str | Annotated[list[Part], SHORT_LIST]


class CallItem(RequestPart):
    """An earlier call of a function. It is left out of the prompt."""

    type: Literal["function_call"]
    name: str
    arguments: str
    call_id: str


class CallOutputItem(RequestPart):
    """The result of a function. It joins the next question."""

    type: Literal["function_call_output"]
    call_id: str
    output: (
        str
        | Annotated[
            list[Annotated[InputText | InputImage, Field(discriminator="type")]], SHORT_LIST
        ]
    )


class ImageItem(RequestPart):
    """An image that was generated earlier. It is shown with the next question."""

    type: Literal["image_generation_call"]
    result: str | None = Field(default=None, description="An image file in base64.")


class ReasoningItem(RequestPart):
    """The reasoning of another model. It is ignored."""

    type: Literal["reasoning"]


class ReferenceItem(RequestPart):
    """A reference to a stored item. It is refused, since nothing is stored."""

    type: Literal["item_reference"]


def _item_kind(item: Any) -> str:
    """Return the type of an item, a dict or an object. Messages may leave their type out."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return str(kind or "message")


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ImageItem, Tag("image_generation_call")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ReferenceItem, Tag("item_reference")],
    Discriminator(
        _item_kind,
        custom_error_type="item",
        custom_error_message="the type of an item is message, function_call, function_call_output, "
        "image_generation_call or reasoning",
    ),
]


class NamedSchemaFormat(RequestPart):
    """Answers in JSON that matches a schema."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema", description="The JSON Schema.")
    name: str | None = Field(default=None, description="Ignored.")
    description: str | None = Field(default=None, description="Ignored.")
    strict: bool | None = Field(
        default=None,
        description="Whether a schema is refused if it has keywords that cannot be enforced. "
        "Otherwise they are ignored. Default: false.",
    )


class TextConfig(RequestPart):
    """The form of an answer."""

    format: (
        Annotated[TextFormat | ObjectFormat | NamedSchemaFormat, Field(discriminator="type")] | None
    ) = Field(default=None, description="Default: any text.")


class ResponsesFunction(RequestPart):
    """A function that an answer may call."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = Field(default=None, description="Purpose, for the prompt.")
    parameters: dict[str, Any] | None = Field(
        default=None,
        description="A JSON Schema of the arguments, which are an object. Default: no arguments.",
    )
    strict: bool | None = Field(default=None, description="As for `text.format`. Default: false.")


class ImageTool(RequestPart):
    """The tool by which the model draws. `quality`, `model` and `moderation` have no effect."""

    type: Literal["image_generation"]
    action: Literal["auto", "generate", "edit"] | None = Field(
        default=None,
        description="`edit`: change the images of the last question, or the last image before it; "
        "`generate`: draw from the text only; `auto`: edit if the last question has images and the "
        "model can. Default: `auto`.",
    )
    size: str | None = Field(default=None, description="As for `/v1/images/generations`.")
    output_format: ImageFormat | None = Field(
        default=None, description="Format of the image. Default: `png`."
    )
    output_compression: Annotated[WholeNumber, Field(ge=0, le=100)] | None = Field(
        default=None, description="Quality of a JPEG or WebP. Default: 95."
    )
    background: Literal["auto", "opaque"] | None = None
    partial_images: Annotated[WholeNumber, Field(ge=0, le=16)] | None = Field(
        default=None,
        description="Maximum number of previews that a stream sends. Default: 0.",
    )
    input_image_mask: None = Field(default=None, description="Not supported.")
    cfg_weight: Guidance | None = Field(
        default=None, description="As for `/v1/images/generations` and `/v1/images/edits`."
    )
    cfg_weight2: Guidance | None = Field(default=None, description="As for `/v1/images/edits`.")
    temperature: Temperature | None = Field(
        default=None, description="Sampling temperature. Default: the model's own."
    )
    top_p: TopP | None = Field(default=None, description="As for `/v1/images/generations`.")
    steps: Annotated[WholeNumber, Field(ge=1, le=MAX_STEPS)] | None = Field(
        default=None, description="As for `/v1/images/generations`."
    )


class OtherTool(RequestPart):
    """A tool of another type. It is refused."""

    type: str


def _tool_kind(tool: Any) -> str:
    """Return the type of a tool, a dict or an object; "other" for one that is not supported."""
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return kind if kind in ("function", "image_generation") else "other"


ResponsesTool = Annotated[
    Annotated[ResponsesFunction, Tag("function")]
    | Annotated[ImageTool, Tag("image_generation")]
    | Annotated[OtherTool, Tag("other")],
    Discriminator(_tool_kind),
]


class FunctionChoice(RequestPart):
    """The choice of one function."""

    type: Literal["function"]
    name: str


class ImageChoice(RequestPart):
    """The choice to draw."""

    type: Literal["image_generation"]


class AllowedTools(RequestPart):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS, fail_fast=True)]


def _check_metadata(metadata: Any) -> Any:
    """Refuse too much metadata, before an error for each value is collected."""
    if isinstance(metadata, dict) and len(metadata) > _MAX_METADATA:
        raise ValueError(f"{len(metadata)} values are too many: send at most {_MAX_METADATA}")
    return metadata


class _UnsupportedFields(RequestBody):
    """Unsupported fields that would change an answer, and fields that need stored responses."""

    previous_response_id: Annotated[Any, OnlyNeutral()] = None
    conversation: Annotated[Any, OnlyNeutral()] = None
    background: Annotated[Any, OnlyNeutral(False)] = None
    prompt: Annotated[Any, OnlyNeutral()] = None
    modalities: Annotated[Any, OnlyNeutral(["text"])] = None
    n: Annotated[Any, OnlyNeutral(1)] = None
    best_of: Annotated[Any, OnlyNeutral(1)] = None
    structured_outputs: Annotated[Any, OnlyNeutral()] = None


class ResponsesRequest(_UnsupportedFields, SamplingFields):
    """A conversation for the model to continue, by an answer, a call or an image."""

    input: (
        str | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    ) = Field(
        description="A question, or the conversation so far. If it ends with an answer, the model "
        "continues it.",
    )
    model: str | None = Field(default=None, description="Name of the model, as in a chat request.")
    instructions: str | None = Field(
        default=None, description="The beginning of the system prompt."
    )
    max_output_tokens: TokenLimit | None = Field(
        default=None,
        description="Maximum number of tokens in an answer; -1: no limit but the model's context. "
        "Default: 512.",
    )
    seed: Seed | None = Field(
        default=None, description="Seed of the answer or the image. -1, the default: random."
    )
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = Field(
        default=None,
        description="Strings that end an answer. They are not part of it. Empty ones are ignored.",
    )
    stream: bool | None = Field(
        default=None,
        description="Whether the answer is sent in pieces, as server-sent events. Default: false.",
    )
    text: TextConfig | None = Field(default=None, description="Form of the answer.")
    tools: Annotated[list[ResponsesTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = (
        Field(
            default=None,
            description="Functions that an answer may call, and `image_generation`. Default: none.",
        )
    )
    tool_choice: (
        Literal["none", "auto", "required"] | FunctionChoice | ImageChoice | AllowedTools | None
    ) = Field(
        default=None,
        description="`none`: no call; `auto`: the model decides; `required`, or one tool: the "
        "answer is a call. Default: `auto`.",
    )
    include: Annotated[list[str], SHORT_LIST] | None = Field(
        default=None,
        description=f"`{LOGPROBS}` adds log-probabilities. Other values have no effect.",
    )
    metadata: (
        Annotated[dict[str, str], BeforeValidator(_check_metadata), Field(max_length=_MAX_METADATA)]
        | None
    ) = Field(default=None, description="Returned in the reply.")
