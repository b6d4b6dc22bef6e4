"""Bodies and replies, as OpenAI's API has them. What else a body holds is ignored, or refused if it would change much.

The numbers' ranges are the library's own. Extensions of ours: ``seed``, ``cfg_weight``, ``temperature`` and ``top_p``
of a drawing, and ``index`` and ``seed`` of what is drawn.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..limits import MAX_CFG_WEIGHT, MAX_SEED, MAX_TEMPERATURE, MAX_TOKENS

MAX_ANSWERS = 16
MAX_DRAWN = 16
MAX_STOPS = 4

_MESSAGES, _PARTS = 4096, 256  # of a conversation, and of a message: far more than any context holds

Seed = Annotated[int, Field(ge=-1, le=MAX_SEED), AfterValidator(lambda seed: None if seed == -1 else seed)]
Temperature = Annotated[float, Field(ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False)]
Guidance = Annotated[float, Field(ge=0, le=MAX_CFG_WEIGHT, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1)]
Words = Annotated[str, Field(min_length=1)]
_FEW_PARTS = Field(max_length=_PARTS, fail_fast=True)  # an error for each of a million would take minutes


def _absent(value: object) -> bool:
    return value is None


class _Given(BaseModel):
    """Part of a body: numbers are no strings, and fields that are not known are dropped."""

    model_config = ConfigDict(strict=True, extra="ignore")


# What is asked


class TextPart(_Given):
    """Text of a message."""

    type: Literal["text"]
    text: str


class PictureAddress(_Given):
    """Where a picture is."""

    url: str = Field(
        description="A data URL in base64, `data:image/png;base64,...`; an https address if the server allows it.",
        examples=["data:image/png;base64,iVBORw0KGgo="],
    )
    detail: str | None = Field(default=None, description="Ignored: a picture is read in the model's own size.")


class PicturePart(_Given):
    """A picture of a message. A message's pictures are shown before its text."""

    type: Literal["image_url"]
    image_url: PictureAddress


class SystemMessage(_Given):
    """Instructions; they stand before all other messages."""

    role: Literal["system", "developer"]
    content: str | Annotated[list[TextPart], _FEW_PARTS]


class UserMessage(_Given):
    """A question, with its pictures."""

    role: Literal["user"]
    content: str | Annotated[list[Annotated[TextPart | PicturePart, Field(discriminator="type")]], _FEW_PARTS]


class AssistantMessage(_Given):
    """An answer that was given before."""

    role: Literal["assistant"]
    content: str | Annotated[list[TextPart], _FEW_PARTS] | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Given):
    """What a stream tells besides."""

    include_usage: bool | None = None


_NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields that would change an answer, and what they may be
    "tool_choice": (None, "none", "auto"),  # then a model need call none of the tools it is told of
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "web_search_options": (None,),
    # not OpenAI's own, but sent by many
    "repetition_penalty": (None, 1),
    "top_k": (None, -1, 0),
    "min_p": (None, 0),
    "best_of": (None, 1),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
}


class _Neutral(_Given):
    """Fields that are refused unless they say what is so anyhow."""

    tool_choice: Any = None
    function_call: Any = None
    response_format: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    logit_bias: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None
    repetition_penalty: Any = None
    top_k: Any = None
    min_p: Any = None
    best_of: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None

    def refused(self) -> str | None:
        """The first field that would change the answer and cannot be honoured."""
        return next((name for name, allowed in _NEUTRAL.items() if getattr(self, name) not in allowed), None)


class ChatRequest(_Neutral):
    """A conversation to continue."""

    messages: list[Message] = Field(
        min_length=1, max_length=_MESSAGES, fail_fast=True, description="The last one is the user's."
    )
    model: str | None = Field(default=None, description="The name that /v1/models gives, or `default`.")
    temperature: Temperature | None = Field(default=None, description="Default: 0, the likeliest token always.")
    top_p: TopP | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = Field(
        default=None, description="Default: 512."
    )
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = Field(
        default=None, description="The old name of max_completion_tokens, which goes before."
    )
    seed: Seed | None = Field(
        default=None, description="Of the first answer, the others have the next; default, and -1: random."
    )
    stop: Words | Annotated[list[Words], Field(max_length=MAX_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ImageRequest(_Given):
    """Pictures to draw."""

    prompt: Words
    model: str | None = Field(default=None, description="The name that /v1/models gives, or `default`.")
    n: Annotated[int, Field(ge=1, le=MAX_DRAWN)] | None = None
    size: str | None = Field(default=None, description="`auto`, or the model's own size, such as `384x384`.")
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=16)] | None = Field(
        default=None, description="How often at most a stream shows each picture before it is whole."
    )
    seed: Seed | None = Field(
        default=None, description="Of the first picture, the others have the next; default, and -1: random."
    )
    cfg_weight: Guidance | None = Field(
        default=None, description="Guidance, how strictly to follow the prompt; 1: none. Default: the model's own."
    )
    temperature: Temperature | None = Field(default=None, description="Default: the model's own.")
    top_p: TopP | None = None


# What is replied


ErrorKind = Literal["invalid_request_error", "rate_limit_error", "server_error"]


class ErrorText(BaseModel):
    """What is wrong."""

    message: str
    type: ErrorKind
    param: str | None = Field(description="The field that it is about.")
    code: str | None


class ErrorReply(BaseModel):
    """An error."""

    error: ErrorText


class PromptDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a prompt, pictures included, and of its answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


FinishReason = Literal["stop", "length"]


class AnswerMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """One of the answers."""

    index: int
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: None = None


class ChatCompletion(BaseModel):
    """Answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str


class Delta(BaseModel):
    """What is new of an answer."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=_absent)
    content: str | None = Field(default=None, exclude_if=_absent)


class ChunkChoice(BaseModel):
    """What is new of one of the answers."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(BaseModel):
    """A piece of a stream of answers; the last one before `[DONE]` has the usage, if it was asked for."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = Field(default=None, exclude_if=_absent)
    system_fingerprint: str


class DrawnTokens(BaseModel):
    """Tokens by kind."""

    image_tokens: int
    text_tokens: int


class ImageUsage(BaseModel):
    """Tokens of a prompt and of the pictures drawn."""

    input_tokens: int
    input_tokens_details: DrawnTokens
    output_tokens: int
    output_tokens_details: DrawnTokens
    total_tokens: int


class DrawnImage(BaseModel):
    """A picture: a PNG that carries its settings as text chunks."""

    b64_json: str
    seed: int


class ImagesReply(BaseModel):
    """The pictures."""

    created: int
    data: list[DrawnImage]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png"] = "png"
    size: str
    usage: ImageUsage


class ImageEvent(BaseModel):
    """A picture on its way, or whole, then with the usage."""

    type: Literal["image_generation.partial_image", "image_generation.completed"]
    index: int = Field(description="Which of the pictures, from 0.")
    seed: int
    b64_json: str
    created_at: int
    size: str
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png"] = "png"
    quality: Literal["auto"] = "auto"
    partial_image_index: int | None = Field(
        default=None, exclude_if=_absent, description="Counts from 0 for each picture."
    )
    usage: ImageUsage | None = Field(default=None, exclude_if=_absent)


class ServedModel(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mlx_janus"


class ModelList(BaseModel):
    """All of them: one."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


class Health(BaseModel):
    """Whether the server takes requests, and what it is doing: those that wait, answers and pictures under way."""

    status: Literal["ok", "stopping"]
    model: str
    waiting: int
    answering: int
    drawing: int
