"""Several models: loaded on request, unloaded for others or when nobody asks, never cut short."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import mlx.core as mx
import pytest

from mlx_janus.engine.engine import Engine
from mlx_janus.engine.messages import Answered, BusyError, Event, StoppingError
from mlx_janus.engine.pool import EnginePool, LoadError, ModelSource, PooledModel
from mlx_janus.engine.tickets import Counts
from mlx_janus.errors import CheckpointError, OutOfMemoryError
from mlx_janus.pipeline import JanusPipeline
from mlx_janus.weights import footprint
from mlx_janus.weights.footprint import required_memory
from tests.support.engines import ask, draw, events, tiny

SHORT = ask("hello", max_tokens=2)
LONG = ask("hello", max_tokens=60, temperature=20.0, seed=1)


def pooled(
    work: Callable[[EnginePool], Awaitable[Any]],
    loads: Sequence[Callable[[], JanusPipeline]] = (tiny, tiny, tiny),
    **options: Any,
) -> Any:
    """What ``work`` gives on a started pool of models "a", "b" and so on."""

    async def main() -> Any:
        sources = [ModelSource(load, "abcd"[index]) for index, load in enumerate(loads)]
        pool = EnginePool(sources, **options)
        await pool.start()
        try:
            return await asyncio.wait_for(work(pool), 120)
        finally:
            await pool.close(0)

    return asyncio.run(main())


async def told(pool: EnginePool, model: PooledModel, request: Any = SHORT) -> list[Event]:
    """All events of a request to a model, which is released as soon as it is submitted."""
    engine = await pool.acquire(model)
    try:
        ticket = engine.submit(request)
    finally:
        pool.release(model)
    return await events(ticket)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def states(pool: EnginePool) -> list[str]:
    return [model.state for model in pool.models]


@pytest.fixture(scope="module")
def sizes(janus: JanusPipeline) -> tuple[int, int]:
    """The bytes that the memory check wants for Janus-Tiny, and those of its weights."""
    needed = max(required_memory(janus.config, janus.config.dtype).values())

    async def weights(pool: EnginePool) -> int:
        return pool.engines[0].weight_bytes

    return needed, pooled(weights)


@pytest.fixture
def room_for(sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the memory check see room for a number of models, beside what is held now."""
    needed, weights = sizes

    def limit(count: float) -> None:
        gc.collect()
        mx.clear_cache()
        held = mx.get_active_memory()
        room = needed + int((count - 1) * weights)

        def available() -> int:
            return room - (mx.get_active_memory() - held)

        monkeypatch.setattr(footprint, "available_memory", available)

    return limit


def test_a_model_is_loaded_once_for_all_who_wait_and_the_others_go_on() -> None:
    may_load = threading.Event()
    calls: list[str] = []

    def slow() -> JanusPipeline:
        calls.append(threading.current_thread().name)
        assert may_load.wait(60)
        return tiny()

    async def work(pool: EnginePool) -> None:
        first, second, _ = pool.models
        assert states(pool) == ["loaded", "unloaded", "unloaded"]
        waiting = [asyncio.create_task(told(pool, second)) for _ in range(3)]
        await until(lambda: calls)
        assert states(pool) == ["loaded", "loading", "unloaded"]
        assert pool.counts == Counts(waiting=3)
        assert isinstance((await told(pool, first))[-1], Answered)
        assert not any(task.done() for task in waiting)
        may_load.set()
        for answered in await asyncio.gather(*waiting):
            assert isinstance(answered[-1], Answered)
        assert (states(pool)[1], calls) == ("loaded", ["mlx_janus device"])

    pooled(work, (tiny, slow, tiny))


def test_the_least_recently_used_model_makes_room(room_for: Callable[[float], None]) -> None:
    async def work(pool: EnginePool) -> list[list[str]]:
        a, b, c = pool.models
        seen = []
        for model in (b, a, c, a, b):
            await told(pool, model)
            seen.append([other.name for other in pool.loaded])
        return seen

    room_for(2.5)
    assert pooled(work) == [["a", "b"], ["a", "b"], ["a", "c"], ["a", "c"], ["a", "b"]]


