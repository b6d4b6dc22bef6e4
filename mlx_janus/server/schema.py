"""Bodies of requests and replies, as OpenAI defines them; the source of ``/openapi.json``.

Fields beyond OpenAI's: ``top_k``, ``min_p`` and ``repetition_penalty`` of a chat request; ``seed``,
``cfg_weight``, ``cfg_weight2``, ``temperature``, ``top_p``, ``steps`` and ``crop`` of an image
request; ``index`` and ``seed`` of a generated image. Unknown fields of a request are ignored. A
field that changes the result on other servers, but is not supported here, is refused unless its
value changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from ..limits import (
    ALL_TOKENS,
    MAX_CFG_WEIGHT,
    MAX_LOGIT_BIAS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_STEPS,
    MAX_TEMPERATURE,
    MAX_TOKENS,
    MAX_TOP_K,
    MAX_TOP_LOGPROBS,
    MIN_REPETITION_PENALTY,
    RANDOM_SEED,
)
from .request_parts import SHORT_LIST as _SHORT_LIST
from .request_parts import OnlyNeutral as _OnlyNeutral
from .request_parts import RequestBody as _Request
from .request_parts import RequestPart as _RequestPart

MAX_ANSWERS = 16  # answers of one request
MAX_GENERATED_IMAGES = 16  # images of one reply
MAX_INPUT_IMAGES = 16  # images that one request contains or links to
MAX_STOPS = 256  # stop strings
NO_LIMIT = -1  # as a maximum number of tokens: no limit but the model's context
MAX_MESSAGES = 4096  # messages of a conversation, far more than any context holds
MAX_TOOLS = 128  # functions of a request
_MAX_BIASED_TOKENS = 4096  # tokens of ``logit_bias``
_MAX_ID_DIGITS = 9  # digits of a token id, more than any vocabulary needs


def _to_int(value: Any) -> Any:
    """Return a whole float as an int, because some clients write all numbers as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refuse_zero(limit: int) -> int:
    """Refuse 0 as the maximum number of tokens; return any other number."""
    if limit == 0:
        raise ValueError("an answer has one token or more: send a larger number, or -1")
    return limit


def _check_bias_count(bias: Any) -> Any:
    """Refuse a ``logit_bias`` of too many tokens, before pydantic collects an error for each."""
    if isinstance(bias, dict) and len(bias) > _MAX_BIASED_TOKENS:
        raise ValueError(f"{len(bias)} tokens are too many: send at most {_MAX_BIASED_TOKENS}")
    return bias


def _check_token_ids(bias: dict[str, float]) -> dict[str, float]:
    """Check that the keys of ``logit_bias`` are token ids in decimal digits."""
    for key in bias:
        if not (key.isascii() and key.isdecimal() and len(key) <= _MAX_ID_DIGITS):
            raise ValueError(f'the keys are token ids, such as "100", got {key[:40]!r}')
    return bias


WholeNumber = Annotated[int, BeforeValidator(_to_int)]
TokenLimit = Annotated[
    WholeNumber,
    Field(ge=NO_LIMIT, le=MAX_TOKENS, json_schema_extra={"not": {"const": 0}}),
    AfterValidator(_refuse_zero),
]
# RANDOM_SEED becomes None, as if the request had no seed.
Seed = Annotated[
    WholeNumber,
    Field(ge=RANDOM_SEED, le=MAX_SEED),
    AfterValidator(lambda seed: None if seed == RANDOM_SEED else seed),
]
Temperature = Annotated[float, Field(ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False)]
Guidance = Annotated[float, Field(ge=0, le=MAX_CFG_WEIGHT, allow_inf_nan=False)]
TopP = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]
Bias = Annotated[float, Field(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS)]
LogitBias = Annotated[
    dict[str, Bias],
    Field(json_schema_extra={"maxProperties": _MAX_BIASED_TOKENS}),
    BeforeValidator(_check_bias_count),
    AfterValidator(_check_token_ids),
]
ImageFormat = Literal["png", "jpeg", "webp"]
NonEmptyText = Annotated[str, Field(min_length=1)]

