"""Several models for many clients: each is loaded when a request needs it, and unloaded again.

The event loop does everything here except loading, which each engine does in its own thread. So
the other models go on while one is loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import JanusError, OutOfMemoryError
from ..inference.loaded import LoadedModel
from .engine import Engine
from .messages import BusyError, StoppingError
from .tickets import Counts

_RETRY_AFTER = 10  # seconds, for a client whose request may not wait for a model
_LOG = logging.getLogger("mlx_janus.engine")

State = Literal["loaded", "loading", "unloaded", "failed"]
"""The state of a model. "failed": the last attempt to load it failed; a request tries again."""


@dataclass(frozen=True)
class ModelSource:
    """A model that a pool can load.

    Args:
        load: returns the model; called in the thread of the model's engine, once for each loading.
        name: the model's name; "": the loaded model's own.
        aliases: further names that requests may use.
    """

    load: Callable[[], LoadedModel]
    name: str = ""
    aliases: tuple[str, ...] = ()


class LoadError(JanusError):
    """A model that a request needs cannot be loaded.

    Args:
        name: the model's name.
        cause: the error of loading it.
    """

    def __init__(self, name: str, cause: Exception):
        super().__init__(f"the model {name!r} cannot be loaded: {cause}")
        self.name = name
        self.cause = cause


class PooledModel:
    """A model of a pool, loaded or not. Only the pool changes it.

    Args:
        source: loads the model.
        engine: the running engine of a model that is loaded already; None: the model is not loaded.
    """

    def __init__(self, source: ModelSource, engine: Engine | None = None):
        self.source = source
        self.name = source.name  # "": not known before the model is loaded
        self.engine = engine  # None: not loaded
        self.users = 0  # requests that hold the model and may submit something to its engine
        self.wanted = 0  # requests that wait until the model is loaded
        self.leaving = False  # whether the model is unloaded once its running requests have ended
        self.failed = False  # whether the last attempt to load the model failed
        self.used_at = time.monotonic()  # time of the last use
        self.loading: asyncio.Task[None] | None = None  # the last attempt to load the model

    @property
    def ready(self) -> bool:
        """Whether a request can use the model without waiting."""
        return self.engine is not None and not self.leaving

    @property
    def idle(self) -> bool:
        """Whether the model is loaded and no request uses it."""
        return self.engine is not None and not self.users and not self.engine.unfinished

    @property
    def state(self) -> State:
        """The model's state."""
        if self.engine is not None:
            return "loaded"
        if self.loading is not None and not self.loading.done():
            return "loading"
        return "failed" if self.failed else "unloaded"


