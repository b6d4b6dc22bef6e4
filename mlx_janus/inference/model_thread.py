"""A thread of its own for one model, so that every other thread may use it.

MLX binds lazy arrays and streams to the thread that made them, and a thread that computed must release its streams
before it ends, or the process may abort at exit. So a model's work runs in one thread, whichever threads ask for it;
they hand over calls and wait for the results.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from queue import SimpleQueue
from typing import Any, Generic, TypeVar, cast

import mlx.core as mx

from ..errors import JanusError

CLOSED = "the model is closed: load it again"
T = TypeVar("T")
_END = object()


class _Abandoned(BaseException):
    """Ends a call whose caller has stopped waiting."""


class _Call:
    """One function to run, and a place for its result."""

    def __init__(self, function: Callable[[], Any]):
        self.function: Callable[[], Any] | None = function
        self.abandoned = False  # nobody waits any more
        self.value: Any = None
        self.error: BaseException | None = None
        self.done: SimpleQueue[None] = SimpleQueue()

    def run(self) -> None:
        """Run the function unless nobody waits for it."""
        try:
            if not self.abandoned and self.function is not None:
                self.value = self.function()
        except BaseException as error:
            self.error = error
        finally:
            self.function = None  # frees the arrays that it holds
            if not self.abandoned:
                self.done.put(None)

    def wait(self) -> Any:
        """Return the result, or raise the error, once the call is done."""
        try:
            self.done.get()
        except BaseException:  # Ctrl-C
            self.abandoned = True
            raise
        if self.error is None:
            return self.value
        try:
            raise self.error
        finally:
            self.error = None  # or the traceback would hold this frame, and this frame the error


class _Worker:
    """The thread, with nothing that refers to the model: a model that is dropped can be collected."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[_Call | None] = SimpleQueue()  # None ends the thread
        self.current: _Call | None = None
        self.ending = False  # with the program: the calls that wait are not run
        self._device = mx.default_device()
        self.thread = threading.Thread(target=self._run, name="mlx_janus model", daemon=True)

    def start(self) -> None:
        """Start the thread, which ends with the program at the latest."""
        _RUNNING.add(self)
        self.thread.start()

    def stop(self) -> None:
        """Have the thread end after the calls that wait."""
        self.calls.put(None)

    def _run(self) -> None:
        if mx.default_device() != self._device:
            mx.set_default_device(self._device)
        try:
            while (call := self.calls.get()) is not None:
                self.current = call
                call.abandoned |= self.ending
                call.run()
                self.current = call = None
        finally:
            mx.clear_streams()
            _RUNNING.discard(self)


_RUNNING: set[_Worker] = set()


@atexit.register
def _end_all() -> None:
    """End every thread before the interpreter does; a step that is under way is waited for, unless Ctrl-C comes."""
    try:
        for worker in list(_RUNNING):
            worker.ending = True
            if (call := worker.current) is not None:
                call.abandoned = True
            worker.stop()
        for worker in list(_RUNNING):
            worker.thread.join()
    except KeyboardInterrupt:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(130)


class ModelThread:
    """Runs calls and streams one after the other in one thread, which starts with the first of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held to start, to stop and to hand over, never during work
        self._worker: _Worker | None = None
        self._closed = False
        self._pid = os.getpid()
        self._end: weakref.finalize[Any, Any] | None = None
        self._open: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the model's thread and return its result.

        An exception of the function is raised here. Ctrl-C here abandons the call: it ends at its next ``check``.

        Raises:
            JanusError: the model is closed, or belongs to the process that this one was forked from.
        """
        worker = self._worker
        if worker is not None and worker.thread is threading.current_thread():
            return function()
        call = _Call(function)
        self._hand_over(call)
        return cast(T, call.wait())

    def stream(self, generator: Generator[T, None, None]) -> ThreadStream[T]:
        """Wrap a generator so that each of its steps runs in the model's thread."""
        self._open.add(generator)
        return ThreadStream(self, generator)

    def check(self) -> None:
        """Raise in the model's thread if the caller of the current call no longer waits; for long work."""
        worker = self._worker
        if worker is None or worker.thread is not threading.current_thread():
            return
        if worker.current is not None and worker.current.abandoned:
            raise _Abandoned

    def close(self) -> None:
        """End the thread after the calls that wait, and every stream; later calls are refused.

        Closing again does nothing.
        """
        with self._lock:
            self._closed = True
            worker = self._worker
            self._worker = None
            if self._end is not None:
                self._end.detach()
            if worker is not None:
                for generator in list(self._open):
                    worker.calls.put(_Call(generator.close))
                worker.stop()
        if worker is not None and worker.thread is not threading.current_thread():
            worker.thread.join()

    def discard(self, generator: Generator[Any, None, None]) -> None:
        """Close a generator in the model's thread without waiting; safe to call from a garbage collector."""
        worker = self._worker
        if worker is None or os.getpid() != self._pid:
            return  # it never ran, or its thread has ended
        worker.calls.put(_Call(generator.close))

    def _hand_over(self, call: _Call) -> None:
        if os.getpid() != self._pid:
            raise JanusError(
                "a model cannot be used in a process that was forked after it was loaded: "
                'start processes by multiprocessing.get_context("spawn"), and load the model in each'
            )
        with self._lock:
            if self._closed:
                raise JanusError(CLOSED)
            if self._worker is None:
                worker = _Worker()
                worker.start()
                self._worker = worker
                self._end = weakref.finalize(self, worker.stop)
                self._end.atexit = False  # there `_end_all` does it, and waits
            self._worker.calls.put(call)


class ThreadStream(Iterator[T], Generic[T]):
    """An iterator that any thread may advance and close, one at a time.

    Steps of several streams of one model take turns: a stream that is paused keeps nobody waiting. One that is
    dropped, or whose step is interrupted by Ctrl-C, is closed.
    """

    def __init__(self, thread: ModelThread, generator: Generator[T, None, None]):
        self._thread = thread
        self._generator = generator
        self._drop = weakref.finalize(self, thread.discard, generator)
        self._drop.atexit = False

    def __iter__(self) -> ThreadStream[T]:
        return self

    def __next__(self) -> T:
        if not self._drop.alive:
            raise StopIteration
        try:
            value = self._thread.call(lambda: next(self._generator, _END))
        except BaseException:
            self._drop()
            raise
        if value is _END:
            self._drop.detach()
            raise StopIteration
        return cast(T, value)

    def close(self) -> None:
        """Stop the work within a step; a closed stream yields nothing more."""
        if self._drop.detach() is None:
            return
        with contextlib.suppress(JanusError):  # the model was closed before
            self._thread.call(self._generator.close)
