"""The engine's image scheduler: chooses which images join the batch, and decodes images."""

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

MOST = 16  # images generated at the same time


@dataclass(eq=False)
class ImageTask:
    """A request for images, with the state of its images: waiting, running or finished."""

    ticket: Ticket
    request: DrawingRequest
    ids: list[int]  # the prompt's tokens
    started: int = 0  # number of images
    finished: int = 0  # number of images
    running: dict[ImageJob, int] = field(default_factory=dict)
    """Running images to their indices in the request."""
    preview_at: dict[int, int] = field(default_factory=dict)
    """Numbers of steps after which an image is previewed, to the numbers of the previews."""

    @property
    def left(self) -> int:
        """The number of images that wait."""
        return self.request.n - self.started


@dataclass(frozen=True)
class _Decoding:
    """A queued decoding of an image, for a preview or at its end."""

    task: ImageTask
    work: Callable[[], None]


class ImageScheduler:
    """A scheduler for image requests. All running images form one batch.

    Requests with waiting images take turns.

    Args:
        janus: the model.
    """

    def __init__(self, janus: LoadedModel):
        self.waiting: deque[ImageTask] = deque()  # requests without a started image
        self.running: list[ImageTask] = []  # in order of arrival
        self._janus = janus
        self._pathway = pathway_of(janus)
        self._batch = self._pathway.batch()
        self._owners: dict[ImageJob, ImageTask] = {}  # the request of each image in the batch
        self._finishing: deque[_Decoding] = deque()  # of finished images
        self._previews: dict[ImageJob, _Decoding] = {}  # the newest of each image

    @property
    def images(self) -> int:
        """The number of running images, including those that wait for decoding."""
        return len(self._batch.jobs) + len(self._finishing)

    @property
    def waiting_requests(self) -> int:
        """The number of requests that wait and have no running image."""
        # The event loop reads this while the engine's thread changes ``running``, so copy it first.
        idle = [task for task in tuple(self.running) if task.left and not task.running]
        return len(self.waiting) + len(idle)

    @property
    def needs(self) -> int:
        """Peak bytes of the running images, including memory that they hold already."""
        count = len(self._batch.jobs)
        return count * self._bytes_per_image(self.running) if count else 0

    def _bytes_per_image(self, tasks: Sequence[ImageTask]) -> int:
        """Return the most bytes an image of ``tasks`` needs, padded to the longest prompt."""
        longest = max(len(task.ids) for task in tasks)
        return max(self._pathway.bytes_per_image(longest, task.request.options) for task in tasks)

    def choose(self, reserved: int) -> tuple[ImageTask, int] | None:
        """Choose the images to start next.

        The request with the fewest running images is chosen; of several, the earliest. It joins
        ``running``.

        Args:
            reserved: peak bytes of the running answers.

        Returns:
            A request and the number of its images to start; None if no image may start.
        """
        asking = [task for task in (*self.running, *self.waiting) if task.left]
        if not asking:
            return None
        running = len(self._batch.jobs)
        needed = self._bytes_per_image([*self.running, *asking])
        # Cautious: running images count twice. The memory that they hold is not free, and ``room``
        # subtracts their number. So fewer images may start than would fit.
        fit = images_that_fit(self._janus, needed, reserved)
        if not running:  # start one without a memory check, or it might wait for ever
            fit = max(fit, 1)
        room = min(MOST, fit) - running
        chosen: dict[ImageTask, int] = {}
        for _ in range(room):
            open_tasks = [task for task in asking if task.left > chosen.get(task, 0)]
            if not open_tasks:
                break
            task = min(open_tasks, key=lambda task: len(task.running) + chosen.get(task, 0))
            chosen[task] = chosen.get(task, 0) + 1
        if not chosen:
            return None
        task = next(iter(chosen))  # one request a call: the next call reads another's prompt
        if task in self.waiting:
            self.waiting.remove(task)
            self.running.append(task)
        return task, chosen[task]

    def start(self, task: ImageTask, count: int) -> None:
        """Start ``count`` images of a request.

        A failure ends this request, and any other whose running images the batch lost.
        """
        request = task.request
        jobs: dict[ImageJob, int] = {}
        for index in range(task.started, task.started + count):
            seed = request.seed + index
            jobs[ImageJob(request.prompt, task.ids, seed, request.options)] = index
        task.started += count
        task.preview_at = _preview_at(request, self._pathway.steps(request.options))
        try:
            self._batch.add(list(jobs))
        except Exception as error:
            self.drop([task], error)
            self._end_lost(error)  # the batch may have lost other requests' images too
        else:
            task.running |= jobs
            self._owners |= dict.fromkeys(jobs, task)

    def step(self) -> None:
        """Advance every image by a step, and decode one finished image or else one preview.

        If the step fails, all requests with a running image end with the error.
        """
        try:
            finished = self._batch.step()
        except Exception as error:  # the cache's layers may differ now: give up the batch
            self._batch = self._pathway.batch()
            self._end_lost(error)
            return
        for job, canvas in finished.items():
            task = self._owners.pop(job)
            index = task.running.pop(job)
            self._previews.pop(job, None)
            self._finishing.append(self._finisher(task, index, canvas))
        for job in self._batch.jobs:
            task = self._owners[job]
            number = task.preview_at.get(self._batch.steps_done(job))
            if number is not None:
                index = task.running[job]
                canvas = self._batch.canvas(job)
                self._previews[job] = self._previewer(task, index, number, canvas)
        self._decode_one()

    def _decode_one(self) -> None:
        """Decode the first finished image, or else the first preview.

        Decodes no more than one, since decoding delays every answer. A failure ends only the
        image's request.
        """
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
        """Return the decoding of a finished image; the last one of a request also ends it."""

        def work() -> None:
            image = canvas.finish()
            task.finished += 1
            task.ticket.tell(Drawn(index, image, len(task.ids)))
            if task.finished == task.request.n:
                self.drop([task])

        return _Decoding(task, work)

    def _previewer(self, task: ImageTask, index: int, number: int, canvas: Canvas) -> _Decoding:
        """Return the decoding of an image's preview with this number."""
        return _Decoding(task, lambda: task.ticket.tell(Partial(index, number, canvas.preview())))

    def drop(self, tasks: Sequence[ImageTask], error: BaseException | None = None) -> None:
        """End requests, finished or not, and remove their images from the batch.

        Args:
            tasks: requests in ``running``.
            error: the reason, told to the client; None: the requests end without an error.
        """
        for task in tasks:
            if task not in self.running:  # has ended already, as a failure below lost its images
                continue
            jobs = list(task.running)
            self._forget(task)
            task.ticket.end(error)
            try:
                self._batch.remove(jobs)
            except Exception as failure:  # the batch may have lost other requests' images
                self._end_lost(failure)
        if tasks:
            mx.clear_cache()

    def drop_all(self, error: BaseException) -> None:
        """End every request in ``running`` with an error, and begin a new, empty batch."""
        self._batch = self._pathway.batch()
        self.drop(list(self.running), error)

    def _end_lost(self, error: BaseException) -> None:
        """End the requests that lost a running image when the batch failed with ``error``.

        A request that only waits, for a turn or for decoding, has lost none and is kept.
        """
        kept = set(self._batch.jobs)
        for task in [task for task in self.running if not kept.issuperset(task.running)]:
            self.drop([task], error)

    def _forget(self, task: ImageTask) -> None:
        """Remove a request from all lists and queues here. Its images stay in the batch."""
        self.running.remove(task)
        for job in task.running:
            self._owners.pop(job, None)
            self._previews.pop(job, None)
        task.running.clear()
        self._finishing = deque(
            decoding for decoding in self._finishing if decoding.task is not task
        )


def _preview_at(request: DrawingRequest, steps: int) -> dict[int, int]:
    """Return the numbers of steps after which an image is previewed, to the previews' numbers.

    Previews are evenly spaced. The last step has no preview, as the image is finished then.
    """
    most = min(request.partial_images, steps - 1)
    return {steps * (number + 1) // (most + 1): number for number in range(most)}
