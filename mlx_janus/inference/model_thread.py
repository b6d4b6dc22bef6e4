"""A thread that runs all work of one model, so that any other thread can use the model.

MLX binds lazy arrays and streams to the thread that created them. So all work of a model runs in
one thread; other threads pass calls to it and wait for the results.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from queue import SimpleQueue
from typing import Any, Generic, TypeVar, cast

from ..errors import JanusError
from ..threads import SPAWN, Call, ComputingThread, check_call, check_usable, note_mlx_use

CLOSED = "the model is closed: load it again"
T = TypeVar("T")
_END = object()  # a stream's step returns this when the generator has ended
Generators = set[Generator[Any, None, None]]


class _Worker:
    """A model's thread and its queue of calls.

    It has no reference to the model, so an unused model can be garbage collected.
    """

    def __init__(self, generators: Generators) -> None:
        self.calls: SimpleQueue[Call | None] = SimpleQueue()  # None ends the thread
        self._generators = generators  # of the model's open streams; only the thread uses it
        self._ending = False  # whether the program ends; waiting calls are not run then
        self.thread = ComputingThread(self._run, "mlx_janus model", self._end_soon)

    def stop(self) -> None:
        """Make the thread end after the calls in its queue; return without waiting for the end."""
        self.calls.put(None)

    def _end_soon(self) -> None:
        """Make the thread end after the running call, which ends at its next ``check_call``."""
        self._ending = True
        if (call := self.thread.call) is not None:
            call.abandoned = True
        self.stop()

    def _run(self) -> None:
        """Run the calls of the queue one after the other; when None is queued, close all streams.

        Streams are closed here because the arrays of their generators belong to this thread.
        """
        while (call := self.calls.get()) is not None:
            self.thread.call = call
            if self._ending:
                call.abandoned = True  # so that ``run`` skips the function
            call.run()
            # Drop the call, or its result would stay in memory until the next call.
            self.thread.call = None
            call = None
        for generator in list(self._generators):
            with contextlib.suppress(Exception):  # a failure must not keep the others open
                generator.close()
        self._generators.clear()


class ModelThread:
    """A thread that runs calls and steps of streams one at a time; the first call starts it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # for ``_worker`` and ``_closed``; not held during calls
        self._worker: _Worker | None = None  # None: not started, or closed
        self._closed = False
        self._pid = os.getpid()  # a forked process has another pid, and lacks the thread
        # Stops the worker when this ``ModelThread`` is garbage collected.
        self._finalizer: weakref.finalize[Any, Any] | None = None
        # Of streams that have begun and not ended. Only the model's thread uses this.
        self._generators: Generators = set()

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the model's thread and return its result.

        An exception of the function is raised in the calling thread. Ctrl-C in the calling thread
        abandons the call, and the function ends when it calls ``check`` next.

        Raises:
            JanusError: the model is closed, the program is ending, or this process was forked after
                the model was loaded.
        """
        worker = self._worker
        if worker is not None and worker.thread is threading.current_thread():
            return function()  # called in the model's thread, which must not wait for itself
        call = Call(function)
        self._queue(call)
        return cast(T, call.wait())

    def stream(self, generator: Generator[T, None, None]) -> ThreadStream[T]:
        """Wrap a generator so that each of its steps runs in the model's thread."""
        return ThreadStream(self, generator)

    def advance(self, generator: Generator[T, None, None]) -> T | object:
        """Run the next step of a stream's generator in the model's thread.

        Returns:
            The item that it yields, or ``_END`` if it has ended.

        Raises:
            JanusError: the model is closed, the program is ending, or this process was forked after
                the model was loaded.
        """

        def step() -> T | object:
            """Advance the generator; keep it in ``_generators`` as long as it is open."""
            self._generators.add(generator)
            item: T | object = _END
            try:
                item = next(generator, _END)
            finally:
                if item is _END:  # it has ended or failed
                    self._generators.discard(generator)
            return item

        return self.call(step)

    def check(self) -> None:
        """End the current call by an exception if its caller has stopped waiting.

        Raises:
            Abandoned: the caller has stopped waiting, or the program ends.
        """
        check_call()

    def close(self) -> None:
        """Finish the calls in the queue, close all streams, and end the thread.

        Waits until the thread has ended, unless this runs in that thread. After that, ``call``
        raises ``JanusError``, and a second ``close`` does nothing.
        """
        with self._lock:
            self._closed = True
            worker = self._worker
            self._worker = None
            if self._finalizer is not None:
                self._finalizer.detach()  # the worker is stopped below instead
        if worker is None or self._is_forked():  # a forked process lacks the thread
            return
        worker.stop()
        if worker.thread is not threading.current_thread():
            worker.thread.join()

    def close_stream(self, generator: Generator[Any, None, None], *, wait: bool) -> None:
        """Close a stream's generator in the model's thread.

        Without ``wait``, take no lock, because garbage collection may call this in a thread that
        holds the lock.

        Raises:
            JanusError: with ``wait``, if the model is closed, the program is ending, or this
                process was forked after the model was loaded.
        """
        worker = self._worker

        def close() -> None:
            """Close the generator. If it is running a step, queue this function again."""
            running = inspect.getgeneratorstate(generator) == inspect.GEN_RUNNING
            if running and worker is not None:  # garbage collection during the step called this
                worker.calls.put(Call(close))
                return
            self._generators.discard(generator)
            generator.close()

        if wait:
            self.call(close)
        # Without a worker, the generator has never begun, or the thread has closed it. A forked
        # process lacks the thread.
        elif worker is not None and not self._is_forked():
            worker.calls.put(Call(close))

    def _is_forked(self) -> bool:
        """Return whether this process was forked after the model was loaded."""
        return os.getpid() != self._pid

    def _queue(self, call: Call) -> None:
        """Put a call into the thread's queue; the first call also starts the thread.

        Raises:
            JanusError: the model is closed, the program is ending, or this process was forked after
                the model was loaded.
        """
        if self._is_forked():
            raise JanusError(
                f"a model cannot be used in a process that was forked after it was loaded: {SPAWN}"
            )
        check_usable()
        with self._lock:
            if self._closed:
                raise JanusError(CLOSED)
            if self._worker is None:
                worker = _Worker(self._generators)
                note_mlx_use()
                worker.thread.start()
                self._worker = worker
                self._finalizer = weakref.finalize(self, worker.stop)
                self._finalizer.atexit = False  # at exit, ``mlx_janus.threads`` ends the thread
            self._worker.calls.put(call)