_MODEL_NAME = (
    "Name of the model, as `/v1/models` lists it, or `default`. Default: the served model."
)
_TOP_P = (
    "Nucleus sampling: the total probability of the likeliest tokens to sample from. Default: 1."
)
_SYSTEM_FINGERPRINT = (
    "Identifies model, precision and release: another one may answer differently to the same seed."
)
_CREATED = "Creation time of the reply, in seconds since 1970."


def _is_none(value: object) -> bool:
    """Return whether a field is None; pydantic then leaves it out of the reply."""
    return value is None


# Requests


class TextPart(_RequestPart):
    """A text in a message."""

    type: Literal["text"]
    text: str


class ImageURL(_RequestPart):
    """The source of an image."""

    url: str = Field(
        description="A data URL, `data:image/png;base64,...`, or an https address if the server "
        "allows it.",
        examples=["data:image/png;base64,iVBORw0KGgo="],
    )
    detail: str | None = Field(
        default=None, description="Ignored: every image is scaled to the size that the model reads."
    )


def _to_image_url(value: Any) -> Any:
    """Wrap a bare string in the object that OpenAI defines for a URL."""
    return {"url": value} if isinstance(value, str) else value


class ImagePart(_RequestPart):
    """An image in a message. Images among the texts keep their places, others are read first."""

    type: Literal["image_url"]
    image_url: Annotated[ImageURL, BeforeValidator(_to_image_url)]


class LocatedImage(ImagePart):
    """An image of a message that was translated from another API."""

    field: str  # the field of the body that holds the image


class RefusalPart(_RequestPart):
    """A refusal of another model. It is ignored."""

    type: Literal["refusal"]
    refusal: str


class SystemMessage(_RequestPart):
    """Instructions for the model. Those after the first question join the next question."""

    role: Literal["system", "developer"]
    content: str | Annotated[list[TextPart], _SHORT_LIST]


class ToolMessage(_RequestPart):
    """The result of a tool. It joins the next question, or is one if none follows."""

    role: Literal["tool", "function"]
    content: str | Annotated[list[TextPart], _SHORT_LIST] | None = None


class UserMessage(_RequestPart):
    """A message of the user, with or without images."""

    role: Literal["user"]
    content: (
        str
        | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], _SHORT_LIST]
    )


class AssistantMessage(_RequestPart):
    """An earlier answer of the model. Its images are shown with the next question."""

    role: Literal["assistant"]
    content: (
        str
        | Annotated[
            list[Annotated[TextPart | ImagePart | RefusalPart, Field(discriminator="type")]],
            _SHORT_LIST,
        ]
        | None
    ) = None
    tool_calls: Any = Field(
        default=None, description="Ignored. A message with nothing else is left out."
    )
    function_call: Any = Field(default=None, description="As `tool_calls`.")


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class StreamOptions(_RequestPart):
    """Options of a streamed reply."""

    include_usage: bool | None = Field(
        default=None,
        description="Whether the last chunk before `[DONE]` has the token counts. Default: false.",
    )


class TextFormat(_RequestPart):
    """Answers in any text."""

    type: Literal["text"]


class ObjectFormat(_RequestPart):
    """Answers that are a JSON object."""

    type: Literal["json_object"]


class NamedSchema(_RequestPart):
    """A JSON Schema of an answer."""

    json_schema: dict[str, Any] | None = Field(
        default=None, alias="schema", description="The JSON Schema. Default: any JSON object."
    )
    name: str | None = Field(default=None, description="Ignored.")
    description: str | None = Field(default=None, description="Ignored.")
    strict: bool | None = Field(
        default=None,
        description="Whether a schema is refused if it has keywords that cannot be enforced. "
        "Otherwise they are ignored. Default: false.",
    )


class SchemaFormat(_RequestPart):
    """Answers in JSON that matches a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class Function(_RequestPart):
    """A function that an answer may call."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = Field(default=None, description="Purpose, for the prompt.")
    parameters: dict[str, Any] | None = Field(
        default=None,
        description="A JSON Schema of the arguments, which are an object. Default: no arguments.",
    )
    strict: bool | None = Field(default=None, description="As for `response_format`.")


class FunctionTool(_RequestPart):
    """A tool, which is always a function."""

    type: Literal["function"]
    function: Function


class FunctionName(_RequestPart):
    """The name of a function."""

    name: str


class NamedTool(_RequestPart):
    """The choice of one function."""

    type: Literal["function"]
    function: FunctionName


