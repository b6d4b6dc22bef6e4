"""The engine's text scheduler: chooses requests, advances answers, and keeps prefix caches."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx

from ..decode.answer_batch import AnswerBatch
from ..inference.loaded import LoadedModel
from ..inference.prefix_cache import ImageFeatureCache, Key, PrefixCache, image_digest
from ..inference.text_generation import Finished, PromptRead, Token
from ..memory import available_memory
from ..models.backbone import cache_bytes
from ..weights.footprint import SAFE_SHARE
from .messages import Answered, AnswerRequest, Piece, Progress
from .tickets import Ticket

_PREFILL_STEP = 256  # positions of a prompt read in one round
_MAX_IMAGE_FEATURES = 32  # images whose features are kept
_MAX_PREFIX_CACHES = 8  # prefix caches kept
_PREFIX_CACHE_SHARE = 1 / 8  # share of the free memory for prefix caches


@dataclass(eq=False)
class TextTask:
    """A waiting or running request for answers."""

    ticket: Ticket
    request: AnswerRequest
    ids: list[int]  # the prompt's tokens
    steps: Generator[None, None, None] | None = None  # None: the request is waiting
    reading: bool = True  # whether images or the prompt are still being read

    @cached_property
    def digests(self) -> list[str]:
        """The hashes of the request's images, in order."""
        return [image_digest(image) for image in self.request.images]


