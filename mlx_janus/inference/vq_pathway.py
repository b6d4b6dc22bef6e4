"""The VQ pathway: image tokens one after the other, in raster order, then the codec's decoder."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..decode.batch import DrawingBatch, Picture
from ..decode.image import DrawOptions, draw_tokens
from ..errors import OptionError, PromptError
from ..models.vq_parts import VQ_PARTS, token_config
from ..processing.images import to_image
from .loaded import LoadedModel
from .pathway import Canvas, ImageJob, describe
from .results import GeneratedImage
from .window_timing import find_window

_BACKGROUND = (127, 127, 127)  # of a preview where no token is drawn yet
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
        """Check choices of guidance and sampling.

        Raises:
            OptionError: a value out of its range, a choice of another pathway, or ``exact`` with a window.
        """
        chosen = {name: value for name, value in choices.items() if value is not None}
        if foreign := sorted(set(chosen) - set(_CHOICES)):
            raise OptionError(
                f"{foreign[0]} is no option of a model that draws image tokens: leave it out"
            )
        defaults = {"cfg_weight": self._config.cfg_weight, "temperature": self._config.temperature}
        return DrawOptions(**(defaults | chosen))

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the ids of a prompt, begin-of-image last.

        Raises:
            PromptError: an empty prompt, or one that leaves an image no room in the context.
        """
        ids = self._janus.prompts.drawing(prompt)
        context = self._janus.config.language.max_position_embeddings
        if len(ids) + self._config.tokens > context:
            raise PromptError(
                f"the prompt is {len(ids)} tokens long and a picture takes {self._config.tokens}, more than the "
                f"model's context of {context}: shorten it"
            )
        return ids

    def steps(self, options: DrawOptions) -> int:
        """Return the number of tokens of one image."""
        return self._config.tokens

    def bytes_per_image(self, prompt_tokens: int, options: DrawOptions) -> int:
        """Return the bytes of an image's KV cache and logits."""
        model = self._janus.model
        return VQ_PARTS.image_bytes(model.config, prompt_tokens, options.rows, model.dtype.size)

    def decoding_bytes(self) -> int:
        """Return the bytes of activations while one image is decoded."""
        return VQ_PARTS.pixel_bytes(self._janus.config)

    def generate(
        self, jobs: Sequence[ImageJob], options: DrawOptions
    ) -> Generator[Sequence[Canvas], None, None]:
        """Generate images together, a token of each a step; one pass of the model may bring several steps."""
        janus = self._janus
        drawn: list[mx.array] = []  # (n,) tokens of each position
        passes = 0
        janus.load_weights_for("draw")
        stream = self._start(jobs, options)
        try:
            for block in stream:
                passes += 1
                for tokens in mx.split(block, block.shape[1], axis=1):
                    drawn.append(tokens[:, 0])
                    tokens_of = partial(_column, drawn, len(drawn))
                    yield [
                        TokenCanvas(janus, job, partial(tokens_of, i), passes)
                        for i, job in enumerate(jobs)
                    ]
                janus.load_weights_for("draw")  # a preview or another stream may have freed them
        finally:
            stream.close()  # type: ignore[attr-defined]

    def _start(self, jobs: Sequence[ImageJob], options: DrawOptions) -> Iterator[mx.array]:
        model = self._janus.model
        window = 1 if options.exact else options.window
        if window is None:  # several rows already make a pass wide
            window = 1 if len(jobs) > 1 else find_window(model, options.rows)
        prompts = list(dict.fromkeys(tuple(job.ids) for job in jobs))
        pictures = [(prompts.index(tuple(job.ids)), job.seed) for job in jobs]
        unconditional = self._janus.prompts.unconditional(jobs[0].ids)
        return draw_tokens(model, prompts, unconditional, pictures, options, window)

    def batch(self) -> TokenBatch:
        """Return an empty batch."""
        return TokenBatch(self._janus)


def _column(drawn: list[mx.array], count: int, index: int) -> np.ndarray:
    """Return (count,) int32: the first tokens of one of several images, from (n,) tokens of each position."""
    return np.array(mx.stack(drawn[:count], axis=1)[index]).astype(np.int32)


class TokenCanvas:
    """A ``Canvas`` of image tokens.

    Args:
        janus: the model.
        job: the image.
        tokens: gives the (n,) int32 tokens that are drawn, in raster order.
        passes: of the language model so far.
    """

    def __init__(
        self, janus: LoadedModel, job: ImageJob, tokens: Callable[[], np.ndarray], passes: int
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
        return GeneratedImage(
            image, tokens, job.seed, job.prompt, facts, self._passes, steps=len(tokens)
        )

    def preview(self) -> Image.Image:
        """Decode the rows that are drawn, by themselves, on grey."""
        config = token_config(self._janus.config)
        tokens = self._tokens()
        columns = config.grid
        side = config.codec.downsampling
        rows = -(-len(tokens) // columns)
        filled = np.concatenate([tokens, np.repeat(tokens[-1:], rows * columns - len(tokens))])
        canvas = Image.new("RGB", (config.image_size,) * 2, _BACKGROUND)
        canvas.paste(_decode(self._janus, filled, (rows, columns)), (0, 0))
        if last := len(tokens) % columns:
            canvas.paste(_BACKGROUND, (last * side, (rows - 1) * side, columns * side, rows * side))
        return canvas


def _decode(janus: LoadedModel, tokens: np.ndarray, grid: tuple[int, int]) -> Image.Image:
    """Turn (rows * columns,) tokens into an image; one at a time, since its activations are the largest of all."""
    janus.load_weights_for("decode")
    pixels = janus.model.decode_image_tokens(mx.array(tokens[None]), grid)
    image = to_image(np.array(pixels[0]))
    del pixels
    mx.clear_cache()
    return image


class TokenBatch:
    """An ``ImageBatch`` whose images advance by one token a step."""

    def __init__(self, janus: LoadedModel):
        self._janus = janus
        self._batch = DrawingBatch(janus.model)
        self._pictures: dict[ImageJob, Picture] = {}

    @property
    def jobs(self) -> Sequence[ImageJob]:
        """The images under way; an error in the model may have lost some."""
        there = set(self._batch.pictures)
        return [job for job, picture in self._pictures.items() if picture in there]

    def add(self, jobs: Sequence[ImageJob]) -> None:
        """Start images of one prompt, which is read once for all of them."""
        ids = jobs[0].ids
        pictures = {job: Picture(job.seed, job.options) for job in jobs}  # type: ignore[arg-type]
        self._batch.add(ids, self._janus.prompts.unconditional(ids), list(pictures.values()))
        self._pictures |= pictures

    def remove(self, jobs: Sequence[ImageJob]) -> None:
        """Give up images."""
        pictures = [self._pictures.pop(job) for job in jobs if job in self._pictures]
        self._batch.remove(pictures)

    def step(self) -> dict[ImageJob, Canvas]:
        """Draw the next token of every image; the following pass is under way when this returns."""
        complete = set(self._batch.step())
        finished = {
            job: self.canvas(job) for job, picture in self._pictures.items() if picture in complete
        }
        for job in finished:
            del self._pictures[job]
        return finished

    def steps_done(self, job: ImageJob) -> int:
        """Return how many tokens of an image are drawn."""
        return len(self._pictures[job])

    def canvas(self, job: ImageJob) -> Canvas:
        """Return an image as it is now."""
        picture = self._pictures[job]
        return TokenCanvas(self._janus, job, partial(picture.tokens, len(picture)), len(picture))
