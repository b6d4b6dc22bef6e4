"""The answers' side of the engine: who is next, what was read before, and a token of each in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import mlx.core as mx

from ..memory import available_memory
from ..models.backbone import cache_bytes
from ..prefix import Key, ReadPrefix, SeenPictures, picture_digest
from .requests import Answered, AnswerRequest, Piece
from .tickets import Ticket

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline

_PICTURES = 32  # whose features are kept
_PREFIXES = 8  # that are kept
_SHARE = 1 / 8  # of the free memory, for prefixes
_SPARE = 0.8  # of the free memory that answers side by side may take


@dataclass(eq=False)
class Answering:
    """An answer that waits, or is under way."""

    ticket: Ticket
    request: AnswerRequest
    ids: list[int]
    steps: Iterator[None] | None = None

    @cached_property
    def digests(self) -> list[str]:
        """Of the request's pictures, in order."""
        return [picture_digest(image) for image in self.request.pictures]


class Answers:
    """Requests for answers: so many side by side, the others wait in the order in which they came.

    Args:
        janus: the model.
        most: answers side by side.
    """

    def __init__(self, janus: JanusPipeline, most: int):
        self.waiting: deque[Answering] = deque()
        self.running: list[Answering] = []
        self._janus, self._most = janus, most
        self._seen = SeenPictures(janus, _PICTURES)
        self._prefixes: list[ReadPrefix] = []  # the last used one last

    def choose(self, others: bool) -> list[Answering]:
        """Take those from the queue that may begin.

        Args:
            others: whether pictures are under way, so that waiting for memory has an end.
        """
        chosen: list[Answering] = []
        while self.waiting and len(self.running) + len(chosen) < self._most:
            busy = others or self.running or chosen
            if busy and not self._fits([*chosen, self.waiting[0]]):
                break
            chosen.append(self.waiting.popleft())
        return chosen

    def _fits(self, answers: Sequence[Answering]) -> bool:
        config, itemsize = self._janus.config.language, self._janus.model.gen_embed.weight.dtype.size
        needed = 0
        for answer in answers:
            positions = min(len(answer.ids) + answer.request.options.max_tokens, config.max_position_embeddings)
            needed += cache_bytes(config, 1, positions, itemsize)
        while needed > _SPARE * available_memory():
            if not self._prefixes:
                return False
            del self._prefixes[0]
            mx.clear_cache()
        return True

    def start(self, answers: Sequence[Answering]) -> None:
        """Begin those that were chosen."""
        for answer in answers:
            answer.steps = self._answer(answer)
            self.running.append(answer)

    def step(self) -> None:
        """A token of every answer; one that fails takes no other with it."""
        for answer in list(self.running):
            assert answer.steps is not None
            try:
                next(answer.steps)
            except StopIteration:
                self._close(answer)
            except Exception as error:
                self._close(answer, error)

    def drop(self, answers: Sequence[Answering], error: BaseException | None = None) -> None:
        """End answers that are under way."""
        for answer in answers:
            self._close(answer, error)

    def _close(self, answer: Answering, error: BaseException | None = None) -> None:
        self.running.remove(answer)
        try:
            answer.steps.close()  # type: ignore[union-attr]
        finally:
            answer.ticket.end(error)
        mx.clear_cache()

    def _answer(self, answer: Answering) -> Iterator[None]:
        request, ticket = answer.request, answer.ticket
        keys = self._seen.keys(answer.ids, answer.digests)
        shown = dict(zip(answer.digests, request.pictures, strict=True))
        for index in range(request.n):
            options = replace(request.options, seed=request.options.seed + index)
            prefix = self._take(keys)
            stream = prefix.answer(answer.ids, keys, self._seen, shown, options, every_token=True)
            try:
                for chunk in stream:
                    if chunk.text:
                        ticket.tell(Piece(index, chunk.text))
                    if chunk.result is not None:
                        ticket.tell(Answered(index, chunk.result))
                    yield
            finally:
                stream.close()  # type: ignore[attr-defined]
                self._keep(prefix)

    def _take(self, keys: Sequence[Key]) -> ReadPrefix:
        """The prefix with the longest common beginning, unless most of what it holds would be lost; else a new one."""
        best = max(self._prefixes, key=lambda prefix: prefix.common(keys), default=None)
        if best is None or 2 * best.common(keys) < len(best.keys):
            return ReadPrefix(self._janus)
        self._prefixes.remove(best)
        return best

    def _keep(self, prefix: ReadPrefix) -> None:
        if not prefix.keys:
            return
        self._prefixes.append(prefix)
        held = sum(prefix.nbytes for prefix in self._prefixes)
        room = _SHARE * (available_memory() + held)
        while len(self._prefixes) > _PREFIXES or (self._prefixes and held > room):
            held -= self._prefixes.pop(0).nbytes
