"""``/v1/images/generations``: from a prompt to images."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from fastapi.responses import Response
from starlette.requests import Request as HTTPRequest

from ..engine.messages import DrawingRequest
from .image_replies import (
    EventTypes,
    check_fields,
    chosen_options,
    image_numbers,
    reply_with_images,
)
from .schema import ImageRequest
from .service import Service

if TYPE_CHECKING:
    from ..engine.engine import Engine

_SAMPLING_FIELDS = ("cfg_weight", "temperature", "top_p", "steps")
_EVENT_TYPES = EventTypes("image_generation.partial_image", "image_generation.completed")


async def generate_images(body: ImageRequest, request: HTTPRequest, service: Service) -> Response:
    """Generate images from a prompt, in one object or as a stream with previews.

    Raises:
        APIError: the request is refused, the client leaves, or a reply that is not streamed fails.
            A stream reports a failure in its last event.
    """
    check_fields(body, service)
    pathway = service.engine.pathway
    options = chosen_options(body, _SAMPLING_FIELDS, pathway.options)
    numbers = image_numbers(body, pathway.steps(options))
    engine_request = DrawingRequest(body.prompt, options, **asdict(numbers))
    return await reply_with_images(body, engine_request, _EVENT_TYPES, request, service)


def default_sampling(engine: Engine) -> dict[str, float]:
    """Return the model's default guidance, sampling and steps, by field of an image request."""
    metadata = engine.pathway.options({}).metadata()
    return {name: float(metadata[name]) for name in _SAMPLING_FIELDS if name in metadata}
