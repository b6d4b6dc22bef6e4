"""Threads that compute with MLX, and how they end.

MLX keeps streams and a key of random numbers for each thread. If a thread ends before they are
freed, or computes while the interpreter ends, the process may abort. So this package computes only
in the main thread and in ``ComputingThread``. Such a thread frees MLX's state at its end, and the
program waits for it before the interpreter ends. A forked process does not have its parent's
threads, and MLX hangs in it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from functools import wraps
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar, cast

import mlx.core as mx

from .errors import JanusError

P = ParamSpec("P")
T = TypeVar("T")
Report = Callable[[str, int, int], None]
"""Reports progress: the stage, the bytes done and the total bytes."""

SPAWN = 'start processes by multiprocessing.get_context("spawn"), and load the model in each'
"""The advice for a forked process."""

_FORKED = f"MLX cannot be used in a process that was forked after it had computed: {SPAWN}"
_ENDING = (
    "the program is ending: use the model earlier, or call atexit.register after mlx_janus.load"
)
_POLL = 0.5  # seconds between two looks whether a caller still waits


class Abandoned(BaseException):
    """Raised in a computing thread to end a call for which nobody waits any more."""


class Call:
    """A function to run in another thread, and its result or error."""

    def __init__(self, function: Callable[[], Any]):
        self.function: Callable[[], Any] | None = function
        self.abandoned = False  # whether the caller has stopped waiting, or the program ends
        self.value: Any = None
        self.error: BaseException | None = None
        # Functions that the caller runs while it waits; None: the call has ended.
        self._requests: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def run(self) -> None:
        """Run the function unless the call is abandoned; keep the result or error for ``wait``."""
        try:
            self.check()
            if self.function is not None:
                self.value = self.function()
        except BaseException as error:
            self.error = error
        finally:
            self.function = None  # frees the arrays that the function holds
            self._requests.put(None)

    def wait(self) -> Any:
        """Wait until the call has ended; return the function's result or raise its error.

        Raises:
            SystemExit: the program is ending. It ends this thread without a message.
        """
        try:
            while (request := self._requests.get()) is not None:
                request()
        except BaseException:  # Ctrl-C; the function ends at its next call of ``check``
            self.abandoned = True
            raise
        if self.error is None:
            return self.value
        try:
            if isinstance(self.error, Abandoned):
                # This thread still waits, so only the end of the program can have abandoned it.
                raise SystemExit
            raise self.error
        finally:
            # Otherwise the error's traceback and this frame would keep each other alive.
            self.error = None

    def check(self) -> None:
        """Check that a caller waits for this call.

        Raises:
            Abandoned: the caller has stopped waiting, or the program ends.
        """
        if self.abandoned:
            raise Abandoned

    def in_caller(self, function: Callable[[], Any]) -> None:
        """Run a function in the thread that waits for this call; raise the error that it raises.

        Raises:
            Abandoned: nobody waits for this call.
        """
        errors: SimpleQueue[BaseException | None] = SimpleQueue()

        def request() -> None:
            """Run the function, and put its error into ``errors``; None if it raises none."""
            try:
                function()
            except BaseException as error:
                errors.put(error)
            else:
                errors.put(None)

        self.check()
        self._requests.put(request)
        error = self._wait_for_error(errors)
        if error is not None:
            raise error

    def _wait_for_error(self, errors: SimpleQueue[BaseException | None]) -> BaseException | None:
        """Return the error, or None, that the caller's thread puts into a queue.

        Raises:
            Abandoned: the caller has stopped waiting for this call.
        """
        while True:
            self.check()
            with contextlib.suppress(Empty):
                return errors.get(timeout=_POLL)


class ComputingThread(threading.Thread):
    """A thread that may compute with MLX. When it ends, it frees what MLX keeps for it.

    Its default device is that of the thread that creates it.

    Args:
        target: the function to run.
        name: the thread's name.
        end_soon: makes the target end soon. ``_end_all_threads`` calls it at the program's end, and
            then waits for the thread.
    """

    def __init__(self, target: Callable[[], None], name: str, end_soon: Callable[[], None]):
        super().__init__(target=target, name=name, daemon=True)
        self.end_soon = end_soon
        self.call: Call | None = None  # the running call
        self._device = mx.default_device()

    def start(self) -> None:
        """Start the thread.

        Raises:
            JanusError: the program is ending, this process was forked after MLX was used, or the
                system has no more threads.
        """
        with _state.lock:
            _state.check()
            _state.running.add(self)
            try:
                super().start()
            # The system has no more threads; or the interpreter ends (since Python 3.12).
            except RuntimeError as error:
                _state.running.discard(self)
                reason = str(error).rstrip(".")
                raise JanusError(f"a thread for the model cannot be started: {reason}") from None

    def run(self) -> None:
        """Run the target, then free MLX's state of this thread."""
        try:
            if mx.default_device() != self._device:
                mx.set_default_device(self._device)
            super().run()
        finally:
            mx.clear_streams()
            _state.running.discard(self)


