"""The parts of a server that its routes share."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from ..engine.messages import Request
from ..errors import JanusError
from ..version import __version__
from .errors import APIError, to_api_error
from .image_store import ImageStore
from .images import ImageReader
from .metrics import Metrics
from .settings import Settings

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.tickets import Ticket

DEFAULT_MODEL = "default"  # a name that every server accepts for its model


@dataclass
class Service:
    """An engine with the settings and the metrics of its server.

    Args:
        engine: an engine that is started before the first request.
        settings: the server's settings.
        metrics: the server's metrics.
        started_at: start of the server, in seconds since 1970.
        images: generated images that clients fetch by URL.
    """

    engine: Engine
    settings: Settings
    metrics: Metrics
    started_at: int = field(default_factory=lambda: int(time.time()))
    images: ImageStore = field(default_factory=ImageStore)

    @property
    def names(self) -> tuple[str, ...]:
        """The model's names in lists. Replies have the first one."""
        return self.settings.served_names or (self.engine.name,)

    @cached_property
    def image_reader(self) -> ImageReader:
        """The reader of the requests' images. It needs the config of the loaded model."""
        return ImageReader(self.settings, self.engine.config.image)

    @cached_property
    def fingerprint(self) -> str:
        """OpenAI's ``system_fingerprint``.

        The fingerprint changes with the model, its precision and this package's release, because
        the same seed may then give another answer.
        """
        identity = f"{__version__} {self.engine.name} {self.engine.config}"
        return f"fp_{hashlib.sha256(identity.encode()).hexdigest()[:10]}"

    def check_model(self, name: str | None) -> None:
        """Refuse the name of a model that is not served. A request without a name (None) passes.

        Raises:
            APIError: the model is not served (404).
        """
        aliases = self.settings.model_aliases
        if name not in (None, DEFAULT_MODEL, self.engine.name, *self.names, *aliases):
            message = f"there is no model {name!r} here: use {self.names[0]!r}, or leave it out"
            raise APIError(404, message, param="model", code="model_not_found")

    def submit(self, request: Request, param: str) -> Ticket:
        """Hand a request to the engine and return its ticket.

        Args:
            request: the request.
            param: the field of the body that the error names if the request is refused.

        Raises:
            APIError: the engine refuses the request.
        """
        try:
            return self.engine.submit(request)
        except JanusError as error:
            raise to_api_error(error, param) from None
