"""Events of progress, for requests that ask for them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from PIL import Image

from mlx_janus.engine.engine import Engine
from mlx_janus.engine.messages import Event, Progress
from tests.support.engines import ask, draw, events, served


def test_only_requests_that_ask_get_events_of_progress(pictures: list[Image.Image]) -> None:
    long_question = "what is in the picture? " * 60
    asked = [draw("a star", 1, n=2), ask(long_question, pictures[0], max_tokens=1)]
    asked += [replace(request, with_progress=True) for request in asked]

    async def work(engine: Engine) -> list[list[Event]]:
        return await asyncio.gather(*(events(engine.submit(request)) for request in asked))

    plain_drawing, plain_answer, drawing, answer = served(work)
    for told in (plain_drawing, plain_answer):
        assert not any(isinstance(event, Progress) for event in told)
    steps = [event for event in drawing if isinstance(event, Progress)]
    assert {(event.stage, event.total) for event in steps} == {("draw", 128)}
    assert [event.done for event in steps] == list(range(2, 129, 2))  # both images at once
    read = [event for event in answer if isinstance(event, Progress)]
    assert {event.stage for event in read} == {"read"}
    assert 0 < read[0].done < read[0].total
