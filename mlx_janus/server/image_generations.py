"""``/v1/images/generations``: from a prompt to images."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse, Response
from starlette.requests import Request as HTTPRequest

from ..decode.sampling import random_seed
from ..engine.messages import DrawingRequest, Drawn, Event, Partial
from ..limits import MAX_SEED
from .errors import APIError
from .event_streams import EventStream, collect_events, server_sent_event
from .images import png_base64
from .schema import ImageData, ImageEvent, ImageRequest, ImagesReply, ImageUsage, TokenKinds
from .service import Service

if TYPE_CHECKING:
    from ..config import JanusConfig
    from ..engine.engine import Engine
    from ..engine.tickets import Ticket


async def generate_images(body: ImageRequest, request: HTTPRequest, service: Service) -> Response:
    """Generate images from a prompt, in one object or as a stream with previews.

    Raises:
        APIError: the request is refused, the client leaves, or a reply that is not streamed fails.
            A stream reports a failure in its last event.
    """
    service.check_model(body.model)
    engine_request = _to_engine_request(body, service.engine)
    ticket = service.submit(engine_request, param="prompt")
    record = service.metrics.event_recorder()
    size = _size_text(service.engine.config)
    if body.stream:
        events = _events(ticket, engine_request.seed, size, record)
        return EventStream(events, ticket, service.settings.heartbeat_seconds)
    collected = await collect_events(ticket, request, record, param="prompt")
    finished = [event for event in collected if isinstance(event, Drawn)]
    # Images may have finished in any order.
    finished.sort(key=lambda event: event.index)
    data = []
    for event in finished:
        generated = event.image
        png = await png_base64(generated.image, generated.metadata)
        data.append(ImageData(b64_json=png, seed=generated.seed))
    reply = ImagesReply(created=int(time.time()), data=data, size=size, usage=_usage(finished))
    return JSONResponse(reply.model_dump())


def _size_text(config: JanusConfig) -> str:
    """Return the width and height of the model's images as text, such as "384x384"."""
    return f"{config.image_size}x{config.image_size}"


def _to_engine_request(body: ImageRequest, engine: Engine) -> DrawingRequest:
    """Convert the body to the engine's request.

    Its seed is the first image's. The other images use the following numbers.

    Raises:
        APIError: the size is not the model's, or the last image's seed would be too large.
        OptionError: the model does not support an option.
    """
    size = _size_text(engine.config)
    if body.size not in (None, "auto", size):
        message = f"size must be 'auto' or the model's own '{size}', got {body.size!r}"
        raise APIError(400, message, param="size")
    n = body.n or 1
    seed = random_seed() if body.seed is None else body.seed
    if seed + n - 1 > MAX_SEED:
        raise APIError(
            400,
            f"the last image's seed would be above {MAX_SEED}: take a smaller one",
            param="seed",
        )
    sampling = {"cfg_weight": body.cfg_weight, "temperature": body.temperature, "top_p": body.top_p}
    options = engine.pathway.options(sampling)  # a None takes the model's default
    partial_images = (body.partial_images or 0) if body.stream else 0  # only streams have previews
    return DrawingRequest(body.prompt, options, seed, n, partial_images)


async def _events(
    ticket: Ticket, first_seed: int, size: str, record: Callable[[Event], None]
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a streamed reply.

    Args:
        ticket: the request in the engine.
        first_seed: seed of image 0. A preview's seed is ``first_seed`` plus the image's index.
        size: width and height of each image, as text.
        record: called with each of the engine's events.
    """
    async for event in ticket:
        record(event)
        if isinstance(event, Partial):
            reply_event = ImageEvent(
                type="image_generation.partial_image",
                partial_image_index=event.number,
                index=event.index,
                seed=first_seed + event.index,
                b64_json=await png_base64(event.image, {}),
                created_at=int(time.time()),
                size=size,
            )
        elif isinstance(event, Drawn):
            reply_event = ImageEvent(
                type="image_generation.completed",
                index=event.index,
                seed=event.image.seed,
                b64_json=await png_base64(event.image.image, event.image.metadata),
                created_at=int(time.time()),
                size=size,
                usage=_usage([event]),
            )
        else:
            continue
        yield server_sent_event(reply_event, reply_event.type)


def _usage(finished: Sequence[Drawn]) -> ImageUsage:
    """Count the tokens of a prompt and its images. The prompt counts once for all images.

    Args:
        finished: one image or more of the same prompt.
    """
    prompt_tokens = finished[0].prompt_tokens
    image_tokens = sum(event.image.steps for event in finished)  # a step counts as a token
    return ImageUsage(
        input_tokens=prompt_tokens,
        input_tokens_details=TokenKinds(image_tokens=0, text_tokens=prompt_tokens),
        output_tokens=image_tokens,
        output_tokens_details=TokenKinds(image_tokens=image_tokens, text_tokens=0),
        total_tokens=prompt_tokens + image_tokens,
    )
