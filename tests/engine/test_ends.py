"""Work that ends early: the engine is closed, something fails, or it cannot begin."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_janus
from mlx_janus.decode import batch
from mlx_janus.decode.batch import DrawingBatch
from mlx_janus.decode.text import TextOptions
from mlx_janus.engine import image_queue, text_queue
from mlx_janus.engine.engine import Engine
from mlx_janus.engine.messages import (
    Answered,
    AnswerRequest,
    DrawingRequest,
    Drawn,
    StoppingError,
)
from mlx_janus.engine.tickets import Counts, Ticket
from mlx_janus.errors import CheckpointError, JanusError, OptionError, PromptError
from mlx_janus.inference.image_generation import ImageJob, image_jobs
from mlx_janus.inference.vq_pathway import TokenCanvas
from mlx_janus.limits import MAX_SEED
from mlx_janus.pipeline import JanusPipeline
from mlx_janus.processing.prompts import Turn
from tests.support.engines import ask, draw, drawn_alone, events, served, tiny


def test_closing_ends_what_waits_and_finishes_what_runs(
    janus: JanusPipeline, pictures: list[Image.Image]
) -> None:
    async def work(engine: Engine) -> None:
        running = engine.submit(draw("a star", 9, n=2, partial_images=10))
        await anext(running)
        answering = engine.submit(ask("describe the picture", pictures[0]))
        await anext(answering)
        waiting = engine.submit(ask("what is it?", pictures[1]))
        closing = asyncio.create_task(engine.close(60))
        await asyncio.sleep(0)
        with pytest.raises(StoppingError):
            engine.submit(ask("what is it?", pictures[1]))
        with pytest.raises(StoppingError):
            await events(waiting)
        drawn = [event for event in await events(running) if isinstance(event, Drawn)]
        assert sorted(event.image.seed for event in drawn) == [9, 10]
        assert isinstance((await events(answering))[-1], Answered)
        await closing

    served(work, max_answers=1)


def test_closing_at_once_ends_what_runs(pictures: list[Image.Image]) -> None:
    async def work(engine: Engine) -> None:
        drawing = engine.submit(draw("a star", 9, n=2, partial_images=20))
        answering = engine.submit(
            ask("describe the picture", pictures[0], max_tokens=900, temperature=50.0)
        )
        await asyncio.gather(anext(drawing), anext(answering))  # both are begun
        await engine.close(0)
        for ticket in (drawing, answering):
            with pytest.raises(StoppingError):
                await events(ticket)

    served(work)


def test_one_that_fails_takes_no_other_with_it(
    janus: JanusPipeline, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = TokenCanvas.finish

    def failing(canvas: TokenCanvas) -> Any:
        if canvas._job.seed == 1:
            raise MemoryError("no room")
        return finish(canvas)

    monkeypatch.setattr(TokenCanvas, "finish", failing)

    async def work(engine: Engine) -> None:
        tickets = [engine.submit(draw("a star", seed)) for seed in (1, 2)]
        tickets.append(engine.submit(ask("what is in the picture?", pictures[0])))
        lost, drawn, answered = await asyncio.gather(*map(events, tickets), return_exceptions=True)
        assert isinstance(lost, MemoryError)
        assert np.array_equal(drawn[0].image.tokens, drawn_alone(janus, "a star", 2))
        assert isinstance(answered[-1], Answered)
        monkeypatch.setattr(
            DrawingBatch,
            "_choose_next_tokens",
            lambda self: mx.zeros((2,))[5:, None, None] @ mx.zeros((3, 3)),
        )
        with pytest.raises(ValueError, match="matmul"):
            await events(engine.submit(draw("a star", 2)))
        monkeypatch.undo()
        (event,) = await events(engine.submit(draw("a star", 2)))
        assert np.array_equal(event.image.tokens, drawn_alone(janus, "a star", 2))

    served(work)


def test_a_prompt_that_failed_halfway_is_read_anew(
    janus: JanusPipeline, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers then differ in what they hold, and nothing that was read may be used."""
    alone = janus.generate_text("describe the picture", pictures[0])
    block = type(janus.model.language_model.layers[2])
    call = block.__call__

    async def work(engine: Engine) -> None:
        await events(engine.submit(ask("what is in the picture?", pictures[0])))
        calls = 0

        def failing(self: Any, *arguments: Any, **named: Any) -> mx.array:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise MemoryError("no room")
            return call(self, *arguments, **named)

        monkeypatch.setattr(block, "__call__", failing)
        with pytest.raises(MemoryError):
            await events(engine.submit(ask("describe the picture", pictures[0])))
        monkeypatch.undo()
        *_, answered = await events(engine.submit(ask("describe the picture", pictures[0])))
        assert answered.result.tokens == alone.tokens

    served(work)


