"""``/v1/images/generations``: from a prompt to images."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from fastapi.responses import Response
from starlette.requests import Request as HTTPRequest

from ..engine.messages import DrawingRequest
from .image_replies import EventTypes, check_fields, image_numbers, reply_with_images
from .schema import ImageRequest
from .service import Service

if TYPE_CHECKING:
    from ..engine.engine import Engine

_SAMPLING_FIELDS = ("cfg_weight", "temperature", "top_p")
_EVENT_TYPES = EventTypes("image_generation.partial_image", "image_generation.completed")


async def generate_images(body: ImageRequest, request: HTTPRequest, service: Service) -> Response:
    """Generate images from a prompt, in one object or as a stream with previews.

    Raises:
        APIError: the request is refused, the client leaves, or a reply that is not streamed fails.
            A stream reports a failure in its last event.
        OptionError: the model does not support an option.
    """
    check_fields(body, service)
    sampling = {name: getattr(body, name) for name in _SAMPLING_FIELDS}
    options = service.engine.pathway.options(sampling)  # a None takes the model's default
    numbers = image_numbers(body)
    engine_request = DrawingRequest(body.prompt, options, **asdict(numbers))
    return await reply_with_images(body, engine_request, _EVENT_TYPES, request, service)


def default_sampling(engine: Engine) -> dict[str, float]:
    """Return the model's own guidance and sampling, by field of an image request."""
    metadata = engine.pathway.options({}).metadata()
    return {name: float(metadata[name]) for name in _SAMPLING_FIELDS if name in metadata}
