"""Janus inside an async app: any thread may use the model, so the event loop's own pool of threads will do.

python examples/async_app.py                                       with Janus-Tiny
python examples/async_app.py deepseek-ai/Janus-Pro-1B

A request that is cancelled stops the model within a step: closing the stream is all it takes.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import mlx_janus


async def steps_of(stream: Any) -> AsyncIterator[Any]:
    """The items of ``stream_text`` or ``stream_images``, while the event loop stays free."""
    try:
        while (step := await asyncio.to_thread(next, stream, None)) is not None:
            yield step
    finally:
        await asyncio.to_thread(stream.close)


async def main(model: str | None = None) -> None:
    janus = await asyncio.to_thread(mlx_janus.load, model)

    async def draw(prompt: str) -> Any:
        steps = [step async for step in steps_of(janus.stream_images(prompt, seed=1))]
        return steps[-1].images[0].image

    async def answer(question: str, picture: Any) -> str:
        return "".join(
            [chunk.text async for chunk in steps_of(janus.stream_text(question, picture))]
        )

    async def heartbeat() -> int:
        beats = 0
        while True:
            await asyncio.sleep(0.01)
            beats += 1
            if beats == 3:
                print("the event loop is free")

    alive = asyncio.create_task(heartbeat())
    circle, square = await asyncio.gather(
        draw("a red circle"), draw("a blue square")
    )  # step by step, in turns
    print("circle:", await answer("What colour is the circle?", circle))
    print("square:", await answer("What colour is the square?", square))
    cancelled = asyncio.create_task(draw("a star"))
    await asyncio.sleep(0.1)
    cancelled.cancel()
    print("again:", await answer("What colour is the circle?", circle))
    alive.cancel()


try:
    asyncio.run(main(*sys.argv[1:2]))
except mlx_janus.JanusError as error:
    sys.exit(f"Error: {error}")
