"""The VQ pathway: image tokens in raster order, then the codec's decoder."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..decode.batch import BatchImage, DrawingBatch
from ..decode.image import DrawOptions, draw_tokens
from ..errors import OptionError, PromptError
from ..models.vq_parts import VQ_PARTS, token_config
from ..processing.images import to_image
from .loaded import LoadedModel
from .pathway import Canvas, ImageJob, describe
from .results import GeneratedImage
from .window_timing import find_window

_BACKGROUND = (127, 127, 127)  # grey, where a preview has no token so far
_CHOICES = ("cfg_weight", "temperature", "top_p", "exact", "window")


class VQPathway:
    """An ``ImagePathway`` that generates images as tokens of a codebook.

    Args:
        janus: the model.
    """

    def __init__(self, janus: LoadedModel):
        self._janus = janus
        self._config = token_config(janus.config)
        self.preview_every = self._config.grid  # a row of tokens

    def options(self, choices: Mapping[str, Any]) -> DrawOptions:
        """Check options of guidance and sampling, by name; None takes the default.

        Raises:
            OptionError: a value is out of range, an option belongs to another pathway, or ``exact``
                is combined with a window.
        """
        chosen = {name: value for name, value in choices.items() if value is not None}
        foreign = sorted(set(chosen) - set(_CHOICES))
        if foreign:
            raise OptionError(
                f"{foreign[0]} is no option of a model that draws image tokens: leave it out"
            )
        defaults = {
            "cfg_weight": self._config.cfg_weight,
            "temperature": self._config.temperature,
        }
        values = defaults | chosen
        return DrawOptions(**values)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the ids of a prompt, ending with begin-of-image.

        Raises:
            PromptError: the prompt is empty, or leaves no room in the context for an image.
        """
        ids = self._janus.prompts.drawing(prompt)
        length = len(ids)
        image = self._config.tokens
        context = self._janus.config.language.max_position_embeddings
        if length + image > context:
            raise PromptError(
                f"the prompt is {length} tokens long and an image takes {image}, "
                f"more than the model's context of {context}: shorten it"
            )
        return ids

    def steps(self, options: DrawOptions) -> int:
        """Return the number of tokens of one image."""
        return self._config.tokens

    def bytes_per_image(self, prompt_tokens: int, options: DrawOptions) -> int:
        """Return the bytes of an image's KV cache and logits."""
        model = self._janus.model
        itemsize = model.dtype.size
        return VQ_PARTS.image_bytes(model.config, prompt_tokens, options.rows, itemsize)

    def decoding_bytes(self) -> int:
        """Return the bytes of activations while one image is decoded."""
        return VQ_PARTS.pixel_bytes(self._janus.config)

    def generate(
        self,
        jobs: Sequence[ImageJob],
        options: DrawOptions,
    ) -> Generator[Sequence[Canvas], None, None]:
        """Load the weights for drawing, and generate images together.

        Each step adds a token to each image. One pass of the model may accept the tokens of several
        steps.

        Yields:
            After each step the canvas of every image, in the order of the jobs.
        """
        janus = self._janus
        columns: list[mx.array] = []  # for each position, the tokens of all n images, (n,)
        passes = 0
        janus.load_weights_for("draw")
        stream = self._start(jobs, options)
        try:
            for block in stream:
                passes += 1
                accepted = block.shape[1]
                for column in mx.split(block, accepted, axis=1):
                    columns.append(column[:, 0])
                    count = len(columns)
                    canvases = []
                    for index, job in enumerate(jobs):  # ``columns`` grows: canvases keep a count
                        tokens = partial(_tokens_of, columns, count, index)
                        canvas = TokenCanvas(janus, job, tokens, passes)
                        canvases.append(canvas)
                    yield canvases
                janus.load_weights_for("draw")  # a preview or another stream may have freed them
        finally:
            stream.close()  # type: ignore[attr-defined]

    def _start(self, jobs: Sequence[ImageJob], options: DrawOptions) -> Iterator[mx.array]:
        """Start ``draw_tokens`` for jobs of equal options; each prompt is read only once."""
        model = self._janus.model
        # The window is the number of positions that one pass reads.
        window = 1 if options.exact else options.window
        if window is None:  # the rows of several images already make a pass wide
            window = 1 if len(jobs) > 1 else find_window(model, options.rows)
        prompts: list[list[int]] = []
        images: list[tuple[int, int]] = []  # the index of the prompt, and the seed
        for job in jobs:
            if job.ids not in prompts:
                prompts.append(job.ids)
            index = prompts.index(job.ids)
            images.append((index, job.seed))
        first = prompts[0]  # all have one length, so one row of pads serves them all
        unconditional = self._janus.prompts.unconditional(first)
        return draw_tokens(model, prompts, unconditional, images, options, window)

    def batch(self) -> TokenBatch:
        """Return an empty batch."""
        return TokenBatch(self._janus)


