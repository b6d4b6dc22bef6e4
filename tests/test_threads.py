"""Functions that compute with MLX: the thread they run in, their reports, and the end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_janus import threads
from mlx_janus.errors import JanusError
from mlx_janus.threads import Abandoned, Call, ComputingThread, Report, compute, computing


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> threads._State:
    """The state of the threads, to change."""
    state = threads._State()
    monkeypatch.setattr(threads, "_state", state)
    return state


def thread_of_work(report: Report) -> threading.Thread:
    report("working", 1, 2)
    return threading.current_thread()


def test_the_main_thread_and_computing_threads_compute_themselves() -> None:
    main = threading.current_thread()
    assert compute(thread_of_work) is main
    assert computing(threading.current_thread)() is main
    found: list[threading.Thread] = []
    thread = ComputingThread(lambda: found.append(compute(thread_of_work)), "mine", lambda: None)
    thread.start()
    thread.join()
    assert found == [thread]


def test_other_threads_have_it_done_and_get_the_reports(pool: ThreadPoolExecutor) -> None:
    reports: list[tuple[object, ...]] = []

    def ask() -> tuple[threading.Thread, threading.Thread]:
        def progress(*report: object) -> None:
            reports.append((threading.current_thread(), *report))

        return threading.current_thread(), compute(thread_of_work, progress)

    asking, computed = pool.submit(ask).result()
    assert isinstance(computed, ComputingThread)
    assert reports == [(asking, "working", 1, 2)]
    computed.join(10)
    assert not computed.is_alive()
    assert pool.submit(computing(threading.current_thread)).result() not in (asking, computed)


def test_an_error_of_a_report_reaches_the_work_and_then_the_caller(
    pool: ThreadPoolExecutor,
) -> None:
    cleaned: list[str] = []

    def work(report: Report) -> None:
        try:
            report("working", 0, 1)
        finally:
            cleaned.append("up")

    def progress(*_: object) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pool.submit(compute, work, progress).result()
    assert cleaned == ["up"]


def test_work_whose_caller_is_gone_stops_at_its_next_report() -> None:
    call = Call(lambda: None)
    call.abandoned = True
    with pytest.raises(Abandoned):
        call.in_caller(lambda: None)
    call.run()
    with pytest.raises(SystemExit):  # so that a thread ends without a message
        call.wait()


def test_at_the_end_of_the_program_nothing_starts(
    state: threads._State, pool: ThreadPoolExecutor
) -> None:
    state.ending = True
    with pytest.raises(JanusError, match="the program is ending"):
        compute(thread_of_work)
    with pytest.raises(JanusError, match="the program is ending"):
        ComputingThread(lambda: None, "mine", lambda: None).start()
    with pytest.raises(SystemExit):  # in a thread, it ends the thread without a message
        pool.submit(compute, thread_of_work).result()


def test_a_fork_forgets_the_threads_and_refuses_if_mlx_was_used(state: threads._State) -> None:
    thread = ComputingThread(lambda: None, "mine", lambda: None)
    state.running.add(thread)
    threads._after_fork()
    assert not state.running
    assert compute(thread_of_work) is threading.current_thread()
    threads.note_mlx_use()
    threads._after_fork()
    with pytest.raises(JanusError, match="forked after it had computed: start processes by"):
        compute(thread_of_work)


def test_a_thread_that_cannot_start_is_one_error(
    state: threads._State, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(JanusError, match=r"cannot be started: can't start new thread$"):
        ComputingThread(lambda: None, "mine", lambda: None).start()
    assert not state.running
