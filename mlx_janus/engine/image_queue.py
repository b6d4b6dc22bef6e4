"""The engine's image scheduler: chooses which images join the batch, and decodes images."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from ..inference.image_generation import images_that_fit
from ..inference.input_records import edit_facts, record_of
from ..inference.loaded import LoadedModel
from ..inference.pathway import Canvas, ImageJob, InputImages
from ..inference.pathways import pathway_of
from ..processing.images import preprocess
from .messages import DrawingRequest, Drawn, Partial, Progress
from .tickets import Ticket

MAX_RUNNING_IMAGES = 16  # images generated at the same time


@dataclass(eq=False)
class ImageTask:
    """A request for images, with the state of its images: waiting, running or finished."""

    ticket: Ticket
    request: DrawingRequest
    ids: list[int]  # the prompt's tokens
    input_tokens: int = 0  # number of the prompt's tokens that stand for images to change
    inputs: InputImages | None = None  # the images to change; None before the first image starts
    started_images: int = 0
    finished_images: int = 0
    reported_steps: int = 0  # steps done, in the newest ``Progress`` event
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


@dataclass(frozen=True)
class _Start:
    """New images of a request whose prompt is being read."""

    task: ImageTask
    count: int
    steps: Generator[None, None, None]  # reads the next part of the prompt


class ImageScheduler:
    """A scheduler for image requests. All running images form one batch.

    Each free place in the batch goes to the request that has the fewest images in it.

    Args:
        janus: the model.
    """

    def __init__(self, janus: LoadedModel):
        self.waiting: deque[ImageTask] = deque()  # requests without a started image
        self.running: list[ImageTask] = []  # the other requests, in order of arrival
        self._janus = janus
        self._pathway = pathway_of(janus)
        self._batch = self._pathway.batch()
        self._starting: _Start | None = None  # images whose prompt is being read; None: none
        self._task_of: dict[ImageJob, ImageTask] = {}  # the request of each image in the batch
        self._pending_images: deque[_PendingDecode] = deque()  # images after their last step
        self._pending_previews: dict[ImageJob, _PendingDecode] = {}  # each image's newest preview

    @property
    def running_images(self) -> int:
        """The number of images that were started and are not decoded yet."""
        return self._started_images + len(self._pending_images)

    @property
    def _started_images(self) -> int:
        """The number of images in the batch, including those whose prompt is still being read."""
        starting = self._starting  # the event loop reads this while the engine's thread changes it
        return len(self._batch.jobs) + (starting.count if starting else 0)

    @property
    def waiting_requests(self) -> int:
        """The number of requests with waiting images and no running image.

        Images whose prompt is being read are running, and so are those that wait to be decoded.
        """
        # The event loop reads this while the engine's thread changes both, so copy them first.
        running = tuple(self.running)
        starting = self._starting
        idle = [
            task
            for task in running
            if task.waiting_images
            and task.started_images == task.finished_images
            and not (starting and starting.task is task)
        ]
        return len(self.waiting) + len(idle)

    @property
    def needed_bytes(self) -> int:
        """Peak bytes of the running images, including memory that they hold already."""
        count = self._started_images
        return count * self._bytes_per_image(self.running) if count else 0

    def _bytes_per_image(self, tasks: Sequence[ImageTask]) -> int:
        """Return the peak bytes of one image in a batch of these requests.

        An image's memory depends on its request's options and on the longest prompt of all, because
        a batch may pad the others to it. The result is the maximum over the requests.
        """
        longest = max(len(task.ids) for task in tasks)
        return max(self._pathway.bytes_per_image(longest, task.request.options) for task in tasks)

    def choose(
        self, answer_bytes: int, *, new_requests: bool = True
    ) -> tuple[ImageTask, int] | None:
        """Choose the images to start next. They belong to one request, which joins ``running``.

        The free places in the batch are given out one by one. Each goes to the request with the
        fewest running and new images, or to the earliest of several such requests. Only the request
        that got the first place starts its new images now. The others follow in later calls.

        Args:
            answer_bytes: peak bytes of the running answers.
            new_requests: whether requests without a started image may start.

        Returns:
            A request and the number of its images to start; None if no image may start, for example
            because the prompt of other images is still being read.
        """
        if self._starting is not None:
            return None
        waiting = self.waiting if new_requests else ()
        candidates = [task for task in (*self.running, *waiting) if task.waiting_images]
        if not candidates:
            return None
        running_count = len(self._batch.jobs)
        image_bytes = self._bytes_per_image([*self.running, *candidates])
        # ``fitting`` counts the memory that is free now, so running images have lowered it already.
        # They may still grow, so their number is subtracted too: at worst, too few images start.
        fitting = images_that_fit(self._janus, image_bytes, answer_bytes)
        if not running_count:  # start one image in any case, since no other image will free memory
            fitting = max(fitting, 1)
        places = min(MAX_RUNNING_IMAGES, fitting) - running_count
        new_images: Counter[ImageTask] = Counter()  # number of images to start, by request
        for _ in range(places):
            remaining = [task for task in candidates if task.waiting_images > new_images[task]]
            if not remaining:  # every image has a place
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
        """Queue the next ``count`` images of a request; the next steps read the prompt for them."""
        self._starting = _Start(task, count, self._start_in_parts(task, count))

    def _start_in_parts(self, task: ImageTask, count: int) -> Generator[None, None, None]:
        """Read the prompt of a request, then add its next ``count`` images to the batch.

        Yields:
            None after each part of the prompt, such as an image to change, except the last part.
        """
        request = task.request
        task.preview_numbers = _preview_numbers(request, self._pathway.steps(request.options))
        jobs = self._make_jobs(task, count)
        yield from self._batch.start(list(jobs))
        task.running_jobs |= jobs
        self._task_of |= dict.fromkeys(jobs, task)

    def _read_prompt(self) -> None:
        """Read the next part of the prompt of the images that are starting, if there are any.

        A failure ends their request, and any other request whose running images the batch lost.
        """
        starting = self._starting
        if starting is None:
            return
        try:
            next(starting.steps)
        except StopIteration:
            self._starting = None
        except Exception as error:
            self.drop([starting.task], error)
            self._end_tasks_with_lost_images(error)

    def _make_jobs(self, task: ImageTask, count: int) -> dict[ImageJob, int]:
        """Create jobs for the next ``count`` images of a request, and count them as started.

        The images to change are preprocessed when the request's first jobs are created.

        Returns:
            For each job, the index of its image in the request.
        """
        request = task.request
        if request.images and task.inputs is None:
            task.inputs = _inputs_of(request, self._janus)
        first = task.started_images
        task.started_images += count
        jobs = {}
        for index in range(first, first + count):
            seed = request.seed + index
            job = ImageJob(request.prompt, task.ids, seed, request.options, task.inputs)
            jobs[job] = index
        return jobs

    def step(self) -> None:
        """Advance every running image by a step, then decode one finished image or one preview.

        If images are starting, first read the next part of their prompt. Only one part is read in a
        step, since reading a long prompt at once would delay every answer.

        The loops only queue the finished images and the previews. ``_decode_one`` decodes one of
        them.

        If the batch fails, all requests with a running or starting image end with the error.
        """
        self._read_prompt()
        try:
            finished = self._batch.step()
        except Exception as error:
            # The layers of the batch's KV cache may now differ in length, so begin a new batch.
            self._batch = self._pathway.batch()
            if self._starting is not None:  # its images would join the old batch
                self.drop([self._starting.task], error)
            self._end_tasks_with_lost_images(error)
            return
        for job, canvas in finished.items():
            task = self._task_of.pop(job)
            index = task.running_jobs.pop(job)
            self._pending_previews.pop(job, None)
            self._pending_images.append(self._make_pending_image(task, index, canvas))
        self._report_progress()
        for job in self._batch.jobs:
            task = self._task_of[job]
            number = task.preview_numbers.get(self._batch.steps_done(job))
            if number is not None:
                index = task.running_jobs[job]
                canvas = self._batch.canvas(job)
                pending = self._make_pending_preview(task, index, number, canvas)
                self._pending_previews[job] = pending  # replaces an older preview
        self._decode_one()

    def _report_progress(self) -> None:
        """Send the number of steps done to each request that asks for it and has advanced."""
        for task in self.running:
            if not task.request.with_progress:
                continue
            complete = task.finished_images
            complete += sum(pending.task is task for pending in self._pending_images)
            steps = self._pathway.steps(task.request.options)
            done = complete * steps + sum(map(self._batch.steps_done, task.running_jobs))
            if done > task.reported_steps:
                task.reported_steps = done
                task.ticket.add_event(Progress("draw", done, task.request.n * steps))

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
        """Return a queue item that decodes the request's finished image ``index``."""

        def decode() -> None:
            """Decode the image and send it. End the request if all its images are finished."""
            image = canvas.finish()
            task.finished_images += 1
            task.ticket.add_event(Drawn(index, image, len(task.ids), task.input_tokens))
            if task.finished_images == task.request.n:
                self.drop([task])

        return _PendingDecode(task, decode)

    def _make_pending_preview(
        self, task: ImageTask, index: int, number: int, canvas: Canvas
    ) -> _PendingDecode:
        """Return a queue item that decodes preview ``number`` of the request's image ``index``."""

        def decode() -> None:
            """Decode the preview and send it."""
            task.ticket.add_event(Partial(index, number, canvas.preview()))

        return _PendingDecode(task, decode)

    def drop(self, tasks: Sequence[ImageTask], error: BaseException | None = None) -> None:
        """End requests, finished or not, and remove their images from the batch.

        Args:
            tasks: requests in ``running``.
            error: the error that the requests' tickets raise; None: the requests end without one.
        """
        for task in tasks:
            if task not in self.running:  # it ended when ``_batch.remove`` failed for another task
                continue
            jobs = list(task.running_jobs)
            if self._starting is not None and self._starting.task is task:
                self._starting.steps.close()
                self._starting = None
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

        A request without running images has lost none, so it continues: its images wait to be
        started or decoded.
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


def _inputs_of(request: DrawingRequest, janus: LoadedModel) -> InputImages:
    """Return the images that a request changes, preprocessed for the model."""
    config = janus.config.image
    pixels = [preprocess(image, config) for image in request.images]
    records = request.records or [record_of(image, image.size) for image in request.images]
    facts = edit_facts(records, cropped=request.crop is not None)
    return InputImages(tuple(pixels), request.crop, facts)


def _preview_numbers(request: DrawingRequest, steps: int) -> dict[int, int]:
    """Return the number of each preview, from 0, by the number of steps after which it is due.

    Previews are evenly spaced. There is none after the last step, when the image is finished.

    Args:
        request: the request; ``partial_images`` is the maximum number of previews.
        steps: steps of one image.
    """
    count = min(request.partial_images, steps - 1)
    return {steps * (number + 1) // (count + 1): number for number in range(count)}