def _tokens_of(columns: list[mx.array], count: int, index: int) -> np.ndarray:
    """Return the first ``count`` tokens of one of n images, (count,) int32.

    Args:
        columns: for each position, the tokens of all images, (n,).
        count: number of positions, at least 1.
        index: index of the image.
    """
    rows = mx.stack(columns[:count], axis=1)
    tokens = np.array(rows[index])
    return tokens.astype(np.int32)


class TokenCanvas:
    """A ``Canvas`` of image tokens.

    Args:
        janus: the model.
        job: the image.
        tokens: returns the image's tokens so far, (n,) int32, in raster order.
        passes: the passes of the language model so far.
    """

    def __init__(
        self,
        janus: LoadedModel,
        job: ImageJob,
        tokens: Callable[[], np.ndarray],
        passes: int,
    ):
        self._janus = janus
        self._job = job
        self._tokens = tokens
        self._passes = passes

    def finish(self) -> GeneratedImage:
        """Decode all tokens."""
        job = self._job
        tokens = self._tokens()
        grid = token_config(self._janus.config).grid
        image = _decode(self._janus, tokens, (grid, grid))
        facts = describe(self._janus, job)
        steps = len(tokens)
        return GeneratedImage(
            image,
            tokens,
            job.seed,
            job.prompt,
            facts,
            self._passes,
            steps=steps,
        )

    def preview(self) -> Image.Image:
        """Decode the rows of tokens so far; the rest of the image is grey."""
        config = token_config(self._janus.config)
        tokens = self._tokens()
        count = len(tokens)
        columns = config.grid
        rows = -(-count // columns)
        # The decoder needs entire rows: repeat the last token, and paint over it in the end.
        missing = rows * columns - count
        padding = np.repeat(tokens[-1:], missing)
        filled = np.concatenate([tokens, padding])
        decoded = _decode(self._janus, filled, (rows, columns))
        size = (config.image_size, config.image_size)
        canvas = Image.new("RGB", size, _BACKGROUND)
        canvas.paste(decoded, (0, 0))
        if missing:
            side = config.codec.downsampling
            left = (columns - missing) * side
            top = (rows - 1) * side
            right = columns * side
            bottom = rows * side
            canvas.paste(_BACKGROUND, (left, top, right, bottom))
        return canvas


def _decode(janus: LoadedModel, tokens: np.ndarray, grid: tuple[int, int]) -> Image.Image:
    """Decode (rows * columns,) tokens to an image; ``grid`` is (rows, columns).

    Only one image at a time: the decoder's activations are the largest of all. In low-memory mode,
    loading the decoder's weights frees those of other tasks.
    """
    janus.load_weights_for("decode")
    batch = mx.array(tokens[None])
    pixels = janus.model.decode_image_tokens(batch, grid)
    image = to_image(np.array(pixels[0]))
    del pixels
    mx.clear_cache()
    return image


class TokenBatch:
    """An ``ImageBatch`` whose images advance by one token a step."""

    def __init__(self, janus: LoadedModel):
        self._janus = janus
        self._batch = DrawingBatch(janus.model)
        self._images: dict[ImageJob, BatchImage] = {}

    @property
    def jobs(self) -> Sequence[ImageJob]:
        """The running images; an error in the model may have lost some."""
        running = set(self._batch.images)
        return [job for job, image in self._images.items() if image in running]

    def add(self, jobs: Sequence[ImageJob]) -> None:
        """Start images of one prompt, which is read once for all of them."""
        ids = jobs[0].ids
        unconditional = self._janus.prompts.unconditional(ids)
        images = {}
        for job in jobs:
            images[job] = BatchImage(job.seed, job.options)  # type: ignore[arg-type]
        self._batch.add(ids, unconditional, list(images.values()))
        self._images |= images

    def remove(self, jobs: Sequence[ImageJob]) -> None:
        """Remove images from the batch."""
        images = []
        for job in jobs:
            if job in self._images:
                images.append(self._images.pop(job))
        self._batch.remove(images)

    def step(self) -> dict[ImageJob, Canvas]:
        """Add the next token to every image; return the canvases of those that are now complete.

        Complete images leave the batch. The next pass is already running on return.
        """
        complete = set(self._batch.step())
        finished = {}
        for job, image in self._images.items():
            if image in complete:
                finished[job] = self.canvas(job)
        for job in finished:
            del self._images[job]
        return finished

    def steps_done(self, job: ImageJob) -> int:
        """Return the number of tokens of an image so far."""
        return len(self._images[job])

    def canvas(self, job: ImageJob) -> Canvas:
        """Return an image as it is now."""
        image = self._images[job]
        count = len(image)
        tokens = partial(image.tokens, count)
        return TokenCanvas(self._janus, job, tokens, passes=count)