def test_an_unloaded_model_leaves_no_memory_and_no_thread() -> None:
    networks: list[weakref.ref[Any]] = []

    def noted() -> JanusPipeline:
        janus = tiny()
        networks.append(weakref.ref(janus.model))
        return janus

    async def work(pool: EnginePool) -> None:
        _, b = pool.models
        gc.collect()
        mx.clear_cache()
        held = mx.get_active_memory()
        threads = set(threading.enumerate())
        await told(pool, b)
        await told(pool, b, draw("a star", 1))
        assert mx.get_active_memory() - held > pool.engines[1].weight_bytes * 0.9
        async with pool._memory_lock:
            await pool._unload(b)
        assert (states(pool), networks[0]()) == (["loaded", "unloaded"], None)
        assert mx.get_active_memory() - held < 100_000
        assert not [thread for thread in set(threading.enumerate()) - threads if _computes(thread)]
        assert isinstance((await told(pool, b))[-1], Answered)  # and it is loaded again

    pooled(work, (tiny, noted))


def _computes(thread: threading.Thread) -> bool:
    return thread.name.startswith("mlx_janus")


def test_what_runs_is_finished_before_its_model_makes_room(
    janus: JanusPipeline, room_for: Callable[[float], None]
) -> None:
    """New requests for that model wait for it to be loaded again, and none is lost."""
    alone = janus.generate_text("hello", max_tokens=60, temperature=20.0, seed=1)
    order: list[str] = []

    async def asked(pool: EnginePool, model: PooledModel, request: Any = SHORT) -> list[Event]:
        answered = await told(pool, model, request)
        order.append(model.name)
        return answered

    async def work(pool: EnginePool) -> None:
        a, b = pool.models
        engine = await pool.acquire(a)
        ticket = engine.submit(LONG)
        pool.release(a)
        await anext(ticket)
        other = asyncio.create_task(asked(pool, b))
        await until(lambda: a.leaving)
        again = asyncio.create_task(asked(pool, a))
        *_, answered = await events(ticket)
        assert isinstance(answered, Answered)
        assert answered.result.tokens == alone.tokens
        await asyncio.gather(other, again)
        assert (order, states(pool)) == (["b", "a"], ["loaded", "unloaded"])

    room_for(1.5)
    pooled(work, (tiny, tiny))


def test_two_models_that_do_not_fit_together_take_turns(room_for: Callable[[float], None]) -> None:
    """A stream of requests for one of them does not keep the other out."""

    async def work(pool: EnginePool) -> None:
        a, b = pool.models
        stop = False

        async def ask_again_and_again() -> None:
            while not stop:
                assert isinstance((await told(pool, a))[-1], Answered)

        busy = [asyncio.create_task(ask_again_and_again()) for _ in range(3)]
        for _ in range(2):
            assert isinstance((await told(pool, b))[-1], Answered)
        stop = True
        await asyncio.gather(*busy)

    room_for(1.5)
    pooled(work, (tiny, tiny))


def test_a_model_that_can_never_fit_makes_none_leave() -> None:
    def huge() -> JanusPipeline:
        raise OutOfMemoryError("it needs 90 GB", needed=90 * 10**9, free=10**9)

    async def work(pool: EnginePool) -> None:
        engines = pool.engines
        with pytest.raises(LoadError, match="'b' cannot be loaded: it needs 90 GB") as caught:
            await pool.acquire(pool.models[1])
        assert isinstance(caught.value.cause, OutOfMemoryError)
        assert (pool.engines, states(pool)) == (engines, ["loaded", "failed"])

    pooled(work, (tiny, huge))


