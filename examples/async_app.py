"""Use Janus in an async app.

Any thread may use the model, so ``asyncio.to_thread`` is enough. To cancel a request, close its
stream: the model stops within a step.

Without a model, this uses Janus-Tiny:
    python examples/async_app.py
    python examples/async_app.py deepseek-ai/Janus-Pro-1B
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import mlx_janus


async def steps_of(stream: Any) -> AsyncIterator[Any]:
    """Yield the items of ``stream_text`` or ``stream_images`` without blocking the event loop."""
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

    async def answer(question: str, image: Any) -> str:
        stream = janus.stream_text(question, image)
        return "".join([chunk.text async for chunk in steps_of(stream)])

    async def heartbeat() -> int:
        beats = 0
        while True:
            await asyncio.sleep(0.01)
            beats += 1
            if beats == 3:
                print("the event loop is free")

    alive = asyncio.create_task(heartbeat())
    # The two streams take turns step by step.
    circle, square = await asyncio.gather(draw("a red circle"), draw("a blue square"))
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
