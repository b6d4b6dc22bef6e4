"""Saving the images of a drawing: files and their paths, one JSON object, or stdout."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .jobs import DrawJob
from .progress import follow_drawing, terminal_preview
from .runner import note

if TYPE_CHECKING:
    from ..inference.results import GeneratedImage, ImageStep


class ImageWriter:
    """A writer that saves images and prints their paths, or one JSON object about all of them.

    Args:
        job: the job, for its options ``upscale``, ``show``, ``as_json`` and ``to_stdout``.
    """

    def __init__(self, job: DrawJob):
        self._job = job
        # Previews are printed to stdout, where they would corrupt the JSON or the image.
        self._show_previews = False if job.as_json or job.to_stdout else job.show
        self._saved: list[dict[str, Any]] = []  # a JSON object about each saved image
        self._started = time.perf_counter()
        self._peak_memory = 0  # bytes

    def draw(
        self, steps: Iterable[ImageStep], n: int, path_of: Callable[[GeneratedImage], Path | None]
    ) -> None:
        """Run the steps of a drawing, and save its images.

        Args:
            steps: steps of the drawing.
            n: number of images that the steps draw in all.
            path_of: returns the file for an image; None: stdout.
        """
        import mlx.core as mx

        preview = terminal_preview(self._show_previews)
        follow_drawing(steps, n, lambda image: self._save(image, path_of(image)), preview)
        self._peak_memory = max(self._peak_memory, mx.get_peak_memory())

    def _save(self, image: GeneratedImage, path: Path | None) -> None:
        """Save an image and add it to the JSON object. Without --json, print its path and seed.

        Args:
            image: the image, which is enlarged first if the job says so.
            path: the file; None: write a PNG to stdout, and print only the seed.
        """
        from ..processing.saved_images import encode_image

        enlarged = image.upscaled(self._job.upscale)
        if path is None:
            click.echo(encode_image(enlarged.image, enlarged.metadata), nl=False)
            note(f"seed {image.seed}")
            return
        saved_path = enlarged.save(path)  # with another name if the file exists
        self._saved.append(
            {
                "path": str(saved_path),
                "prompt": image.prompt,
                "seed": image.seed,
                "passes": image.passes,
                "tokens": None if image.tokens is None else image.tokens.tolist(),
            }
        )
        if not self._job.as_json:
            click.echo(str(saved_path))
            note(f"seed {image.seed}")

    def finish(self, model: str | None) -> None:
        """Print the JSON object, if --json is given.

        Args:
            model: name of the model; None: no image was missing, so no model was loaded.
        """
        if not self._job.as_json:
            return
        report = {
            "images": self._saved,
            "seconds": round(time.perf_counter() - self._started, 3),  # without loading the model
            "peak_memory": self._peak_memory,
            "model": model,
        }
        click.echo(json.dumps(report, ensure_ascii=False))
