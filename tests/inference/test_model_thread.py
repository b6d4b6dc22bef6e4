"""A model works from any thread: loading and use, streams that change threads, programs' ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_janus
from mlx_janus.inference.model_thread import ModelThread
from tests.support.golden import FIXTURES
from tests.support.programs import INTERRUPTIBLE, run

PROMPT, QUESTION = "a cat", "a cat?"
PICTURE = FIXTURES / "picture.png"
Janus = mlx_janus.JanusPipeline


@pytest.fixture
def threads() -> Iterator[list[ThreadPoolExecutor]]:
    """Three threads, each a pool of one."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(3)]


def drawn(janus: Janus, seed: int) -> list[int]:
    return janus.generate_images(PROMPT, seed=seed)[0].tokens.tolist()


def answered(janus: Janus) -> tuple[int, ...]:
    return janus.generate_text(QUESTION, max_tokens=8).tokens


# From thread to thread


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_model_works_in_other_threads_than_the_one_that_loaded_it(
    converted: dict[str, Path],
    threads: list[ThreadPoolExecutor],
    bits: int | None,
    low_memory: bool,
) -> None:
    """Weights that nothing has been computed with are read wherever they are first needed."""

    def load() -> Janus:
        return mlx_janus.load(converted["deepseek-pro-bin"], bits=bits, low_memory=low_memory)

    def use(janus: Janus) -> list[Any]:
        seen = janus.generate_text("What is it?", PICTURE, max_tokens=4).tokens
        return [answered(janus), drawn(janus, 1), seen]

    here = load()
    want = use(load())
    assert threads[0].submit(use, here).result() == want
    assert use(here) == want
    there = threads[1].submit(load).result()
    assert use(there) == want
    assert threads[2].submit(use, there).result() == want


def test_the_networks_are_used_from_any_thread(
    converted: dict[str, Path], threads: list[ThreadPoolExecutor]
) -> None:
    janus = threads[0].submit(mlx_janus.load, converted["deepseek-pro-bin"]).result()
    embedded = janus.model.embed_text(mx.array([[1, 2, 3]]))
    assert np.isfinite(np.array(embedded)).all()
    shape = (
        threads[1]
        .submit(lambda: janus.model.image_logits(janus.model.hidden_states(embedded)).shape)
        .result()
    )
    assert shape[:2] == (1, 3)


def test_a_stream_is_advanced_and_closed_by_any_thread(
    pro: Janus, threads: list[ThreadPoolExecutor]
) -> None:
    want = drawn(pro, 1)
    steps = pro.stream_images(PROMPT, seed=1)
    turns = itertools.cycle(threads)
    last = None
    while (step := next(turns).submit(next, steps, None).result()) is not None:
        last = step
    assert last is not None
    assert last.images[0].tokens.tolist() == want
    previewed = threads[0].submit(last.preview).result()
    assert previewed[0] == last.images[0].image
    other = pro.stream_images(PROMPT, seed=2)
    threads[0].submit(next, other).result()
    threads[1].submit(other.close).result()
    assert list(other) == []
    assert threads[2].submit(answered, pro).result(30) == answered(pro)


def test_a_preview_is_made_in_any_thread(pro: Janus, threads: list[ThreadPoolExecutor]) -> None:
    steps = pro.stream_images(PROMPT, seed=1)
    step = list(itertools.islice(steps, 5))[-1]
    here = step.preview()[0]
    assert threads[0].submit(step.preview).result()[0] == here
    steps.close()


def test_streams_of_several_threads_take_turns(
    pro: Janus, threads: list[ThreadPoolExecutor]
) -> None:
    want = [drawn(pro, seed) for seed in (1, 2)]
    text = answered(pro)
    meeting = threading.Barrier(3)

    def draw(seed: int) -> list[int]:
        steps = pro.stream_images(PROMPT, seed=seed)
        next(steps)
        meeting.wait(30)  # all three are under way
        *_, last = steps
        return last.images[0].tokens.tolist()

    def answer() -> tuple[int, ...]:
        chunks = pro.stream_text(QUESTION, max_tokens=8)
        next(chunks)
        meeting.wait(30)
        *_, last = chunks
        assert last.result is not None
        return last.result.tokens

    jobs = [threads[0].submit(draw, 1), threads[1].submit(draw, 2)]
    told = threads[2].submit(answer)
    assert [job.result(60) for job in jobs] == want
    assert told.result(60) == text


