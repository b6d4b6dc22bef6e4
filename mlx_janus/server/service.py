"""The parts of a server that a request to one of its models needs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ..engine.messages import Request
from ..errors import JanusError
from ..version import __version__
from .errors import to_api_error
from .image_store import ImageStore
from .images import ImageReader
from .metrics import Metrics
from .settings import Settings

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from ..engine.engine import Engine
    from ..engine.tickets import Ticket


@dataclass
class Service:
    """A loaded model, with the settings, the metrics and the stores of its server.

    ``ServedModels.use`` gives it to a request.

    Args:
        engine: the model's engine.
        settings: the server's settings.
        metrics: the server's metrics.
        names: the model's names in lists. Replies have the first one.
        images: generated images that clients fetch by URL.
        decoder: the server's thread that decodes the images of requests.
        keep: returns a context that keeps the model in memory, for a stream that submits something
            to the engine after its route has returned.
    """

    engine: Engine
    settings: Settings
    metrics: Metrics
    names: tuple[str, ...]
    images: ImageStore
    decoder: ThreadPoolExecutor
    keep: Callable[[], AbstractContextManager[None]]

    @cached_property
    def image_reader(self) -> ImageReader:
        """The reader of the requests' images. It needs the config of the loaded model."""
        return ImageReader(self.settings, self.engine.config.image, self.decoder)

    @cached_property
    def fingerprint(self) -> str:
        """OpenAI's ``system_fingerprint``.

        The fingerprint changes with the model, its precision and this package's release, because
        the same seed may then give another answer.
        """
        identity = f"{__version__} {self.engine.name} {self.engine.config}"
        return f"fp_{hashlib.sha256(identity.encode()).hexdigest()[:10]}"

    def system(self, given: str | None) -> str | None:
        """Return the request's system prompt, or else the server's; None: the model's own.

        Args:
            given: the system prompt of the request; None: the request has none.
        """
        return self.settings.system if given is None else given

    def submit(self, request: Request, param: str) -> Ticket:
        """Hand a request to the engine and return its ticket.

        Args:
            request: the request.
            param: a field of the body. The error names it if the engine refuses the request.

        Raises:
            APIError: the engine refuses the request.
        """
        try:
            return self.engine.submit(request)
        except JanusError as error:
            raise to_api_error(error, param) from None