def test_a_failure_as_one_leaves_the_batch_ends_what_it_lost_and_nothing_else(
    janus: JanusPipeline, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    async def work(engine: Engine) -> None:
        tickets = [engine.submit(draw("a star", seed, partial_images=20)) for seed in (1, 2)]
        await asyncio.gather(*map(anext, tickets))
        monkeypatch.setattr(batch, "keep_rows", failing)
        tickets[0].cancel()
        with pytest.raises(RuntimeError, match="gone"):
            await events(tickets[1])
        assert not any(isinstance(event, Drawn) for event in await events(tickets[0]))
        monkeypatch.undo()
        (event,) = await events(engine.submit(draw("a star", 2)))
        assert np.array_equal(event.image.tokens, drawn_alone(janus, "a star", 2))

    served(work)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_ends_everything(
    pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("a bug")

    async def work(engine: Engine) -> None:
        ticket = engine.submit(draw("a star", 1, partial_images=20))
        await anext(ticket)
        monkeypatch.setattr(text_queue.TextScheduler, "choose", failing)
        with pytest.raises(RuntimeError, match="a bug"):
            await events(ticket)
        await engine.ended.wait()
        assert engine.stopping
        assert str(engine.failure) == "a bug"
        with pytest.raises(StoppingError):
            engine.submit(draw("a star", 1))

    served(work)


def test_an_answer_that_fails_to_close_ends_no_other_with_its_error(janus: JanusPipeline) -> None:
    def answering(fails: bool) -> Generator[None, None, None]:
        try:
            yield
        finally:
            if fails:
                raise RuntimeError("a bug")

    async def main() -> None:
        scheduler = text_queue.TextScheduler(janus, 2)
        tasks = [
            text_queue.TextTask(Ticket(lambda: None, lambda seconds: None), ask("?"), [], steps)
            for steps in (answering(fails=True), answering(fails=False))
        ]
        scheduler.running.extend(tasks)
        for task in tasks:
            assert task.steps is not None
            next(task.steps)  # now in the middle of its answer
        scheduler.drop(tasks)
        with pytest.raises(RuntimeError, match="a bug"):
            await events(tasks[0].ticket)
        assert await events(tasks[1].ticket) == []

    asyncio.run(main())


def test_a_batch_that_fails_to_drop_an_image_ends_each_request_once(janus: JanusPipeline) -> None:
    class Broken:
        jobs: tuple[ImageJob, ...] = ()  # it has lost all images

        def remove(self, jobs: list[ImageJob]) -> None:
            raise RuntimeError("a bug")

    async def main() -> None:
        scheduler = image_queue.ImageScheduler(janus)
        scheduler._batch = Broken()  # type: ignore[assignment]
        for seed in range(3):
            task = image_queue.ImageTask(
                Ticket(lambda: None, lambda seconds: None), draw("a star", seed), []
            )
            task.running_jobs = dict.fromkeys(image_jobs(janus, "a star", 1, seed, {}), 0)
            scheduler.running.append(task)
        cancelled, also_cancelled, other = list(scheduler.running)
        scheduler.drop([cancelled, also_cancelled])
        assert not scheduler.running
        assert await events(cancelled.ticket) == []
        for task in (also_cancelled, other):
            with pytest.raises(RuntimeError, match="a bug"):
                await events(task.ticket)

    asyncio.run(main())


def test_closing_while_the_model_is_loaded_ends_soon() -> None:
    prepared: list[str] = []

    def load() -> JanusPipeline:
        time.sleep(0.3)
        janus = tiny()
        janus.load_weights_for = prepared.append  # type: ignore[method-assign,assignment]
        return janus

    async def main() -> None:
        engine = Engine(load)
        starting = asyncio.create_task(engine.start())
        await asyncio.sleep(0.1)
        await engine.close(0)
        with pytest.raises(StoppingError):
            await starting
        with pytest.raises(StoppingError):
            engine.submit(draw("a star", 1))
        assert engine.counts == Counts()

    asyncio.run(main())
    assert not prepared


def test_an_engine_that_was_never_started_can_be_closed() -> None:
    async def main() -> None:
        await Engine(tiny).close()

    asyncio.run(main())


def test_a_model_in_low_memory_is_refused() -> None:
    with pytest.raises(OptionError, match="low_memory"):
        served(
            lambda engine: events(engine.submit(draw("a star", 1))),
            lambda: mlx_janus.load("tiny", low_memory=True),
        )


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (ask(" "), PromptError),
        (ask("word " * 5000), PromptError),
        (ask("x" * 100_000), PromptError),
        (draw("", 1), PromptError),
        (draw("word " * 5000, 1), PromptError),
        (draw("a star", MAX_SEED, n=2), OptionError),
        (draw("a star", 1, n=0), OptionError),
        (draw("a star", 1, partial_images=-1), OptionError),
        (AnswerRequest((Turn("user", "what?", 1),), (), TextOptions()), OptionError),
        (
            AnswerRequest((Turn("assistant", "that"),), (), TextOptions()),
            PromptError,
        ),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(
    request_: AnswerRequest | DrawingRequest, error: type[JanusError]
) -> None:
    async def work(engine: Engine) -> None:
        with pytest.raises(error):
            engine.submit(request_)
        assert engine.counts == Counts()

    served(work)


def test_a_model_that_cannot_be_loaded_says_so_as_the_engine_starts() -> None:
    def load() -> JanusPipeline:
        raise CheckpointError("the weights are damaged")

    with pytest.raises(CheckpointError, match="damaged"):
        served(lambda engine: events(engine.submit(draw("a star", 1))), load)
