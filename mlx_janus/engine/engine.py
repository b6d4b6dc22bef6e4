"""One model for many clients.

A thread of its own has the device and does all that computes. It goes in rounds: one token of every picture, one token
of every answer, and at most one decoding of a picture. So a drawing does not keep an answer waiting for its whole
length, nor an answer a drawing. The event loop hands requests over and reads what becomes of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, get_args

import mlx.core as mx

from ..config import JanusConfig
from ..errors import OptionError, PromptError
from ..limits import MAX_IMAGES, MAX_SEED, check_int
from ..memory import weights_wired
from ..pipeline import Task
from .image_queue import Drawing, Drawings
from .messages import AnswerRequest, BusyError, Request, StoppingError
from .text_queue import Answering, Answers
from .tickets import Counts, Ticket, end_waiting

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline

_CHARACTERS = 32  # of a prompt, for a position of the context: more are not even looked at
_LONGEST_WAIT = 60  # seconds that a client is ever told to wait


class Engine:
    """Takes requests on an event loop, and has one thread answer and draw.

    Args:
        load: gives the model; called in that thread.
        waiting: how many requests may wait for their turn.
        answers: how many are given side by side.
    """

    def __init__(self, load: Callable[[], JanusPipeline], *, waiting: int = 64, answers: int = 4):
        self._load, self._most_waiting, self._most_answers = load, waiting, answers
        self._changed = threading.Condition()
        self._stop_at: float | None = None  # when what is under way then ends; None: not stopping
        self._durations: deque[float] = deque([1.0], maxlen=16)  # seconds, of the last requests
        self._thread = threading.Thread(target=self._run, name="mlx_janus device", daemon=True)
        self._desks: tuple[Answers, Drawings] | None = None
        self.failure: BaseException | None = None
        self.ended = asyncio.Event()

    @property
    def name(self) -> str:
        """The model's name."""
        return self._janus.name

    @property
    def config(self) -> JanusConfig:
        """The model's sizes and facts."""
        return self._janus.config

    @property
    def stopping(self) -> bool:
        """Whether nothing new is taken: it is being closed, or its thread has failed."""
        return self._stop_at is not None

    @property
    def counts(self) -> Counts:
        """What there is to do."""
        if self._desks is None:
            return Counts()
        answers, drawings = self._desks
        return Counts(len(answers.waiting) + drawings.held_up, len(answers.running), drawings.pictures)

    async def start(self) -> None:
        """Load the model, and be ready.

        Raises:
            JanusError: the model cannot be loaded.
            StoppingError: it was closed meanwhile.
        """
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._thread.start()
        await self._started

    async def close(self, seconds: float = 30.0) -> None:
        """Refuse what comes, end what waits, give what is under way so long to finish, and end the thread."""
        with self._changed:
            end = time.monotonic() + seconds
            self._stop_at = end if self._stop_at is None else min(end, self._stop_at)
            self._changed.notify()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)

    def submit(self, request: Request) -> Ticket:
        """Hand a request over.

        Raises:
            PromptError: nothing is asked, or more than fits into the context.
            OptionError: a number out of its range.
            BusyError: as many wait as may.
            StoppingError: the engine is being closed.
        """
        if self.stopping or self._desks is None:
            raise StoppingError
        if self.counts.waiting >= self._most_waiting:
            raise BusyError(self._retry_after())
        ticket = Ticket(self._wake, self._durations.append)
        work = self._checked(ticket, request)
        answers, drawings = self._desks
        with self._changed:
            if self.stopping:
                raise StoppingError
            if isinstance(work, Answering):
                answers.waiting.append(work)
            else:
                drawings.waiting.append(work)
            self._changed.notify()
        return ticket

    def _retry_after(self) -> int:
        mean = sum(self._durations) / len(self._durations)
        return min(max(math.ceil(mean), 1), _LONGEST_WAIT)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _checked(self, ticket: Ticket, request: Request) -> Answering | Drawing:
        check_int("n", request.n, 1, MAX_IMAGES)
        seed = request.options.seed if isinstance(request, AnswerRequest) else request.seed
        check_int("seed", seed, 0, MAX_SEED - request.n + 1)
        if not isinstance(request, AnswerRequest):
            check_int("partial_images", request.partial_images, 0, self.config.image_tokens)
            self._check_length(request.prompt)
            return Drawing(ticket, request, self._janus.drawing_ids(request.prompt))
        shown, given = sum(turn.images for turn in request.turns), len(request.pictures)
        if shown != given:
            raise OptionError(f"the turns show {shown} pictures, {given} were given")
        self._check_length(*(turn.text for turn in request.turns), request.system or "")
        return Answering(ticket, request, self._janus.answering_ids(request.turns, request.system))

    def _check_length(self, *texts: str) -> None:
        """Refuse at once what would take long to make ids of, and cannot fit."""
        most = _CHARACTERS * self.config.language.max_position_embeddings
        if (length := sum(map(len, texts))) > most:
            raise PromptError(
                f"the prompt is {length} characters long, far more than fits into the context: shorten it"
            )

    # The device's thread

    def _run(self) -> None:
        try:
            desks = self._prepare()
        except BaseException as error:
            self._stop_at = time.monotonic()
            self._tell_start(error)
            mx.clear_streams()
            return
        self._tell_start(None)
        try:
            while self._wait_for_work(*desks):
                with weights_wired():
                    while self._round(*desks):
                        pass
        except BaseException as error:
            self.failure = error
            raise
        finally:
            try:
                with self._changed:
                    self._stop_at = time.monotonic() if self._stop_at is None else self._stop_at
                self._end_all(*desks, self.failure or StoppingError())
            finally:
                self._tell(self.ended.set)
                self._janus.close()

    def _prepare(self) -> tuple[Answers, Drawings]:
        """Load the model and read its weights, unless the engine is closed meanwhile."""
        self._janus = self._load()
        if self._janus.low_memory:
            raise OptionError("a server holds all parts of a model: leave low_memory out")
        for task in get_args(Task):
            if self.stopping:
                raise StoppingError
            self._janus.prepare(task)
        self._desks = Answers(self._janus, self._most_answers), Drawings(self._janus)
        return self._desks

    def _tell_start(self, error: BaseException | None) -> None:
        def tell() -> None:
            if self._started.done():
                return
            if error is None:
                self._started.set_result(None)
            else:
                self._started.set_exception(error)

        self._tell(tell)

    def _tell(self, what: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(what)

    def _wait_for_work(self, answers: Answers, drawings: Drawings) -> bool:
        """Sleep until there is something to do; False once the engine is to end."""
        with self._changed:
            self._changed.wait_for(lambda: answers.waiting or drawings.waiting or self.stopping)
            return not self.stopping

    def _round(self, answers: Answers, drawings: Drawings) -> bool:
        """Drop what nobody waits for, begin what may begin, advance what is under way; False if there is nothing."""
        answers.drop([answer for answer in answers.running if answer.ticket.cancelled])
        drawings.drop([drawing for drawing in drawings.running if drawing.ticket.cancelled])
        if self._stop_at is not None and time.monotonic() > self._stop_at:
            self._end_all(answers, drawings, StoppingError())
        with self._changed:
            end_waiting(answers.waiting, stopping=self.stopping)
            end_waiting(drawings.waiting, stopping=self.stopping)
            chosen, short = answers.choose(bool(drawings.running), drawings.needs)
            answers.start(chosen)
            # While memory is short for an answer, no picture begins: otherwise the answer might wait for ever.
            drawing = None if short else drawings.choose(answers.needs)
        if drawing is not None:
            drawings.start(*drawing)
        drawings.step()
        answers.step()
        return bool(answers.running or drawings.running)

    def _end_all(self, answers: Answers, drawings: Drawings, error: BaseException) -> None:
        with self._changed:
            end_waiting(answers.waiting, stopping=True)
            end_waiting(drawings.waiting, stopping=True)
        answers.drop(list(answers.running), error)
        drawings.drop_all(error)
