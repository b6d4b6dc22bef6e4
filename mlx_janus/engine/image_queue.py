"""The engine's image scheduler: chooses which images join the batch, and decodes images."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from ..inference.image_generation import images_that_fit
from ..inference.loaded import LoadedModel
from ..inference.pathway import Canvas, ImageJob
from ..inference.pathways import pathway_of
from .messages import DrawingRequest, Drawn, Partial
from .tickets import Ticket

MAX_RUNNING_IMAGES = 16  # images generated at the same time


@dataclass(eq=False)
class ImageTask:
    """A request for images, with the state of its images: waiting, running or finished."""

    ticket: Ticket
    request: DrawingRequest
    ids: list[int]  # the prompt's tokens
    started_images: int = 0
    finished_images: int = 0
    running_jobs: dict[ImageJob, int] = field(default_factory=dict)
    """For each running image, its index in the request."""
    preview_numbers: dict[int, int] = field(default_factory=dict)
    """By the number of steps after which a preview is due: the preview's number, from 0."""

    @property
    def waiting_images(self) -> int:
        """The number of images that have not been started."""
        return self.request.n - self.started_images


@dataclass(frozen=True)
class _PendingDecode:
    """A finished image or a preview that waits to be decoded."""

    task: ImageTask
    run: Callable[[], None]  # decodes the image and adds it to the request's events


