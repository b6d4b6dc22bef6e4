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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mlx.utils import tree_flatten

from ..config import JanusConfig
from ..decode.grammar import Grammar
from ..errors import ContextLengthError, JanusError, OptionError
from ..inference.editing import warn_if_untrained
from ..inference.loaded import TASKS, LoadedModel
from ..inference.pathway import EditingPathway, ImagePathway
from ..inference.pathways import pathway_of
from ..limits import MAX_IMAGES, MAX_SEED, check_int
from ..memory import weights_wired
from ..processing.prompts import Turn
from ..threads import ComputingThread, note_mlx_use
from .image_queue import ImageScheduler, ImageTask
from .messages import AnswerRequest, BusyError, DrawingRequest, Request, StoppingError
from .text_queue import TextScheduler, TextTask
from .tickets import Counts, Ticket, end_waiting

_MAX_CHARACTERS_PER_POSITION = 32
"""Characters of a prompt for each position of the context. Longer prompts are refused."""
_LONGEST_WAIT = 60  # seconds: the maximum of Retry-After
CANNOT_EDIT = "this model generates images from prompts only: leave the images out"


@dataclass(frozen=True)
class _Schedulers:
    """The loaded model and the schedulers that use it."""

    janus: LoadedModel
    text: TextScheduler
    images: ImageScheduler


