"""The VQ pathway: image tokens in raster order, then the codec's decoder."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from PIL import Image

from ..decode.batch import BatchImage, DrawingBatch
from ..decode.image import (
    DrawOptions,
    EditOptions,
    EmbeddedRow,
    Row,
    TextRow,
    draw_tokens,
    text_rows,
)
from ..errors import ContextLengthError, OptionError
from ..models.vq_parts import VQ_PARTS, token_config
from ..processing.images import to_image
from ..processing.prompts import Prompts
from .loaded import LoadedModel
from .pathway import Canvas, EarlierImage, ImageJob, InputImages, image_metadata
from .results import GeneratedImage
from .window_timing import find_window

_GREY = (127, 127, 127)  # RGB of the parts of a preview that have no token so far
_OPTIONS = ("cfg_weight", "temperature", "top_p", "exact", "window")
_EDIT_OPTIONS = (*_OPTIONS, "cfg_weight2")
_EDIT_GUIDANCE = 5.0  # default of ``cfg_weight`` for changing images, as Janus-4o was trained


class VQPathway:
    """An ``ImagePathway`` that generates images as tokens of a codebook, in raster order.

    Args:
        janus: the model.
    """

    option_names: tuple[str, ...] = _OPTIONS

    def __init__(self, janus: LoadedModel):
        self._janus = janus
        self._config = token_config(janus.config)  # the section on image tokens
        self.preview_every = self._config.grid  # steps between two previews: a row
        # For each input image, the prompt has its features and its tokens, each between two tags.
        self.tokens_per_input = 4 + janus.config.understanding.tokens + self._config.tokens

    def options(self, choices: Mapping[str, Any]) -> DrawOptions:
        """Check options given by name. An option that is None or missing takes the model's default.

        Raises:
            OptionError: a value is out of range, an option is unknown or needs images to change, or
                ``exact`` is combined with a window above 1.
        """
        needs_images = set(_EDIT_OPTIONS) - set(_OPTIONS)
        for name in sorted(needs_images):
            if choices.get(name) is not None:
                raise OptionError(f"{name} is for changing images: give images, or leave it out")
        return DrawOptions(**self._choose(choices, _OPTIONS))

    def edit_options(self, choices: Mapping[str, Any]) -> EditOptions:
        """Check options of changing images. An option that is None or missing takes its default.

        Raises:
            OptionError: as for ``options``.
        """
        values = {"cfg_weight": _EDIT_GUIDANCE} | {
            name: value for name, value in choices.items() if value is not None
        }
        return EditOptions(**self._choose(values, _EDIT_OPTIONS))

    def _choose(self, choices: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Return the chosen options, and the model's defaults of the others.

        Raises:
            OptionError: an option is none of ``names``.
        """
        chosen = {name: value for name, value in choices.items() if value is not None}
        unknown = sorted(set(chosen) - set(names))
        if unknown:
            raise OptionError(
                f"{unknown[0]} is no option of a model that draws image tokens: leave it out"
            )
        defaults = {
            "cfg_weight": self._config.cfg_weight,
            "temperature": self._config.temperature,
        }
        return defaults | chosen

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt, ending with the begin-of-image token.

        Raises:
            PromptError: the prompt is empty, or leaves no room in the context for an image.
        """
        return self._with_room(self._janus.drawing_prompts.drawing(prompt))

    def prompt_ids_in(self, prompts: Prompts, prompt: str) -> list[int]:
        """Return the token ids of an image's prompt in other templates than the model's own.

        Raises:
            PromptError: the prompt is empty, or leaves no room in the context for an image.
        """
        return self._with_room(prompts.drawing(prompt))

    def temperature(self, options: DrawOptions) -> float:
        """Return the sampling temperature of images. Plans and judgements have it, too."""
        return options.temperature

    def redraw_prompt_ids(self, ids: Sequence[int], judgement: Sequence[int]) -> list[int]:
        """Return the token ids of a prompt after which an image is drawn again.

        Pads hold the places of the earlier image's tokens.

        Args:
            ids: the prompt of the earlier image.
            judgement: the ids between the earlier image and the new one.

        Raises:
            PromptError: the ids leave no room in the context for an image.
        """
        slot = [self._janus.prompts.special.pad] * self._config.tokens
        return self._with_room([*ids, *slot, *judgement])

    def edit_prompt_ids(self, prompt: str, images: int) -> list[int]:
        """Return the token ids of a prompt that asks for a change to ``images`` input images.

        Raises:
            PromptError: the prompt is empty, or leaves no room in the context for an image.
        """
        return self._with_room(self._janus.prompts.editing(prompt, images, self._config.tokens))

    def _with_room(self, ids: list[int]) -> list[int]:
        """Check that the context has room for an image after a prompt; return the prompt's ids.

        Raises:
            ContextLengthError: the context has no room for an image.
        """
        length = len(ids)
        image_tokens = self._config.tokens
        context = self._janus.config.language.max_position_embeddings
        if length + image_tokens > context:
            raise ContextLengthError(
                f"the prompt is {length} tokens long and an image takes {image_tokens}, and this "
                f"model's maximum context length is {context}: shorten it"
            )
        return ids

    def steps(self, options: DrawOptions) -> int:
        """Return the number of steps of one image: one for each token."""
        return self._config.tokens

    def bytes_per_image(self, prompt_tokens: int, options: DrawOptions) -> int:
        """Return the bytes of an image's KV cache and logits while it is generated."""
        model = self._janus.model
        itemsize = model.dtype.size  # bytes of a number in the KV cache
        batch_rows = options.rows  # 2 with guidance, otherwise 1
        return VQ_PARTS.image_bytes(model.config, prompt_tokens, batch_rows, itemsize)

    def decoding_bytes(self) -> int:
        """Return the bytes of activations while one image is decoded."""
        return VQ_PARTS.pixel_bytes(self._janus.config)

    def generate(
        self,
        jobs: Sequence[ImageJob],
        options: DrawOptions,
    ) -> Generator[Sequence[Canvas], None, None]:
        """Load the weights for image tokens, and generate images together.

        Each step adds a token to each image. One pass of the model may accept the tokens of several
        steps.

        Yields:
            After each step, a ``TokenCanvas`` of every image with its tokens so far, in the order
                of ``jobs``.
        """
        janus = self._janus
        columns: list[mx.array] = []  # for each position, the tokens of all n images, (n,)
        passes = 0
        blocks = self._start_drawing(jobs, options)
        try:
            for block in blocks:  # (n, accepted)
                passes += 1
                accepted = block.shape[1]
                for column in mx.split(block, accepted, axis=1):
                    columns.append(column[:, 0])
                    count = len(columns)  # the canvases keep this number, while ``columns`` grows
                    canvases = []
                    for index, job in enumerate(jobs):
                        read_tokens = partial(_tokens_of, columns, count, index)
                        canvas = TokenCanvas(janus, job, read_tokens, passes)
                        canvases.append(canvas)
                    yield canvases
                janus.load_weights_for("draw")  # a preview or another task may have freed them
        finally:
            blocks.close()  # type: ignore[attr-defined]

    def _start_drawing(self, jobs: Sequence[ImageJob], options: DrawOptions) -> Iterator[mx.array]:
        """Return an iterator over the image tokens that each pass accepts, (n, accepted).

        Args:
            jobs: n images, whose prompts have the same length. Equal prompts are read only once.
            options: options of all images.
        """
        model = self._janus.model
        # The window is the number of positions that one pass reads.
        window = 1 if options.exact else options.window
        if window is None:
            # With several images a pass has many rows already, so a wide window gains little.
            window = 1 if len(jobs) > 1 else find_window(model, options.rows)
        indices: dict[object, int] = {}  # index in ``prompts``, by the prompt's ids and images
        prompts: list[list[Row]] = []  # without repeats
        images: list[tuple[int, int]] = []  # for each image, the index of its prompt and the seed
        for job in jobs:
            key = (tuple(job.ids), job.inputs, job.earlier)
            if key not in indices:
                indices[key] = len(prompts)
                prompts.append(self._rows(job, options))
            images.append((indices[key], job.seed))
        self._janus.load_weights_for("draw")
        return draw_tokens(model, prompts, images, options, window)

    def _rows(self, job: ImageJob, options: DrawOptions) -> list[Row]:
        """Return the rows of an image's prompt: run ``_read_rows`` without a pause."""
        steps = self._read_rows(job, options)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                rows: list[Row] = end.value
                return rows

    def _read_rows(self, job: ImageJob, options: DrawOptions) -> Generator[None, None, list[Row]]:
        """Return the rows of an image's prompt.

        Prompts of one length have the same unconditional row: between its first and last ids, it
        has only padding.

        Yields:
            None after each input image is encoded as features, and after each is encoded as tokens.
        """
        if job.earlier is not None:
            return self._redraw_rows(job.ids, job.earlier, options)
        unconditional = self._janus.prompts.unconditional(job.ids)
        if job.inputs is None:
            self._janus.load_weights_for("draw")
            return text_rows(job.ids, unconditional, options)
        full, part = yield from self._embed_with_images(job.ids, job.inputs)
        rows: list[Row] = [EmbeddedRow(full)]
        # This row lacks the tokens of the input images, and so their details.
        if isinstance(options, EditOptions) and options.cfg_weight2 != 0:
            rows.append(EmbeddedRow(part))
        if options.cfg_weight != 1:
            rows.append(TextRow(tuple(unconditional)))
        return rows

    def _redraw_rows(
        self, ids: Sequence[int], earlier: EarlierImage, options: DrawOptions
    ) -> list[Row]:
        """Return the rows of a prompt after which an image is drawn again, as in Janus-Pro-R1.

        The unconditional row lacks only the words of the prompt: it has the earlier image and the
        judgement.
        """
        janus = self._janus
        janus.load_weights_for("tokenize")
        pixels = np.asarray(earlier.image, np.float32) / 255
        normalized = (pixels - 0.5) / 0.5  # in [-1, 1]
        tokens = janus.model.encode_image_tokens(mx.array(normalized)[None])
        embedded_tokens = janus.model.embed_image_tokens(tokens)[0]  # (tokens, hidden)
        mx.eval(embedded_tokens)
        janus.load_weights_for("draw")
        start = earlier.prompt_tokens
        unconditional = [*janus.prompts.unconditional(ids[:start]), *ids[start:]]
        rows: list[Row] = []
        for row_ids in (ids, unconditional)[: options.rows]:  # without guidance, there is one row
            row = janus.model.embed_text(mx.array(list(row_ids)))
            row[start : start + len(embedded_tokens)] = embedded_tokens.astype(row.dtype)
            mx.eval(row)
            rows.append(EmbeddedRow(row))
        return rows

    def _embed_with_images(
        self, ids: Sequence[int], inputs: InputImages
    ) -> Generator[None, None, tuple[mx.array, mx.array]]:
        """Embed a prompt that changes images, as Janus-4o was trained.

        Yields:
            None after each image is encoded as features, and after each is encoded as tokens.

        Returns:
            full: (L, hidden), with the features of the vision encoder in the places of the image
                ids, and the embedded image tokens in those of the pads.
            part: (L, hidden), with the features only.
        """
        janus = self._janus
        special = janus.prompts.special
        features = []
        for pixels in inputs.pixels:
            features += janus.encode([pixels])
            yield
        janus.load_weights_for("tokenize")
        embedded_tokens = []
        for pixels in inputs.pixels:  # one at a time, because the codec's activations are large
            janus.thread.check()
            tokens = janus.model.encode_image_tokens(mx.array(pixels)[None])
            embedded = janus.model.embed_image_tokens(tokens)[0]  # (tokens, hidden)
            mx.eval(embedded)
            embedded_tokens.append(embedded)
            yield
        janus.load_weights_for("draw")
        part = janus.model.embed_text(mx.array(list(ids)))
        feature_places = np.flatnonzero(np.array(ids) == special.image)
        part[mx.array(feature_places)] = mx.concatenate(features).astype(part.dtype)
        full = mx.array(part)
        token_places = np.flatnonzero(np.array(ids) == special.pad)
        full[mx.array(token_places)] = mx.concatenate(embedded_tokens).astype(part.dtype)
        mx.eval(full, part)
        return full, part

    def batch(self) -> TokenBatch:
        """Return an empty batch."""
        return TokenBatch(self._janus, self._read_rows)