@pytest.mark.parametrize("low_memory", [False, True])
def test_two_streams_in_one_thread_take_turns(converted: dict[str, Path], low_memory: bool) -> None:
    """In low memory, too, where each takes the other's weights away."""
    janus = mlx_janus.load(converted["deepseek-pro-bin"], low_memory=low_memory)
    want = drawn(janus, 1), answered(janus)
    steps = janus.stream_images(PROMPT, seed=1)
    chunks = janus.stream_text(QUESTION, max_tokens=8)
    found: dict[str, Any] = {}
    for step, chunk in itertools.zip_longest(steps, chunks):
        if step is not None and step.images:
            found["image"] = step.images[0].tokens.tolist()
        if chunk is not None and chunk.result is not None:
            found["text"] = chunk.result.tokens
    assert (found["image"], found["text"]) == want


def test_a_paused_stream_keeps_nobody_waiting(
    pro: Janus, threads: list[ThreadPoolExecutor]
) -> None:
    want = drawn(pro, 1)
    steps = pro.stream_images(PROMPT, seed=1)
    next(steps)
    assert threads[0].submit(answered, pro).result(30) == answered(pro)
    *_, last = steps
    assert last.images[0].tokens.tolist() == want


def test_a_stream_that_is_dropped_stops(pro: Janus, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    embed = type(pro.model).embed_image_tokens
    monkeypatch.setattr(
        type(pro.model),
        "embed_image_tokens",
        lambda self, ids: (calls.append(1), embed(self, ids))[1],
    )
    steps = pro.stream_images(PROMPT, seed=1, window=1)
    next(steps)
    before = len(calls)
    del steps
    gc.collect()
    answered(pro)  # after the closing
    assert len(calls) == before
    talk = pro.conversation()
    chunks = talk.stream(QUESTION, max_tokens=8)
    next(chunks)
    del chunks
    gc.collect()
    assert talk.send(QUESTION, max_tokens=2).tokens  # else: "an answer is still being given"


def test_a_collector_may_run_amid_a_step(pro: Janus, monkeypatch: pytest.MonkeyPatch) -> None:
    """It drops streams in the model's own thread, which must not wait for itself."""
    want = drawn(pro, 1)
    hidden_states = type(pro.model).hidden_states

    def collecting(self: Any, *arguments: Any) -> Any:
        cycle: list[Any] = [pro.stream_images(PROMPT, seed=9)]
        cycle.append(cycle)
        next(iter(cycle[0]))
        del cycle
        gc.collect()
        return hidden_states(self, *arguments)

    steps = pro.stream_images(PROMPT, seed=1, window=1)
    next(steps)
    with monkeypatch.context() as patch:
        patch.setattr(
            type(pro.model),
            "hidden_states",
            lambda self, *a: (patch.undo(), collecting(self, *a))[1],
        )
        next(steps)
    *_, last = steps
    assert last.images[0].tokens.tolist() == want


def test_a_finalizer_amid_a_step_may_close_its_stream_and_use_the_model(
    pro: Janus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A garbage collector runs it in the model's thread, during a step of that stream."""
    want = answered(pro)
    hidden_states = type(pro.model).hidden_states
    steps = pro.stream_images(PROMPT, seed=1, window=1)
    found: list[object] = []

    class Finalized:
        def __del__(self) -> None:
            steps.close()
            found.append(answered(pro))

    def collecting(self: Any, *arguments: Any) -> Any:
        patch.undo()
        cycle: list[Any] = [Finalized()]
        cycle.append(cycle)
        del cycle
        gc.collect()
        return hidden_states(self, *arguments)

    next(steps)
    with monkeypatch.context() as patch:
        patch.setattr(type(pro.model), "hidden_states", collecting)
        next(steps)  # the step under way ends, and then the stream
    assert found == [want]
    assert list(steps) == []
    assert answered(pro) == want


def test_errors_arrive_where_the_stream_is_read(
    pro: Janus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise MemoryError("no room")

    steps = pro.stream_images(PROMPT, seed=1, window=1)
    next(steps)
    with monkeypatch.context() as patch:
        patch.setattr(type(pro.model), "hidden_states", failing)
        with pytest.raises(MemoryError, match="no room"):
            list(steps)
    assert list(steps) == []
    assert answered(pro)


# Frameworks


async def beats(counted: list[int]) -> None:
    while True:
        await asyncio.sleep(0.001)
        counted.append(1)


def test_asyncio_to_thread(pro: Janus) -> None:
    """Steps run in changing threads of asyncio's pool beside the loop; cancelling stops them."""
    want = drawn(pro, 1)

    async def draw(seed: int) -> list[int]:
        steps = pro.stream_images(PROMPT, seed=seed)
        last: Any = None
        while (step := await asyncio.to_thread(next, steps, None)) is not None:
            last = step
        return last.images[0].tokens.tolist()

    async def main() -> list[int]:
        counted: list[int] = []
        alive = asyncio.create_task(beats(counted))
        cancelled = asyncio.create_task(draw(3))
        await asyncio.sleep(0.01)
        cancelled.cancel()
        first, second = await asyncio.gather(draw(1), draw(2))
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        alive.cancel()
        assert counted
        assert second != first
        return first

    assert asyncio.run(main()) == want
    assert answered(pro)


def test_a_threadpool_of_fastapi(pro: Janus) -> None:
    """A synchronous route and a synchronous generator: each step runs in any thread of the pool."""
    fastapi = pytest.importorskip("fastapi")
    from fastapi.responses import StreamingResponse
    from fastapi.testclient import TestClient

    app = fastapi.FastAPI()

    @app.get("/answer")
    def answer() -> list[int]:
        return list(answered(pro))

    @app.get("/draw/{seed}")
    def draw(seed: int) -> StreamingResponse:
        return StreamingResponse(
            str(step.index) + " " for step in pro.stream_images(PROMPT, seed=seed)
        )

    client = TestClient(app)
    want = list(answered(pro))
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(client.get, "/answer") for _ in range(3)]
        drawings = [pool.submit(client.get, f"/draw/{seed}") for seed in range(3)]
        assert [job.result(60).json() for job in answers] == [want] * 3
        for job in drawings:
            indexes = job.result(60).text.split()
            assert indexes[-1] == str(pro.config.generation.tokens)


def test_a_plain_thread_for_every_call(pro: Janus) -> None:
    want = drawn(pro, 1)
    found: list[list[int]] = []
    for _ in range(4):
        thread = threading.Thread(target=lambda: found.append(drawn(pro, 1)))
        thread.start()
        thread.join()
    assert found == [want] * 4


# Interruptions and ends


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, whatever started the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_after(event: threading.Event) -> None:
    event.wait(10)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_leaves_the_model_usable(pro: Janus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller is interrupted at once; the step ends by itself, and the stream is closed."""
    hidden_states = type(pro.model).hidden_states
    began = threading.Event()

    def slow(self: Any, *arguments: Any) -> Any:
        began.set()
        time.sleep(0.3)
        return hidden_states(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(type(pro.model), "hidden_states", slow)
        threading.Thread(target=interrupt_after, args=[began]).start()
        steps = pro.stream_images(PROMPT, seed=1)
        with pytest.raises(KeyboardInterrupt):
            list(steps)
        assert list(steps) == []
        pro.thread.call(lambda: None)  # after the step and the closing
    assert answered(pro)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_a_stream_is_closed_closes_it_all_the_same(pro: Janus) -> None:
    talk = pro.conversation()
    stream = talk.stream(QUESTION, max_tokens=30)
    next(stream)
    free = threading.Event()
    other = threading.Thread(target=pro.thread.call, args=[lambda: free.wait(10)])
    other.start()
    began = threading.Event()
    threading.Thread(target=interrupt_after, args=[began]).start()
    threading.Timer(0.3, began.set).start()  # while this thread waits for the other one's call
    with pytest.raises(KeyboardInterrupt):
        stream.close()
    free.set()
    other.join()
    talk.reset()  # else: "an answer is still being given"


@pytest.mark.usefixtures("interruptible")
def test_reading_weights_stops_when_nobody_waits() -> None:
    thread = ModelThread()
    checked = threading.Event()
    ended: list[BaseException] = []

    def reading() -> None:
        checked.set()
        try:
            for _ in range(1000):
                time.sleep(0.01)
                thread.check()
        except BaseException as error:
            ended.append(error)
            raise

    threading.Thread(target=interrupt_after, args=[checked]).start()
    with pytest.raises(KeyboardInterrupt):
        thread.call(reading)
    thread.call(lambda: None)
    assert len(ended) == 1
    thread.close()


def test_a_closed_model_says_so(converted: dict[str, Path]) -> None:
    janus = mlx_janus.load(converted["deepseek-pro-bin"])
    other = mlx_janus.load(converted["deepseek-pro-bin"])
    steps = janus.stream_images(PROMPT, seed=1)
    next(steps)
    janus.close()
    janus.close()
    with pytest.raises(mlx_janus.JanusError, match="closed: load it again"):
        next(steps)
    steps.close()
    with pytest.raises(mlx_janus.JanusError, match="closed: load it again"):
        answered(janus)
    assert answered(other)
    assert (mx.array([1.0]) + 1).item() == 2.0


def held() -> int:
    gc.collect()
    mx.clear_cache()
    return int(mx.get_active_memory())


def test_closing_frees_the_models_memory_and_nothing_else(converted: dict[str, Path]) -> None:
    """Whatever still refers to it: streams that are open, conversations, images."""
    other = mlx_janus.load(converted["deepseek-pro-bin"])
    own = mx.ones((1000,)) * 2
    mx.eval(own)
    answered(other)
    before = held()
    with mlx_janus.load(converted["deepseek-pro-bin"]) as janus:
        talk = janus.conversation()
        talk.send(QUESTION, PICTURE, max_tokens=2)
        image = janus.generate_images(PROMPT, seed=1)[0]
        steps = janus.stream_images(PROMPT, seed=1)
        next(steps)
        assert held() > before + 300_000
    assert held() < before + 50_000
    assert image.tokens is not None
    for use in (lambda: talk.send(QUESTION), lambda: next(steps), lambda: janus.model):
        with pytest.raises(mlx_janus.JanusError, match="closed: load it again"):
            use()
    assert answered(other)
    assert own.sum().item() == 2000
    assert (mx.array([1.0]) + 1).item() == 2.0


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize(
    "error",
    [KeyError, StopIteration, GeneratorExit, KeyboardInterrupt, SystemExit, asyncio.CancelledError],
)
def test_a_progress_callback_that_raises_leaves_nothing_behind(
    error: type[BaseException],
    in_thread: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: list[ThreadPoolExecutor],
) -> None:
    """It is called in the thread that loads, amid the conversion."""
    monkeypatch.setenv("MLX_JANUS_CACHE", str(tmp_path / "cache"))
    called_in: list[threading.Thread] = []

    def failing(stage: str, done: int, total: int) -> None:
        called_in.append(threading.current_thread())
        if stage == "converting" and done > total // 2:
            raise error("mine")

    def attempt() -> threading.Thread:
        with pytest.raises(error, match="mine"):
            mlx_janus.load(FIXTURES / "deepseek-pro-bin", progress=failing)
        return threading.current_thread()

    loading = threads[0].submit(attempt).result() if in_thread else attempt()
    assert set(called_in) == {loading}
    assert list((tmp_path / "cache").iterdir()) == []
    assert answered(mlx_janus.load(FIXTURES / "deepseek-pro-bin"))


def test_a_conversation_is_used_from_any_thread(
    pro: Janus, threads: list[ThreadPoolExecutor]
) -> None:
    def talk(pools: list[ThreadPoolExecutor]) -> list[tuple[int, ...]]:
        turns = itertools.cycle(pools)
        conversation = next(turns).submit(pro.conversation).result()
        said = [
            next(turns).submit(conversation.send, QUESTION, max_tokens=4).result() for _ in range(3)
        ]
        next(turns).submit(conversation.draw, PROMPT, seed=1).result()
        said.append(next(turns).submit(conversation.send, "What is it?", max_tokens=4).result())
        return [result.tokens for result in said]

    assert talk(threads) == talk(threads[:1])


def test_a_model_that_is_dropped_frees_its_memory_and_its_thread(
    converted: dict[str, Path],
) -> None:
    gc.collect()
    before = held()
    names = [thread.name for thread in threading.enumerate()].count("mlx_janus model")
    janus = mlx_janus.load(converted["deepseek-pro-bin"])
    drawn(janus, 1)
    assert held() > before + 100_000
    del janus
    gc.collect()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        count = [thread.name for thread in threading.enumerate()].count("mlx_janus model")
        if count == names and held() < before + 50_000:
            return
        time.sleep(0.02)
    pytest.fail(f"{count - names} threads are left, and {held() - before} bytes")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_is_told_to_be_spawned(pro: Janus) -> None:
    """Whatever it tries with its parent's model, or with one of its own; and nothing hangs."""
    answered(pro)
    janus = mlx_janus.load()
    steps = janus.stream_images(PROMPT, seed=1)
    next(steps)
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe()

    def child() -> None:
        for use in (lambda: answered(pro), lambda: next(steps), mlx_janus.load):
            try:
                writer.send(str(use()))
            except mlx_janus.JanusError as error:
                writer.send(str(error))
        steps.close()
        janus.close()

    process = context.Process(target=child)
    process.start()
    try:
        for _ in range(3):
            assert reader.poll(30)
            assert 'get_context("spawn")' in reader.recv()
        process.join(30)
        assert process.exitcode == 0
    finally:
        process.kill()
    *_, last = steps  # the parent's own goes on
    assert last.images


# Ends of programs

# The end of each program, after ``mlx_janus`` is imported and ``janus`` loaded. Exit code 7.
ENDINGS = {
    "threads that are gone": """
for target in (mlx_janus.load, convert, work):
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
concurrent.futures.ThreadPoolExecutor(2).submit(work).result()
sys.exit(7)
""",
    "daemon threads under way": """
small = mlx_janus.load(low_memory=True)
def again_and_again(target):
    while True:
        target()
for target in (work, lambda: work(small), convert, mlx_janus.load):
    threading.Thread(target=again_and_again, args=[target], daemon=True).start()
time.sleep(0.5)
sys.exit(7)
""",
    "streams that are open, and a failure": """
def fail():
    cycle = [janus.stream_images("a red circle", seed=1), janus.conversation().stream("Hello")]
    cycle.append(cycle)
    next(cycle[0]), next(cycle[1])
    sys.exit(3)  # ends the thread only
threading.Thread(target=fail).start()
answer = janus.stream_text("Hello", max_tokens=30)
next(answer)
for step in janus.conversation().stream_drawing("a star"):
    sys.exit(7)
""",
    "a consumer that ends the process": """
def end():
    for step in janus.stream_images("a red circle", seed=1):
        if step.index == 3:
            os._exit(7)
threading.Thread(target=end).start()
work()
time.sleep(20)
""",
    "handlers at exit": """
atexit.register(lambda: print("later:", janus.generate_text("Hello", max_tokens=2).finish_reason))
sys.exit(7)
""",
}
EARLY_HANDLERS = """
import atexit
def refused(function):
    try:
        print(function())
    except mlx_janus.JanusError as error:
        print("earlier:", error)
atexit.register(lambda: refused(lambda: janus.generate_text("Hello")))
atexit.register(lambda: refused(mlx_janus.load))
atexit.register(lambda: open_stream.close())
"""


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_program_ends_with_its_own_exit_code(ending: str, tmp_path: Path) -> None:
    program = f"""
{EARLY_HANDLERS if ending == "handlers at exit" else ""}
import concurrent.futures, os, sys, tempfile, threading, time
import mlx_janus
janus = mlx_janus.load()
open_stream = janus.stream_images("a red circle", seed=1)
next(open_stream)
def work(janus=janus):
    janus.generate_text("Hello", max_tokens=2)
    janus.generate_images("a red circle", seed=1)
def convert():
    from mlx_janus.weights.convert import Source, convert_checkpoint
    folder = Path(tempfile.mkdtemp(dir=sys.argv[2]))
    convert_checkpoint(Source(Path(sys.argv[1]), "pro"), folder / "model")
from pathlib import Path
{ENDINGS[ending]}
"""
    done = run("-c", program, FIXTURES / "deepseek-pro-bin", tmp_path)
    assert done.code == 7, done
    for word in ("Traceback", "terminate", "ignored"):
        assert word not in done.stderr
    if ending == "handlers at exit":
        assert done.stdout.splitlines()[0].startswith("later:")
        assert done.stdout.count("earlier: the program is ending: use the model earlier") == 2
    if ending == "daemon threads under way":  # a conversion that is stopped leaves nothing
        assert all(path.name == "model" for path in tmp_path.glob("*/*"))


@pytest.mark.usefixtures("interruptible")
def test_a_signal_ends_the_wait_for_a_step_at_the_end_of_a_program() -> None:
    """Its code replaces the program's: Ctrl-C gives 130, and a handler's SystemExit its own."""
    program = """
import os, signal, sys, threading, time
import mlx_janus
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
janus = mlx_janus.load()
def step(*_):
    threading.Timer(0.3, os.kill, (os.getpid(), int(sys.argv[1]))).start()
    time.sleep(20)
type(janus.model).hidden_states = step
threading.Thread(target=lambda: janus.generate_text("Hello"), daemon=True).start()
time.sleep(0.2)
"""
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        done = run("-c", INTERRUPTIBLE + program, int(number))
        assert done.code == code, done