class _State:
    """The computing threads of this process, and whether new ones may start."""

    def __init__(self) -> None:
        # Guards ``ending`` and ``running``. It is an RLock because the garbage collector may run
        # while ``start`` holds it, and run code that starts another thread.
        self.lock = threading.RLock()
        self.running: set[ComputingThread] = set()  # started and not ended
        self.used = False  # whether MLX has evaluated anything for this package
        self.forked = False  # whether this process was forked from one whose ``used`` was True
        # Whether the program is ending.
        self.ending = False

    def check(self) -> None:
        """Check that this process may compute.

        Raises:
            JanusError: the program is ending, or this process was forked after MLX was used.
            SystemExit: the program is ending, and this is not its main thread. It ends the thread
                without a message, as the thread would end with the program anyway.
        """
        if self.forked:
            raise JanusError(_FORKED)
        if self.ending and threading.current_thread() is not threading.main_thread():
            raise SystemExit
        if self.ending:
            raise JanusError(_ENDING)


_state = _State()


def _after_fork() -> None:
    """Forget the parent's threads, which a forked process does not have."""
    _state.lock = threading.RLock()
    _state.running = set()
    _state.forked = _state.forked or _state.used
    _state.ending = False


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


@atexit.register
def _end_all_threads() -> None:
    """End all computing threads before the interpreter ends, and start no more.

    Waits until the calls in progress have ended. Ctrl-C ends the process without waiting, and so
    does a signal whose handler raises SystemExit.
    """
    try:
        with _state.lock:
            _state.ending = True
            running = list(_state.running)
        for thread in running:
            thread.end_soon()
        for thread in running:
            thread.join()
    except (KeyboardInterrupt, SystemExit) as error:
        code = error.code if isinstance(error, SystemExit) else 130  # the status after Ctrl-C
        for stream in (sys.stdout, sys.stderr):  # ``os._exit`` does not flush them
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code if isinstance(code, int) else 1)


def check_usable() -> None:
    """Check that this process can use models.

    Raises:
        JanusError: the program is ending, or this process was forked after MLX was used.
    """
    _state.check()


def is_forked() -> bool:
    """Return whether this process was forked after MLX was used, so that MLX may hang."""
    return _state.forked


def note_mlx_use() -> None:
    """Record that this process evaluates something with MLX: its later forks cannot use MLX."""
    _state.used = True


def compute(function: Callable[[Report], T], progress: Report | None = None) -> T:
    """Run a function in a thread that may compute with MLX, and return its result.

    If this thread is the main thread or a ``ComputingThread``, it runs the function. Otherwise a
    new thread does, and this thread waits for it.

    Args:
        function: the function, which computes with MLX. Its argument is a function that it should
            call often to report progress. If a report raises an error, such as one of ``progress``,
            the function must clean up and not catch it.
        progress: called in this thread, even if the function runs in another; None: no reports.

    Raises:
        JanusError: the program is ending, or this process was forked after MLX was used.
    """
    _state.check()
    here = threading.current_thread()
    if here is threading.main_thread() or isinstance(here, ComputingThread):
        return function(progress or (lambda *_: None))

    def report(stage: str, done: int, total: int) -> None:
        """Call ``progress`` in the thread that waits; raise ``Abandoned`` if none waits."""
        call.check()
        if progress is not None:
            call.in_caller(lambda: progress(stage, done, total))

    def end_soon() -> None:
        """Have the function end at its next report."""
        call.abandoned = True

    call = Call(lambda: function(report))
    thread = ComputingThread(call.run, "mlx_janus computing", end_soon)
    thread.call = call
    thread.start()
    return cast(T, call.wait())


def check_call() -> None:
    """Check that a caller waits for the call that this thread runs.

    Long work, such as loading weights, calls this between its parts. Outside a ``ComputingThread``
    this does nothing.

    Raises:
        Abandoned: the caller has stopped waiting, or the program ends.
    """
    here = threading.current_thread()
    if isinstance(here, ComputingThread) and here.call is not None:
        here.call.check()


def computing(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a short function, which reports no progress, so that ``compute`` runs it."""

    @wraps(function)
    def computed(*args: P.args, **kwargs: P.kwargs) -> T:
        """Run the function in a thread that may compute with MLX."""
        return compute(lambda _: function(*args, **kwargs))

    return computed