def _tokens_of(columns: list[mx.array], count: int, index: int) -> np.ndarray:
    """Return the first ``count`` tokens of one of n images, (count,) int32.

    Args:
        columns: for each position, the tokens of all n images, (n,).
        count: number of positions, at least 1.
        index: index of the image.
    """
    rows = mx.stack(columns[:count], axis=1)  # (n, count)
    tokens = np.array(rows[index])
    return tokens.astype(np.int32)


class TokenCanvas:
    """A ``Canvas`` of image tokens.

    Args:
        janus: the model.
        job: the image.
        read_tokens: returns the image's tokens so far, (count,) int32, in raster order.
        passes: number of passes of the language model up to these tokens.
    """

    def __init__(
        self,
        janus: LoadedModel,
        job: ImageJob,
        read_tokens: Callable[[], np.ndarray],
        passes: int,
    ):
        self._janus = janus
        self._job = job
        self._read_tokens = read_tokens
        self._passes = passes

    def finish(self) -> GeneratedImage:
        """Decode all tokens of a complete image."""
        job = self._job
        tokens = self._read_tokens()
        side = token_config(self._janus.config).grid  # tokens
        image = _decode(self._janus, tokens, (side, side))
        return GeneratedImage(
            image=job.cropped(image),
            tokens=tokens,
            seed=job.seed,
            prompt=job.prompt,
            metadata=image_metadata(self._janus, job),
            passes=self._passes,
            steps=len(tokens),
        )

    def preview(self) -> Image.Image:
        """Decode the tokens so far; the parts of the image without tokens are grey."""
        config = token_config(self._janus.config)
        tokens = self._read_tokens()
        count = len(tokens)
        columns = config.grid
        rows = -(-count // columns)  # rounded up
        # The decoder needs complete rows, so the last row is filled with copies of the last token.
        # Grey is painted over them below.
        missing = rows * columns - count
        padding = np.repeat(tokens[-1:], missing)
        filled = np.concatenate([tokens, padding])
        decoded = _decode(self._janus, filled, (rows, columns))
        size = (config.image_size, config.image_size)
        canvas = Image.new("RGB", size, _GREY)
        canvas.paste(decoded, (0, 0))
        if missing:
            side = config.codec.downsampling  # pixels per side of a token
            left = (columns - missing) * side
            top = (rows - 1) * side
            right = columns * side
            bottom = rows * side
            canvas.paste(_GREY, (left, top, right, bottom))
        return self._job.cropped(canvas)


def _decode(janus: LoadedModel, tokens: np.ndarray, grid: tuple[int, int]) -> Image.Image:
    """Decode (rows * columns,) tokens to an image; ``grid`` is (rows, columns).

    In low-memory mode, this frees the weights of other tasks and loads the decoder's.
    """
    janus.load_weights_for("decode")
    batch = mx.array(tokens[None])
    pixels = janus.model.decode_image_tokens(batch, grid)
    image = to_image(np.array(pixels[0]))
    del pixels
    mx.clear_cache()
    return image


ReadRows: TypeAlias = Callable[[ImageJob, DrawOptions], Generator[None, None, list[Row]]]


class TokenBatch:
    """An ``ImageBatch`` whose images advance by one token a step.

    Args:
        janus: the model.
        read_rows: returns the rows of a job's prompt, in parts.
    """

    def __init__(self, janus: LoadedModel, read_rows: ReadRows):
        self._janus = janus
        self._read_rows = read_rows
        self._batch = DrawingBatch(janus.model)
        self._images_by_job: dict[ImageJob, BatchImage] = {}

    @property
    def jobs(self) -> Sequence[ImageJob]:
        """The jobs of the running images; after an error in the model, some may be missing."""
        running = set(self._batch.images)
        return [job for job, image in self._images_by_job.items() if image in running]

    def start(self, jobs: Sequence[ImageJob]) -> Generator[None, None, None]:
        """Start images that have one prompt, which is read once for all of them.

        The jobs have the same images to change, too, if they have any.

        Yields:
            None after each encoding of such an image, and between two parts of the prompt.
        """
        images = {}
        for job in jobs:
            images[job] = BatchImage(job.seed, job.options)  # type: ignore[arg-type]
        rows = yield from self._read_rows(jobs[0], images[jobs[0]].options)
        yield from self._batch.start(rows, list(images.values()))
        self._images_by_job |= images

    def remove(self, jobs: Sequence[ImageJob]) -> None:
        """Remove images from the batch; ignore those that are not in it."""
        images = []
        for job in jobs:
            if job in self._images_by_job:
                images.append(self._images_by_job.pop(job))
        self._batch.remove(images)

    def step(self) -> dict[ImageJob, Canvas]:
        """Add the next token to every image; remove complete images, and return their canvases.

        The model already computes the following tokens when this returns.
        """
        complete = set(self._batch.step())
        finished = {}
        for job, image in self._images_by_job.items():
            if image in complete:
                finished[job] = self.canvas(job)
        for job in finished:
            del self._images_by_job[job]
        return finished

    def steps_done(self, job: ImageJob) -> int:
        """Return the number of tokens of an image so far."""
        return len(self._images_by_job[job])

    def canvas(self, job: ImageJob) -> Canvas:
        """Return the canvas of an image with its tokens so far."""
        image = self._images_by_job[job]
        count = len(image)  # the canvas keeps this number of tokens, while the image grows
        read_tokens = partial(image.tokens, count)
        # In a batch, each pass adds one token.
        return TokenCanvas(self._janus, job, read_tokens, passes=count)