class _Changes:
    """Wakes coroutines that wait for a condition, whenever something has changed."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Let all waiting coroutines look at their conditions again."""
        self._event.set()
        self._event = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds."""
        while not condition():
            await self._event.wait()


class EnginePool:
    """The engines of several models, of which as many are loaded as fit into memory.

    If the memory check refuses a model, the least recently used one is unloaded first. A model
    without requests is preferred; otherwise the running requests of one model are finished, and
    its new requests wait until the other model has been loaded. So two models that do not fit
    together take turns, and no request waits for ever. One model is loaded at a time.

    Args:
        sources: the models; the first one is loaded by ``start``.
        max_waiting: the maximum number of requests that wait for a model to be loaded, and of
            requests that wait in each engine.
        idle_seconds: seconds without requests after which a model is unloaded; None: never.
        max_loaded: the maximum number of loaded models; None: as many as fit into memory.
    """

    def __init__(
        self,
        sources: Sequence[ModelSource],
        *,
        max_waiting: int = 64,
        idle_seconds: float | None = None,
        max_loaded: int | None = None,
    ):
        self.models = tuple(PooledModel(source) for source in sources)
        self.failure: BaseException | None = None  # the error that stopped an engine's thread
        self.failed = asyncio.Event()  # set after an engine's thread has failed
        self._max_waiting = max_waiting
        self._idle_seconds = idle_seconds
        self._max_loaded = max_loaded
        self._closing = False
        self._ended = asyncio.Event()  # set when ``close`` has ended
        # In a pool made by ``of_engine``: the engine, which the caller starts and closes.
        self._given: Engine | None = None
        self._memory_lock = asyncio.Lock()  # held while a model is loaded or unloaded
        self._starting: Engine | None = None  # the engine that is loading its model
        self._changes = _Changes()
        self._tasks: set[asyncio.Task[None]] = set()  # of this pool, apart from loading

    @classmethod
    def of_engine(cls, engine: Engine) -> EnginePool:
        """Return a pool with one model, whose engine the caller starts and closes."""

        def load() -> LoadedModel:
            raise JanusError("the caller of this pool has loaded the model")

        pool = cls([])
        pool.models = (PooledModel(ModelSource(load, engine.name), engine),)
        pool._given = engine
        return pool

    @property
    def loaded(self) -> list[PooledModel]:
        """The models that are loaded."""
        return [model for model in self.models if model.engine is not None]

    @property
    def engines(self) -> list[Engine]:
        """The engines of the loaded models."""
        return [model.engine for model in self.models if model.engine is not None]

    @property
    def stopping(self) -> bool:
        """Whether new requests are refused: the pool is closing, or an engine has failed."""
        return self._closing or any(engine.stopping for engine in self.engines)

    @property
    def counts(self) -> Counts:
        """The numbers of waiting requests, running answers and running images of all models.

        Requests that wait for a model to be loaded count as waiting.
        """
        counts = [engine.counts for engine in self.engines]
        return Counts(
            waiting=self._wanted + sum(count.waiting for count in counts),
            answering=sum(count.answering for count in counts),
            drawing=sum(count.drawing for count in counts),
        )

    @property
    def _wanted(self) -> int:
        """The number of requests that wait for a model."""
        return sum(model.wanted for model in self.models)

    async def start(self) -> None:
        """Load the first model, and begin to unload idle ones. Call it once.

        Raises:
            JanusError: the model cannot be loaded.
            StoppingError: the pool was closed while loading.
        """
        async with self._memory_lock:
            await self._add_engine(self.models[0])
        if self._idle_seconds is not None:
            self._start_task(self._unload_idle_models(self._idle_seconds))

    async def close(self, seconds: float = 30.0) -> None:
        """Refuse new requests, and wait until all engines have ended.

        Requests that wait are ended. A model that is being loaded is given up.

        Args:
            seconds: time for the running requests to finish.
        """
        self._closing = True
        self._changes.notify()
        closing = [engine.close(seconds) for engine in self.engines]
        if self._starting is not None:
            closing.append(self._starting.close(0))
        await asyncio.gather(*closing)
        loading = [model.loading for model in self.models if model.loading is not None]
        await asyncio.gather(*loading, return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._ended.set()

    async def wait_for_end(self) -> None:
        """Wait until the pool is closed; in a pool made by ``of_engine``, until the engine is."""
        await (self._ended if self._given is None else self._given.ended).wait()

    async def acquire(self, model: PooledModel) -> Engine:
        """Return the engine of a model; load the model first if needed.

        The model stays loaded until ``release`` has been called and all requests that were
        submitted to its engine have ended.

        Raises:
            LoadError: the model cannot be loaded.
            BusyError: too many requests wait for a model.
            StoppingError: the pool is closing.
        """
        if not model.ready:
            await self._wait_for(model)
        assert model.engine is not None
        model.users += 1
        model.used_at = time.monotonic()
        return model.engine

    def release(self, model: PooledModel) -> None:
        """Note that a request which acquired a model submits nothing more to its engine."""
        model.users -= 1
        self._note_end_of_use(model)

    @contextlib.contextmanager
    def keep(self, model: PooledModel) -> Iterator[None]:
        """Keep a loaded model in memory until the context ends."""
        model.users += 1
        try:
            yield
        finally:
            self.release(model)

    async def _wait_for(self, model: PooledModel) -> None:
        """Wait until a model is loaded; start to load it if needed.

        Raises:
            LoadError, BusyError, StoppingError: as for ``acquire``.
        """
        if self._closing:
            raise StoppingError
        if self._wanted >= self._max_waiting:
            raise BusyError(_RETRY_AFTER)
        model.wanted += 1
        try:
            while not model.ready:
                # Shielded, since other requests may wait for the same task.
                await asyncio.shield(self._load_task(model))
        except StoppingError:
            raise
        except Exception as error:
            raise LoadError(model.name, error) from None
        finally:
            model.wanted -= 1
            self._changes.notify()

    def _note_end_of_use(self, model: PooledModel) -> None:
        """Note that a use of a model ends now, and wake the coroutines that wait for that."""
        model.used_at = time.monotonic()
        self._changes.notify()

    # Loading

    def _load_task(self, model: PooledModel) -> asyncio.Task[None]:
        """Return the task that loads a model; begin it unless it is under way."""
        if model.loading is None or model.loading.done():
            model.loading = asyncio.create_task(self._load(model))
            # Read the error, even if every request has stopped waiting. Otherwise asyncio would log
            # it as never retrieved.
            model.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return model.loading

    async def _load(self, model: PooledModel) -> None:
        """Load a model, unless another task has loaded it while this one waited for the lock.

        Raises:
            StoppingError: the pool is closing.
            Exception: the model cannot be loaded.
        """
        async with self._memory_lock:
            if model.ready:
                return
            try:
                await self._add_engine(model)
            except StoppingError:
                raise
            except Exception as error:
                model.failed = True
                _log_failure(model, error)
                # With its traceback, the error would keep the weights that were read.
                raise error.with_traceback(None) from None

    async def _add_engine(self, model: PooledModel) -> None:
        """Load a model, and give it its engine. Call this with ``_memory_lock`` held.

        Raises:
            StoppingError: the pool is closing.
            Exception: the model cannot be loaded.
        """
        started = time.monotonic()
        engine = await self._start_engine(model)
        if self._closing:
            await engine.close(0)
            raise StoppingError
        model.failed = False
        model.name = model.name or engine.name
        model.used_at = time.monotonic()
        model.engine = engine
        self._start_task(self._watch(engine))
        _LOG.info("%s is loaded, in %.1f s", model.name, model.used_at - started)

    async def _start_engine(self, model: PooledModel) -> Engine:
        """Start an engine for a model and return it. Unload other models until the model fits.

        Raises:
            StoppingError: the pool is closing.
            OutOfMemoryError: the model does not fit, even without the other models.
            Exception: the model cannot be loaded.
        """
        while True:
            while self._max_loaded is not None and len(self.loaded) >= self._max_loaded:
                await self._unload(self._next_to_unload())
            if self._closing:
                raise StoppingError
            engine = Engine(model.source.load, max_waiting=self._max_waiting)
            engine.on_idle = lambda: self._note_end_of_use(model)
            self._starting = engine
            try:
                await engine.start()
            except OutOfMemoryError as error:
                await engine.close(0)
                if not self._could_fit(error):
                    raise
                await self._unload(self._next_to_unload())
            else:
                return engine
            finally:
                self._starting = None

    def _could_fit(self, error: OutOfMemoryError) -> bool:
        """Return whether a model that did not fit could fit after others are unloaded.

        Args:
            error: the error of loading the model.
        """
        held = sum(engine.weight_bytes for engine in self.engines)
        return bool(held) and error.needed <= error.free + held

    def _next_to_unload(self) -> PooledModel:
        """Return the least recently used model; of a model in use only if all are in use."""

        def order(model: PooledModel) -> tuple[bool, float]:
            """Return a model's sort key. False sorts before True, so models in use are last."""
            in_use = not model.idle or model.wanted > 0
            return in_use, model.used_at

        return min(self.loaded, key=order)

    # Unloading

    async def _unload(self, model: PooledModel) -> None:
        """Unload a model after all requests that wait for it or use it.

        New requests for the model wait until it is loaded again. Call this with ``_memory_lock``
        held.

        Raises:
            StoppingError: the pool is closing.
        """
        # Requests for which the model was loaded come first, or it might be unloaded unused.
        await self._changes.until(lambda: not model.wanted or self._closing)
        model.leaving = True
        try:
            await self._changes.until(lambda: model.idle or self._closing)
            if self._closing:
                raise StoppingError
            engine = model.engine
            assert engine is not None
            model.engine = None
        finally:
            model.leaving = False
        await engine.unload()
        _LOG.info("%s is unloaded", model.name)

    async def _unload_idle_models(self, idle_seconds: float) -> None:
        """Unload each model once it has had no requests for ``idle_seconds``."""
        while not self._closing:
            now = time.monotonic()
            for model in self.loaded:
                if now - model.used_at >= idle_seconds:
                    await self._unload_if_idle(model, idle_seconds)
            # Sleep until the first model can have been idle for long enough. A model in use is idle
            # from now on at the earliest.
            ends_of_use = [model.used_at if model.idle else now for model in self.loaded]
            await asyncio.sleep(min(ends_of_use, default=now) + idle_seconds - now)

    async def _unload_if_idle(self, model: PooledModel, idle_seconds: float) -> None:
        """Unload a model, unless a request has used it while this coroutine waited for the lock."""
        async with self._memory_lock:
            is_unused = time.monotonic() - model.used_at >= idle_seconds
            if model.idle and not model.wanted and is_unused and not self._closing:
                await self._unload(model)

    # Failures

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine as a task, which ``close`` cancels."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self, engine: Engine) -> None:
        """Wait until an engine's thread has ended. If it failed, set ``failure`` and ``failed``."""
        await engine.ended.wait()
        if engine.failure is not None:
            self.failure = engine.failure
            self.failed.set()


def _log_failure(model: PooledModel, error: Exception) -> None:
    """Log why a model cannot be loaded. For a bug, which is no JanusError, log the stack, too."""
    reason = str(error) or type(error).__name__
    stack = ""
    if not isinstance(error, JanusError):
        stack = "\n" + "".join(traceback.format_tb(error.__traceback__)).rstrip()
    _LOG.error("%s cannot be loaded: %s%s", model.name, reason, stack)
