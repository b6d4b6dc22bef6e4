"""A thread that runs all work of one model, so that any other thread can use the model.

MLX binds lazy arrays and streams to the thread that created them. A thread that has computed must
release its streams before it ends, or the process may abort at exit. So all work of a model runs in
one thread; other threads pass calls to it and wait for the results.
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
_END = object()  # a stream's step returns this when the generator has ended


class _Abandoned(BaseException):
    """Raised by ``ModelThread.check`` to end a call whose caller has stopped waiting."""


class _Call:
    """A function to run, and its result or error."""

    def __init__(self, function: Callable[[], Any]):
        self.function: Callable[[], Any] | None = function
        self.abandoned = False  # whether the caller has stopped waiting, or the program ends
        self.value: Any = None
        self.error: BaseException | None = None
        self.done: SimpleQueue[None] = SimpleQueue()  # gets one item when the call has ended

    def run(self) -> None:
        """Run the function unless the call is abandoned; keep the result or error for ``wait``."""
        try:
            if not self.abandoned and self.function is not None:
                self.value = self.function()
        except BaseException as error:
            self.error = error
        finally:
            self.function = None  # frees the arrays that the function holds
            if not self.abandoned:  # otherwise no thread waits
                self.done.put(None)

    def wait(self) -> Any:
        """Wait until the call has ended; return the function's result or raise its error."""
        try:
            self.done.get()
        except BaseException:  # Ctrl-C; the function ends when it calls ``ModelThread.check`` next
            self.abandoned = True
            raise
        if self.error is None:
            return self.value
        try:
            raise self.error
        finally:
            self.error = None  # else the traceback and this frame would keep each other alive


class _Worker:
    """A model's thread and its queue of calls.

    It has no reference to the model, so an unused model can be garbage collected.
    """

    def __init__(self) -> None:
        self.calls: SimpleQueue[_Call | None] = SimpleQueue()  # None ends the thread
        self.current: _Call | None = None  # the running call
        self.ending = False  # whether the program ends; waiting calls are not run then
        self._device = mx.default_device()  # of the creating thread
        self.thread = threading.Thread(target=self._run, name="mlx_janus model", daemon=True)

    def start(self) -> None:
        """Start the thread. If it still runs at exit, ``_end_all_threads`` ends it."""
        _RUNNING.add(self)
        self.thread.start()

    def stop(self) -> None:
        """Make the thread end after the calls in its queue; return without waiting for the end."""
        self.calls.put(None)

    def _run(self) -> None:
        """Run the calls of the queue one after the other; end when None is queued.

        MLX's default device is that of the thread that created the worker.
        """
        if mx.default_device() != self._device:
            mx.set_default_device(self._device)
        try:
            while (call := self.calls.get()) is not None:
                self.current = call
                if self.ending:
                    call.abandoned = True  # so that ``run`` skips the function
                call.run()
                # Drop the call, or its result would stay in memory until the next call.
                self.current = None
                call = None
        finally:
            mx.clear_streams()  # else the process may abort at exit
            _RUNNING.discard(self)


_RUNNING: set[_Worker] = set()  # workers whose threads have started and not ended


@atexit.register
def _end_all_threads() -> None:
    """End the threads of all models before the interpreter exits.

    Waits until running calls have ended; Ctrl-C ends the process without waiting.
    """
    try:
        for worker in list(_RUNNING):
            worker.ending = True
            if (call := worker.current) is not None:
                call.abandoned = True  # its next ``ModelThread.check`` ends it
            worker.stop()
        for worker in list(_RUNNING):
            worker.thread.join()
    except KeyboardInterrupt:
        for stream in (sys.stdout, sys.stderr):  # ``os._exit`` does not flush them
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(130)  # the exit status after Ctrl-C


class ModelThread:
    """A thread that runs calls and steps of streams one at a time; the first call starts it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # for ``_worker`` and ``_closed``; not held during calls
        self._worker: _Worker | None = None  # None: not started, or closed
        self._closed = False
        self._pid = os.getpid()  # a forked process has another pid, and lacks the thread
        # Stops the worker when this ``ModelThread`` is garbage collected.
        self._finalizer: weakref.finalize[Any, Any] | None = None
        # The generators of all streams, for ``close`` to close them.
        self._generators: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the model's thread and return its result.

        An exception of the function is raised in the calling thread. Ctrl-C in the calling thread
        abandons the call, and the function ends when it calls ``check`` next.

        Raises:
            JanusError: the model is closed, or was loaded before this process was forked.
        """
        worker = self._worker
        if worker is not None and worker.thread is threading.current_thread():
            return function()  # called in the model's thread, which must not wait for itself
        call = _Call(function)
        self._queue(call)
        return cast(T, call.wait())

    def stream(self, generator: Generator[T, None, None]) -> ThreadStream[T]:
        """Wrap a generator so that each of its steps runs in the model's thread."""
        self._generators.add(generator)
        return ThreadStream(self, generator)

    def check(self) -> None:
        """End the current call by an exception if the call is abandoned.

        Long work, such as loading weights, calls this between its parts. Outside the model's
        thread, this does nothing.

        Raises:
            _Abandoned: the caller has stopped waiting, or the program ends.
        """
        worker = self._worker
        if worker is None or worker.thread is not threading.current_thread():
            return
        if worker.current is not None and worker.current.abandoned:
            raise _Abandoned

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
            if worker is not None:
                for generator in list(self._generators):
                    worker.calls.put(_Call(generator.close))
                worker.stop()
        if worker is not None and worker.thread is not threading.current_thread():
            worker.thread.join()

    def discard(self, generator: Generator[Any, None, None]) -> None:
        """Close a stream's generator in the model's thread; return without waiting.

        Takes no lock, because garbage collection may call this in a thread that holds the lock.
        """
        worker = self._worker
        if worker is None or os.getpid() != self._pid:
            return  # the generator never ran, its thread was closed, or this process was forked
        worker.calls.put(_Call(generator.close))

    def _queue(self, call: _Call) -> None:
        """Put a call into the thread's queue; the first call also starts the thread.

        Raises:
            JanusError: the model is closed, or was loaded before this process was forked.
        """
        if os.getpid() != self._pid:
            raise JanusError(
                "a model cannot be used in a process that was forked after it was loaded: "
                'start processes by multiprocessing.get_context("spawn"), '
                "and load the model in each"
            )
        with self._lock:
            if self._closed:
                raise JanusError(CLOSED)
            if self._worker is None:
                worker = _Worker()
                worker.start()
                self._worker = worker
                self._finalizer = weakref.finalize(self, worker.stop)
                self._finalizer.atexit = False  # ``_end_all_threads`` stops the worker at exit
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
        self._finalizer = weakref.finalize(self, thread.discard, generator)
        self._finalizer.atexit = False  # at exit, the thread ends without it

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
            item = self._thread.call(lambda: next(self._generator, _END))
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
        with contextlib.suppress(JanusError):  # the model is closed, or this process was forked
            self._thread.call(self._generator.close)
