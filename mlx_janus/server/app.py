"""The application: the routes of all APIs, the routes about the server, and the web page."""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from collections.abc import Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ..engine.pool import EnginePool
from ..version import __version__
from .chat_completions import complete_chat
from .compatible_routes import compatible_router
from .errors import APIError, handle_http_exception, handle_validation_error
from .form_schema import edit_body_schema
from .image_edits import edit_images, read_edit
from .image_generations import generate_images
from .image_store import PATH as IMAGES_PATH
from .mcp_route import add_mcp_route
from .middleware.api_key import is_public
from .middleware.stack import middleware_stack
from .routing import ERROR_RESPONSES, JSONRoute, streamed_responses
from .schema import (
    ChatCompletion,
    ChatRequest,
    Health,
    ImageRequest,
    ImagesReply,
    ModelList,
    ServedModel,
)
from .served_models import ServedModels
from .settings import Settings

if TYPE_CHECKING:
    from ..engine.engine import Engine

_Handler = TypeVar("_Handler", bound=Callable[..., Any])
_PLACEHOLDER_PAGE = "<!doctype html><title>mlx_janus</title><p>The page is not installed.</p>"
_CHUNKS_DESCRIPTION = "Server-sent events: chat.completion.chunk objects, then `[DONE]`."
_IMAGE_EVENTS_DESCRIPTION = (
    "Server-sent events: image_generation.partial_image and image_generation.completed."
)
_EDIT_EVENTS_DESCRIPTION = "Server-sent events: image_edit.partial_image and image_edit.completed."


def create_app(engines: Engine | EnginePool, settings: Settings) -> FastAPI:
    """Return the server's FastAPI application.

    Args:
        engines: the engine of one model, or a pool of several engines. The caller starts and
            closes them.
        settings: access and limits.
    """
    pool = engines if isinstance(engines, EnginePool) else EnginePool.of_engine(engines)
    models = ServedModels(pool, settings)
    # Silence ``python_multipart``: it would log every damaged form, but the reply tells the client.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    app = FastAPI(
        title="mlx_janus",
        version=__version__,
        description="OpenAI's API for Janus models: answers about images, and image generation.",
        docs_url=None,  # FastAPI's documentation pages load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,  # an unknown path is 404, with or without a final slash
        middleware=middleware_stack(settings, models.metrics),
        exception_handlers={
            HTTPException: handle_http_exception,
            RequestValidationError: handle_validation_error,
        },
    )
    app.include_router(_generation_router(models))
    app.include_router(_edit_router(models))
    app.include_router(compatible_router(models))
    app.include_router(_image_router(models))
    app.include_router(_model_router(models))
    app.include_router(_server_router(models))
    add_mcp_route(app, models)
    if settings.api_key is not None:
        _add_key_to_openapi(app)
    return app


def _generation_router(models: ServedModels) -> APIRouter:
    """Return a router with the routes that generate text and images."""
    router = APIRouter(prefix="/v1", route_class=JSONRoute, tags=["generation"])

    @router.post(
        "/chat/completions",
        response_model=ChatCompletion,
        responses=streamed_responses(_CHUNKS_DESCRIPTION),
    )
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation. `stream` sends the answer piece by piece."""
        async with models.use(body.model, request) as service:
            return await complete_chat(body, request, service)

    @router.post(
        "/images/generations",
        response_model=ImagesReply,
        responses=streamed_responses(_IMAGE_EVENTS_DESCRIPTION),
    )
    async def create_image(body: ImageRequest, request: Request) -> Response:
        """Generate images from a prompt. `stream` sends each image once it is finished."""
        async with models.use(body.model, request) as service:
            return await generate_images(body, request, service)

    return router


def _edit_router(models: ServedModels) -> APIRouter:
    """Return a router with the route that changes images.

    The route takes forms and JSON, so it is not a ``JSONRoute``. ``SameOriginMiddleware`` refuses
    forms that pages of other sites send.
    """
    router = APIRouter(prefix="/v1", tags=["generation"])

    @router.post(
        "/images/edits",
        response_model=ImagesReply,
        responses=streamed_responses(_EDIT_EVENTS_DESCRIPTION),
        openapi_extra={"requestBody": edit_body_schema()},
    )
    async def edit_image(request: Request) -> Response:
        """Change images as a prompt says. `stream` sends each result once it is finished."""
        body, sources = await read_edit(request)
        async with models.use(body.model, request) as service:
            return await edit_images(body, sources, request, service)

    return router


def _model_router(models: ServedModels) -> APIRouter:
    """Return a router with the routes that list and describe the served models."""
    router = APIRouter(responses=ERROR_RESPONSES, tags=["server"])

    # Without its own route, "/v1/models/" would ask for a model of the name "".
    @_get_and_head(router, "/v1/models/", include_in_schema=False)
    @_get_and_head(router, "/v1/models")
    async def list_models() -> ModelList:
        """List the server's models, each under all of its names."""
        data = []
        for model in models.pool.models:
            data += [models.describe(model, name) for name in models.names(model)]
        return ModelList(data=data)

    @_get_and_head(router, "/v1/models/{name:path}")  # path: the name of a model may have slashes
    async def retrieve_model(name: str) -> ServedModel:
        """Describe the model of this name."""
        model = models.find(name)
        names = models.names(model)
        # Lists leave out aliases and "default". For these, reply with the model's first name.
        return models.describe(model, name if name in names else names[0])

    return router


