"""Generated images as replies: in one object, or as a stream with previews."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse, Response
from starlette.requests import Request as HTTPRequest

from ..decode.sampling import random_seed
from ..engine.messages import DrawingRequest, Drawn, Event, Partial
from ..errors import OptionError
from ..inference.image_generation import without_neutral_values
from ..inference.pathway import ImageOptions
from ..limits import MAX_SEED
from .errors import APIError, to_api_error
from .event_streams import EventStream, collect_events, server_sent_event
from .image_store import PATH as IMAGES_PATH
from .images import ReplyFormat
from .schema import (
    ImageData,
    ImageEvent,
    ImageEventType,
    ImageFields,
    ImageFormat,
    ImagesReply,
    ImageUsage,
    TokenKinds,
)
from .service import Service

if TYPE_CHECKING:
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


@dataclass(frozen=True)
class EventTypes:
    """The names of a stream's events."""

    preview: ImageEventType
    completed: ImageEventType


@dataclass(frozen=True)
class _CommonFields:
    """The fields that all events of a stream repeat."""

    output_format: ImageFormat
    size: str


async def reply_with_images(
    body: ImageFields,
    engine_request: DrawingRequest,
    event_types: EventTypes,
    request: HTTPRequest,
    service: Service,
) -> Response:
    """Generate images, and return them in the form that the body asks for.

    Args:
        body: the client's request; ``check_fields`` has accepted it.
        engine_request: the body as the engine takes it.
        event_types: the names of a stream's events.
        request: the client's HTTP request.
        service: the server's parts.

    Raises:
        APIError: the engine refuses the request, the client leaves, or a reply that is not streamed
            fails. A stream reports a failure in its last event.
    """
    reply_format = choose_format(body, service)
    ticket = service.submit(engine_request, param="prompt")
    record = service.metrics.event_recorder()
    common_fields = _CommonFields(
        output_format=reply_format.name,
        size=size_text(*reply_format.enlarged(_drawn_size(engine_request, service))),
    )
    if body.stream:
        events = _image_events(
            ticket, engine_request.seed, reply_format, common_fields, event_types, record
        )
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
            url = _store(file, reply_format, request, service)
            data.append(ImageData(url=url, seed=generated.seed))
        else:
            b64_text = base64.b64encode(file).decode("ascii")
            data.append(ImageData(b64_json=b64_text, seed=generated.seed))
    reply = ImagesReply(
        **asdict(common_fields), created=int(time.time()), data=data, usage=_usage(finished)
    )
    return JSONResponse(reply.model_dump())


def _drawn_size(request: DrawingRequest, service: Service) -> tuple[int, int]:
    """Return the width and height of a request's images, as the model draws them."""
    if request.crop is None:
        side = service.engine.config.image_size
        return side, side
    left, top, right, bottom = request.crop
    return right - left, bottom - top


def _store(file: bytes, reply_format: ReplyFormat, request: HTTPRequest, service: Service) -> str:
    """Store an image file, and return its address, which begins with the Host of the request."""
    name = service.images.add(file, reply_format.suffix, reply_format.media_type)
    return str(request.base_url.replace(path=IMAGES_PATH + name))


def check_fields(body: ImageFields, service: Service) -> None:
    """Refuse a body whose size or other fields the model or this server does not support.

    Raises:
        APIError: a field is not supported (400).
    """
    if field := body.unsupported_field():
        raise APIError(400, f"{field} is not supported: leave it out", param=field)
    choose_format(body, service)  # refuses an unsupported size


@dataclass(frozen=True)
class ImageNumbers:
    """The number of images, the first image's seed, and the number of previews of each image."""

    n: int
    seed: int
    partial_images: int


def chosen_options(
    body: ImageFields, names: Sequence[str], check: Callable[[Mapping[str, Any]], ImageOptions]
) -> ImageOptions:
    """Check and return the options of a body. An option that is left out takes the model's default.

    Args:
        body: the client's request.
        names: the fields that are options.
        check: checks the options: ``ImagePathway.options``, or ``EditingPathway.edit_options``.

    Raises:
        APIError: the model does not support an option or its value. The error names the option.
    """
    chosen = without_neutral_values({name: getattr(body, name) for name in names})
    try:
        return check(chosen)
    except OptionError as error:
        # The message begins with the name of the refused option.
        refused = next((name for name in names if str(error).startswith(f"{name} ")), None)
        raise to_api_error(error, refused) from None


def image_numbers(body: ImageFields, steps: int) -> ImageNumbers:
    """Return the numbers of images and of previews that a body asks for, and the first seed.

    A body without a seed gets a random one. Each further image uses the next number as its seed. An
    image has at most one preview a step.

    Args:
        body: the client's request.
        steps: the number of steps of an image.

    Raises:
        APIError: the last image's seed would be too large.
    """
    n = body.n or 1
    seed = random_seed() if body.seed is None else body.seed
    if seed + n - 1 > MAX_SEED:
        raise APIError(
            400,
            f"the last image's seed would be above {MAX_SEED}: take a smaller one",
            param="seed",
        )
    partial_images = (body.partial_images or 0) if body.stream else 0  # only streams have previews
    return ImageNumbers(n, seed, min(partial_images, steps))


def _wants_url(body: ImageFields) -> bool:
    """Return whether the reply has addresses of the images instead of the images.

    As in OpenAI's API, addresses are the default for models whose names begin with "dall-e-".
    """
    if body.response_format is None:
        return body.model is not None and body.model.startswith("dall-e-")
    return body.response_format == "url"


def size_text(width: int, height: int) -> str:
    """Return the width and height of an image as text, such as "384x384"."""
    return f"{width}x{height}"


def choose_format(body: ImageFields, service: Service) -> ReplyFormat:
    """Return the format and size of the reply's images.

    The model's images are square. If the body asks for one of OpenAI's sizes, the images keep the
    model's own size; with the setting ``upscale_to_size``, they are enlarged to the shorter side of
    the wanted size.

    Raises:
        APIError: the size is neither the model's nor one of OpenAI's.
    """
    own_side = service.engine.config.image_size
    own_size = size_text(own_side, own_side)
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


async def _image_events(
    ticket: Ticket,
    first_seed: int,
    reply_format: ReplyFormat,
    common_fields: _CommonFields,
    event_types: EventTypes,
    record: Callable[[Event], None],
) -> AsyncGenerator[bytes, None]:
    """Yield the encoded events of a streamed reply.

    Args:
        ticket: the request in the engine.
        first_seed: seed of the first image. A preview's seed is ``first_seed`` plus the index of
            its image.
        reply_format: format of finished images and previews.
        common_fields: the fields that all events repeat.
        event_types: the names of the events.
        record: called with each of the engine's events.
    """
    async for event in ticket:
        record(event)
        if isinstance(event, Partial):
            reply_event = ImageEvent(
                **asdict(common_fields),
                type=event_types.preview,
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
                type=event_types.completed,
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
    input_image_tokens = finished[0].input_image_tokens
    image_tokens = sum(event.image.steps for event in finished)  # a step counts as a token
    return ImageUsage(
        input_tokens=prompt_tokens,
        input_tokens_details=TokenKinds(
            image_tokens=input_image_tokens, text_tokens=prompt_tokens - input_image_tokens
        ),
        output_tokens=image_tokens,
        output_tokens_details=TokenKinds(image_tokens=image_tokens, text_tokens=0),
        total_tokens=prompt_tokens + image_tokens,
    )
