"""The flow pathway: latents move from noise to an image in a few steps, then a decoder."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..decode.flow import FlowDrawing, FlowOptions, seed_noise
from ..errors import ContextLengthError, OptionError
from ..memory import weights_wired
from ..models.flow_parts import FLOW_PARTS, flow_config
from ..processing.images import to_image
from .loaded import LoadedModel
from .pathway import Canvas, ImageJob, image_metadata
from .results import GeneratedImage

_OPTIONS = ("cfg_weight", "steps")


class FlowPathway:
    """An ``ImagePathway`` that generates images by a rectified flow.

    Args:
        janus: the model.
    """

    preview_every = 5  # steps between two previews
    option_names: tuple[str, ...] = _OPTIONS

    def __init__(self, janus: LoadedModel):
        self._janus = janus
        self._config = flow_config(janus.config)

    def options(self, choices: Mapping[str, Any]) -> FlowOptions:
        """Check options given by name. An option that is None or missing takes the model's default.

        Raises:
            OptionError: a value is out of range, or an option is unknown.
        """
        chosen = {name: value for name, value in choices.items() if value is not None}
        unknown = sorted(set(chosen) - set(_OPTIONS))
        if unknown:
            raise OptionError(
                f"{unknown[0]} is no option of a model that draws by a rectified flow: leave it out"
            )
        defaults = {"cfg_weight": self._config.cfg_weight, "steps": self._config.steps}
        return FlowOptions(**defaults | chosen)

    def starts(self, latents: Any, n: int) -> list[np.ndarray]:
        """Check latents from which images begin, in place of the noise of their seeds.

        Args:
            latents: an array of NumPy or MLX, or anything that NumPy reads as an array, of finite
                real numbers, (n, h, w, z_channels).
            n: number of images.

        Returns:
            The latents of each image, (h, w, z_channels), float32.

        Raises:
            OptionError: the latents have another shape, or are not finite real numbers.
        """
        shape = (n, *self._config.latent_shape)
        try:
            values = _as_float32(latents)
        except OptionError:  # which is a ValueError, too
            raise
        except (TypeError, ValueError):
            raise OptionError(f"latents must be numbers of the shape {shape}") from None
        if values.shape != shape:
            raise OptionError(f"latents must have the shape {shape}, got {values.shape}")
        if not np.isfinite(values).all():
            raise OptionError("latents must be finite numbers")
        return list(values)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt, ending with the begin-of-image token.

        The model reads an embedding of the time in place of the last id.

        Raises:
            PromptError: the prompt is empty, or leaves no room in the context for an image.
        """
        ids = self._janus.prompts.drawing(prompt)
        positions = self._config.positions
        context = self._janus.config.language.max_position_embeddings
        if len(ids) + positions > context:
            raise ContextLengthError(
                f"the prompt is {len(ids)} tokens long and an image takes {positions}, and this "
                f"model's maximum context length is {context}: shorten it"
            )
        return ids

    def steps(self, options: FlowOptions) -> int:
        """Return the number of steps of one image."""
        return options.steps

    def bytes_per_image(self, prompt_tokens: int, options: FlowOptions) -> int:
        """Return the bytes of an image's KV cache and activations while it is generated."""
        model = self._janus.model
        return FLOW_PARTS.image_bytes(model.config, prompt_tokens, options.rows, model.dtype.size)

    def decoding_bytes(self) -> int:
        """Return the bytes of activations while one image is decoded."""
        return FLOW_PARTS.pixel_bytes(self._janus.config)

    def generate(
        self, jobs: Sequence[ImageJob], options: FlowOptions
    ) -> Generator[Sequence[Canvas], None, None]:
        """Load the weights for drawing, and generate images together.

        Yields:
            After each step, a ``FlowCanvas`` of every image, in the order of ``jobs``.
        """
        drawing = _start(self._janus, jobs, options)
        with weights_wired():
            for _ in range(options.steps):
                self._janus.load_weights_for("draw")  # a preview may have freed them
                drawing.step()
                yield [FlowCanvas(self._janus, job, drawing, i) for i, job in enumerate(jobs)]

    def batch(self) -> FlowBatch:
        """Return an empty batch."""
        return FlowBatch(self._janus)


def _as_float32(latents: Any) -> np.ndarray:
    """Return a new float32 array with the values of latents; those out of range become infinite.

    Raises:
        OptionError: the numbers are complex.
        TypeError, ValueError: the values are not numbers, or have no shape.
    """
    values = np.asarray(_without_bfloat16(latents))
    if values.dtype.kind == "c":
        raise OptionError(f"latents must be real numbers, got {values.dtype}")
    if values.dtype.kind in "SU":  # NumPy would read the number in a text
        raise TypeError
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _without_bfloat16(latents: Any) -> Any:
    """Return latents with float32 arrays in place of MLX's bfloat16, which NumPy cannot read."""
    if isinstance(latents, list | tuple):
        return [_without_bfloat16(part) for part in latents]
    is_bfloat16 = isinstance(latents, mx.array) and latents.dtype == mx.bfloat16
    return latents.astype(mx.float32) if is_bfloat16 else latents


