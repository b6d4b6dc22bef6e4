"""The drawings' side of the engine: which pictures join the batch, and what is shown of them meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx

from ..decode.batch import DrawingBatch, Picture
from ..decode.image import DrawOptions
from ..inference.image_generation import Job, finish, partial_picture, picture_bytes, pictures_that_fit
from .messages import DrawingRequest, Drawn, Partial
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
    shown_at: dict[int, int] = field(default_factory=dict)  # after how many tokens each is shown for which time

    @property
    def left(self) -> int:
        """Pictures that wait."""
        return self.request.n - self.begun


@dataclass(frozen=True)
class _Chore:
    """A decoding that is to be done for a request."""

    drawing: Drawing
    work: Callable[[], None]


class Drawings:
    """Requests for pictures. All pictures under way are one batch; requests with pictures that wait take turns.

    Args:
        janus: the model.
    """

    def __init__(self, janus: JanusPipeline):
        self.waiting: deque[Drawing] = deque()  # of which no picture is begun
        self.running: list[Drawing] = []  # in the order in which they came
        self._janus = janus
        self._batch = DrawingBatch(janus.model)
        self._owners: dict[Picture, Drawing] = {}
        self._finishing: deque[_Chore] = deque()
        self._showing: dict[Picture, _Chore] = {}  # the newest for each

    @property
    def pictures(self) -> int:
        """Pictures under way, those included that are yet to be decoded."""
        return len(self._batch.pictures) + len(self._finishing)

    @property
    def held_up(self) -> int:
        """Requests that wait: those of which nothing is under way."""
        return len(self.waiting) + sum(1 for d in tuple(self.running) if d.left and not d.pictures)

    @property
    def needs(self) -> int:
        """Memory that pictures under way may come to take, some of which they have."""
        if not self._batch.pictures:
            return 0
        return len(self._batch.pictures) * picture_bytes(self._janus, *self._widest(self.running))

    def _widest(self, drawings: Sequence[Drawing]) -> tuple[int, DrawOptions]:
        """The longest prompt, to which all rows of a batch are padded, and options with the most rows."""
        return max(len(d.ids) for d in drawings), max((d.request.options for d in drawings), key=lambda o: o.rows)

    def choose(self, reserved: int) -> tuple[Drawing, int] | None:
        """The request whose pictures begin next, and how many of them; None: none may.

        Requests with the fewest pictures under way come first, and among those the one that came first.

        Args:
            reserved: memory that answers may come to take.
        """
        asking = [d for d in (*self.running, *self.waiting) if d.left]
        if not asking:
            return None
        under_way = len(self._batch.pictures)
        longest, options = self._widest([*self.running, *asking])
        fit = pictures_that_fit(self._janus, longest, options, reserved)
        room = min(MOST, fit if under_way else max(fit, 1)) - under_way  # cautious: those under way have part of theirs
        chosen: dict[Drawing, int] = {}
        for _ in range(room):
            left = [d for d in asking if d.left > chosen.get(d, 0)]
            if not left:
                break
            drawing = min(left, key=lambda d: len(d.pictures) + chosen.get(d, 0))
            chosen[drawing] = chosen.get(drawing, 0) + 1
        if not chosen:
            return None
        drawing = next(iter(chosen))  # the others' prompts are read in the next rounds
        if drawing in self.waiting:
            self.waiting.remove(drawing)
            self.running.append(drawing)
        return drawing, chosen[drawing]

    def start(self, drawing: Drawing, count: int) -> None:
        """Begin so many of a request's pictures; if that fails, no other is taken with it."""
        request, first = drawing.request, drawing.begun
        pictures = {Picture(request.seed + i, request.options): i for i in range(first, first + count)}
        drawing.begun += count
        drawing.shown_at = _shown_at(request, self._janus.config.image_tokens)
        try:
            self._batch.add(drawing.ids, self._janus.prompts.unconditional(drawing.ids), list(pictures))
        except Exception as error:
            self.drop([drawing], error)
            self._end_lost(error)
        else:
            drawing.pictures |= pictures
            self._owners |= dict.fromkeys(pictures, drawing)

    def step(self) -> None:
        """A token of every picture, and one thing to do for those that are whole or are to be shown."""
        try:
            whole = self._batch.step()
        except Exception as error:
            self._batch = DrawingBatch(self._janus.model)
            self._end_lost(error)
            return
        for picture in whole:
            drawing = self._owners.pop(picture)
            self._showing.pop(picture, None)
            self._finishing.append(self._finisher(drawing, drawing.pictures.pop(picture), picture.tokens()))
        for picture in self._batch.pictures:
            drawing = self._owners[picture]
            if (number := drawing.shown_at.get(len(picture))) is not None:
                index = drawing.pictures[picture]
                self._showing[picture] = self._shower(drawing, index, number, picture.tokens())
        self._do_a_chore()

    def _do_a_chore(self) -> None:
        if self._finishing:
            chore = self._finishing.popleft()
        elif self._showing:
            chore = self._showing.pop(next(iter(self._showing)))
        else:
            return
        try:
            chore.work()
        except Exception as error:
            self.drop([chore.drawing], error)

    def _finisher(self, drawing: Drawing, index: int, tokens: np.ndarray) -> _Chore:
        def work() -> None:
            request = drawing.request
            job = Job(request.prompt, drawing.ids, request.seed + index)
            image = finish(self._janus, tokens, job, request.options, len(tokens))
            drawing.finished += 1
            drawing.ticket.tell(Drawn(index, image, len(drawing.ids)))
            if drawing.finished == request.n:
                self.drop([drawing])

        return _Chore(drawing, work)

    def _shower(self, drawing: Drawing, index: int, number: int, tokens: np.ndarray) -> _Chore:
        return _Chore(
            drawing, lambda: drawing.ticket.tell(Partial(index, number, partial_picture(self._janus, tokens)))
        )

    def drop(self, drawings: Sequence[Drawing], error: BaseException | None = None) -> None:
        """End requests that are under way, finished or not."""
        for drawing in drawings:
            pictures = list(drawing.pictures)
            self._forget(drawing)
            drawing.ticket.end(error)
            try:
                self._batch.remove(pictures)
            except Exception as failure:
                self._end_lost(failure)
        if drawings:
            mx.clear_cache()

    def drop_all(self, error: BaseException) -> None:
        """End everything that is under way."""
        self._batch = DrawingBatch(self._janus.model)
        self.drop(list(self.running), error)

    def _end_lost(self, error: BaseException) -> None:
        """End the requests whose pictures the batch has lost by an error."""
        there = set(self._batch.pictures)
        for drawing in [d for d in self.running if not there.issuperset(d.pictures)]:
            self.drop([drawing], error)

    def _forget(self, drawing: Drawing) -> None:
        self.running.remove(drawing)
        for picture in drawing.pictures:
            self._owners.pop(picture, None)
            self._showing.pop(picture, None)
        drawing.pictures.clear()
        self._finishing = deque(chore for chore in self._finishing if chore.drawing is not drawing)


def _shown_at(request: DrawingRequest, positions: int) -> dict[int, int]:
    """After how many tokens a picture is shown for which time."""
    most = min(request.partial_images, positions - 1)
    return {positions * (number + 1) // (most + 1): number for number in range(most)}