class ThreadStream(Iterator[T], Generic[T]):
    """An iterator that any thread can advance and close, one thread at a time.

    Several streams of one model take turns step by step, so a paused stream does not block the
    others. A stream is closed when it is garbage collected or Ctrl-C interrupts a step.
    """

    def __init__(self, thread: ModelThread, generator: Generator[T, None, None]):
        self._thread = thread
        self._generator = generator
        # Closes the generator if the stream is garbage collected or fails. The stream is open as
        # long as ``_finalizer.alive``.
        self._finalizer = weakref.finalize(self, thread.close_stream, generator, wait=False)
        # At exit, the thread ends without this finalizer.
        self._finalizer.atexit = False

    def __iter__(self) -> ThreadStream[T]:
        return self

    def __next__(self) -> T:
        """Run the generator's next step in the model's thread, and return the item it yields.

        An exception in the step ends the stream and is raised here.

        Raises:
            StopIteration: the stream has ended, failed or been closed.
        """
        if not self._finalizer.alive:  # the stream has ended, failed or been closed
            raise StopIteration
        try:
            item = self._thread.advance(self._generator)
        except BaseException:
            self._finalizer()  # closes the generator
            raise
        if item is _END:
            self._finalizer.detach()  # there is nothing to close
            raise StopIteration
        return cast(T, item)

    def close(self) -> None:
        """Close the generator after any step in progress, and wait until it is closed.

        The stream then yields no further items. Does nothing if the stream has ended.
        """
        if self._finalizer.detach() is None:  # the stream has ended, failed or been closed
            return
        try:
            self._thread.close_stream(self._generator, wait=True)
        except JanusError:
            # The model is closed or the program is ending: then the thread closes all generators.
            # Or this process was forked, and the generator belongs to a thread that it lacks.
            pass
        except BaseException:  # Ctrl-C, which may have abandoned the call before it began
            self._thread.close_stream(self._generator, wait=False)
            raise
