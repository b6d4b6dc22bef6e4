"""Many requests on one device: who is served when, and that each gets what it would get alone."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_janus.decode.batch import DrawingBatch
from mlx_janus.decode.grammar import schema_grammar
from mlx_janus.decode.image import DrawOptions
from mlx_janus.decode.text import TextOptions
from mlx_janus.engine import image_queue, text_queue
from mlx_janus.engine.engine import Engine
from mlx_janus.engine.messages import (
    Answered,
    AnswerRequest,
    BusyError,
    DrawingRequest,
    Drawn,
    Event,
    Partial,
    Piece,
)
from mlx_janus.engine.tickets import Counts, Ticket
from mlx_janus.inference.vq_pathway import TokenCanvas, VQPathway
from mlx_janus.models.janus import JanusModel
from mlx_janus.pipeline import JanusPipeline
from mlx_janus.processing.prompts import Turn
from tests.support.engines import (
    ask,
    draw,
    drawn_alone,
    events,
    served,
    until_idle,
)


def test_many_at_once_each_get_what_they_get_alone(
    janus: JanusPipeline, pictures: list[Image.Image]
) -> None:
    questions = ["how many shapes are there?", "what is in the picture?", "is there a red circle?"]
    asked = [
        ask(questions[i % 3], pictures[i], seed=i, temperature=0.7 * (i % 2)) for i in range(6)
    ]
    wanted = [draw("a red circle", 3, n=3), draw("two blue squares", 8), draw("a star", 5, n=2)]

    async def work(engine: Engine) -> list[list[Event]]:
        return await asyncio.gather(
            *(events(engine.submit(request)) for request in (*asked, *wanted))
        )

    found = served(work)
    for i, told in enumerate(found[:6]):
        alone = janus.generate_text(
            questions[i % 3], pictures[i], seed=i, temperature=0.7 * (i % 2)
        )
        *pieces, last = told
        assert isinstance(last, Answered)
        assert last.result.tokens == alone.tokens
        assert (
            "".join(piece.text for piece in pieces if isinstance(piece, Piece))
            == last.result.text
            == alone.text
        )
    for request, told in zip(wanted, found[6:], strict=True):
        assert sorted(event.index for event in told) == list(range(request.n))
        for event in told:
            assert isinstance(event, Drawn)
            assert event.image.seed == request.seed + event.index
            assert np.array_equal(
                event.image.tokens, drawn_alone(janus, request.prompt, event.image.seed)
            )


def test_several_answers_have_the_seeds_after_the_first(
    janus: JanusPipeline, pictures: list[Image.Image]
) -> None:
    request = ask("what is in the picture?", pictures[0], n=3, temperature=1.5, seed=20)
    told = served(lambda engine: events(engine.submit(request)))
    results = {event.index: event.result for event in told if isinstance(event, Answered)}
    for index in range(3):
        alone = janus.generate_text(
            "what is in the picture?", pictures[0], temperature=1.5, seed=20 + index
        )
        assert results[index].tokens == alone.tokens
    assert results[1].cached_tokens == results[1].prompt_tokens - 1  # the prompt is read once


def test_an_answer_is_given_while_a_picture_is_drawn(pictures: list[Image.Image]) -> None:
    order: list[Event] = []

    async def follow(ticket: Ticket) -> None:
        async for event in ticket:
            order.append(event)

    async def work(engine: Engine) -> None:
        drawing = asyncio.create_task(
            follow(engine.submit(draw("a red circle", 3, partial_images=8)))
        )
        while not order:  # the picture is begun
            await asyncio.sleep(0)
        await asyncio.gather(
            drawing, follow(engine.submit(ask("how many shapes are there?", pictures[0])))
        )

    served(work)
    kinds = [type(event) for event in order]
    assert kinds[0] is Partial
    assert kinds[-1] is Drawn
    assert kinds.index(Answered) < kinds.index(Drawn)
    assert Partial in kinds[kinds.index(Piece) :]  # and the picture goes on meanwhile


def test_a_picture_is_shown_as_it_forms(janus: JanusPipeline) -> None:
    told = served(
        lambda engine: events(engine.submit(draw("a red circle", 3, n=2, partial_images=3)))
    )
    for index in range(2):
        *partial, last = [event for event in told if event.index == index]
        assert [event.number for event in partial] == [0, 1, 2]
        assert isinstance(last, Drawn)
        whole = np.asarray(last.image.image, np.int16)
        for number, event in enumerate(partial, start=1):
            rows = 16 * number  # of the 64, after a quarter of the tokens each time
            shown = np.asarray(event.image, np.int16)
            assert np.abs(shown[: rows - 8] - whole[: rows - 8]).mean() < 8
            assert (shown[rows:] == 127).all()


def test_whole_pictures_come_before_those_that_are_only_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds, whole_in, finished_in = [0], list[int](), list[int]()
    step, finish = DrawingBatch.step, TokenCanvas.finish

    def counted(self: DrawingBatch) -> Any:
        rounds[0] += 1
        whole = step(self)
        whole_in.extend([rounds[0]] * len(whole))
        return whole

    def noted(*arguments: Any) -> Any:
        finished_in.append(rounds[0])
        return finish(*arguments)

    monkeypatch.setattr(DrawingBatch, "step", counted)
    monkeypatch.setattr(TokenCanvas, "finish", noted)

    async def work(engine: Engine) -> list[Event]:
        one = engine.submit(draw("a star", 1, partial_images=20))
        await anext(
            one
        )  # it is ahead of the others, of which there is more to show than there are rounds
        _, many = await asyncio.gather(
            events(one), events(engine.submit(draw("a red circle", 1, 8, partial_images=16)))
        )
        return many

    many = served(work)
    assert finished_in[0] == whole_in[0]  # at once, whatever else is to be shown
    kinds = [type(event) for event in many]
    assert kinds.count(Drawn) == 8
    assert (
        0 < kinds.count(Partial) < 8 * 16
    )  # what something newer has come for is not shown any more


def test_requests_with_pictures_that_wait_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_queue, "MAX_RUNNING_IMAGES", 2)
    order: list[str] = []

    async def follow(ticket: Ticket, name: str) -> None:
        async for _ in ticket:
            order.append(name)

    async def work(engine: Engine) -> None:
        many = engine.submit(draw("a red circle", 1, n=6))
        one = engine.submit(draw("a star", 2))
        await asyncio.gather(follow(many, "many"), follow(one, "one"))

    served(work)
    assert sorted(order) == ["many"] * 6 + ["one"]
    assert order.index("one") <= 3


def test_a_request_of_many_is_not_passed_by_those_that_come_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(image_queue, "MAX_RUNNING_IMAGES", 2)

    async def work(engine: Engine) -> int:
        stop, others = asyncio.Event(), 0

        async def newcomers() -> None:
            nonlocal others
            while not stop.is_set():
                await events(engine.submit(draw("a star", 1)))
                others += 1

        crowd = [asyncio.create_task(newcomers()) for _ in range(4)]
        await asyncio.sleep(0.2)
        await events(engine.submit(draw("a red circle", 1, n=3)))
        stop.set()
        passed = others
        await asyncio.gather(*crowd)
        return passed

    assert served(work) <= 9  # three pictures in turns with those that were there


def test_requests_of_many_pictures_wait_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_queue, "MAX_RUNNING_IMAGES", 2)

    async def work(engine: Engine) -> None:
        tasks: list[asyncio.Task[list[Event]]] = []
        refused = 0
        while sum(task.done() for task in tasks) < 3:
            try:
                tasks.append(asyncio.create_task(events(engine.submit(draw("a star", 1, n=3)))))
            except BusyError:
                refused += 1
            assert sum(not task.done() for task in tasks) <= 2 + 2  # under way, and waiting
            await asyncio.sleep(0.01)
        assert refused
        for task in tasks:
            task.cancel()

    served(work, max_waiting=2)


@pytest.mark.parametrize(
    ("owner", "method", "drawing"),
    [
        (DrawingBatch, "start", 2),  # the prompt is being read for the first two pictures
        (TokenCanvas, "finish", 1),  # both are complete: one is being decoded, one waits for it
    ],
)
def test_a_request_does_not_run_and_wait_at_once(
    monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, drawing: int
) -> None:
    monkeypatch.setattr(image_queue, "MAX_RUNNING_IMAGES", 2)
    seen: list[Counts] = []
    real = getattr(owner, method)

    async def work(engine: Engine) -> None:
        def watching(*arguments: Any) -> Any:
            seen.append(engine.counts)
            return real(*arguments)

        monkeypatch.setattr(owner, method, watching)
        await events(engine.submit(draw("a star", 1, n=3)))

    served(work)
    assert seen[0] == Counts(waiting=0, drawing=drawing)


def test_pictures_wait_for_memory(janus: JanusPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way: list[int] = []
    step = DrawingBatch.step
    monkeypatch.setattr(
        DrawingBatch, "step", lambda self: (under_way.append(len(self.images)), step(self))[1]
    )
    monkeypatch.setattr(image_queue, "images_that_fit", lambda *_: 2)
    told = served(lambda engine: events(engine.submit(draw("a star", 30, n=5))))
    assert max(under_way) == 2
    for event in told:
        assert np.array_equal(event.image.tokens, drawn_alone(janus, "a star", event.image.seed))


def test_memory_is_counted_by_the_longest_prompt_of_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To which the rows of all others are padded."""
    counted: list[tuple[int, int]] = []

    bytes_per_image = VQPathway.bytes_per_image

    def counting(self: VQPathway, prompt_tokens: int, options: DrawOptions) -> int:
        counted.append((prompt_tokens, options.rows))
        return bytes_per_image(self, prompt_tokens, options)

    monkeypatch.setattr(VQPathway, "bytes_per_image", counting)
    words = "a red circle and a blue square " * 8

    async def work(engine: Engine) -> int:
        long = engine.submit(
            DrawingRequest(words, DrawOptions(1.0, 0.6), 1, partial_images=20)
        )  # in one row
        await anext(long)
        await asyncio.gather(events(long), events(engine.submit(draw("a star", 1))))
        return len(engine.pathway.prompt_ids(words))

    length = served(work)
    assert counted[0] == (length, 1)
    assert (length, 2) in counted