def _start(janus: LoadedModel, jobs: Sequence[ImageJob], options: FlowOptions) -> FlowDrawing:
    """Load the weights for drawing, read the prompts of images, and return their drawing.

    The drawing has done no step yet.
    """
    janus.load_weights_for("draw")
    shape = flow_config(janus.config).latent_shape
    noise = [
        seed_noise(job.seed, shape) if job.latents is None else mx.array(job.latents)
        for job in jobs
    ]
    prompts = [job.ids[:-1] for job in jobs]  # the time stands in place of the last id
    pad = janus.prompts.special.pad
    return FlowDrawing(janus.model, prompts, pad, mx.stack(noise), options)


class FlowCanvas:
    """A ``Canvas`` of an image's latents, as they are when the canvas is made.

    Args:
        janus: the model.
        job: the image.
        drawing: the drawing of which the image is a part.
        index: the index of the image in the drawing.
    """

    def __init__(self, janus: LoadedModel, job: ImageJob, drawing: FlowDrawing, index: int):
        self._janus = janus
        self._job = job
        # The drawing replaces its arrays at each step, and never changes one in place. So these
        # arrays stay as they are now.
        self._all_latents = drawing.latents
        self._all_predicted = drawing.predicted
        self._index = index
        self._steps = drawing.steps_done

    def preview(self) -> Image.Image:
        """Decode the latents to which the image would move in a straight line from its last step.

        The preview shows the whole image, blurred at first and sharper with each step.
        """
        return _decode(self._janus, self._all_predicted[self._index])

    def finish(self) -> GeneratedImage:
        """Decode the latents of a complete image."""
        job = self._job
        latents = self._all_latents[self._index]
        metadata = image_metadata(self._janus, job)
        if job.latents is not None:
            metadata["latents"] = "given"  # the seed does not lead to this image
        return GeneratedImage(
            image=_decode(self._janus, latents),
            tokens=None,
            seed=job.seed,
            prompt=job.prompt,
            metadata=metadata,
            passes=self._steps,
            steps=self._steps,
            latents=np.array(latents),
        )


def _decode(janus: LoadedModel, latents: mx.array) -> Image.Image:
    """Decode the latents of one image, (h, w, z_channels).

    In low-memory mode, this frees the weights of other tasks and loads the decoder's.
    """
    janus.load_weights_for("decode")
    pixels = janus.model.vae(latents[None])
    image = to_image(np.array(pixels[0]))
    del pixels
    mx.clear_cache()
    return image


class FlowBatch:
    """An ``ImageBatch`` in groups: only images that were started together share a pass.

    A pass reads several hundred positions of each image, so a pass of few images uses the device as
    well as a pass of many. Joining groups of different prompts and steps would gain nothing.
    """

    def __init__(self, janus: LoadedModel):
        self._janus = janus
        self._groups: list[tuple[FlowDrawing, list[ImageJob]]] = []

    @property
    def jobs(self) -> Sequence[ImageJob]:
        """The running images."""
        return [job for _, jobs in self._groups for job in jobs]

    def start(self, jobs: Sequence[ImageJob]) -> Generator[None, None, None]:
        """Start images that have one prompt and equal options.

        Yields:
            Nothing, because the prompt is read in one part: it is much shorter than an image.
        """
        drawing = _start(self._janus, jobs, jobs[0].options)  # type: ignore[arg-type]
        self._groups.append((drawing, list(jobs)))
        yield from ()

    def remove(self, jobs: Sequence[ImageJob]) -> None:
        """Remove images from the batch; ignore those that are not in it."""
        removed = set(jobs)
        groups = []
        for drawing, members in self._groups:
            kept = [i for i, job in enumerate(members) if job not in removed]
            if kept and len(kept) < len(members):
                drawing.keep(kept)
            if kept:
                groups.append((drawing, [members[i] for i in kept]))
        self._groups = groups

    def step(self) -> dict[ImageJob, Canvas]:
        """Advance every image by a step; remove complete images, and return their canvases."""
        finished: dict[ImageJob, Canvas] = {}
        for drawing, members in self._groups:
            drawing.step()
            if drawing.complete:
                for i, job in enumerate(members):
                    finished[job] = FlowCanvas(self._janus, job, drawing, i)
        self._groups = [(drawing, jobs) for drawing, jobs in self._groups if not drawing.complete]
        return finished

    def steps_done(self, job: ImageJob) -> int:
        """Return the number of steps that an image has done."""
        drawing, _ = self._find(job)
        return drawing.steps_done

    def canvas(self, job: ImageJob) -> Canvas:
        """Return the canvas of an image at its present step."""
        drawing, index = self._find(job)
        return FlowCanvas(self._janus, job, drawing, index)

    def _find(self, job: ImageJob) -> tuple[FlowDrawing, int]:
        """Return the drawing of a running image, and the image's index in it.

        Raises:
            KeyError: the image is not in the batch.
        """
        for drawing, members in self._groups:
            if job in members:
                return drawing, members.index(job)
        raise KeyError(job)
