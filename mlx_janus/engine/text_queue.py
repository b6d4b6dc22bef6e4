"""The answers' side of the engine: who is next, what was read before, and a token of each in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import mlx.core as mx

from ..inference.prefix_cache import Key, ReadPrefix, SeenPictures, picture_digest
from ..inference.text_generation import READING
from ..memory import available_memory
from ..models.backbone import cache_bytes
from ..weights.footprint import SAFE_SHARE
from .messages import Answered, AnswerRequest, Piece
from .tickets import Ticket

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline

_PICTURES = 32  # whose features are kept
_PREFIXES = 8  # that are kept
_SHARE = 1 / 8  # of the free memory, for prefixes


@dataclass(eq=False)
class Answering:
    """An answer that waits, or is under way."""

    ticket: Ticket
    request: AnswerRequest
    ids: list[int]
    steps: Iterator[None] | None = None
    reading: bool = True  # pictures or prompt

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

    @property
    def needs(self) -> int:
        """Memory that those under way may come to take, some of which they have."""
        return sum(map(self._needs, self.running))

    def _needs(self, answer: Answering) -> int:
        config, itemsize = self._janus.config.language, self._janus.model.gen_embed.weight.dtype.size
        positions = min(len(answer.ids) + answer.request.options.max_tokens, config.max_position_embeddings)
        return cache_bytes(config, 1, positions, itemsize)

    def choose(self, others: bool, reserved: int) -> tuple[list[Answering], bool]:
        """Take those from the queue that may begin.

        Args:
            others: whether pictures are under way, so that waiting for memory has an end.
            reserved: memory that those may come to take.

        Returns:
            Them, and whether one is left that memory is short for.
        """
        chosen: list[Answering] = []
        while self.waiting and len(self.running) + len(chosen) < self._most:
            needed = reserved + self.needs + sum(map(self._needs, (*chosen, self.waiting[0])))
            if (others or self.running or chosen) and not self._make_room(needed):
                return chosen, True
            chosen.append(self.waiting.popleft())
        return chosen, False

    def _make_room(self, needed: int) -> bool:
        """Whether there is so much memory, without kept prefixes if need be."""
        if needed > SAFE_SHARE * (available_memory() + sum(prefix.nbytes for prefix in self._prefixes)):
            return False
        while self._prefixes and needed > SAFE_SHARE * available_memory():
            del self._prefixes[0]
            mx.clear_cache()
        return True

    def start(self, answers: Sequence[Answering]) -> None:
        """Begin those that were chosen."""
        for answer in answers:
            answer.steps = self._answer(answer)
            self.running.append(answer)

    def step(self) -> None:
        """A token of every answer, and a piece of one that still reads; one that fails takes no other with it."""
        reader = next((answer for answer in self.running if answer.reading), None)
        for answer in list(self.running):
            if answer.reading and answer is not reader:
                continue
            assert answer.steps is not None
            try:
                next(answer.steps)
            except StopIteration:
                self.drop([answer])
            except Exception as error:
                self.drop([answer], error)

    def drop(self, answers: Sequence[Answering], error: BaseException | None = None) -> None:
        """End answers that are under way."""
        for answer in answers:
            self.running.remove(answer)
            try:
                answer.steps.close()  # type: ignore[union-attr]
            except Exception as failure:
                error = error or failure
            finally:
                answer.ticket.end(error)
        if answers:
            mx.clear_cache()

    def _answer(self, answer: Answering) -> Iterator[None]:
        request, ticket = answer.request, answer.ticket
        keys = self._seen.keys(answer.ids, answer.digests)
        shown = dict(zip(answer.digests, request.pictures, strict=True))
        for index in range(request.n):
            options = replace(request.options, seed=request.options.seed + index)
            prefix = self._take(keys)
            yield from self._seen.look(keys[prefix.common(keys) :], shown)
            stream = prefix.answer(answer.ids, keys, self._seen, shown, options, every_token=True)
            try:
                for chunk in stream:
                    answer.reading = chunk is READING
                    if chunk.text:
                        ticket.tell(Piece(index, chunk.text))
                    if chunk.result is not None:
                        ticket.tell(Answered(index, chunk.result))
                    yield
            finally:
                stream.close()  # type: ignore[attr-defined]
                self._keep(prefix)

    def _take(self, keys: Sequence[Key]) -> ReadPrefix:
        """The prefix with the longest common beginning, of those that lose no more than half; else a new one."""
        common = {prefix: prefix.common(keys) for prefix in self._prefixes}
        fitting = [prefix for prefix, length in common.items() if 2 * length >= len(prefix.keys)]
        if not fitting:
            return ReadPrefix(self._janus)
        best = max(fitting, key=lambda prefix: common[prefix])
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
