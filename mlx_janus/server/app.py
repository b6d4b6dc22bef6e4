"""The application: OpenAI's routes, the routes about the server, and the page."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Coroutine
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ..version import __version__
from .chat_completions import DEFAULT_MAX_TOKENS, complete_chat
from .errors import APIError, handle_http_exception, handle_validation_error
from .image_generations import default_sampling, generate_images
from .image_store import PATH as IMAGES_PATH
from .metrics import Metrics
from .middleware.api_key import is_public
from .middleware.stack import middleware_stack
from .schema import (
    ChatCompletion,
    ChatRequest,
    ErrorReply,
    Health,
    ImageRequest,
    ImagesReply,
    ModelDefaults,
    ModelList,
    ServedModel,
)
from .service import Service
from .settings import Settings

if TYPE_CHECKING:
    from ..engine.engine import Engine

_Handler = TypeVar("_Handler", bound=Callable[..., Any])
_PLACEHOLDER_PAGE = "<!doctype html><title>mlx_janus</title><p>The page is not installed.</p>"
_CHUNKS_DESCRIPTION = "Server-sent events: chat.completion.chunk objects, then `[DONE]`."
_IMAGE_EVENTS_DESCRIPTION = (
    "Server-sent events: image_generation.partial_image and image_generation.completed."
)
_ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "The request is refused."},
    "5XX": {"model": ErrorReply, "description": "The server cannot complete the request."},
}


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """Return the server's FastAPI application.

    Args:
        engine: runs the model. The caller starts and closes the engine.
        settings: access and limits.
    """
    service = Service(engine, settings, Metrics(engine))
    app = FastAPI(
        title="mlx_janus",
        version=__version__,
        description="OpenAI's API for one Janus model: answers about images, and image generation.",
        docs_url=None,  # FastAPI's documentation pages load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,  # an unknown path is 404, with or without a final slash
        middleware=middleware_stack(settings, service.metrics),
        exception_handlers={
            HTTPException: handle_http_exception,
            RequestValidationError: handle_validation_error,
        },
    )
    app.include_router(_generation_router(service))
    app.include_router(_image_router(service))
    app.include_router(_model_router(service))
    app.include_router(_server_router(service))
    if settings.api_key is not None:
        _add_key_to_openapi(app)
    return app


class _StrictRequest(Request):
    """A request whose body must be JSON without NaN, lone surrogates or excessive depth."""

    async def json(self) -> Any:
        """Parse the body. FastAPI calls this before it validates the result.

        Raises:
            APIError: the body is not JSON, or has NaN, a lone surrogate or excessive depth (400).
        """
        try:
            # from_json always refuses lone surrogates and excessive depth.
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise APIError(400, f"the body is not JSON: {error}") from None


class _JSONRoute(APIRoute):
    """A route that accepts only JSON, so that no form on another site's page can use it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return a handler that checks the content type (415) and then calls FastAPI's handler."""
        handle_with_fastapi = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            content_type = request.headers.get("content-type", "")
            media_type = content_type.partition(";")[0].strip().lower()  # without "; charset=..."
            if media_type != "application/json":
                raise APIError(415, "the body must be JSON: send 'Content-Type: application/json'")
            return await handle_with_fastapi(_StrictRequest(request.scope, request.receive))

        return handle_json


def _stream_and_error_responses(stream_description: str) -> dict[int | str, dict[str, Any]]:
    """Return a route's OpenAPI responses, by status: the streamed reply and the errors."""
    # The schema has no type: some tools take it as that of the stream, others as that of an event.
    events = {"schema": {"description": stream_description}}
    return {200: {"content": {"text/event-stream": events}}, **_ERROR_RESPONSES}


def _generation_router(service: Service) -> APIRouter:
    """Return a router with the routes that generate text and images."""
    router = APIRouter(prefix="/v1", route_class=_JSONRoute, tags=["generation"])

    @router.post(
        "/chat/completions",
        response_model=ChatCompletion,
        responses=_stream_and_error_responses(_CHUNKS_DESCRIPTION),
    )
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation. `stream` sends the answer piece by piece."""
        return await complete_chat(body, request, service)

    @router.post(
        "/images/generations",
        response_model=ImagesReply,
        responses=_stream_and_error_responses(_IMAGE_EVENTS_DESCRIPTION),
    )
    async def create_image(body: ImageRequest, request: Request) -> Response:
        """Generate images from a prompt. `stream` sends each image once it is finished."""
        return await generate_images(body, request, service)

    return router


def _model_router(service: Service) -> APIRouter:
    """Return a router with the routes that list and describe the served model."""
    router = APIRouter(responses=_ERROR_RESPONSES, tags=["server"])

    def describe(name: str) -> ServedModel:
        defaults = ModelDefaults(
            answers={"temperature": 0, "top_p": 1, "max_tokens": DEFAULT_MAX_TOKENS},
            images=default_sampling(service.engine),
        )
        return ServedModel(id=name, created=service.started_at, defaults=defaults)

    # Without its own route, "/v1/models/" would ask for a model of the name "".
    @_get_and_head(router, "/v1/models/", include_in_schema=False)
    @_get_and_head(router, "/v1/models")
    async def list_models() -> ModelList:
        """List the server's one model under each of its names."""
        return ModelList(data=[describe(name) for name in service.names])

    @_get_and_head(router, "/v1/models/{name:path}")  # path: the name of a model may have slashes
    async def retrieve_model(name: str) -> ServedModel:
        """Describe the model of this name."""
        service.check_model(name)
        # For an alias or "default", which are in no list, reply with the list's first name.
        return describe(name if name in service.names else service.names[0])

    return router


def _image_router(service: Service) -> APIRouter:
    """Return a router with the route that serves generated images."""
    router = APIRouter(responses=_ERROR_RESPONSES, tags=["generation"])

    @_get_and_head(
        router,
        IMAGES_PATH + "{name}",
        response_class=Response,
        responses={200: {"content": {"image/*": {}}}},
    )
    async def get_image(name: str) -> Response:
        """Return a generated image, whose address an earlier reply gave."""
        image = service.images.get(name)
        if image is None:
            raise APIError(404, "there is no such image: it is kept for an hour only")
        # Any site's page may show the image, because nobody can guess its name.
        headers = {"Cross-Origin-Resource-Policy": "cross-origin"}
        return Response(image.data, media_type=image.media_type, headers=headers)

    return router


def _server_router(service: Service) -> APIRouter:
    """Return a router with the routes for the server's state and for the web page."""
    router = APIRouter(responses=_ERROR_RESPONSES, tags=["server"])
    engine = service.engine
    page, page_headers = _read_page()

    @_get_and_head(
        router,
        "/health",
        responses={503: {"model": Health, "description": "The server is stopping."}},
    )
    async def health(response: Response) -> Health:
        """Report the load. Status 503 means that the server is stopping and refuses requests."""
        counts = engine.counts
        stopping = engine.stopping
        if stopping:
            response.status_code = 503
        return Health(
            status="stopping" if stopping else "ok",
            model=service.names[0],
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
            service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
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
        return " ".join(hashes) or "'none'"  # the placeholder page has neither tag

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
        scheme = HTTPBearer().model.model_dump(by_alias=True, exclude_none=True, mode="json")
        document.setdefault("components", {})["securitySchemes"] = {"key": scheme}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                # In OpenAPI, [] means that no key is needed; {"key": []} names the scheme above.
                operation["security"] = [] if is_public(path) else [{"key": []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]
