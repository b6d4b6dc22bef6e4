"""The tools: names, descriptions and arguments, with JSON Schemas for the model that calls them."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from mcp_types import Tool, ToolAnnotations
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.json_schema import GenerateJsonSchema, SkipJsonSchema

from ..errors import OptionError
from ..limits import MAX_CFG_WEIGHT, MAX_STEPS, MAX_TEMPERATURE

GENERATE = "generate_image"
ASK = "ask_about_image"
EDIT = "edit_image"
MAX_IMAGES = 4  # images of one call, drawn or given
_MAX_SEED = 2**53 - 1  # clients in JavaScript hold whole numbers exactly up to this one
MAX_TOKENS = 4096  # tokens of an answer
_IMAGE = (
    "The path of an image file, an https address, or the image itself as data:image/png;base64,... "
    "A server that is reached over HTTP reads no paths, and addresses only if it allows them."
)


def _as_list(value: Any) -> Any:
    """Wrap one image in a list, since callers often leave the list out."""
    return [value] if isinstance(value, str) else value


_Missing = SkipJsonSchema[None]
"""The type of an argument that is left out. The schema does not mention it."""
_Seed = Annotated[int, Field(ge=0, le=_MAX_SEED)]
_Count = Annotated[int, Field(ge=1, le=MAX_IMAGES)]
_Weight = Annotated[float, Field(ge=0, le=MAX_CFG_WEIGHT)]
_Temperature = Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)]
_Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
_Text = Annotated[str, Field(min_length=1)]
_Images = Annotated[
    list[_Text], Field(min_length=1, max_length=MAX_IMAGES), BeforeValidator(_as_list)
]


class _Arguments(BaseModel):
    """Arguments of a tool. An unknown one is refused, since it may be a misspelt one."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _DrawingArguments(_Arguments):
    """The arguments that drawing and changing images share."""

    seed: _Seed | _Missing = Field(
        default=None,
        description="Seed of the first image; the others use the following numbers. The same seed "
        "and arguments give the same image. Default: random; the result names it.",
    )
    n: _Count = Field(default=1, description="Number of images.")
    cfg_weight: _Weight | _Missing = Field(
        default=None,
        description="Classifier-free guidance: how strictly images follow the prompt; 1: none. "
        "Default: the model's own.",
    )
    temperature: _Temperature | _Missing = Field(
        default=None,
        description="Sampling temperature: lower values give plainer images. Models that draw by a "
        "rectified flow have none. Default: the model's own.",
    )
    steps: _Steps | _Missing = Field(
        default=None,
        description="Steps from noise to an image, for models that draw by a rectified flow: more "
        "are slower and finer. Other models have none. Default: the model's own.",
    )


class GenerateArguments(_DrawingArguments):
    """Arguments of ``generate_image``."""

    prompt: _Text = Field(
        description="Description of the image: subject, surroundings, style and light."
    )


class EditArguments(_DrawingArguments):
    """Arguments of ``edit_image``."""

    images: _Images = Field(
        description=f"The images to change, which together give one result. {_IMAGE}",
    )
    prompt: _Text = Field(description="How to change the images.")
    cfg_weight2: _Weight | _Missing = Field(
        default=None,
        description="Weight of the prompt against the details of the images: the higher, the freer "
        "the result. Default: 5.",
    )


class AskArguments(_Arguments):
    """Arguments of ``ask_about_image``."""

    image: _Text = Field(description=_IMAGE)
    question: _Text = Field(description="A question about the image, or an instruction.")
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] = Field(
        default=512, description="Maximum length of the answer, in tokens."
    )
    temperature: _Temperature = Field(
        default=0,
        description="Sampling temperature; 0 always takes the likeliest token.",
    )


Arguments = TypeVar("Arguments", bound=_Arguments)


def check_arguments(schema: type[Arguments], given: dict[str, Any] | None) -> Arguments:
    """Return the arguments of a call as an object.

    Raises:
        OptionError: an argument is missing, unknown, out of range or of a wrong type.
    """
    try:
        return schema.model_validate(given or {})
    except ValidationError as error:
        mistake = error.errors(include_url=False)[0]  # one error is enough for the message
        name = str(mistake["loc"][0])  # the path to the mistake begins with the argument's name
        if mistake["type"] == "missing":
            raise OptionError(f"{name} is missing: add it") from None
        if mistake["type"] == "extra_forbidden":
            known = ", ".join(schema.model_fields)
            raise OptionError(f"there is no argument {name!r}: use {known}") from None
        reason = mistake["msg"].replace("Input should be", "it must be", 1)
        raise OptionError(f"{name}: {reason}, got {_describe_value(mistake['input'])}") from None


def _describe_value(value: Any) -> str:
    """Return a wrong value for an error message; of a long text or a list, only the type."""
    is_short = isinstance(value, int | float | None) or (isinstance(value, str) and len(value) < 80)
    return repr(value) if is_short else f"a {type(value).__name__}"


class _PlainSchema(GenerateJsonSchema):
    """A generator of schemas without titles, and without the default null of missing arguments."""

    def field_title_should_be_set(self, _: Any) -> bool:
        """Return False: a title would only repeat the argument's name."""
        return False

    def default_schema(self, schema: Any) -> dict[str, Any]:
        """Return the schema of an argument that has a default."""
        generated = super().default_schema(schema)
        if generated.get("default", "") is None:  # "" stands for no default
            del generated["default"]
        return generated


def _schema(arguments: type[_Arguments]) -> dict[str, Any]:
    """Return the JSON Schema of a tool's arguments."""
    schema = arguments.model_json_schema(schema_generator=_PlainSchema)
    for name in ("title", "description"):  # they come from the class, not from the tool
        schema.pop(name, None)
    # The required arguments first: models tend to write arguments in the order of the schema.
    properties = schema["properties"]
    schema["properties"] = {name: properties[name] for name in schema["required"]} | properties
    return schema


def tools(*, saves_images: bool, can_edit: bool) -> list[Tool]:
    """Return the tools as clients list them.

    Args:
        saves_images: whether each image is also written to a file.
        can_edit: whether the model can change images.
    """
    result = "Returns PNG images, and a line with their seeds"
    result += " and files." if saves_images else "."
    drawing = ToolAnnotations(
        read_only_hint=not saves_images,
        destructive_hint=False,  # an existing file is never replaced
        idempotent_hint=False,
        open_world_hint=False,
    )
    reading = ToolAnnotations(read_only_hint=True, destructive_hint=False, open_world_hint=True)
    # Images to change may be at an address, as the image of a question may.
    editing = drawing.model_copy(update={"open_world_hint": True})
    listed = [
        Tool(
            name=GENERATE,
            title="Generate images",
            description=f"Draw square images from a description with Janus. {result}",
            input_schema=_schema(GenerateArguments),
            annotations=drawing,
        ),
        Tool(
            name=ASK,
            title="Ask about an image",
            description="Let Janus look at an image and answer a question about it. "
            "Returns the answer as text.",
            input_schema=_schema(AskArguments),
            annotations=reading,
        ),
        Tool(
            name=EDIT,
            title="Change images",
            description="Draw a new image from given ones, changed as a prompt says. Only models "
            f"that were trained for it, such as Janus-4o, do it well. {result}",
            input_schema=_schema(EditArguments),
            annotations=editing,
        ),
    ]
    return listed if can_edit else listed[:-1]  # the last tool is EDIT
