"""The models of a server, by the names that requests may use."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from functools import partial

from starlette.requests import Request as HTTPRequest

from ..engine.engine import Engine
from ..engine.pool import EnginePool, PooledModel
from ..errors import JanusError
from .chat_completions import DEFAULT_MAX_TOKENS
from .errors import APIError, to_api_error
from .event_streams import unless_client_leaves
from .image_edits import default_edit_sampling
from .image_generations import default_sampling
from .image_store import ImageStore
from .images import decoding_thread
from .metrics import Metrics
from .schema import Capability, ModelDefaults, ServedModel
from .service import Service
from .settings import Settings

DEFAULT_MODEL = "default"  # a name that every server accepts for its first model


class ServedModels:
    """The models of a server, with the parts that they share.

    Args:
        pool: the models.
        settings: the server's settings.
    """

    def __init__(self, pool: EnginePool, settings: Settings):
        self.pool = pool
        self.metrics = Metrics(pool)
        self.images = ImageStore()
        self.started_at = int(time.time())  # seconds since 1970
        self.settings = settings
        self._decoder = decoding_thread()
        self._services: dict[PooledModel, Service] = {}  # of models that are or were loaded
        # Of the same models, so that lists have the defaults of a model that is unloaded again.
        self._defaults: dict[PooledModel, ModelDefaults] = {}

    @property
    def first(self) -> PooledModel:
        """The model of requests that name none."""
        return self.pool.models[0]

    def names(self, model: PooledModel) -> tuple[str, ...]:
        """Return the names under which lists show a model. Replies name the first one."""
        served_names = self.settings.served_names if model is self.first else ()
        return served_names or (model.name,)

    def find(self, name: str | None) -> PooledModel:
        """Return the model that a request names; None stands for the first model.

        Raises:
            APIError: there is no model of this name (404).
        """
        for model in self.pool.models:
            if name in self._accepted_names(model):
                return model
        if len(self.pool.models) == 1:
            fix = f"use {self.names(self.first)[0]!r}, or leave it out"
        else:
            fix = "/v1/models lists them"
        message = f"there is no model {name!r} here: {fix}"
        raise APIError(404, message, param="model", code="model_not_found")

    def _accepted_names(self, model: PooledModel) -> set[str | None]:
        """Return all names by which requests may choose a model."""
        names: set[str | None] = {model.name, *self.names(model), *model.source.aliases}
        if model is self.first:
            names |= {None, DEFAULT_MODEL, *self.settings.model_aliases}
        return names

    @contextlib.asynccontextmanager
    async def use(self, name: str | None, request: HTTPRequest) -> AsyncIterator[Service]:
        """Yield the service of the model that a request names; load the model first if needed.

        The model is not unloaded before the context ends, nor while something is running that was
        submitted to its engine. So a stream may outlive the context.

        Args:
            name: the request's ``model``; None: the first model.
            request: the client's request, whose body has been read.

        Raises:
            APIError: there is no such model, it cannot be loaded, or the client leaves.
        """
        model = self.find(name)
        try:
            if model.ready:
                engine = await self.pool.acquire(model)
            else:  # loading takes long
                engine = await unless_client_leaves(self.pool.acquire(model), request)
        except JanusError as error:
            raise to_api_error(error, "model") from None
        try:
            yield self.service(model, engine)
        finally:
            self.pool.release(model)

    def service(self, model: PooledModel, engine: Engine) -> Service:
        """Return the service of a loaded model, always the same one for one engine.

        The first call for an engine also stores the model's defaults, which ``describe`` needs.
        """
        service = self._services.get(model)
        if service is None or service.engine is not engine:
            service = Service(
                engine,
                self.settings,
                self.metrics,
                self.names(model),
                self.images,
                self._decoder,
                partial(self.pool.keep, model),
            )
            self._services[model] = service
            self._defaults[model] = _defaults(engine)
        return service

    def describe(self, model: PooledModel, name: str) -> ServedModel:
        """Return the description of a model under one of its names."""
        if model.engine is not None:
            self.service(model, model.engine)  # stores the defaults
        defaults = self._defaults.get(model)
        return ServedModel(
            id=name,
            created=self.started_at,
            root=self.names(model)[0],
            state=model.state,
            loaded=model.state == "loaded",
            capabilities=None if defaults is None else _capabilities(defaults),
            defaults=defaults,
        )


def _defaults(engine: Engine) -> ModelDefaults:
    """Return the defaults of a loaded model."""
    return ModelDefaults(
        answers={"temperature": 0, "top_p": 1, "max_tokens": DEFAULT_MAX_TOKENS},
        images=default_sampling(engine),
        edits=default_edit_sampling(engine),
    )


def _capabilities(defaults: ModelDefaults) -> list[Capability]:
    """Return the abilities of a model with these defaults."""
    capabilities: list[Capability] = ["answers", "images"]
    if defaults.edits is not None:
        capabilities.append("edits")
    return capabilities
