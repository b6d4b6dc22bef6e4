"""The drawings' side of the engine: which pictures join the batch, and what is shown of them meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx

from ..decode.batch import DrawingBatch, Picture
from ..drawing import Job, finish, partial_picture, pictures_that_fit
from .requests import DrawingRequest, Drawn, Partial
from .tickets import Ticket

if TYPE_CHECKING:
    import numpy as np

    from ..pipeline import JanusPipeline

MOST = 16  # pictures side by side


@dataclass(eq=False)
class Drawing:
    """Pictures of one request: those that wait, those under way, and how many are finished."""

    ticket: Ticket
    request: DrawingRequest
    ids: list[int]
    begun: int = 0
    finished: int = 0
    pictures: dict[Picture, int] = field(default_factory=dict)  # under way, and which of the request's they are

    @property
    def left(self) -> int:
        """Pictures that wait."""
        return self.request.n - self.begun


class Drawings:
    """Requests for pictures. All pictures under way are one batch; requests with pictures that wait take turns.

    Args:
        janus: the model.
    """

    def __init__(self, janus: JanusPipeline):
        self.waiting: deque[Drawing] = deque()  # of which no picture is begun
        self.running: list[Drawing] = []
        self._janus = janus
        self._batch = DrawingBatch(janus.model)
        self._owners: dict[Picture, Drawing] = {}
        self._chores: deque[tuple[Drawing, Callable[[], None]]] = deque()

    @property
    def pictures(self) -> int:
        """Pictures under way."""
        return len(self._batch.pictures)

    def choose(self) -> list[tuple[Drawing, int]]:
        """Requests and how many of their pictures may begin now. Those with the fewest begun come first."""
        room = self._room()
        counts: dict[Drawing, int] = {}
        while room > 0:
            candidates = [d for d in (*self.running, *self.waiting) if d.left > counts.get(d, 0)]
            if not candidates:
                break
            drawing = min(candidates, key=lambda d: d.begun + counts.get(d, 0))
            counts[drawing] = counts.get(drawing, 0) + 1
            room -= 1
        for drawing in counts:
            if drawing in self.waiting:
                self.waiting.remove(drawing)
                self.running.append(drawing)
        return list(counts.items())

    def _room(self) -> int:
        asking = [d for d in (*self.running, *self.waiting) if d.left]
        if not asking:
            return 0
        longest = max(asking, key=lambda d: (d.request.options.rows, len(d.ids)))
        under_way = self.pictures
        fit = pictures_that_fit(self._janus, len(longest.ids), longest.request.options)
        return min(MOST, fit if under_way else max(fit, 1)) - under_way  # cautious: those under way hold part of theirs

    def start(self, chosen: Sequence[tuple[Drawing, int]]) -> None:
        """Begin pictures that were chosen; a request that fails takes no other with it."""
        for drawing, count in chosen:
            request, first = drawing.request, drawing.begun
            pictures = {Picture(request.seed + i, request.options): i for i in range(first, first + count)}
            drawing.begun += count
            drawing.pictures |= pictures
            try:
                self._batch.add(drawing.ids, self._janus.prompts.unconditional(drawing.ids), list(pictures))
            except Exception as error:
                self.drop([drawing], error)
            else:
                self._owners |= dict.fromkeys(pictures, drawing)

    def step(self) -> None:
        """A token of every picture, and one thing to do for those that are whole or are to be shown."""
        try:
            whole = set(self._batch.step())
        except Exception as error:
            self._batch = DrawingBatch(self._janus.model)
            self.drop([drawing for drawing in self.running if drawing.pictures], error)
            return
        for picture in (*whole, *self._batch.pictures):
            drawing = self._owners[picture]
            index = drawing.pictures[picture]
            if picture in whole:
                del self._owners[picture], drawing.pictures[picture]
                self._chores.append((drawing, self._finishing(drawing, index, picture.tokens())))
            elif (number := _shown_at(drawing.request, self._janus.config.image_tokens).get(len(picture))) is not None:
                self._chores.append((drawing, self._showing(drawing, index, number, picture.tokens())))
        self._do_a_chore()

    def _do_a_chore(self) -> None:
        if not self._chores:
            return
        drawing, chore = self._chores.popleft()
        try:
            chore()
        except Exception as error:
            self.drop([drawing], error)

    def _finishing(self, drawing: Drawing, index: int, tokens: np.ndarray) -> Callable[[], None]:
        def chore() -> None:
            request = drawing.request
            job = Job(request.prompt, drawing.ids, request.seed + index)
            image = finish(self._janus, tokens, job, request.options, len(tokens))
            drawing.finished += 1
            drawing.ticket.tell(Drawn(index, image, len(drawing.ids)))
            if drawing.finished == request.n:
                self.drop([drawing])

        return chore

    def _showing(self, drawing: Drawing, index: int, number: int, tokens: np.ndarray) -> Callable[[], None]:
        return lambda: drawing.ticket.tell(Partial(index, number, partial_picture(self._janus, tokens)))

    def drop(self, drawings: Sequence[Drawing], error: BaseException | None = None) -> None:
        """End requests that are under way, finished or not."""
        for drawing in drawings:
            self._batch.remove(list(drawing.pictures))
            for picture in drawing.pictures:
                self._owners.pop(picture, None)
            drawing.pictures.clear()
            self._chores = deque((whose, chore) for whose, chore in self._chores if whose is not drawing)
            self.running.remove(drawing)
            drawing.ticket.end(error)
        if drawings:
            mx.clear_cache()


def _shown_at(request: DrawingRequest, positions: int) -> dict[int, int]:
    """After how many tokens a picture is shown for which time."""
    most = min(request.partial_images, positions - 1)
    return {positions * (number + 1) // (most + 1): number for number in range(most)}