def test_answers_wait_for_memory(
    pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_queue, "available_memory", lambda: 0)

    async def work(engine: Engine) -> int:
        tasks = [
            asyncio.create_task(events(engine.submit(ask("what is in the picture?", p))))
            for p in pictures[:3]
        ]
        most = 0
        while not all(task.done() for task in tasks):
            most = max(most, engine.counts.answering)
            await asyncio.sleep(0)
        assert all(isinstance(task.result()[-1], Answered) for task in tasks)
        return most

    assert served(work) == 1


def test_an_answer_that_waits_for_memory_comes_before_further_pictures(
    pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_queue, "available_memory", lambda: 0)

    async def work(engine: Engine) -> None:
        async def draw_on() -> None:
            while True:
                await events(engine.submit(draw("a star", 1)))

        drawing = [asyncio.create_task(draw_on()) for _ in range(3)]
        while not engine.counts.drawing:
            await asyncio.sleep(0)
        told = await asyncio.wait_for(
            events(engine.submit(ask("what is in the picture?", pictures[0]))), 20
        )
        assert isinstance(told[-1], Answered)
        for task in drawing:
            task.cancel()

    served(work)


def test_answers_are_given_side_by_side(pictures: list[Image.Image]) -> None:
    async def work(engine: Engine) -> None:
        long = engine.submit(
            ask("describe the picture", pictures[0], max_tokens=900, temperature=50.0)
        )
        await anext(long)
        short = await events(engine.submit(ask("how many shapes are there?", pictures[1])))
        assert isinstance(short[-1], Answered)
        assert engine.counts.answering == 1
        long.cancel()

    served(work)


