"""Image pathways: interfaces for the ways in which models turn a prompt into pixels.

A pathway owns everything that depends on how images are generated: its section of the config, its
networks (``models``), its loops (``decode``), and here its options, memory estimates and previews.
Other code counts steps and uses canvases; it never uses image tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from ..version import __version__
from .loaded import LoadedModel
from .results import GeneratedImage


class ImageOptions(Protocol):
    """Checked options of one pathway.

    Equal options generate equal images from the same prompt and seed.
    """

    @property
    def exact(self) -> bool:
        """Whether images are generated one by one, because rounding in a batch changes them."""

    def metadata(self) -> dict[str, str]:
        """Return the options as an image file records them."""


@dataclass(frozen=True, eq=False)
class InputImages:
    """The images that a request changes. They are compared by identity.

    Args:
        pixels: of each image, as preprocessed for the vision encoder, (S, S, 3) in [-1, 1].
    """

    pixels: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class ImageJob:
    """An image to generate.

    Jobs are compared by identity: two clients may request the same image.
    """

    prompt: str
    ids: list[int] = field(repr=False)  # ``ImagePathway.prompt_ids`` of the prompt
    seed: int
    options: ImageOptions
    inputs: InputImages | None = None  # the images to change, if any


class Canvas(Protocol):
    """An image after some of its steps."""

    def preview(self) -> Image.Image:
        """Decode the part of the image that is generated so far."""

    def finish(self) -> GeneratedImage:
        """Decode the image after its last step."""


class ImageBatch(Protocol):
    """A batch whose images advance together, though they start and finish at different times."""

    @property
    def jobs(self) -> Sequence[ImageJob]:
        """The running images; after an error, some may be missing."""

    def add(self, jobs: Sequence[ImageJob]) -> None:
        """Start images that have one prompt and equal options."""

    def remove(self, jobs: Sequence[ImageJob]) -> None:
        """Remove running images."""

    def step(self) -> dict[ImageJob, Canvas]:
        """Advance every image by a step; remove the complete ones, and return their canvases."""

    def steps_done(self, job: ImageJob) -> int:
        """Return the number of steps that an image has done."""

    def canvas(self, job: ImageJob) -> Canvas:
        """Return the canvas of an image at its present step."""


class ImagePathway(Protocol):
    """A way to generate images with a loaded model."""

    preview_every: int
    """Steps between two previews that differ enough to be worth decoding."""

    def options(self, choices: Mapping[str, Any]) -> ImageOptions:
        """Check options given by name. One that is None or missing takes the model's default.

        Raises:
            OptionError: a value is out of range, or this pathway has no such option.
        """

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the token ids of an image's prompt.

        Raises:
            PromptError: the prompt is empty, or leaves no room in the context for an image.
        """

    def steps(self, options: Any) -> int:
        """Return the number of steps of one image."""

    def bytes_per_image(self, prompt_tokens: int, options: Any) -> int:
        """Return the memory of one image while it is generated, in bytes."""

    def decoding_bytes(self) -> int:
        """Return the memory of the activations while one image is decoded, in bytes."""

    def generate(
        self, jobs: Sequence[ImageJob], options: Any
    ) -> Generator[Sequence[Canvas], None, None]:
        """Generate images together. Their prompts must have equal lengths in tokens.

        Closing the generator ends the generation within a step.

        Yields:
            After each step, a ``Canvas`` of every image in its present state, in the order of
                ``jobs``.
        """

    def batch(self) -> ImageBatch:
        """Return an empty batch."""


@runtime_checkable
class EditingPathway(Protocol):
    """What an ``ImagePathway`` has too if it can change images: jobs may have ``inputs``."""

    def edit_options(self, choices: Mapping[str, Any]) -> ImageOptions:
        """Check options of changing images, as ``ImagePathway.options`` does.

        Raises:
            OptionError: a value is out of range, or this pathway has no such option.
        """

    def edit_prompt_ids(self, prompt: str, images: int) -> list[int]:
        """Return the token ids of a prompt that changes a number of images.

        Raises:
            PromptError: the prompt is empty, or leaves no room in the context for an image.
        """


def image_metadata(janus: LoadedModel, job: ImageJob) -> dict[str, str]:
    """Return the metadata of a generated image, from which it can be generated again."""
    return {
        "prompt": job.prompt,
        "seed": str(job.seed),
        **job.options.metadata(),
        "model": janus.name,
        **janus.load_options,
        "version": f"mlx_janus {__version__}",
    }