def test_a_model_that_failed_is_tried_again_at_the_next_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    problems: list[Exception] = [CheckpointError("model.safetensors is cut"), ValueError("a bug")]

    def damaged() -> JanusPipeline:
        if problems:
            raise problems.pop(0)
        return tiny()

    async def work(pool: EnginePool) -> None:
        model = pool.models[1]
        for cause in (CheckpointError, ValueError):
            both = [pool.acquire(model), pool.acquire(model)]  # one attempt for both
            for error in await asyncio.gather(*both, return_exceptions=True):
                assert isinstance(error, LoadError)
                assert isinstance(error.cause, cause)
            assert (model.state, pool.counts) == ("failed", Counts())
        assert isinstance((await told(pool, model))[-1], Answered)
        assert model.state == "loaded"

    pooled(work, (tiny, damaged))
    first, second = caplog.messages
    assert first == "b cannot be loaded: model.safetensors is cut"
    assert second.startswith("b cannot be loaded: a bug\n")
    assert "in damaged" in second


def test_a_first_model_that_cannot_be_loaded_is_the_callers_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def damaged() -> JanusPipeline:
        raise CheckpointError("it is cut")

    async def nothing(_: EnginePool) -> None:
        raise AssertionError("it has started")

    with pytest.raises(CheckpointError, match="it is cut"):
        pooled(nothing, (damaged, tiny))
    assert caplog.messages == []  # the caller prints it


def test_a_model_without_requests_is_unloaded_and_one_in_use_is_not() -> None:
    async def work(pool: EnginePool) -> None:
        a, b = pool.models
        await pool.acquire(a)
        await told(pool, b)
        await until(lambda: b.state == "unloaded")
        assert a.state == "loaded"
        pool.release(a)
        await until(lambda: a.state == "unloaded")
        assert isinstance((await told(pool, a))[-1], Answered)

    pooled(work, (tiny, tiny), idle_seconds=0.3)


def test_a_limit_of_models() -> None:
    async def work(pool: EnginePool) -> None:
        for model in (pool.models[1], pool.models[0], pool.models[2]):
            await told(pool, model)
            assert pool.loaded == [model]

    pooled(work, max_loaded=1)


def test_closing_ends_those_who_wait_for_a_model() -> None:
    may_load = threading.Event()

    def slow() -> JanusPipeline:
        assert may_load.wait(60)
        return tiny()

    async def work(pool: EnginePool) -> None:
        _, b, c = pool.models
        waiting = [asyncio.create_task(told(pool, model)) for model in (b, c)]
        await until(lambda: pool._starting is not None)
        closing = asyncio.create_task(pool.close(0))
        await asyncio.sleep(0.05)
        may_load.set()
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(error, StoppingError)
        await closing
        with pytest.raises(StoppingError):
            await pool.acquire(b)

    pooled(work, (tiny, slow, slow))


def test_only_so_many_wait_and_one_who_leaves_makes_room_for_another() -> None:
    may_load = threading.Event()

    def slow() -> JanusPipeline:
        assert may_load.wait(60)
        return tiny()

    async def work(pool: EnginePool) -> None:
        model = pool.models[1]
        first = asyncio.create_task(pool.acquire(model))
        await until(lambda: model.wanted)
        with pytest.raises(BusyError):
            await pool.acquire(model)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        second = asyncio.create_task(told(pool, model))
        may_load.set()
        assert isinstance((await second)[-1], Answered)

    pooled(work, (tiny, slow), max_waiting=1)


def test_a_thread_that_fails_is_told() -> None:
    async def work(pool: EnginePool) -> None:
        def failing(*_: Any) -> bool:
            raise RuntimeError("the device is gone")

        engine = pool.engines[0]
        engine._run_round = failing  # type: ignore[method-assign]
        ticket = engine.submit(SHORT)
        with pytest.raises((RuntimeError, StoppingError)):
            await events(ticket)
        await asyncio.wait_for(pool.failed.wait(), 20)
        assert (str(pool.failure), pool.stopping) == ("the device is gone", True)

    hook = threading.excepthook
    threading.excepthook = lambda _: None
    try:
        pooled(work, (tiny,))
    finally:
        threading.excepthook = hook


def test_a_pool_of_a_running_engine() -> None:
    async def main() -> None:
        engine = Engine(tiny)
        await engine.start()
        pool = EnginePool.of_engine(engine)
        assert [model.name for model in pool.models] == ["janus-tiny"]
        assert await pool.acquire(pool.models[0]) is engine
        await engine.close(0)

    asyncio.run(main())