class Engine:
    """A thread that serves the requests of an event loop with one model.

    A model in low-memory mode holds the weights of one task at a time: to encode an image, to
    answer, to generate an image, or to decode one. So the engine answers one request at a time,
    generates no images during an answer, and sends no previews.

    Args:
        load: returns the model; called in the thread.
        max_waiting: the maximum number of waiting requests.
        max_answers: the maximum number of requests that are answered at the same time.
    """

    def __init__(
        self, load: Callable[[], LoadedModel], *, max_waiting: int = 64, max_answers: int = 8
    ):
        self._load = load
        self._max_waiting = max_waiting
        self._max_answers = max_answers
        self._changed = threading.Condition()  # lock of the waiting queues; wakes the thread
        # Time of time.monotonic() at which running requests are ended; None: not stopping.
        self._stop_at: float | None = None
        # Seconds that recent requests took; the first value is a guess.
        self._durations: deque[float] = deque([1.0], maxlen=16)
        self._thread = ComputingThread(self._run, "mlx_janus device", self._end_soon)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: asyncio.Future[None] | None = None
        self._schedulers: _Schedulers | None = None
        self._frees_model = False  # whether the thread frees the model when it ends
        # In low-memory mode: True if answers ran last, False if images ran last or nothing has run.
        self._last_answered = False
        self.unfinished = 0  # requests that have not ended; only the event loop changes this
        # Called on the event loop when the last unfinished request has ended.
        self.on_idle: Callable[[], None] = lambda: None
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
        """The numbers of waiting requests, running answers and running images.

        All are 0 until the model is loaded.
        """
        schedulers = self._schedulers
        if schedulers is None:
            return Counts()
        text = schedulers.text
        images = schedulers.images
        return Counts(
            waiting=len(text.waiting) + images.waiting_requests,
            answering=len(text.running),
            drawing=images.running_images,
        )

    @property
    def weight_bytes(self) -> int:
        """The bytes of all weights of the model. In low-memory mode, fewer are held."""
        return sum(array.nbytes for _, array in tree_flatten(self._janus.model.parameters()))

    async def start(self) -> None:
        """Start the thread, and wait until it has loaded the model and its weights. Call it once.

        Raises:
            JanusError: the model cannot be loaded.
            StoppingError: the engine was closed while loading.
        """
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.create_future()
        note_mlx_use()
        self._thread.start()
        await self._started

    async def close(self, seconds: float = 30.0) -> None:
        """Refuse new requests, and wait until the thread has ended.

        The thread ends the waiting requests and lets the running ones finish.

        Args:
            seconds: time for the running requests to finish. Unfinished ones then end with a
                StoppingError.
        """
        self._stop_within(seconds)
        if self._thread.ident is not None:  # it was started
            await asyncio.to_thread(self._thread.join)

    async def unload(self) -> None:
        """Close the engine at once and free the model's memory.

        The model is closed, so nothing else may use it. Call this when no request is unfinished.
        """
        self._frees_model = True
        await self.close(0)

    def _stop_within(self, seconds: float) -> None:
        """Refuse new requests, and end the running ones after some seconds.

        A second call may shorten the time, but never extends it.
        """
        with self._changed:
            stop_at = time.monotonic() + seconds
            self._stop_at = stop_at if self._stop_at is None else min(stop_at, self._stop_at)
            self._changed.notify()

    def _end_soon(self) -> None:
        """Make the thread end after its current step, because the program is ending."""
        self._stop_within(0)

    def submit(self, request: Request) -> Ticket:
        """Queue a request, and return the ticket that yields its events.

        Call this on the event loop.

        Raises:
            PromptError: the prompt is empty, or does not fit into the context.
            OptionError: a number is out of range, the model does not support an option or cannot
                change images, or the request has another number of images than its turns show.
            BusyError: the queue is full.
            StoppingError: the engine is not started, is closing or has failed.
        """
        schedulers = self._schedulers
        if self.stopping or schedulers is None:
            raise StoppingError
        if self.counts.waiting >= self._max_waiting:
            raise BusyError(self._retry_after())
        ticket = Ticket(on_cancel=self._wake, on_end=self._note_end)
        task = self._create_task(ticket, request)
        with self._changed:
            # Check again under the lock: after the engine has stopped, nothing reads the queue.
            if self.stopping:
                raise StoppingError
            if isinstance(task, TextTask):
                schedulers.text.waiting.append(task)
            else:
                schedulers.images.waiting.append(task)
            self.unfinished += 1
            self._changed.notify()
        return ticket

    def conversation_ids(self, turns: Sequence[Turn], system: str | None = None) -> list[int]:
        """Return the token ids of a conversation, even if it does not fit into the context.

        Any thread may call this.

        Args:
            turns: messages. If the last one is the assistant's, it is the beginning of the answer.
            system: system prompt; None: the model's own, "": none.

        Raises:
            PromptError: there is no question, a question is empty, or the texts have far more
                characters than the context holds.
        """
        self._check_length(*(turn.text for turn in turns), system or "")
        return self._janus.prompts.answering(turns, system)

    def text_ids(self, text: str, *, with_bos: bool = True) -> list[int]:
        """Return the token ids of a text, without a template, even if it exceeds the context.

        Any thread may call this.

        Args:
            text: the text.
            with_bos: whether bos comes first, as in a prompt.

        Raises:
            PromptError: the text has far more characters than the context holds.
        """
        self._check_length(text)
        prompts = self._janus.prompts
        return prompts.plain(text) if with_bos else prompts.encode(text)

    def spelling(self, token_id: int) -> str:
        """Return the text of a token; U+FFFD stands for incomplete characters."""
        text, _ = self._janus.prompts.spelling(token_id)
        return text

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, control tokens included."""
        text: str = self._janus.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def check_grammar(self, grammar: Grammar) -> None:
        """Compile the grammar of an answer, and keep it for ``submit``. Any thread may call this.

        ``submit`` would compile the grammar on the event loop, which could delay other requests.

        Raises:
            OptionError: the grammar is refused, or needs a package that is not installed.
        """
        self._janus.grammars.check(grammar)

    def _retry_after(self) -> int:
        """Return the seconds after which a client that is refused should try again.

        This is the mean duration of recent requests, at least 1 and at most ``_LONGEST_WAIT``.
        """
        mean = sum(self._durations) / len(self._durations)
        return min(max(math.ceil(mean), 1), _LONGEST_WAIT)

    def _note_end(self, seconds: float) -> None:
        """Note that a request has ended, and its duration. The engine's thread calls this."""
        self._durations.append(seconds)
        self._call_on_loop(self._count_end)

    def _count_end(self) -> None:
        """Count the end of a request, on the event loop."""
        self.unfinished -= 1
        if not self.unfinished:
            self.on_idle()

    def _wake(self) -> None:
        """Wake the thread after a request was cancelled."""
        with self._changed:
            self._changed.notify()

    def _create_task(self, ticket: Ticket, request: Request) -> TextTask | ImageTask:
        """Check a request, tokenize its prompt and return its task.

        Raises:
            PromptError: the prompt is empty, or does not fit into the context.
            OptionError: a number is out of range, the model does not support an option or cannot
                change images, or the request has another number of images than its turns show.
        """
        check_int("n", request.n, 1, MAX_IMAGES)  # the number of images or of answers
        max_seed = MAX_SEED - request.n + 1  # the request takes ``n`` consecutive seeds
        if isinstance(request, AnswerRequest):
            check_int("seed", request.options.seed, 0, max_seed)
            return self._create_text_task(ticket, request)
        check_int("seed", request.seed, 0, max_seed)
        return self._create_image_task(ticket, request)

    def _create_text_task(self, ticket: Ticket, request: AnswerRequest) -> TextTask:
        """Check a request for answers, tokenize its prompt and return its task.

        Raises:
            PromptError: the prompt is empty, or does not fit into the context.
            OptionError: the request has another number of images than its turns show, or the model
                does not support an option.
        """
        self._janus.check_text_options(request.options, request.turns)
        expected = sum(turn.images for turn in request.turns)
        given = len(request.images)
        if given != expected:
            raise OptionError(f"the turns show {expected} images, {given} were given")
        if request.plain is not None:
            self._check_length(request.plain)
            return TextTask(ticket, request, self._janus.plain_ids(request.plain))
        self._check_length(*(turn.text for turn in request.turns), request.system or "")
        return TextTask(ticket, request, self._janus.answering_ids(request.turns, request.system))

    def _create_image_task(self, ticket: Ticket, request: DrawingRequest) -> ImageTask:
        """Check a request for images, tokenize its prompt and return its task.

        Raises:
            PromptError: the prompt is empty, or does not fit into the context.
            OptionError: the number of previews is out of range, or the model cannot change images.
        """
        pathway = self.pathway
        check_int("partial_images", request.partial_images, 0, pathway.steps(request.options))
        self._check_length(request.prompt)
        # In low-memory mode, a preview would load the decoder's weights, and the next step would
        # load the language model's weights again.
        if self._janus.low_memory:
            request = replace(request, partial_images=0)
        if not request.images:
            return ImageTask(ticket, request, pathway.prompt_ids(request.prompt))
        if not isinstance(pathway, EditingPathway):
            raise OptionError(CANNOT_EDIT)
        count = len(request.images)
        ids = pathway.edit_prompt_ids(request.prompt, count)
        warn_if_untrained(self._janus)
        return ImageTask(ticket, request, ids, count * pathway.tokens_per_input)

    def _check_length(self, *texts: str) -> None:
        """Refuse a prompt that would take long to tokenize and cannot fit into the context.

        Args:
            texts: all texts of the prompt.

        Raises:
            PromptError: the texts have too many characters together.
        """
        positions = self.config.language.max_position_embeddings
        length = sum(len(text) for text in texts)
        if length > _MAX_CHARACTERS_PER_POSITION * positions:
            raise ContextLengthError(
                f"the prompt is {length} characters long, and this model's maximum context length "
                f"is {positions} tokens: shorten it"
            )

    # The device's thread

    def _run(self) -> None:
        """Load the model, serve requests until the engine stops, and end the unfinished requests.

        If loading fails, ``start`` raises the error. If a round fails, the error is kept in
        ``failure`` and ends the thread.
        """
        try:
            schedulers = self._load_schedulers()
        except BaseException as error:
            self._stop_at = time.monotonic()  # from now on, ``submit`` refuses requests
            self._finish_start(error)
            return
        self._finish_start(None)
        try:
            while self._wait_for_work(schedulers):
                with weights_wired():  # macOS must not page the weights out while requests run
                    while self._run_round(schedulers):
                        pass
        except BaseException as error:
            self.failure = error
            raise
        finally:
            try:
                with self._changed:  # from now on, ``submit`` refuses requests
                    self._stop_at = time.monotonic() if self._stop_at is None else self._stop_at
                self._end_all(schedulers, self.failure or StoppingError())
            finally:
                if self._frees_model:
                    janus = schedulers.janus
                    del schedulers  # its batches and caches refer to the network
                    self._schedulers = None
                    janus.close()
                self._call_on_loop(self.ended.set)

    def _load_schedulers(self) -> _Schedulers:
        """Load the model and its weights. Create the schedulers, and keep and return them.

        In low-memory mode, the weights are read when a request needs them.

        Raises:
            StoppingError: the engine was closed while loading.
            Exception: the model cannot be loaded.
        """
        janus = self._load()
        tasks_to_load = () if janus.low_memory else TASKS
        try:
            for task in tasks_to_load:
                if self.stopping:
                    raise StoppingError
                janus.load_weights_for(task)
        except BaseException:
            janus.close()  # otherwise the error's traceback would keep the weights in memory
            raise
        max_answers = 1 if janus.low_memory else self._max_answers
        self._schedulers = _Schedulers(
            janus, TextScheduler(janus, max_answers), ImageScheduler(janus)
        )
        return self._schedulers

    def _finish_start(self, error: BaseException | None) -> None:
        """Make ``start`` return, or raise the error of loading the model."""
        started = self._started
        assert started is not None

        def complete() -> None:
            """Complete the future that ``start`` awaits. asyncio allows this only on the loop."""
            if started.done():  # ``start`` was cancelled
                return
            if error is None:
                started.set_result(None)
            else:
                started.set_exception(error)

        self._call_on_loop(complete)

    def _call_on_loop(self, callback: Callable[[], object]) -> None:
        """Schedule a callback on the event loop; do nothing if the loop is closed."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    def _wait_for_work(self, schedulers: _Schedulers) -> bool:
        """Sleep until a request waits or the engine is stopping; return False if it is stopping."""
        with self._changed:
            self._changed.wait_for(
                lambda: schedulers.text.waiting or schedulers.images.waiting or self.stopping
            )
            return not self.stopping

    def _run_round(self, schedulers: _Schedulers) -> bool:
        """End cancelled requests, start waiting ones and advance the running ones by a step.

        While the engine is stopping, all waiting requests are ended. After ``_stop_at``, all
        running requests are ended, too.

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
            images_to_start = self._start_requests(schedulers)
        if images_to_start is not None:
            image_task, count = images_to_start
            images.start(image_task, count)
        images.step()
        text.step()
        return bool(text.running or images.running)

    def _start_requests(self, schedulers: _Schedulers) -> tuple[ImageTask, int] | None:
        """Start the waiting answers that have room, and choose the images to start.

        Returns:
            A request and the number of its images to start; None if no image may start.
        """
        text = schedulers.text
        images = schedulers.images
        if schedulers.janus.low_memory:
            return self._start_in_low_memory(schedulers)
        answers, answer_waits = text.choose(bool(images.running), images.needed_bytes)
        text.start(answers)
        # While an answer waits for memory, start no image: images that start one after another
        # might take all memory that is freed, and the answer would wait for ever.
        return None if answer_waits else images.choose(text.needed_bytes)

    def _start_in_low_memory(self, schedulers: _Schedulers) -> tuple[ImageTask, int] | None:
        """Start answers or choose images to start, as ``_start_requests`` does, but never both.

        Answers and images need different weights, and a change between them reads weights from the
        disk. So answers start only after the running images, and images after the running answers.
        """
        text = schedulers.text
        images = schedulers.images
        if images.running:
            # While an answer waits, no new request for images starts, or the answer would never
            # start. The other images of the running requests do start.
            return images.choose(0, new_requests=not text.waiting)
        # If both wait, the kind that did not run last is next.
        answers_next = text.waiting and not (self._last_answered and images.waiting)
        if not text.running and answers_next:
            answers, _ = text.choose(images_running=False, image_bytes=0)
            text.start(answers)
            self._last_answered = True
        if text.running:
            return None
        self._last_answered = False
        return images.choose(0)

    def _end_all(self, schedulers: _Schedulers, error: BaseException) -> None:
        """End the running requests with ``error`` and the waiting ones with a StoppingError."""
        with self._changed:
            end_waiting(schedulers.text.waiting, stopping=True)
            end_waiting(schedulers.images.waiting, stopping=True)
        schedulers.text.drop(list(schedulers.text.running), error)
        schedulers.images.drop_all(error)