def _image_router(models: ServedModels) -> APIRouter:
    """Return a router with the route that serves generated images."""
    router = APIRouter(responses=ERROR_RESPONSES, tags=["generation"])

    @_get_and_head(
        router,
        IMAGES_PATH + "{name}",
        response_class=Response,
        responses={200: {"content": {"image/*": {}}}},
    )
    async def get_image(name: str) -> Response:
        """Return a generated image, whose address an earlier reply gave."""
        image = models.images.get(name)
        if image is None:
            raise APIError(404, "there is no such image: it is kept for an hour only")
        # Any site's page may show the image, because nobody can guess its name.
        headers = {"Cross-Origin-Resource-Policy": "cross-origin"}
        return Response(image.data, media_type=image.media_type, headers=headers)

    return router


def _server_router(models: ServedModels) -> APIRouter:
    """Return a router with the routes for the server's state and for the web page."""
    router = APIRouter(responses=ERROR_RESPONSES, tags=["server"])
    pool = models.pool
    page, page_headers = _read_page()

    @_get_and_head(
        router,
        "/health",
        responses={503: {"model": Health, "description": "The server is stopping."}},
    )
    async def health(response: Response) -> Health:
        """Report the load. Status 503 means that the server is stopping and refuses requests."""
        counts = pool.counts
        stopping = pool.stopping
        if stopping:
            response.status_code = 503
        return Health(
            status="stopping" if stopping else "ok",
            model=models.names(models.first)[0],
            models=len(pool.models),
            loaded=len(pool.loaded),
            waiting=counts.waiting,
            answering=counts.answering,
            drawing=counts.drawing,
        )

    @_get_and_head(
        router,
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}},
    )
    async def metrics() -> Response:
        """Report metrics in Prometheus' text format."""
        return Response(
            models.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    @_get_and_head(router, "/", response_class=HTMLResponse)
    async def show_page() -> Response:
        """Return a web page for chatting and for generating images."""
        return HTMLResponse(page, headers=page_headers)

    return router


def _get_and_head(router: APIRouter, path: str, **options: Any) -> Callable[[_Handler], _Handler]:
    """Return a decorator that adds a GET route, and a HEAD route that /openapi.json leaves out."""

    def add_routes(handle: _Handler) -> _Handler:
        router.head(path, **options | {"include_in_schema": False})(handle)
        return router.get(path, **options)(handle)

    return add_routes


def _read_page() -> tuple[str, dict[str, str]]:
    """Return the web page and the headers to send with it.

    The Content-Security-Policy header allows only the page's own styles and scripts.
    """
    resource = files(__package__) / "page.html"
    text = resource.read_text(encoding="utf-8") if resource.is_file() else _PLACEHOLDER_PAGE

    def hash_sources(tag: str) -> str:
        """Return the policy's sources for a tag: hashes of the contents of all its elements."""
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = [hashlib.sha256(content.encode()).digest() for content in contents]
        hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
        return " ".join(hashes) or "'none'"  # the placeholder page has no such tag

    policy = (
        f"default-src 'none'; "
        f"style-src {hash_sources('style')}; script-src {hash_sources('script')}; "
        "connect-src 'self'; img-src 'self' data: blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}


def _add_key_to_openapi(app: FastAPI) -> None:
    """Describe the API key in /openapi.json, and mark the routes that need it.

    This is documentation only: a middleware checks the key.
    """
    openapi_without_key = app.openapi

    def openapi() -> dict[str, Any]:
        document = openapi_without_key()
        schemes = {"key": HTTPBearer(), "x_api_key": APIKeyHeader(name="X-API-Key")}
        document.setdefault("components", {})["securitySchemes"] = {
            name: scheme.model.model_dump(by_alias=True, exclude_none=True, mode="json")
            for name, scheme in schemes.items()
        }
        for path, operations in document["paths"].items():
            for operation in operations.values():
                # OpenAPI: an empty list means that no key is needed. In a list of several schemes,
                # any one of them is enough.
                needed: list[dict[str, list[str]]] = [{name: []} for name in schemes]
                operation["security"] = [] if is_public(path) else needed
        return document

    app.openapi = openapi  # type: ignore[method-assign]
