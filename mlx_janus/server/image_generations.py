"""``/v1/images/generations``: a prompt in, pictures out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse, Response
from starlette.requests import Request as HTTPRequest

from ..decode.sampling import random_seed
from ..engine.messages import DrawingRequest, Drawn, Event, Partial
from ..limits import MAX_SEED
from .errors import Problem
from .event_streams import EventStream, server_sent, whole
from .pictures import to_base64
from .schema import DrawnImage, DrawnTokens, ImageEvent, ImageRequest, ImagesReply, ImageUsage
from .service import Service

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.tickets import Ticket


async def draw(body: ImageRequest, request: HTTPRequest, service: Service) -> Response:
    """The reply to a prompt: all pictures in one object, or a stream of them, as they form if that is asked for.

    Raises:
        Problem: it is refused.
    """
    service.check_model(body.model)
    asked = _to_request(body, service.engine)
    ticket, heard = service.submit(asked, "prompt"), service.metrics.listener()
    side = service.engine.config.image_size
    if body.stream:
        events = _events(ticket, asked.seed, f"{side}x{side}", heard)
        return EventStream(events, ticket, service.settings.heartbeat_seconds)
    drawn = [event for event in await whole(ticket, request, heard, "prompt") if isinstance(event, Drawn)]
    drawn.sort(key=lambda event: event.index)
    data = [
        DrawnImage(b64_json=await to_base64(event.image.image, event.image.metadata), seed=event.image.seed)
        for event in drawn
    ]
    reply = ImagesReply(created=int(time.time()), data=data, size=f"{side}x{side}", usage=_usage(drawn))
    return JSONResponse(reply.model_dump())


def _to_request(body: ImageRequest, engine: Engine) -> DrawingRequest:
    side = engine.config.image_size
    if body.size not in (None, "auto", f"{side}x{side}"):
        raise Problem(400, f"size must be 'auto' or the model's own '{side}x{side}', got {body.size!r}", param="size")
    n, seed = body.n or 1, random_seed() if body.seed is None else body.seed
    if seed + n - 1 > MAX_SEED:
        raise Problem(400, f"the last picture's seed would be above {MAX_SEED}: take a smaller one", param="seed")
    choices = {"cfg_weight": body.cfg_weight, "temperature": body.temperature, "top_p": body.top_p}
    options = engine.pathway.options(choices)
    return DrawingRequest(body.prompt, options, seed, n, body.partial_images or 0 if body.stream else 0)


def _usage(drawn: Sequence[Drawn]) -> ImageUsage:
    """The prompt counts once, whatever the number of pictures."""
    prompt, pictures = drawn[0].prompt_tokens, sum(event.image.steps for event in drawn)
    return ImageUsage(
        input_tokens=prompt,
        input_tokens_details=DrawnTokens(image_tokens=0, text_tokens=prompt),
        output_tokens=pictures,
        output_tokens_details=DrawnTokens(image_tokens=pictures, text_tokens=0),
        total_tokens=prompt + pictures,
    )


async def _events(
    ticket: Ticket, first_seed: int, size: str, heard: Callable[[Event], None]
) -> AsyncGenerator[bytes, None]:
    async for event in ticket:
        heard(event)
        if isinstance(event, Partial):
            shown = ImageEvent(
                type="image_generation.partial_image",
                partial_image_index=event.number,
                index=event.index,
                seed=first_seed + event.index,
                b64_json=await to_base64(event.image, {}),
                created_at=int(time.time()),
                size=size,
            )
        elif isinstance(event, Drawn):
            shown = ImageEvent(
                type="image_generation.completed",
                index=event.index,
                seed=event.image.seed,
                b64_json=await to_base64(event.image.image, event.image.metadata),
                created_at=int(time.time()),
                size=size,
                usage=_usage([event]),
            )
        else:
            continue
        yield server_sent(shown, shown.type)