class _UnsupportedChatFields(_Request):
    """Unsupported fields that would change an answer: OpenAI's, then those of other servers."""

    # "auto" is accepted, since a model may always call no function.
    function_call: Annotated[Any, _OnlyNeutral("none", "auto")] = None
    modalities: Annotated[Any, _OnlyNeutral(["text"])] = None
    audio: Annotated[Any, _OnlyNeutral()] = None
    web_search_options: Annotated[Any, _OnlyNeutral()] = None
    best_of: Annotated[Any, _OnlyNeutral(1)] = None
    guided_json: Annotated[Any, _OnlyNeutral()] = None
    guided_regex: Annotated[Any, _OnlyNeutral()] = None
    guided_choice: Annotated[Any, _OnlyNeutral()] = None
    guided_grammar: Annotated[Any, _OnlyNeutral()] = None
    structured_outputs: Annotated[Any, _OnlyNeutral()] = None


class SamplingFields(_RequestPart):
    """The choice of an answer's tokens: OpenAI's fields, then those of other servers.

    Logits change in the order of vLLM: bias, repetition penalty, the other penalties, temperature,
    ``min_p``, ``top_k``, ``top_p``.
    """

    temperature: Temperature | None = Field(
        default=None,
        description="Sampling temperature. Default: 0, which always takes the likeliest token.",
    )
    top_p: TopP | None = Field(
        default=None, description=f"{_TOP_P} 0 always takes the likeliest token."
    )
    frequency_penalty: Penalty | None = Field(
        default=None,
        description="Number to subtract from a token's logit for each time that the answer has the "
        "token. Default: 0.",
    )
    presence_penalty: Penalty | None = Field(
        default=None,
        description="Number to subtract from the logits of all tokens that the answer has. "
        "Default: 0.",
    )
    logit_bias: LogitBias | None = Field(
        default=None,
        description="Numbers to add to logits, by token id. Default: none.",
        examples=[{"100": -100}],
    )
    logprobs: bool | None = Field(
        default=None,
        description="Whether the reply has the log-probability of each token: that of the model's "
        "own probability, which no other field changes. Default: false.",
    )
    top_logprobs: Annotated[WholeNumber, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        default=None,
        description="Number of the likeliest tokens to report for each token. It needs `logprobs`. "
        "Default: 0.",
    )
    top_k: Annotated[WholeNumber, Field(ge=ALL_TOKENS, le=MAX_TOP_K)] | None = Field(
        default=None,
        description="Number of the likeliest tokens to sample from; 0 or -1, the default: all.",
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="Least probability of a token, as a share of the likeliest token's. "
        "Default: 0.",
    )
    repetition_penalty: (
        Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)] | None
    ) = Field(
        default=None,
        description="Number that divides the positive logits, and multiplies the negative ones, of "
        "all tokens that the prompt or the answer has. Default: 1.",
    )


class ChatRequest(_UnsupportedChatFields, SamplingFields):
    """A conversation for the model to continue."""

    messages: list[Message] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        fail_fast=True,
        description="The conversation so far. If it ends with an answer, the model continues it.",
    )
    model: str | None = Field(default=None, description=_MODEL_NAME)
    max_completion_tokens: TokenLimit | None = Field(
        default=None,
        description="Maximum number of tokens in an answer; -1: no limit but the model's context. "
        "Default: 512.",
    )
    max_tokens: TokenLimit | None = Field(
        default=None, description="The old name of max_completion_tokens, which takes precedence."
    )
    seed: Seed | None = Field(
        default=None,
        description="Seed of the first answer; the others use the following numbers. "
        "-1, the default: random.",
    )
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = Field(
        default=None,
        description="Strings that end an answer. They are not part of it. Empty ones are ignored.",
    )
    n: Annotated[WholeNumber, Field(ge=1, le=MAX_ANSWERS)] | None = Field(
        default=None, description="Number of answers. Default: 1."
    )
    stream: bool | None = Field(
        default=None,
        description="Whether the answer is sent in pieces, as server-sent events. Default: false.",
    )
    stream_options: StreamOptions | None = None
    response_format: (
        Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None
    ) = Field(default=None, description="Form of the answers. Default: any text.")
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = (
        Field(default=None, description="Functions that an answer may call. Default: none.")
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        default=None,
        description="`none`: no call; `auto`: the model decides; `required`, or the name of a "
        "function: the answer is a call. Default: `auto`.",
    )


