"""The engine's text scheduler: chooses requests, advances answers, and keeps prefix caches."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx

from ..inference.loaded import LoadedModel
from ..inference.prefix_cache import ImageFeatureCache, Key, PrefixCache, image_digest
from ..inference.text_generation import Finished, PromptRead
from ..memory import available_memory
from ..models.backbone import cache_bytes
from ..weights.footprint import SAFE_SHARE
from .messages import Answered, AnswerRequest, Piece
from .tickets import Ticket

_PREFILL_STEP = 256  # positions of a prompt read in one round
_FEATURES = 32  # images whose features are kept
_PREFIXES = 8  # prefix caches kept
_PREFIX_SHARE = 1 / 8  # share of the free memory for prefix caches


@dataclass(eq=False)
class TextTask:
    """A waiting or running request for answers."""

    ticket: Ticket
    request: AnswerRequest
    ids: list[int]  # the prompt
    steps: Generator[None, None, None] | None = None  # None: waiting
    reading: bool = True  # still reads images or the prompt: no answer is being generated

    @cached_property
    def digests(self) -> list[str]:
        """The hashes of the request's images, in order."""
        return [image_digest(image) for image in self.request.images]


class TextScheduler:
    """A scheduler for text requests, which start in order of arrival.

    Args:
        janus: the model.
        most: the maximum number of requests running at the same time.
    """

    def __init__(self, janus: LoadedModel, most: int):
        self.waiting: deque[TextTask] = deque()
        self.running: list[TextTask] = []
        self._janus = janus
        self._most = most
        self._features = ImageFeatureCache(janus, _FEATURES)
        self._prefixes: list[PrefixCache] = []  # the most recently used one last

    @property
    def needs(self) -> int:
        """Peak bytes of the running answers, including memory that they hold already."""
        return self._sum_needs(self.running)

    def _sum_needs(self, tasks: Sequence[TextTask]) -> int:
        """Return the peak bytes of the KV caches of several requests."""
        return sum(self._needs(task) for task in tasks)

    def _needs(self, task: TextTask) -> int:
        """Return the bytes of a request's KV cache at the greatest length of an answer."""
        config = self._janus.config.language
        wanted = len(task.ids) + task.request.options.max_tokens
        positions = min(wanted, config.max_position_embeddings)
        return cache_bytes(config, 1, positions, self._janus.model.dtype.size)

    def choose(self, others: bool, reserved: int) -> tuple[list[TextTask], bool]:
        """Take from the queue the requests that may start now.

        If nothing is running, the first request starts without a memory check: no other request
        would free memory for it, so it would wait for ever.

        Args:
            others: whether images are running, which will free memory when they finish.
            reserved: peak bytes of those images.

        Returns:
            The requests to start, and whether the next one in the queue waits for memory.
        """
        chosen: list[TextTask] = []
        while self.waiting and len(self.running) + len(chosen) < self._most:
            needed = reserved + self._sum_needs([*self.running, *chosen, self.waiting[0]])
            if (others or self.running or chosen) and not self._make_room(needed):
                return chosen, True
            chosen.append(self.waiting.popleft())
        return chosen, False

    def _make_room(self, needed: int) -> bool:
        """Free prefix caches, the oldest first, until ``needed`` bytes fit; return whether they do.

        If the bytes would not fit even without these caches, all of them are kept.
        """
        held = sum(prefix.nbytes for prefix in self._prefixes)
        if needed > SAFE_SHARE * (available_memory() + held):
            return False
        while self._prefixes and needed > SAFE_SHARE * available_memory():
            del self._prefixes[0]
            mx.clear_cache()
        return True

    def start(self, tasks: Sequence[TextTask]) -> None:
        """Start chosen requests."""
        for task in tasks:
            task.steps = self._answer(task)
            self.running.append(task)

    def step(self) -> None:
        """Advance every answer by a token, and read one image or one chunk of one prompt.

        The other prompts wait: reading several chunks in a round would delay the next token
        of every answer. A failure ends only its request.
        """
        reader = next((task for task in self.running if task.reading), None)
        for task in list(self.running):
            if task.reading and task is not reader:
                continue
            assert task.steps is not None
            try:
                next(task.steps)
            except StopIteration:
                self.drop([task])
            except Exception as error:
                self.drop([task], error)

    def drop(self, tasks: Sequence[TextTask], error: BaseException | None = None) -> None:
        """End running requests, with ``error`` or a failure to close the answer, if any."""
        for task in tasks:
            self.running.remove(task)
            assert task.steps is not None
            reason = error
            try:
                task.steps.close()
            except Exception as failure:
                reason = error or failure
            finally:
                task.ticket.end(reason)
        if tasks:
            mx.clear_cache()

    def _answer(self, task: TextTask) -> Generator[None, None, None]:
        """Generate a request's answers one after the other, each from the best prefix cache.

        Yields:
            After each encoded image, chunk of the prompt, and token, so that other requests get a
                turn.
        """
        request = task.request
        keys = self._features.keys(task.ids, task.digests)
        shown = dict(zip(task.digests, request.images, strict=True))  # images by hash
        for index in range(request.n):
            options = replace(request.options, seed=request.options.seed + index)
            prefix = self._take(keys)
            # Only the images of positions that the prefix cache does not hold.
            yield from self._features.encode(keys[prefix.common(keys) :], shown)
            events = prefix.answer(
                task.ids, keys, self._features, shown, options, step=_PREFILL_STEP
            )
            try:
                for event in events:
                    task.reading = isinstance(event, PromptRead)
                    if not isinstance(event, PromptRead) and event.text:
                        task.ticket.tell(Piece(index, event.text))
                    if isinstance(event, Finished):
                        task.ticket.tell(Answered(index, event.result))
                    yield
            finally:
                events.close()
                self._keep(prefix)

    def _take(self, keys: Sequence[Key]) -> PrefixCache:
        """Take the prefix cache that shares most positions with a prompt, or a new one.

        A cache that would lose more than half of its positions is left for other prompts.
        """
        common = {prefix: prefix.common(keys) for prefix in self._prefixes}
        fitting = [prefix for prefix, length in common.items() if 2 * length >= len(prefix.keys)]
        if not fitting:
            return PrefixCache(self._janus)
        best = max(fitting, key=lambda prefix: common[prefix])
        self._prefixes.remove(best)
        return best

    def _keep(self, prefix: PrefixCache) -> None:
        """Keep a prefix cache as the most recently used; forget the oldest beyond the limits."""
        if not prefix.keys:  # a failed pass has emptied it
            return
        self._prefixes.append(prefix)
        held = sum(kept.nbytes for kept in self._prefixes)
        room = _PREFIX_SHARE * (available_memory() + held)
        while len(self._prefixes) > _PREFIXES or (self._prefixes and held > room):
            held -= self._prefixes.pop(0).nbytes
