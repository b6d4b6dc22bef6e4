"""An engine whose model is in low-memory mode: one task's weights at a time."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from PIL import Image

import mlx_janus
from mlx_janus.engine.engine import Engine
from mlx_janus.engine.messages import Answered, Drawn, Event, Partial
from mlx_janus.inference.loaded import LoadedModel, Task
from mlx_janus.pipeline import JanusPipeline
from tests.support.engines import ask, draw, drawn_alone, events, served


def load() -> JanusPipeline:
    return mlx_janus.load("tiny", low_memory=True)


def test_answers_and_images_are_those_of_the_library(
    janus: JanusPipeline, pictures: list[Image.Image]
) -> None:
    async def work(engine: Engine) -> list[list[Event]]:
        requests = [
            ask("what is in the picture?", pictures[0]),
            draw("a star", 3, n=2, partial_images=4),
            ask("what is in the picture?", pictures[1]),
            draw("a red circle", 5),
        ]
        tickets = [engine.submit(request) for request in requests]
        return list(await asyncio.wait_for(asyncio.gather(*map(events, tickets)), 100))

    first, stars, second, circle = served(work, load)
    for told, picture in ((first, pictures[0]), (second, pictures[1])):
        alone = janus.generate_text("what is in the picture?", picture)
        assert isinstance(told[-1], Answered)
        assert told[-1].result.tokens == alone.tokens
    assert not any(isinstance(event, Partial) for event in stars)
    drawn = {event.image.seed: event.image for event in stars if isinstance(event, Drawn)}
    for seed in (3, 4):
        assert np.array_equal(drawn[seed].tokens, drawn_alone(janus, "a star", seed))
    (only,) = circle
    assert isinstance(only, Drawn)
    assert np.array_equal(only.image.tokens, drawn_alone(janus, "a red circle", 5))


def test_weights_are_read_once_a_request_not_once_a_step(
    pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers and images that take turns at every step would read the weights each time."""
    read: list[Task] = []
    load_weights = LoadedModel.load_weights_for

    def noted(janus: LoadedModel, task: Task) -> None:
        if task not in janus._loaded_tasks:
            read.append(task)
        load_weights(janus, task)

    monkeypatch.setattr(LoadedModel, "load_weights_for", noted)

    async def work(engine: Engine) -> None:
        requests = [ask("what is it?", pictures[0]), draw("a star", 1, n=2, partial_images=8)]
        requests += [ask("what is it?", pictures[1]), draw("a star", 7)]
        await asyncio.gather(*[events(engine.submit(request)) for request in requests])

    served(work, load)
    assert read == ["encode", "answer", "draw", "decode", "encode", "answer", "draw", "decode"]


def test_the_weights_of_one_task_are_held(pictures: list[Image.Image]) -> None:
    loaded: list[JanusPipeline] = []

    def kept() -> JanusPipeline:
        loaded.append(load())
        return loaded[0]

    async def work(engine: Engine) -> None:
        assert loaded[0]._held == set()
        await events(engine.submit(draw("a star", 1)))
        assert loaded[0]._held == set(loaded[0]._weights_of("decode"))
        await events(engine.submit(ask("hello", max_tokens=2)))
        assert loaded[0]._held == set(loaded[0]._weights_of("answer"))

    served(work, kept)
