"""Image pathways: how a model turns a prompt into pixels.

A pathway owns everything that depends on the way images are made: its section of the config and its networks
(``models``), its loops (``decode``), and here its options, memory sums and previews. Code outside counts steps and
looks at canvases; it never asks for image tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from ..version import __version__
from .loaded import LoadedModel
from .results import GeneratedImage


class ImageOptions(Protocol):
    """Checked options of one pathway; equal ones generate the same image from the same seed."""

    @property
    def exact(self) -> bool:
        """Whether each image is made alone, so that rounding depends on nothing else."""

    def metadata(self) -> dict[str, str]:
        """Return the options as an image file records them."""


@dataclass(frozen=True, eq=False)
class ImageJob:
    """One image to generate. Jobs are compared by identity: two clients may ask for the same image."""

    prompt: str
    ids: list[int] = field(repr=False)  # of the prompt, by ``ImagePathway.prompt_ids``
    seed: int
    options: ImageOptions


class Canvas(Protocol):
    """One image after some of its steps."""

    def preview(self) -> Image.Image:
        """Decode the image as far as it is made."""

    def finish(self) -> GeneratedImage:
        """Decode the image after its last step."""


class ImageBatch(Protocol):
    """Images that advance by one step at a time together, though they start and finish at different times."""

    @property
    def jobs(self) -> Sequence[ImageJob]:
        """The images under way. An error may lose some."""

    def add(self, jobs: Sequence[ImageJob]) -> None:
        """Start images of one prompt and equal options."""

    def remove(self, jobs: Sequence[ImageJob]) -> None:
        """Give up images that are under way."""

    def step(self) -> dict[ImageJob, Canvas]:
        """Advance every image by a step; return those that are complete, which leave the batch."""

    def steps_done(self, job: ImageJob) -> int:
        """Return how many steps of an image are done."""

    def canvas(self, job: ImageJob) -> Canvas:
        """Return an image of the batch as it is now."""


class ImagePathway(Protocol):
    """One way of generating images with a loaded model."""

    preview_every: int
    """Steps between two previews that differ enough to be worth their cost."""

    def options(self, choices: Mapping[str, Any]) -> ImageOptions:
        """Check choices by name; None and missing ones take the model's own defaults.

        Raises:
            OptionError: a value out of its range, or a choice that this pathway does not have.
        """

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the ids of a prompt to generate an image from.

        Raises:
            PromptError: an empty prompt, or one that leaves an image no room in the context.
        """

    def steps(self, options: Any) -> int:
        """Return the number of steps of one image."""

    def bytes_per_image(self, prompt_tokens: int, options: Any) -> int:
        """Return the memory that an image takes while it is generated."""

    def decoding_bytes(self) -> int:
        """Return the memory of the activations while one image is turned into pixels."""

    def generate(
        self, jobs: Sequence[ImageJob], options: Any
    ) -> Generator[Sequence[Canvas], None, None]:
        """Generate images together, whose prompts have as many tokens; closing stops within a step.

        Yields:
            After each step the canvas of every image, in the order of the jobs.
        """

    def batch(self) -> ImageBatch:
        """Return an empty batch."""


def describe(janus: LoadedModel, job: ImageJob) -> dict[str, str]:
    """Return the metadata with which an image can be generated again."""
    return {
        "prompt": job.prompt,
        "seed": str(job.seed),
        **job.options.metadata(),
        "model": janus.name,
        **janus.precision,
        "version": f"mlx_janus {__version__}",
    }
