"""``/v1/images/edits``: images that the model changes as a prompt says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError
from starlette.requests import Request as HTTPRequest

from ..engine.messages import DrawingRequest, edit_arguments
from ..inference.pathway import EditingPathway
from .bodies import FORM, JSON, Form, media_type, parse_json, read_form
from .errors import APIError
from .image_replies import (
    EventTypes,
    check_fields,
    chosen_options,
    image_numbers,
    reply_with_images,
)
from .images import ImageSource
from .schema import EditFields, EditRequest
from .service import Service

if TYPE_CHECKING:
    from ..engine.engine import Engine

_SAMPLING_FIELDS = ("cfg_weight", "cfg_weight2", "temperature", "top_p", "steps")
_EVENT_TYPES = EventTypes("image_edit.partial_image", "image_edit.completed")
_IMAGE_FIELD = re.compile(r"images?(\[\d*\])?")  # names of a form's images: "image", "image[]"
_Body = TypeVar("_Body", bound=BaseModel)


async def read_edit(request: HTTPRequest) -> tuple[EditFields, list[ImageSource]]:
    """Return the fields and the images of a request that changes images.

    Raises:
        APIError: the body is neither a form nor JSON, is damaged, or has a field twice.
        RequestValidationError: a field is missing or has a wrong value.
    """
    kind = media_type(request.headers)
    if kind == FORM:
        return _read_form(await read_form(request))
    if kind == JSON:
        return _read_json(parse_json(await request.body()))
    raise APIError(415, f"the body must be a form or JSON: send 'Content-Type: {FORM}'")


async def edit_images(
    body: EditFields, sources: Sequence[ImageSource], request: HTTPRequest, service: Service
) -> Response:
    """Change images as a prompt says, and reply in one object or as a stream with previews.

    The images are read last, so that none is decoded for a body that is refused here.

    Args:
        body: the fields of the request.
        sources: the images to change.
        request: the client's HTTP request.
        service: the model and the server's parts.

    Raises:
        APIError: the request is refused, the client leaves, or a reply that is not streamed fails.
            A stream reports a failure in its last event.
    """
    pathway = service.engine.pathway
    if not isinstance(pathway, EditingPathway):
        message = "this model cannot change images: it generates them from prompts only"
        raise APIError(400, message, param="image")
    if body.mask is not None:
        message = "mask is not supported: the model changes an image as a whole, so leave it out"
        raise APIError(400, message, param="mask")
    check_fields(body, service)
    options = chosen_options(body, _SAMPLING_FIELDS, pathway.edit_options)
    numbers = image_numbers(body, service.engine.pathway.steps(options))
    if not sources:
        raise APIError(400, "there is no image: send the file as 'image'", param="image")
    images = await service.image_reader.read_all(sources, request, param="image")
    engine_request = DrawingRequest(
        body.prompt, options, **asdict(numbers), **edit_arguments(images, crop=body.crop or False)
    )
    return await reply_with_images(body, engine_request, _EVENT_TYPES, request, service)


def default_edit_sampling(engine: Engine) -> dict[str, float] | None:
    """Return an edit's default guidance and sampling, by field; None: the model cannot edit."""
    pathway = engine.pathway
    if not isinstance(pathway, EditingPathway):
        return None
    metadata = pathway.edit_options({}).metadata()
    return {name: float(metadata[name]) for name in _SAMPLING_FIELDS if name in metadata}


def _read_json(data: Any) -> tuple[EditFields, list[ImageSource]]:
    """Return the fields and the images of a JSON body.

    Raises:
        RequestValidationError: a field is missing or has a wrong value.
    """
    body = _validate(EditRequest, data)
    sources = []
    for index, reference in enumerate(body.images):
        sources.append(ImageSource(reference.image_url, f"images[{index}]"))
    return body, sources


def _read_form(form: Form) -> tuple[EditFields, list[ImageSource]]:
    """Return the fields and the images of a form. In a form, numbers and booleans are text.

    An image is a file, or a text field with a data URL. A file under the name of any other field
    becomes {}, a value that no field accepts.

    Raises:
        APIError: a field is given twice.
        RequestValidationError: a field is missing or has a wrong value.
    """
    fields: dict[str, object] = {}
    images: list[str | bytes] = []
    parts: list[tuple[str, str | bytes]] = [*form.fields, *form.files]
    for name, content in parts:
        if _IMAGE_FIELD.fullmatch(name):
            images.append(content)
        elif name in fields and name in EditFields.model_fields:
            raise APIError(400, f"{name} is given twice: send it once", param=name)
        else:
            fields[name] = content if isinstance(content, str) else {}
    sources = []
    for index, content in enumerate(images):
        name = "image" if len(images) == 1 else f"image[{index}]"
        sources.append(ImageSource(content, name))
    return _validate(EditFields, fields, strict=False), sources


def _validate(schema: type[_Body], data: Any, strict: bool | None = None) -> _Body:
    """Return a body as an object of its schema.

    Args:
        schema: the class of the body.
        data: the body.
        strict: whether text is refused as a number; None: as the schema says.

    Raises:
        RequestValidationError: a field is missing or has a wrong value.
    """
    try:
        return schema.model_validate(data, strict=strict)
    except ValidationError as error:
        # FastAPI's own locations begin with "body" too.
        mistakes = [mistake | {"loc": ("body", *mistake["loc"])} for mistake in error.errors()]
        raise RequestValidationError(mistakes) from None