class _UnsupportedImageFields(_Request):
    """Unsupported fields that would change an image: OpenAI's, then those of other servers."""

    mask: Annotated[Any, _OnlyNeutral()] = None
    init_image: Annotated[Any, _OnlyNeutral()] = None
    strength: Annotated[Any, _OnlyNeutral()] = None
    negative_prompt: Annotated[Any, _OnlyNeutral("")] = None
    guidance_scale: Annotated[Any, _OnlyNeutral()] = None
    cfg_scale: Annotated[Any, _OnlyNeutral()] = None
    num_inference_steps: Annotated[Any, _OnlyNeutral()] = None
    width: Annotated[Any, _OnlyNeutral()] = None
    height: Annotated[Any, _OnlyNeutral()] = None
    aspect_ratio: Annotated[Any, _OnlyNeutral("1:1")] = None
    loras: Annotated[Any, _OnlyNeutral([])] = None


class ImageFields(_UnsupportedImageFields):
    """The fields that all requests for images share."""

    prompt: NonEmptyText = Field(description="Text that describes the images.")
    model: str | None = Field(default=None, description=_MODEL_NAME)
    n: Annotated[WholeNumber, Field(ge=1, le=MAX_GENERATED_IMAGES)] | None = Field(
        default=None, description="Number of images. Default: 1."
    )
    size: str | None = Field(
        default=None,
        description="`auto`, the model's own size (`384x384`), or one of OpenAI's. For those, "
        "images have the model's own size, or are enlarged if the server is set so. The reply's "
        "`size` is true. Default: `auto`.",
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        default=None,
        description="`url`: an address on this server, which keeps the image for an hour. A stream "
        "always has `b64_json`. Default: `b64_json`, or `url` if the request's `model` begins with "
        "`dall-e-`, as in OpenAI's API.",
    )
    output_format: ImageFormat | None = Field(
        default=None, description="Format of the images. Default: `png`."
    )
    output_compression: Annotated[WholeNumber, Field(ge=0, le=100)] | None = Field(
        default=None, description="Quality of a JPEG or WebP. Default: 95."
    )
    background: Literal["auto", "opaque"] | None = None
    stream: bool | None = Field(
        default=None,
        description="Whether images are sent once finished, as server-sent events. Default: false.",
    )
    partial_images: Annotated[WholeNumber, Field(ge=0, le=16)] | None = Field(
        default=None,
        description="Maximum number of previews that a stream sends of each image. Default: 0.",
    )
    seed: Seed | None = Field(
        default=None,
        description="Seed of the first image; the others use the following numbers. "
        "-1, the default: random.",
    )
    cfg_weight: Guidance | None = Field(
        default=None,
        description="Classifier-free guidance: how strictly images follow the prompt; 1: none. "
        "Default: the model's own.",
    )
    temperature: Temperature | None = Field(
        default=None,
        description="Sampling temperature, for a model that draws image tokens. Default: the "
        "model's own.",
    )
    top_p: TopP | None = Field(default=None, description=_TOP_P)
    steps: Annotated[WholeNumber, Field(ge=1, le=MAX_STEPS)] | None = Field(
        default=None,
        description="Steps from noise to an image, for a model that draws by a rectified flow: "
        "more are slower and finer. Default: the model's own.",
    )


class ImageRequest(ImageFields):
    """A prompt to generate images from."""

    image: Annotated[Any, _OnlyNeutral()] = None
    images: Annotated[Any, _OnlyNeutral([])] = None


class EditFields(ImageFields):
    """A prompt that says how to change images, without the images."""

    prompt: NonEmptyText = Field(description="Text that says how to change the images.")
    markup: Annotated[Any, _OnlyNeutral()] = None
    cfg_weight: Guidance | None = Field(
        default=None,
        description="Classifier-free guidance: how strictly the result follows the prompt and the "
        "images; 1: none. Default: 5.",
    )
    cfg_weight2: Guidance | None = Field(
        default=None,
        description="Weight of the prompt against the details of the images: the higher, the freer "
        "the result. Default: 5.",
    )
    crop: bool | None = Field(
        default=None,
        description="Whether results are cut to the shape of the first image. Default: false, "
        "which returns the square that the model draws, with bars beside the image.",
    )


