"""``/v1/images/generations``: from a prompt to images."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse, Response
from starlette.requests import Request as HTTPRequest

from ..decode.sampling import random_seed
from ..engine.messages import DrawingRequest, Drawn, Event, Partial
from ..limits import MAX_SEED
from .errors import APIError
from .event_streams import EventStream, collect_events, server_sent_event
from .image_store import PATH as IMAGES_PATH
from .images import ReplyFormat
from .schema import (
    ImageData,
    ImageEvent,
    ImageFormat,
    ImageRequest,
    ImagesReply,
    ImageUsage,
    TokenKinds,
)
from .service import Service

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.tickets import Ticket

OPENAI_SIZES = (
    "256x256",
    "512x512",
    "1024x1024",
    "1024x1536",
    "1536x1024",
    "1024x1792",
    "1792x1024",
)

_SAMPLING_FIELDS = ("cfg_weight", "temperature", "top_p")


@dataclass(frozen=True)
class _CommonFields:
    """The fields that all events of a stream repeat."""

    output_format: ImageFormat
    size: str


async def generate_images(body: ImageRequest, request: HTTPRequest, service: Service) -> Response:
    """Generate images from a prompt, in one object or as a stream with previews.

    Raises:
        APIError: the request is refused, the client leaves, or a reply that is not streamed fails.
            A stream reports a failure in its last event.
    """
    service.check_model(body.model)
    if field := body.unsupported_field():
        raise APIError(400, f"{field} is not supported: leave it out", param=field)
    reply_format = _reply_format(body, service)
    engine_request = _to_engine_request(body, service.engine)
    ticket = service.submit(engine_request, param="prompt")
    record = service.metrics.event_recorder()
    common_fields = _CommonFields(
        output_format=reply_format.name,
        size=_size_text(reply_format.side or service.engine.config.image_size),
    )
    if body.stream:
        events = _image_events(ticket, engine_request.seed, reply_format, common_fields, record)
        return EventStream(events, ticket, service.settings.heartbeat_seconds)
    collected = await collect_events(ticket, request, record, param="prompt")
    finished = [event for event in collected if isinstance(event, Drawn)]
    # Images may have finished in any order.
    finished.sort(key=lambda event: event.index)
    data = []
    for event in finished:
        generated = event.image
        file = await reply_format.encode(generated.image, generated.metadata)
        if _wants_url(body):
            name = service.images.add(file, reply_format.suffix, reply_format.media_type)
            url = str(request.base_url.replace(path=IMAGES_PATH + name))
            data.append(ImageData(url=url, seed=generated.seed))
        else:
            b64_text = base64.b64encode(file).decode("ascii")
            data.append(ImageData(b64_json=b64_text, seed=generated.seed))
    reply = ImagesReply(
        **asdict(common_fields), created=int(time.time()), data=data, usage=_usage(finished)
    )
    return JSONResponse(reply.model_dump())


def default_sampling(engine: Engine) -> dict[str, float]:
    """Return the model's own guidance and sampling, by field of an image request."""
    metadata = engine.pathway.options({}).metadata()
    return {name: float(metadata[name]) for name in _SAMPLING_FIELDS if name in metadata}


def _wants_url(body: ImageRequest) -> bool:
    """Return whether the reply has addresses of the images instead of the images.

    As in OpenAI's API, addresses are the default of the models whose names begin with "dall-e-".
    """
    if body.response_format is None:
        return body.model is not None and body.model.startswith("dall-e-")
    return body.response_format == "url"


def _size_text(side: int) -> str:
    """Return the width and height of square images as text, such as "384x384"."""
    return f"{side}x{side}"


def _reply_format(body: ImageRequest, service: Service) -> ReplyFormat:
    """Return the format and size of the reply's images.

    The model's images are square. For one of OpenAI's sizes, they keep the model's own size, or are
    enlarged to the shorter side of the wanted size if the settings say so.

    Raises:
        APIError: the size is neither the model's nor one of OpenAI's.
    """
    own_size = _size_text(service.engine.config.image_size)
    if body.size not in (None, "auto", own_size, *OPENAI_SIZES):
        message = (
            f"size must be 'auto', the model's own '{own_size}' or one of OpenAI's, "
            f"such as '1024x1024', got {body.size!r}"
        )
        raise APIError(400, message, param="size")
    name = body.output_format or "png"
    quality = body.output_compression
    if name == "png":  # PNG is lossless and has no quality, but some clients send one
        quality = None
    side = None
    if service.settings.upscale_to_size and body.size in OPENAI_SIZES:
        side = min(map(int, body.size.split("x")))
    return ReplyFormat(name, quality, side)


def _to_engine_request(body: ImageRequest, engine: Engine) -> DrawingRequest:
    """Convert the body to the engine's request.

    Its seed is the first image's, random if the body has none. The other images use the following
    numbers.

    Raises:
        APIError: the last image's seed would be too large.
        OptionError: the model does not support an option.
    """
    n = body.n or 1
    seed = random_seed() if body.seed is None else body.seed
    if seed + n - 1 > MAX_SEED:
        raise APIError(
            400,
            f"the last image's seed would be above {MAX_SEED}: take a smaller one",
            param="seed",
        )
    sampling = {name: getattr(body, name) for name in _SAMPLING_FIELDS}
    options = engine.pathway.options(sampling)  # a None takes the model's default
    partial_images = (body.partial_images or 0) if body.stream else 0  # only streams have previews
    return DrawingRequest(body.prompt, options, seed, n, partial_images)


async def _image_events(
    ticket: Ticket,
    first_seed: int,
    reply_format: ReplyFormat,
    common_fields: _CommonFields,
    record: Callable[[Event], None],
) -> AsyncGenerator[bytes, None]:
    """Yield the encoded events of a streamed reply.

    Args:
        ticket: the request in the engine.
        first_seed: seed of image 0. A preview's seed is ``first_seed`` plus the image's index.
        reply_format: format of finished images and previews.
        common_fields: the fields that all events repeat.
        record: called with each of the engine's events.
    """
    async for event in ticket:
        record(event)
        if isinstance(event, Partial):
            reply_event = ImageEvent(
                **asdict(common_fields),
                type="image_generation.partial_image",
                partial_image_index=event.number,
                index=event.index,
                seed=first_seed + event.index,
                b64_json=await reply_format.encode_base64(event.image, {}),  # no metadata
                created_at=int(time.time()),
            )
        elif isinstance(event, Drawn):
            generated = event.image
            reply_event = ImageEvent(
                **asdict(common_fields),
                type="image_generation.completed",
                index=event.index,
                seed=generated.seed,
                b64_json=await reply_format.encode_base64(generated.image, generated.metadata),
                created_at=int(time.time()),
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