class ImageScheduler:
    """A scheduler for image requests. All running images form one batch.

    Each free place in the batch goes to the request with the fewest running images.

    Args:
        janus: the model.
    """

    def __init__(self, janus: LoadedModel):
        self.waiting: deque[ImageTask] = deque()  # requests without a started image
        self.running: list[ImageTask] = []  # the other requests, in order of arrival
        self._janus = janus
        self._pathway = pathway_of(janus)
        self._batch = self._pathway.batch()
        self._task_of: dict[ImageJob, ImageTask] = {}  # the request of each image in the batch
        self._pending_images: deque[_PendingDecode] = deque()  # images after their last step
        self._pending_previews: dict[ImageJob, _PendingDecode] = {}  # each image's newest preview

    @property
    def running_images(self) -> int:
        """The number of images in the batch, and of finished images that are not decoded yet."""
        return len(self._batch.jobs) + len(self._pending_images)

    @property
    def waiting_requests(self) -> int:
        """The number of requests with waiting images and no running image."""
        # The event loop reads this while the engine's thread changes ``running``, so copy it first.
        running = tuple(self.running)
        idle = [task for task in running if task.waiting_images and not task.running_jobs]
        return len(self.waiting) + len(idle)

    @property
    def needed_bytes(self) -> int:
        """Peak bytes of the running images, including memory that they hold already."""
        count = len(self._batch.jobs)
        return count * self._bytes_per_image(self.running) if count else 0

    def _bytes_per_image(self, tasks: Sequence[ImageTask]) -> int:
        """Return the peak bytes of one image in a batch of these requests.

        This is the maximum over the requests' options, each with the longest of the prompts.
        """
        longest = max(len(task.ids) for task in tasks)
        return max(self._pathway.bytes_per_image(longest, task.request.options) for task in tasks)

    def choose(self, answer_bytes: int) -> tuple[ImageTask, int] | None:
        """Choose the images to start next. They belong to one request, which joins ``running``.

        The free places in the batch are given out one by one. Each goes to the request with the
        fewest running and new images, or to the earliest of several such requests. Only the request
        that got the first place starts its new images now. The others follow in later calls.

        Args:
            answer_bytes: peak bytes of the running answers.

        Returns:
            A request and the number of its images to start; None if no image may start.
        """
        candidates = [task for task in (*self.running, *self.waiting) if task.waiting_images]
        if not candidates:
            return None
        running_count = len(self._batch.jobs)
        image_bytes = self._bytes_per_image([*self.running, *candidates])
        # Fewer images may start than would fit, because running images count twice: their memory is
        # not free, and their number is subtracted from ``fitting`` below.
        fitting = images_that_fit(self._janus, image_bytes, answer_bytes)
        if not running_count:  # start one image without a memory check, or it might wait for ever
            fitting = max(fitting, 1)
        places = min(MAX_RUNNING_IMAGES, fitting) - running_count
        new_images: Counter[ImageTask] = Counter()  # number of images to start, by request
        for _ in range(places):
            remaining = [task for task in candidates if task.waiting_images > new_images[task]]
            if not remaining:
                break
            task = min(remaining, key=lambda task: len(task.running_jobs) + new_images[task])
            new_images[task] += 1
        if not new_images:
            return None
        task = next(iter(new_images))  # the first only, since the batch reads one prompt at a time
        if task in self.waiting:
            self.waiting.remove(task)
            self.running.append(task)
        return task, new_images[task]

    def start(self, task: ImageTask, count: int) -> None:
        """Start the next ``count`` images of a request.

        A failure ends this request, and any other request whose running images the batch lost.
        """
        request = task.request
        jobs: dict[ImageJob, int] = {}  # for each new image, its index in the request
        for index in range(task.started_images, task.started_images + count):
            seed = request.seed + index
            jobs[ImageJob(request.prompt, task.ids, seed, request.options)] = index
        task.started_images += count
        task.preview_numbers = _preview_numbers(request, self._pathway.steps(request.options))
        try:
            self._batch.add(list(jobs))
        except Exception as error:
            self.drop([task], error)
            self._end_tasks_with_lost_images(error)
        else:
            task.running_jobs |= jobs
            self._task_of |= dict.fromkeys(jobs, task)

    def step(self) -> None:
        """Advance every running image by a step, then decode one finished image or one preview.

        The loops only queue the finished images and the previews. ``_decode_one`` decodes one.

        If the step fails, all requests with a running image end with the error.
        """
        try:
            finished = self._batch.step()
        except Exception as error:
            # The layers of the batch's KV cache may now differ in length, so begin a new batch.
            self._batch = self._pathway.batch()
            self._end_tasks_with_lost_images(error)
            return
        for job, canvas in finished.items():
            task = self._task_of.pop(job)
            index = task.running_jobs.pop(job)
            self._pending_previews.pop(job, None)
            self._pending_images.append(self._make_pending_image(task, index, canvas))
        for job in self._batch.jobs:
            task = self._task_of[job]
            number = task.preview_numbers.get(self._batch.steps_done(job))
            if number is not None:
                index = task.running_jobs[job]
                canvas = self._batch.canvas(job)
                pending = self._make_pending_preview(task, index, number, canvas)
                self._pending_previews[job] = pending  # replaces an older preview
        self._decode_one()

    def _decode_one(self) -> None:
        """Decode the first finished image in the queue or, if there is none, the first preview.

        Only one image is decoded in a call, since decoding delays every answer. A failure ends only
        the image's request.
        """
        if self._pending_images:
            pending = self._pending_images.popleft()
        elif self._pending_previews:
            first_job = next(iter(self._pending_previews))
            pending = self._pending_previews.pop(first_job)
        else:
            return
        try:
            pending.run()
        except Exception as error:
            self.drop([pending.task], error)

    def _make_pending_image(self, task: ImageTask, index: int, canvas: Canvas) -> _PendingDecode:
        """Return a queue item that decodes the request's finished image ``index``.

        Decoding the last image of a request ends the request.
        """

        def decode() -> None:
            image = canvas.finish()
            task.finished_images += 1
            task.ticket.add_event(Drawn(index, image, prompt_tokens=len(task.ids)))
            if task.finished_images == task.request.n:
                self.drop([task])

        return _PendingDecode(task, decode)

    def _make_pending_preview(
        self, task: ImageTask, index: int, number: int, canvas: Canvas
    ) -> _PendingDecode:
        """Return a queue item that decodes preview ``number`` of the request's image ``index``."""

        def decode() -> None:
            task.ticket.add_event(Partial(index, number, canvas.preview()))

        return _PendingDecode(task, decode)

    def drop(self, tasks: Sequence[ImageTask], error: BaseException | None = None) -> None:
        """End requests, finished or not, and remove their images from the batch.

        Args:
            tasks: requests in ``running``.
            error: the error that the requests' tickets raise; None: the requests end without one.
        """
        for task in tasks:
            if task not in self.running:  # it has ended, because ``remove`` failed for another task
                continue
            jobs = list(task.running_jobs)
            self._forget(task)
            task.ticket.end(error)
            try:
                self._batch.remove(jobs)
            except Exception as failure:
                self._end_tasks_with_lost_images(failure)
        if tasks:
            mx.clear_cache()

    def drop_all(self, error: BaseException) -> None:
        """End every request in ``running`` with an error, and replace the batch by an empty one."""
        self._batch = self._pathway.batch()
        self.drop(list(self.running), error)

    def _end_tasks_with_lost_images(self, error: BaseException) -> None:
        """End the requests whose running images were lost when the batch failed with ``error``.

        A request without running images continues. Its other images wait to be started or decoded.
        """
        remaining = set(self._batch.jobs)
        for task in list(self.running):
            if not remaining.issuperset(task.running_jobs):
                self.drop([task], error)

    def _forget(self, task: ImageTask) -> None:
        """Remove a request from the lists and queues of this scheduler, but not from the batch."""
        self.running.remove(task)
        for job in task.running_jobs:
            self._task_of.pop(job, None)
            self._pending_previews.pop(job, None)
        task.running_jobs.clear()
        self._pending_images = deque(
            pending for pending in self._pending_images if pending.task is not task
        )


def _preview_numbers(request: DrawingRequest, steps: int) -> dict[int, int]:
    """Return the number of each preview, from 0, by the number of steps after which it is due.

    Previews are evenly spaced. There is none after the last step, when the image is finished.

    Args:
        request: the request; ``partial_images`` is the maximum number of previews.
        steps: steps of one image.
    """
    count = min(request.partial_images, steps - 1)
    return {steps * (number + 1) // (count + 1): number for number in range(count)}