class ImageReference(_RequestPart):
    """The source of an image to change."""

    image_url: str = Field(
        description="A data URL, `data:image/png;base64,...`, or an https address if the server "
        "allows it.",
        examples=["data:image/png;base64,iVBORw0KGgo="],
    )


def _to_reference(value: Any) -> Any:
    """Wrap a bare string in the object that OpenAI defines for an image's source."""
    return {"image_url": value} if isinstance(value, str) else value


class EditRequest(EditFields):
    """Images, and a prompt that says how to change them."""

    images: list[Annotated[ImageReference, BeforeValidator(_to_reference)]] = Field(
        min_length=1,
        max_length=MAX_INPUT_IMAGES,
        fail_fast=True,
        description="The images to change. Each result is made from all of them.",
    )


# Replies


ErrorKind = Literal["invalid_request_error", "rate_limit_error", "server_error"]


class ErrorText(BaseModel):
    """The reason why a request was refused or failed."""

    message: str = Field(description="One sentence for a person.")
    type: ErrorKind
    param: str | None = Field(
        description="The field of the body that caused the error, if there is one."
    )
    code: str | None = Field(description="A short name of the error for programs, if it has one.")


class ErrorReply(BaseModel):
    """The reply to a request that was refused or failed."""

    error: ErrorText


class PromptDetails(BaseModel):
    """Details of the prompt's token count."""

    cached_tokens: int = Field(
        description="Tokens at the beginning of the prompt that were read from the cache."
    )


class Usage(BaseModel):
    """Token counts of a chat completion."""

    prompt_tokens: int = Field(
        description="Tokens of the prompt, images included, counted once for all answers."
    )
    completion_tokens: int = Field(description="Tokens of all answers together.")
    total_tokens: int
    prompt_tokens_details: PromptDetails


FinishReason = Literal["stop", "length", "tool_calls"]


class CalledFunction(BaseModel):
    """A called function with its arguments."""

    name: str
    arguments: str = Field(description="The arguments as JSON text.")


class ToolCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(BaseModel):
    """The message that the model answered with."""

    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="The text; `null`: the answer is a call.")
    refusal: None = None
    tool_calls: list[ToolCall] | None = Field(
        default=None, exclude_if=_is_none, description="The call, if the answer is one."
    )


class ChatTopLogprob(BaseModel):
    """The log-probability of a token."""

    token: str = Field(description="The token's text, with U+FFFD for incomplete characters.")
    bytes: list[int] | None = Field(
        description="The token's bytes, in UTF-8. `null`: a control token."
    )
    logprob: float


class ChatTokenLogprob(ChatTopLogprob):
    """The log-probability of a token of the answer."""

    top_logprobs: list[ChatTopLogprob] = Field(
        description="The likeliest tokens in this place, the likeliest first."
    )


class ChoiceLogprobs(BaseModel):
    """Log-probabilities, for each token of an answer or of its new part."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class Choice(BaseModel):
    """One of the requested answers."""

    index: int = Field(description="Number of the answer, from 0.")
    message: AnswerMessage
    finish_reason: FinishReason = Field(
        description="Why the answer ended. `stop`: complete, or at a stop string; `length`: at the "
        "maximum number of tokens; `tool_calls`: complete, and a call."
    )
    logprobs: ChoiceLogprobs | None = Field(
        default=None, description="Only if the request asks for them."
    )


class ChatCompletion(BaseModel):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description=_CREATED)
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str = Field(description=_SYSTEM_FINGERPRINT)


class FunctionDelta(BaseModel):
    """The new part of a called function."""

    name: str | None = Field(default=None, exclude_if=_is_none)
    arguments: str = Field(description="Text to append to the arguments.")


class ToolCallDelta(BaseModel):
    """The new part of a call."""

    index: int = 0
    id: str | None = Field(default=None, exclude_if=_is_none)
    type: Literal["function"] | None = Field(default=None, exclude_if=_is_none)
    function: FunctionDelta


class Delta(BaseModel):
    """The new part of a streamed answer."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=_is_none)
    content: str | None = Field(default=None, exclude_if=_is_none)
    tool_calls: list[ToolCallDelta] | None = Field(default=None, exclude_if=_is_none)


