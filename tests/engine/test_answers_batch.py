"""Answers of the engine run in one batch: what waits, what leaves, and what it counts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import mlx.core as mx
import pytest
from PIL import Image

from mlx_janus.decode.answer_batch import AnswerBatch
from mlx_janus.decode.grammar import schema_grammar
from mlx_janus.engine.engine import Engine
from mlx_janus.engine.messages import Answered, AnswerRequest, Drawn, Event
from mlx_janus.engine.text_queue import TextScheduler, TextTask
from mlx_janus.engine.tickets import Ticket
from mlx_janus.inference.text_generation import last_result
from mlx_janus.models.backbone import cache_bytes
from mlx_janus.models.janus import JanusModel
from mlx_janus.pipeline import JanusPipeline
from tests.support.engines import ask, draw, events, served, until_idle

LISTS = schema_grammar({"type": "array", "items": {"type": "boolean"}, "minItems": 2})


def assert_as_alone(janus: JanusPipeline, request: AnswerRequest, told: list[Event]) -> None:
    """The answer is the one of the library."""
    last = told[-1]
    assert isinstance(last, Answered)
    alone = last_result(janus.stream_turns(request.turns, request.images, options=request.options))
    assert last.result.tokens == alone.tokens
    assert last.result.text == alone.text
    assert last.result.finish_reason == alone.finish_reason


def lasting(picture: Image.Image, seed: int = 0) -> AnswerRequest:
    """A request whose answer does not end by itself for long."""
    return ask("describe the picture", picture, max_tokens=900, temperature=50.0, seed=seed)


def test_eight_answers_of_all_kinds_are_one_batch(
    janus: JanusPipeline, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    step = AnswerBatch.step
    monkeypatch.setattr(
        AnswerBatch, "step", lambda self: (rows.append(len(self.answers)), step(self))[1]
    )
    words = "is there a red circle above the blue square or a green star? " * 12
    long: dict[str, Any] = {
        "max_tokens": 48,
        "logit_bias": dict.fromkeys(janus.prompts.end_ids, -100.0),
    }
    asked = [
        ask("describe the picture", pictures[0], temperature=1.0, seed=1, **long),
        ask(words, temperature=0.8, top_p=0.9, seed=2, **long),
        ask("what is it?", max_tokens=20, temperature=1.0, grammar=LISTS, seed=3),
        ask("how many shapes are there?", pictures[1], pictures[2], max_tokens=20, lookup=4),
        ask("what is in the picture?", pictures[3], frequency_penalty=1.0, **long),
        ask("what is it?", max_tokens=24, temperature=1.0, stop=("e",), seed=4),
        ask(f"{words} where?", pictures[0], temperature=1.2, seed=5, **long),
        ask("what is it?", temperature=2.0, seed=6, **long),
    ]

    async def work(engine: Engine) -> list[list[Event]]:
        given_up = engine.submit(lasting(pictures[4]))
        drawing = asyncio.create_task(events(engine.submit(draw("a star", 3))))
        await anext(given_up)
        told = [asyncio.create_task(events(engine.submit(request))) for request in asked]
        await asyncio.wait(told, return_when=asyncio.FIRST_COMPLETED)
        given_up.cancel()
        found = await asyncio.gather(*told)
        assert isinstance((await drawing)[-1], Drawn)
        return found

    for request, told in zip(asked, served(work), strict=True):
        assert_as_alone(janus, request, told)
    assert max(rows) >= 5  # prompts are read one after the other


def test_images_are_read_a_block_at_a_time(
    pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    parts = JanusModel.understand_in_parts
    step = AnswerBatch.step

    def noted(self: JanusModel, pixels: mx.array) -> Iterator[mx.array]:
        for features in parts(self, pixels):
            order.append("encodes")
            yield features

    monkeypatch.setattr(JanusModel, "understand_in_parts", noted)
    monkeypatch.setattr(AnswerBatch, "step", lambda self: (order.append("steps"), step(self))[1])

    async def work(engine: Engine) -> int:
        running = engine.submit(lasting(pictures[0]))
        await anext(running)
        order.clear()
        requests = [ask("what is it?", *pictures[1:3]), ask("what is it?", pictures[3])]
        await asyncio.gather(*(events(engine.submit(request)) for request in requests))
        running.cancel()
        return engine.config.understanding.layers

    blocks = served(work)
    assert order.count("encodes") >= 3 * blocks
    assert all("steps" in pair for pair in pairwise(order))  # never two parts in a row


def test_an_answer_that_is_given_up_leaves_the_batch_and_keeps_its_prompt(
    pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    step = AnswerBatch.step
    monkeypatch.setattr(
        AnswerBatch, "step", lambda self: (rows.append(len(self.answers)), step(self))[1]
    )

    async def work(engine: Engine) -> None:
        tickets = [engine.submit(lasting(picture, 1)) for picture in pictures[:3]]
        await asyncio.gather(*map(anext, tickets))
        assert rows[-1] == 3
        tickets[1].cancel()
        cancelled_at = len(rows)
        await events(tickets[1])
        while len(rows) < cancelled_at + 2:
            await asyncio.sleep(0)
        assert set(rows[cancelled_at + 1 :]) == {2}
        *_, again = await events(engine.submit(ask("describe the picture", pictures[1])))
        assert again.result.cached_tokens == again.result.prompt_tokens - 1
        tickets[0].cancel()
        tickets[2].cancel()
        await until_idle(engine)

    served(work)


def test_a_pass_that_fails_ends_the_answers_of_the_batch_only(
    janus: JanusPipeline, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise MemoryError("no room")

    request = ask("what is in the picture?", pictures[2])

    async def work(engine: Engine) -> list[Event]:
        tickets = [engine.submit(lasting(picture, 1)) for picture in pictures[:2]]
        drawing = asyncio.create_task(events(engine.submit(draw("a star", 3))))
        await asyncio.gather(*map(anext, tickets))
        monkeypatch.setattr(AnswerBatch, "_pass_over", failing)
        for ticket in tickets:
            with pytest.raises(MemoryError):
                await events(ticket)
        monkeypatch.undo()
        told = await events(engine.submit(request))
        assert isinstance((await drawing)[-1], Drawn)
        return told

    assert_as_alone(janus, request, served(work))


def test_memory_is_counted_for_rows_as_long_as_the_longest(janus: JanusPipeline) -> None:
    async def count() -> int:
        scheduler = TextScheduler(janus, 8)
        assert scheduler.needed_bytes == 0
        for length, tokens in ((300, 20), (10, 700), (10, 20)):
            ticket = Ticket(lambda: None, lambda seconds: None)
            request = ask("what is it?", max_tokens=tokens)
            scheduler.running.append(TextTask(ticket, request, [5] * length))
        return scheduler.needed_bytes

    config = janus.config.language
    assert asyncio.run(count()) == cache_bytes(config, 3, 710, 4)