def test_a_picture_goes_on_while_long_prompts_are_read(
    janus: JanusPipeline, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    hidden_states, step = JanusModel.hidden_states, DrawingBatch.step

    def watched(self: JanusModel, embeddings: mx.array, cache: Any = None) -> mx.array:
        if embeddings.shape[1] > 1:
            order.append(f"reads {embeddings.shape[1]}")
        return hidden_states(self, embeddings, cache)

    monkeypatch.setattr(JanusModel, "hidden_states", watched)
    monkeypatch.setattr(DrawingBatch, "step", lambda self: (order.append("draws"), step(self))[1])
    words = "is there a red circle above the blue square or a green star? " * 24

    async def work(engine: Engine) -> list[Event]:
        drawing = engine.submit(draw("a star", 3, partial_images=20))
        await anext(drawing)
        order.clear()
        tickets = [engine.submit(ask(f"{i} {words}", *pictures[:4])) for i in range(3)]
        (*_, one), *_ = await asyncio.gather(*map(events, tickets))
        drawing.cancel()
        return one

    one = served(work)
    monkeypatch.undo()
    assert one.result.prompt_tokens > 2 * 256
    alone = janus.generate_text(f"0 {words}", pictures[:4])
    assert one.result.tokens == alone.tokens
    read = [int(word.removeprefix("reads ")) for word in order if word != "draws"]
    assert max(read) <= 256
    assert sum(read) >= one.result.prompt_tokens
    drawn_until = len(order) - order[::-1].index("draws")
    assert all(
        "draws" in pair for pair in pairwise(order[:drawn_until])
    )  # never two pieces in a row


def test_what_a_client_gave_up_stops_within_a_step(
    janus: JanusPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    step = DrawingBatch.step
    monkeypatch.setattr(
        DrawingBatch, "step", lambda self: (steps.append(len(self.images)), step(self))[1]
    )

    async def work(engine: Engine) -> list[Event]:
        given_up = engine.submit(draw("a red circle", 1, n=3, partial_images=20))
        kept = engine.submit(draw("a star", 2))
        await anext(given_up)
        before = len(steps)
        given_up.cancel()
        given_up.cancel()
        told = await events(kept)
        assert 3 + 1 not in steps[before + 2 :]
        assert [event async for event in given_up if isinstance(event, Drawn)] == []
        await until_idle(engine)
        return told

    (event,) = served(work)
    assert np.array_equal(event.image.tokens, drawn_alone(janus, "a star", 2))


def test_an_answer_that_was_given_up_stops(pictures: list[Image.Image]) -> None:
    async def work(engine: Engine) -> None:
        # guards against its own end: nothing but tokens that make no text
        ticket = engine.submit(
            ask("describe the picture", pictures[0], max_tokens=900, temperature=50.0, seed=1)
        )
        await anext(ticket)
        ticket.cancel()
        await asyncio.wait_for(until_idle(engine), 5)
        assert not any(isinstance(event, Answered) for event in await events(ticket))

    served(work)


def test_a_full_queue_refuses_until_somebody_leaves(pictures: list[Image.Image]) -> None:
    async def work(engine: Engine) -> None:
        running = engine.submit(
            ask("describe the picture", pictures[0], max_tokens=900, temperature=50.0)
        )
        await anext(running)
        waiting = [engine.submit(ask("what is it?", pictures[0])) for _ in range(2)]
        with pytest.raises(BusyError) as refused:
            engine.submit(ask("what is it?", pictures[0]))
        assert 1 <= refused.value.retry_after <= 60
        waiting[0].cancel()
        while engine.counts.waiting == 2:
            await asyncio.sleep(0)
        accepted = engine.submit(ask("what is it?", pictures[0]))
        running.cancel()
        for ticket in (waiting[1], accepted):
            assert isinstance((await events(ticket))[-1], Answered)
        assert await events(waiting[0]) == []

    served(work, max_waiting=2, max_answers=1)


def test_earlier_turns_and_pictures_are_not_read_again(
    pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    understand = JanusModel.understand_in_parts
    monkeypatch.setattr(
        JanusModel,
        "understand_in_parts",
        lambda self, x: (seen.append(len(x)), understand(self, x))[1],
    )

    async def work(engine: Engine) -> list[int]:
        first = Turn("user", "what is in the picture?", 1)
        *_, one = await events(
            engine.submit(AnswerRequest((first,), (pictures[0],), TextOptions()))
        )
        turns = (
            first,
            Turn("assistant", one.result.text),
            Turn("user", "how many shapes are there?"),
        )
        *_, two = await events(engine.submit(AnswerRequest(turns, (pictures[0],), TextOptions())))
        *_, other = await events(engine.submit(ask("how many shapes are there?", pictures[0])))
        assert two.result.cached_tokens >= one.result.prompt_tokens
        assert other.result.cached_tokens >= 64  # the picture stands before the question
        *_, new = await events(engine.submit(ask("how many shapes are there?", pictures[1])))
        assert new.result.cached_tokens < 64
        return seen

    assert served(work) == [1, 1]


def test_what_is_kept_of_earlier_questions_is_bounded(
    pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_queue, "_MAX_PREFIX_CACHES", 2)
    monkeypatch.setattr(text_queue, "_MAX_IMAGE_FEATURES", 2)
    seen: list[int] = []
    understand = JanusModel.understand_in_parts
    monkeypatch.setattr(
        JanusModel,
        "understand_in_parts",
        lambda self, x: (seen.append(len(x)), understand(self, x))[1],
    )

    async def cached(engine: Engine, number: int) -> int:
        *_, answered = await events(engine.submit(ask("what is in the picture?", pictures[number])))
        return answered.result.cached_tokens

    async def work(engine: Engine) -> None:
        for number in range(3):
            assert await cached(engine, number) < 64
        assert await cached(engine, 2) > 64  # of the last two
        assert await cached(engine, 1) > 64
        assert len(seen) == 3
        assert await cached(engine, 0) < 64
        assert len(seen) == 4

    served(work)


def test_a_long_conversation_is_not_lost_to_a_short_question(pictures: list[Image.Image]) -> None:
    async def work(engine: Engine) -> None:
        *_, first = await events(engine.submit(ask("describe the picture", *pictures[:3])))
        await events(engine.submit(ask("hello there", system="")))  # begins alike, for a few tokens
        *_, again = await events(engine.submit(ask("describe the picture", *pictures[:3])))
        assert again.result.cached_tokens == first.result.prompt_tokens - 1

    served(work)


def test_answers_by_schemas_run_side_by_side(janus: JanusPipeline) -> None:
    """Each with a grammar of its own, and as alone."""
    schemas: list[Any] = [
        {"enum": ["red circle", "blue"]},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 9},
        None,
        "json",
    ]
    asked = [
        ask(
            "what is in the picture?",
            max_tokens=16,
            temperature=1.0,
            seed=seed,
            grammar=None if schema is None else schema_grammar(schema),
        )
        for seed, schema in enumerate(schemas)
    ]

    async def work(engine: Engine) -> list[list[Event]]:
        return await asyncio.gather(*(events(engine.submit(request)) for request in asked))

    replies = served(work)
    for seed, (schema, reply) in enumerate(zip(schemas, replies, strict=True)):
        alone = janus.generate_text(
            "what is in the picture?", max_tokens=16, temperature=1.0, seed=seed, schema=schema
        )
        assert isinstance(reply[-1], Answered)
        assert reply[-1].result.text == alone.text
