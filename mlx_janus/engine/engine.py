"""One model for many clients.

One thread uses the device and works in rounds: a step of every image, a token of every answer, and
at most one decoding of an image. So no answer waits for an entire image, and no image for an entire
answer. The event loop submits requests and reads their events.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from ..config import JanusConfig
from ..errors import JanusError, OptionError, PromptError
from ..inference.loaded import TASKS, LoadedModel
from ..inference.pathway import ImagePathway
from ..inference.pathways import pathway_of
from ..limits import MAX_IMAGES, MAX_SEED, check_int
from ..memory import weights_wired
from .image_queue import ImageScheduler, ImageTask
from .messages import AnswerRequest, BusyError, DrawingRequest, Request, StoppingError
from .text_queue import TextScheduler, TextTask
from .tickets import Counts, Ticket, end_waiting

_MAX_CHARACTERS = 32
"""Characters of a prompt for each position of the context; longer prompts are not tokenized."""
_LONGEST_WAIT = 60  # seconds: the maximum of Retry-After


@dataclass(frozen=True)
class _Schedulers:
    """The loaded model and the schedulers over it."""

    janus: LoadedModel
    text: TextScheduler
    images: ImageScheduler


class Engine:
    """A thread that serves the requests of an event loop with one model.

    Args:
        load: returns the model; called in the thread.
        waiting: the maximum number of waiting requests.
        answers: the maximum number of answers generated at the same time.
    """

    def __init__(self, load: Callable[[], LoadedModel], *, waiting: int = 64, answers: int = 4):
        self._load = load
        self._most_waiting = waiting
        self._most_answers = answers
        self._changed = threading.Condition()  # lock of the waiting queues; wakes the thread
        # Monotonic time at which running requests are ended; None: the engine is not stopping.
        self._stop_at: float | None = None
        # Seconds of recent requests; the first value is a guess.
        self._durations: deque[float] = deque([1.0], maxlen=16)
        self._thread = threading.Thread(target=self._run, name="mlx_janus device", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: asyncio.Future[None] | None = None
        self._schedulers: _Schedulers | None = None
        self.failure: BaseException | None = None  # the error that stopped the thread's rounds
        self.ended = asyncio.Event()  # set after the thread's last round, not if loading failed

    @property
    def _janus(self) -> LoadedModel:
        """The loaded model.

        Raises:
            JanusError: no model is loaded yet.
        """
        if self._schedulers is None:
            raise JanusError("the engine has no model yet: await start() first")
        return self._schedulers.janus

    @property
    def name(self) -> str:
        """The model's name."""
        return self._janus.name

    @property
    def config(self) -> JanusConfig:
        """The model's config."""
        return self._janus.config

    @property
    def pathway(self) -> ImagePathway:
        """The model's way to generate images."""
        return pathway_of(self._janus)

    @property
    def stopping(self) -> bool:
        """Whether new requests are refused: the engine is closing, or its thread has failed."""
        return self._stop_at is not None

    @property
    def counts(self) -> Counts:
        """The numbers of waiting requests, running answers and running images; 0 before loading."""
        if self._schedulers is None:
            return Counts()
        text = self._schedulers.text
        images = self._schedulers.images
        return Counts(len(text.waiting) + images.waiting_requests, len(text.running), images.images)

    async def start(self) -> None:
        """Start the thread, and wait until it has loaded the model and its weights. Call it once.

        Raises:
            JanusError: the model cannot be loaded, or is in low-memory mode.
            StoppingError: the engine was closed while loading.
        """
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.create_future()
        self._thread.start()
        await self._started

    async def close(self, seconds: float = 30.0) -> None:
        """Refuse new requests, and wait until the thread has ended.

        The thread ends the waiting requests and lets the running ones finish.

        Args:
            seconds: time for the running requests; then those left end with a StoppingError.
        """
        with self._changed:  # a second close() may shorten the time, never extend it
            end = time.monotonic() + seconds
            self._stop_at = end if self._stop_at is None else min(end, self._stop_at)
            self._changed.notify()
        if self._thread.ident is not None:  # it was started
            await asyncio.to_thread(self._thread.join)

    def submit(self, request: Request) -> Ticket:
        """Queue a request, on the event loop, and return the ticket that yields its events.

        Raises:
            PromptError: the prompt is empty, or does not fit into the context.
            OptionError: a number is out of range, or the images do not match the turns.
            BusyError: the queue is full.
            StoppingError: the engine is not started, is closing or has failed.
        """
        schedulers = self._schedulers
        if self.stopping or schedulers is None:
            raise StoppingError
        if self.counts.waiting >= self._most_waiting:
            raise BusyError(self._retry_after())
        ticket = Ticket(self._wake, self._durations.append)
        task = self._checked(ticket, request)
        with self._changed:
            # The engine may stop after the first check: then nothing reads the queue.
            if self.stopping:
                raise StoppingError
            if isinstance(task, TextTask):
                schedulers.text.waiting.append(task)
            else:
                schedulers.images.waiting.append(task)
            self._changed.notify()
        return ticket

    def _retry_after(self) -> int:
        """Return the mean duration of recent requests in seconds, from 1 to ``_LONGEST_WAIT``."""
        mean = sum(self._durations) / len(self._durations)
        return min(max(math.ceil(mean), 1), _LONGEST_WAIT)

    def _wake(self) -> None:
        """Wake the thread after a request was cancelled."""
        with self._changed:
            self._changed.notify()

    def _checked(self, ticket: Ticket, request: Request) -> TextTask | ImageTask:
        """Check a request, tokenize its prompt and return its task.

        A request takes ``n`` seeds in a row, so the last seed must be in range too.

        Raises:
            PromptError: the prompt is empty, or does not fit into the context.
            OptionError: a number is out of range, or the images do not match the turns.
        """
        check_int("n", request.n, 1, MAX_IMAGES)  # for answers too
        if isinstance(request, AnswerRequest):
            check_int("seed", request.options.seed, 0, MAX_SEED - request.n + 1)
            return self._checked_text(ticket, request)
        check_int("seed", request.seed, 0, MAX_SEED - request.n + 1)
        return self._checked_images(ticket, request)

    def _checked_text(self, ticket: Ticket, request: AnswerRequest) -> TextTask:
        """Check the number of images and the prompt's length for answers, and tokenize the prompt.

        Raises:
            OptionError: the number of images is not that of the turns.
        """
        shown = sum(turn.images for turn in request.turns)
        given = len(request.images)
        if shown != given:
            raise OptionError(f"the turns show {shown} images, {given} were given")
        self._check_length(*(turn.text for turn in request.turns), request.system or "")
        return TextTask(ticket, request, self._janus.answering_ids(request.turns, request.system))

    def _checked_images(self, ticket: Ticket, request: DrawingRequest) -> ImageTask:
        """Check the number of previews and the prompt's length, and tokenize the prompt."""
        check_int("partial_images", request.partial_images, 0, self.pathway.steps(request.options))
        self._check_length(request.prompt)
        return ImageTask(ticket, request, self.pathway.prompt_ids(request.prompt))

    def _check_length(self, *texts: str) -> None:
        """Refuse a prompt that would take long to tokenize and cannot fit into the context.

        Raises:
            PromptError: the texts have too many characters together.
        """
        most = _MAX_CHARACTERS * self.config.language.max_position_embeddings
        length = sum(len(text) for text in texts)
        if length > most:
            raise PromptError(
                f"the prompt is {length} characters long, far more than fits into the context: "
                "shorten it"
            )

    # The device's thread

    def _run(self) -> None:
        """Load the model, serve requests until the engine stops, and end those that are left.

        ``start`` raises an error of loading. An error of a round is kept in ``failure`` and raised.
        The thread's streams are cleared at its end, or the process may abort when it exits.
        """
        try:
            schedulers = self._prepare()
        except BaseException as error:
            self._stop_at = time.monotonic()
            self._tell_start(error)
            mx.clear_streams()
            return
        self._tell_start(None)
        try:
            while self._wait_for_work(schedulers):
                with weights_wired():
                    while self._round(schedulers):
                        pass
        except BaseException as error:
            self.failure = error
            raise
        finally:
            try:
                with self._changed:
                    self._stop_at = time.monotonic() if self._stop_at is None else self._stop_at
                self._end_all(schedulers, self.failure or StoppingError())
            finally:
                self._tell(self.ended.set)
                mx.clear_streams()

    def _prepare(self) -> _Schedulers:
        """Load the model and the weights of all tasks.

        Raises:
            StoppingError: the engine was closed while loading.
            OptionError: the model is in low-memory mode.
        """
        janus = self._load()
        if janus.low_memory:
            raise OptionError("a server holds all parts of a model: leave low_memory out")
        for task in TASKS:
            if self.stopping:
                raise StoppingError
            janus.load_weights_for(task)
        self._schedulers = _Schedulers(
            janus, TextScheduler(janus, self._most_answers), ImageScheduler(janus)
        )
        return self._schedulers

    def _tell_start(self, error: BaseException | None) -> None:
        """Let ``start`` return on the event loop, or raise the error of loading the model."""
        started = self._started
        assert started is not None

        def tell() -> None:
            """Complete the future here, on the event loop: asyncio's futures belong to it."""
            if started.done():  # ``start`` was cancelled
                return
            if error is None:
                started.set_result(None)
            else:
                started.set_exception(error)

        self._tell(tell)

    def _tell(self, callback: Callable[[], object]) -> None:
        """Run a callback on the event loop; do nothing if the loop is closed."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    def _wait_for_work(self, schedulers: _Schedulers) -> bool:
        """Sleep until requests wait or the engine is stopping; return False if it is stopping."""
        with self._changed:
            self._changed.wait_for(
                lambda: schedulers.text.waiting or schedulers.images.waiting or self.stopping
            )
            return not self.stopping

    def _round(self, schedulers: _Schedulers) -> bool:
        """Drop cancelled requests, start waiting ones and advance the running ones.

        While the engine is stopping, waiting requests are ended; after ``_stop_at``, all are.

        Returns:
            Whether any request is still running.
        """
        text = schedulers.text
        images = schedulers.images
        text.drop([task for task in text.running if task.ticket.cancelled])
        images.drop([task for task in images.running if task.ticket.cancelled])
        if self._stop_at is not None and time.monotonic() > self._stop_at:
            self._end_all(schedulers, StoppingError())
        with self._changed:
            end_waiting(text.waiting, stopping=self.stopping)
            end_waiting(images.waiting, stopping=self.stopping)
            answers, answer_waits = text.choose(bool(images.running), images.needs)
            text.start(answers)
            # While an answer waits for memory, no image starts, or the answer might wait for ever.
            next_images = None if answer_waits else images.choose(text.needs)
        if next_images is not None:
            images.start(*next_images)
        images.step()
        text.step()
        return bool(text.running or images.running)

    def _end_all(self, schedulers: _Schedulers, error: BaseException) -> None:
        """End the running requests with ``error`` and the waiting ones with a StoppingError."""
        with self._changed:
            end_waiting(schedulers.text.waiting, stopping=True)
            end_waiting(schedulers.images.waiting, stopping=True)
        schedulers.text.drop(list(schedulers.text.running), error)
        schedulers.images.drop_all(error)
