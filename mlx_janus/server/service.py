"""What every route works with."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from ..engine.messages import Request
from ..errors import JanusError
from ..version import __version__
from .errors import Problem, explained
from .metrics import Metrics
from .pictures import PictureReader
from .settings import Settings

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.tickets import Ticket

DEFAULT_MODEL = "default"


@dataclass
class Service:
    """An engine, which has been started when the first request comes, and what goes with it."""

    engine: Engine
    settings: Settings
    metrics: Metrics
    since: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def reader(self) -> PictureReader:
        """Brings pictures to the model's size."""
        return PictureReader(self.settings, self.engine.config.image)

    @cached_property
    def fingerprint(self) -> str:
        """Another one where the same seed may give another answer: another model, precision or release."""
        facts = f"{__version__} {self.engine.name} {self.engine.config}"
        return f"fp_{hashlib.sha256(facts.encode()).hexdigest()[:10]}"

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served.

        Raises:
            Problem: 404.
        """
        if name not in (None, DEFAULT_MODEL, self.engine.name):
            message = f"there is no model {name!r} here: it is {self.engine.name!r}, or leave it out"
            raise Problem(404, message, param="model", code="model_not_found")

    def submit(self, asked: Request, param: str) -> Ticket:
        """Hand a request to the engine; ``param`` is the field that an error is about.

        Raises:
            Problem: it is refused.
        """
        try:
            return self.engine.submit(asked)
        except JanusError as error:
            raise explained(error, param) from None
