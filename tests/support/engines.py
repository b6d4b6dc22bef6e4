"""An engine to test: started, asked, compared with the library alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from PIL import Image

import mlx_janus
from mlx_janus.decode.image import DrawOptions
from mlx_janus.decode.text import TextOptions
from mlx_janus.engine.engine import Engine
from mlx_janus.engine.messages import AnswerRequest, DrawingRequest, Event
from mlx_janus.engine.tickets import Counts, Ticket
from mlx_janus.pipeline import JanusPipeline
from mlx_janus.processing.prompts import Turn
from mlx_janus.worlds import shapes

OPTIONS = DrawOptions(2.5, 0.6)


def tiny() -> JanusPipeline:
    return mlx_janus.load("tiny")


def some_pictures() -> list[Image.Image]:
    """Six scenes."""
    random = np.random.default_rng(4)
    return [shapes.render(shapes.sample_scene(random)) for _ in range(6)]


def served(
    work: Callable[[Engine], Awaitable[Any]], load: Callable[[], JanusPipeline] = tiny, **sizes: int
) -> Any:
    """What ``work`` gives on a started engine, which is closed after it."""

    async def main() -> Any:
        engine = Engine(load, **sizes)
        await engine.start()
        try:
            return await asyncio.wait_for(work(engine), 120)
        finally:
            await engine.close(0)

    return asyncio.run(main())


async def events(ticket: Ticket) -> list[Event]:
    return [event async for event in ticket]


async def until_idle(engine: Engine) -> None:
    while engine.counts != Counts():
        await asyncio.sleep(0.01)


def ask(
    text: str, *shown: Image.Image, n: int = 1, system: str | None = None, **options: Any
) -> AnswerRequest:
    return AnswerRequest(
        (Turn("user", text, len(shown)),), shown, TextOptions(**options), system, n
    )


def draw(prompt: str, seed: int, n: int = 1, partial_images: int = 0) -> DrawingRequest:
    return DrawingRequest(prompt, OPTIONS, seed, n, partial_images)


def drawn_alone(janus: JanusPipeline, prompt: str, seed: int) -> np.ndarray:
    (image,) = janus.generate_images(prompt, seed=seed, cfg_weight=2.5, temperature=0.6, exact=True)
    return image.tokens