class ChunkChoice(BaseModel):
    """The new part of one of the requested answers."""

    index: int = Field(description="Number of the answer, from 0.")
    delta: Delta
    finish_reason: FinishReason | None = Field(
        default=None, description="Set in the last chunk of an answer."
    )
    logprobs: ChoiceLogprobs | None = Field(
        default=None, exclude_if=_is_none, description="Only if the request asks for them."
    )


class ChatCompletionChunk(BaseModel):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int = Field(description=_CREATED)
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = Field(
        default=None,
        exclude_if=_is_none,
        description="Only in the last chunk, if `stream_options.include_usage` is true.",
    )
    system_fingerprint: str = Field(description=_SYSTEM_FINGERPRINT)


class TokenKinds(BaseModel):
    """A token count by kind of token."""

    image_tokens: int
    text_tokens: int


class ImageUsage(BaseModel):
    """Token counts of an image generation."""

    input_tokens: int = Field(description="Tokens of the prompt, counted once for all images.")
    input_tokens_details: TokenKinds
    output_tokens: int = Field(description="Tokens of all images together.")
    output_tokens_details: TokenKinds
    total_tokens: int


class ImageData(BaseModel):
    """A generated image."""

    b64_json: str | None = Field(
        default=None,
        exclude_if=_is_none,
        description="An image file in base64. Its metadata hold the settings of the image.",
    )
    url: str | None = Field(
        default=None,
        exclude_if=_is_none,
        description="Address of an image file on this server, which keeps it for an hour.",
    )
    seed: int


class ImagesReply(BaseModel):
    """The images of a prompt."""

    created: int = Field(description=_CREATED)
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    quality: Literal["auto"] = "auto"
    size: str
    usage: ImageUsage


ImageEventType = Literal[
    "image_generation.partial_image",
    "image_generation.completed",
    "image_edit.partial_image",
    "image_edit.completed",
]


class ImageEvent(BaseModel):
    """One event of streamed images: a preview of an image, or a finished image."""

    type: ImageEventType
    index: int = Field(description="Number of the image, from 0.")
    seed: int
    b64_json: str = Field(description="An image file in base64.")
    created_at: int = Field(description=_CREATED)
    size: str
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    quality: Literal["auto"] = "auto"
    partial_image_index: int | None = Field(
        default=None,
        exclude_if=_is_none,
        description="Number of the preview, from 0 for each image.",
    )
    usage: ImageUsage | None = Field(
        default=None,
        exclude_if=_is_none,
        description="Token counts of this image, once it is finished.",
    )


class ModelDefaults(BaseModel):
    """The values that a request gets for the fields that it leaves out."""

    answers: dict[str, float] = Field(description="For `/v1/chat/completions`, by field.")
    images: dict[str, float] = Field(description="For `/v1/images/generations`, by field.")
    edits: dict[str, float] | None = Field(
        description="For `/v1/images/edits`, by field. `null`: the model cannot change images."
    )


Capability = Literal["answers", "images", "edits"]
"""An ability of a model: answering, generating images, or changing images."""


class ServedModel(BaseModel):
    """A model that this server offers."""

    id: str = Field(description="The name to send as `model`.")
    object: Literal["model"] = "model"
    created: int = Field(description="Start time of the server, in seconds since 1970.")
    owned_by: str = "mlx_janus"
    root: str = Field(description="The model's first name. Its other names have the same `root`.")
    state: Literal["loaded", "loading", "unloaded", "failed"] = Field(
        description="A request loads a model that is `unloaded`, or `failed` to load before."
    )
    loaded: bool = Field(description="Whether the model is in memory.")
    capabilities: list[Capability] | None = Field(
        description="`null`: not known before the model is loaded for the first time."
    )
    defaults: ModelDefaults | None = Field(
        description="`null`: not known before the model is loaded for the first time."
    )


class ModelList(BaseModel):
    """The list of the models that this server offers. The first one is the default."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


class Health(BaseModel):
    """The state of the server and its load."""

    status: Literal["ok", "stopping"] = Field(description="`stopping` if new requests are refused.")
    model: str = Field(description="The default model.")
    models: int = Field(description="Models that requests can use.")
    loaded: int = Field(description="Models in memory.")
    waiting: int = Field(description="Requests in the queue.")
    answering: int = Field(description="Answers being generated.")
    drawing: int = Field(description="Images being generated.")
