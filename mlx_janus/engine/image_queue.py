"""The images' side of the engine: which requests' images join the batch, and which previews are made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from ..inference.image_generation import images_that_fit
from ..inference.loaded import LoadedModel
from ..inference.pathway import Canvas, ImageJob
from ..inference.pathways import pathway_of
from .messages import DrawingRequest, Drawn, Partial
from .tickets import Ticket

MOST = 16  # images side by side


@dataclass(eq=False)
class ImageTask:
    """The images of one request: those that wait, those under way, and how many are finished."""

    ticket: Ticket
    request: DrawingRequest
    ids: list[int]
    started: int = 0
    finished: int = 0
    running: dict[ImageJob, int] = field(
        default_factory=dict
    )  # and which of the request's images each one is
    preview_at: dict[int, int] = field(
        default_factory=dict
    )  # the steps after which a preview is made, to its number

    @property
    def left(self) -> int:
        """How many images wait."""
        return self.request.n - self.started


@dataclass(frozen=True)
class _Decoding:
    """A decoding to be done for a request."""

    task: ImageTask
    work: Callable[[], None]


class ImageScheduler:
    """Schedules requests for images. All images under way are one batch; requests whose images wait take turns.

    Args:
        janus: the model.
    """

    def __init__(self, janus: LoadedModel):
        self.waiting: deque[ImageTask] = deque()  # none of their images is started
        self.running: list[ImageTask] = []  # in the order of their arrival
        self._janus = janus
        self._pathway = pathway_of(janus)
        self._batch = self._pathway.batch()
        self._owners: dict[ImageJob, ImageTask] = {}
        self._finishing: deque[_Decoding] = deque()
        self._previews: dict[ImageJob, _Decoding] = {}  # the newest of each image

    @property
    def images(self) -> int:
        """How many images are under way, including those that still have to be decoded."""
        return len(self._batch.jobs) + len(self._finishing)

    @property
    def waiting_requests(self) -> int:
        """How many requests have no image under way."""
        return len(self.waiting) + sum(
            1 for task in tuple(self.running) if task.left and not task.running
        )

    @property
    def needs(self) -> int:
        """Peak bytes of the images under way, including those that they hold already."""
        count = len(self._batch.jobs)
        return count * self._bytes_per_image(self.running) if count else 0

    def _bytes_per_image(self, tasks: Sequence[ImageTask]) -> int:
        """Return the bytes of the largest image: all rows of a batch are padded to the longest prompt."""
        longest = max(len(task.ids) for task in tasks)
        return max(self._pathway.bytes_per_image(longest, task.request.options) for task in tasks)

    def choose(self, reserved: int) -> tuple[ImageTask, int] | None:
        """Return the request whose images start next, and how many of them; None if none may start.

        Requests with the fewest images under way come first, and among those the earliest.

        Args:
            reserved: peak bytes of the running answers.
        """
        asking = [task for task in (*self.running, *self.waiting) if task.left]
        if not asking:
            return None
        under_way = len(self._batch.jobs)
        fit = images_that_fit(
            self._janus, self._bytes_per_image([*self.running, *asking]), reserved
        )
        room = (
            min(MOST, fit if under_way else max(fit, 1)) - under_way
        )  # cautious: those hold part of theirs already
        chosen: dict[ImageTask, int] = {}
        for _ in range(room):
            left = [task for task in asking if task.left > chosen.get(task, 0)]
            if not left:
                break
            task = min(left, key=lambda task: len(task.running) + chosen.get(task, 0))
            chosen[task] = chosen.get(task, 0) + 1
        if not chosen:
            return None
        task = next(iter(chosen))  # the others' prompts are read in the next rounds
        if task in self.waiting:
            self.waiting.remove(task)
            self.running.append(task)
        return task, chosen[task]

    def start(self, task: ImageTask, count: int) -> None:
        """Start ``count`` images of a request. A failure ends only this request."""
        request = task.request
        first = task.started
        jobs = {
            ImageJob(request.prompt, task.ids, request.seed + i, request.options): i
            for i in range(first, first + count)
        }
        task.started += count
        task.preview_at = _preview_at(request, self._pathway.steps(request.options))
        try:
            self._batch.add(list(jobs))
        except Exception as error:
            self.drop([task], error)
            self._end_lost(error)
        else:
            task.running |= jobs
            self._owners |= dict.fromkeys(jobs, task)

    def step(self) -> None:
        """Advance every image by a step, and decode one that is finished, or else one to preview."""
        try:
            finished = self._batch.step()
        except Exception as error:
            self._batch = self._pathway.batch()
            self._end_lost(error)
            return
        for job, canvas in finished.items():
            task = self._owners.pop(job)
            self._previews.pop(job, None)
            self._finishing.append(self._finisher(task, task.running.pop(job), canvas))
        for job in self._batch.jobs:
            task = self._owners[job]
            number = task.preview_at.get(self._batch.steps_done(job))
            if number is not None:
                self._previews[job] = self._previewer(
                    task, task.running[job], number, self._batch.canvas(job)
                )
        self._decode_one()

    def _decode_one(self) -> None:
        if self._finishing:
            decoding = self._finishing.popleft()
        elif self._previews:
            decoding = self._previews.pop(next(iter(self._previews)))
        else:
            return
        try:
            decoding.work()
        except Exception as error:
            self.drop([decoding.task], error)

    def _finisher(self, task: ImageTask, index: int, canvas: Canvas) -> _Decoding:
        def work() -> None:
            image = canvas.finish()
            task.finished += 1
            task.ticket.tell(Drawn(index, image, len(task.ids)))
            if task.finished == task.request.n:
                self.drop([task])

        return _Decoding(task, work)

    def _previewer(self, task: ImageTask, index: int, number: int, canvas: Canvas) -> _Decoding:
        return _Decoding(task, lambda: task.ticket.tell(Partial(index, number, canvas.preview())))

    def drop(self, tasks: Sequence[ImageTask], error: BaseException | None = None) -> None:
        """End requests, finished or not."""
        for task in tasks:
            jobs = list(task.running)
            self._forget(task)
            task.ticket.end(error)
            try:
                self._batch.remove(jobs)
            except Exception as failure:
                self._end_lost(failure)
        if tasks:
            mx.clear_cache()

    def drop_all(self, error: BaseException) -> None:
        """End every running request."""
        self._batch = self._pathway.batch()
        self.drop(list(self.running), error)

    def _end_lost(self, error: BaseException) -> None:
        """End the requests whose images the batch has lost by an error."""
        there = set(self._batch.jobs)
        for task in [task for task in self.running if not there.issuperset(task.running)]:
            self.drop([task], error)

    def _forget(self, task: ImageTask) -> None:
        self.running.remove(task)
        for job in task.running:
            self._owners.pop(job, None)
            self._previews.pop(job, None)
        task.running.clear()
        self._finishing = deque(
            decoding for decoding in self._finishing if decoding.task is not task
        )


def _preview_at(request: DrawingRequest, steps: int) -> dict[int, int]:
    """Return after how many steps an image is shown, and the number of each preview."""
    most = min(request.partial_images, steps - 1)
    return {steps * (number + 1) // (most + 1): number for number in range(most)}
