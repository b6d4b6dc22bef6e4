"""Janus inside an async app: one worker thread loads the model and does all its work; the event loop stays free.

python examples/async_app.py                                       with Janus-Tiny
python examples/async_app.py deepseek-ai/Janus-Pro-1B

A request that is cancelled stops the model within a step: closing the stream is all it takes.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx_janus


class Worker:
    """The thread that MLX lives in."""

    def __init__(self, model: str | None) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._janus = self._thread.submit(mlx_janus.load, model)

    async def stream(self, method: str, *arguments: Any, **options: Any) -> AsyncIterator[Any]:
        """``stream_text`` or ``stream_images``, an item at a time."""
        loop = asyncio.get_running_loop()

        def start() -> Any:
            return getattr(self._janus.result(), method)(*arguments, **options)

        steps = await loop.run_in_executor(self._thread, start)
        try:
            while (step := await loop.run_in_executor(self._thread, next, steps, None)) is not None:
                yield step
        finally:
            self._thread.submit(steps.close)

    async def close(self) -> None:
        """End the thread; a program that exits without may abort."""
        janus = await asyncio.wrap_future(self._janus)
        await asyncio.get_running_loop().run_in_executor(self._thread, janus.close)
        self._thread.shutdown()


async def main(model: str | None = None) -> None:
    worker = Worker(model)

    async def draw(prompt: str) -> Any:
        steps = [step async for step in worker.stream("stream_images", prompt, seed=1)]
        return steps[-1].images[0].image

    async def answer(question: str, picture: Any) -> str:
        return "".join([chunk.text async for chunk in worker.stream("stream_text", question, picture)])

    async def heartbeat() -> int:
        beats = 0
        while True:
            await asyncio.sleep(0.01)
            beats += 1
            if beats == 3:
                print("the event loop is free")

    alive = asyncio.create_task(heartbeat())
    circle, square = await asyncio.gather(draw("a red circle"), draw("a blue square"))  # they take turns
    print("circle:", await answer("What colour is the circle?", circle))
    print("square:", await answer("What colour is the square?", square))
    cancelled = asyncio.create_task(draw("a star"))
    await asyncio.sleep(0.1)
    cancelled.cancel()
    print("again:", await answer("What colour is the circle?", circle))
    alive.cancel()
    await worker.close()


try:
    asyncio.run(main(*sys.argv[1:2]))
except mlx_janus.JanusError as error:
    sys.exit(f"Error: {error}")
