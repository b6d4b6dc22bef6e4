"""The interface between the tools and the process that serves them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from ..engine.engine import Engine
from ..engine.messages import Event
from ..inference.input_records import InputImage
from ..inference.results import GeneratedImage


class Host(Protocol):
    """A process that serves the tools: a command on stdin and stdout, or the HTTP server."""

    saves_images: bool
    """Whether ``save`` writes files."""

    def engine(self) -> AbstractAsyncContextManager[Engine]:
        """Return a context with the started engine. Entering it waits while the model is loading.

        In the context, and while submitted requests run, the model stays loaded.

        Raises:
            JanusError: the model cannot be loaded.
        """

    async def read_image(self, source: str, engine: Engine) -> InputImage:
        """Return an image, scaled and padded for the vision encoder, with its record.

        Args:
            source: a data URL, base64, an https address or a path, as far as the host allows it.
            engine: the engine that gets the image.

        Raises:
            Exception: the image cannot be read. ``explain`` describes the error.
        """

    async def save(self, image: GeneratedImage) -> Path | None:
        """Write an image to a file and return its path; None: this host saves no images.

        Raises:
            OutputError: the file cannot be written.
        """

    def recorder(self) -> Callable[[Event], None]:
        """Return a function that counts the events of one request, which begins now."""

    def explain(self, error: Exception) -> str:
        """Return the message about a failed call for its client."""