class TextScheduler:
    """A scheduler for text requests, which start in order of arrival.

    Args:
        janus: the model.
        max_running: the maximum number of requests running at the same time.
    """

    def __init__(self, janus: LoadedModel, max_running: int):
        self.waiting: deque[TextTask] = deque()
        self.running: list[TextTask] = []
        self._janus = janus
        self._max_running = max_running
        self._batch = AnswerBatch(janus.model)
        self._features = ImageFeatureCache(janus, _MAX_IMAGE_FEATURES)
        self._prefix_caches: list[PrefixCache] = []  # the most recently used one is the last

    @property
    def needed_bytes(self) -> int:
        """Peak bytes of the running answers, including memory that they hold already."""
        return self._peak_bytes(self.running)

    def _peak_bytes(self, tasks: Sequence[TextTask]) -> int:
        """Return the bytes of the KV cache of several requests after the longest possible answers.

        Each request has one row of the batch, since its answers are generated one after the other.
        All rows are padded to the longest one.
        """
        config = self._janus.config.language
        wanted = max((len(task.ids) + task.request.options.max_tokens for task in tasks), default=0)
        positions = min(wanted, config.max_position_embeddings)
        return cache_bytes(config, len(tasks), positions, self._janus.model.dtype.size)

    def choose(self, images_running: bool, image_bytes: int) -> tuple[list[TextTask], bool]:
        """Take from the queue the requests that may start now.

        If nothing is running, the first request starts without a memory check. If the check failed,
        the request would wait for ever, because no other request would free memory for it.

        Args:
            images_running: whether images are running, which will free memory when they finish.
            image_bytes: peak bytes of those images.

        Returns:
            The requests to start, and whether the next request in the queue waits for memory.
        """
        chosen: list[TextTask] = []
        while self.waiting and len(self.running) + len(chosen) < self._max_running:
            answers = [*self.running, *chosen, self.waiting[0]]
            needed = image_bytes + self._peak_bytes(answers)
            anything_running = images_running or self.running or chosen
            if anything_running and not self._make_room(needed):
                return chosen, True
            chosen.append(self.waiting.popleft())
        return chosen, False

    def _make_room(self, needed: int) -> bool:
        """Free prefix caches until ``needed`` bytes fit, the least recently used first.

        Returns:
            Whether the bytes fit. False if they would not fit even without prefix caches; then none
            is freed.
        """
        cached = sum(prefix_cache.nbytes for prefix_cache in self._prefix_caches)
        if needed > SAFE_SHARE * (available_memory() + cached):
            return False
        while self._prefix_caches and needed > SAFE_SHARE * available_memory():
            del self._prefix_caches[0]
            mx.clear_cache()
        return True

    def start(self, tasks: Sequence[TextTask]) -> None:
        """Start chosen requests."""
        for task in tasks:
            task.steps = self._answer_steps(task)
            self.running.append(task)

    def step(self) -> None:
        """Advance every answer by a token, and read the next part of one prompt.

        The part is some positions of the prompt, or one block of the encoder for one of its images.
        The other prompts that must be read wait, because reading several parts in a round would
        delay the next token of every answer. A failure ends only its own request. But a failure of
        the pass that all answers share ends all of them.
        """
        self._batch.step()
        first_reading = next((task for task in self.running if task.reading), None)
        for task in list(self.running):
            if task.reading and task is not first_reading:  # it waits until the first has been read
                continue
            assert task.steps is not None
            try:
                next(task.steps)
            except StopIteration:  # all answers of the request are complete
                self.drop([task])
            except Exception as error:
                self.drop([task], error)

    def drop(self, tasks: Sequence[TextTask], error: BaseException | None = None) -> None:
        """End running requests.

        Args:
            tasks: requests in ``running``.
            error: the error that the requests' tickets raise; None: the requests end without one,
                unless closing an answer fails.
        """
        for task in tasks:
            self.running.remove(task)
            assert task.steps is not None
            ticket_error = error
            try:
                task.steps.close()
            except Exception as failure:
                ticket_error = error or failure
            finally:
                task.ticket.end(ticket_error)
        if tasks:
            mx.clear_cache()

    def _answer_steps(self, task: TextTask) -> Generator[None, None, None]:
        """Generate a request's answers one after the other, each from the best prefix cache.

        Yields:
            None after each part of an image or of the prompt, and each token, so that the scheduler
                can advance the other requests.
        """
        request = task.request
        keys = self._features.keys(task.ids, task.digests)  # contents of the prompt's positions
        images = dict(zip(task.digests, request.images, strict=True))  # by digest
        for index in range(request.n):
            options = replace(request.options, seed=request.options.seed + index)
            prefix_cache = self._take_prefix_cache(keys)
            # Encode only the images of positions that the prefix cache does not hold.
            yield from self._features.encode(keys[prefix_cache.common_length(keys) :], images)
            events = prefix_cache.answer(
                task.ids,
                keys,
                self._features,
                images,
                options,
                step=_PREFILL_STEP,
                continues=request.continues,
                batch=self._batch,
            )
            try:
                for event in events:
                    task.reading = isinstance(event, PromptRead) and event.done < event.total
                    if isinstance(event, PromptRead) and request.with_progress:
                        task.ticket.add_event(Progress("read", event.done, event.total))
                    # With log-probabilities, a token without text is a piece, too.
                    if isinstance(event, Token) and (event.text or event.logprob):
                        task.ticket.add_event(Piece(index, event.text, event.logprobs))
                    if isinstance(event, Finished) and event.text:  # text held back until the end
                        task.ticket.add_event(Piece(index, event.text))
                    if isinstance(event, Finished):
                        task.ticket.add_event(Answered(index, event.result))
                    yield
            finally:
                events.close()
                self._keep_prefix_cache(prefix_cache)

    def _take_prefix_cache(self, keys: Sequence[Key]) -> PrefixCache:
        """Take out the prefix cache that shares the longest prefix with a prompt.

        Only the shared prefix of the cache can be used again. A cache that would lose more than
        half of its positions is left for other prompts.

        Args:
            keys: the contents of the prompt's positions.

        Returns:
            The prefix cache; a new one if no other fits.
        """
        common_lengths = {cache: cache.common_length(keys) for cache in self._prefix_caches}
        fitting = [
            cache for cache, length in common_lengths.items() if 2 * length >= len(cache.keys)
        ]
        if not fitting:
            return PrefixCache(self._janus)
        best = max(fitting, key=lambda cache: common_lengths[cache])
        self._prefix_caches.remove(best)
        return best

    def _keep_prefix_cache(self, prefix_cache: PrefixCache) -> None:
        """Keep a prefix cache as the most recently used one. Free the least recently used ones.

        At most ``_MAX_PREFIX_CACHES`` are kept, in at most ``_PREFIX_CACHE_SHARE`` of the memory
        that would be free without them.
        """
        if not prefix_cache.keys:  # a failed pass has emptied it
            return
        self._prefix_caches.append(prefix_cache)
        cached = sum(kept.nbytes for kept in self._prefix_caches)
        max_bytes = _PREFIX_CACHE_SHARE * (available_memory() + cached)
        while len(self._prefix_caches) > _MAX_PREFIX_CACHES or (
            self._prefix_caches and cached > max_bytes
        ):
            cached -= self._prefix_caches.pop(0).nbytes
