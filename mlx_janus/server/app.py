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
from .chat_completions import complete_chat
from .errors import APIError, handle_http_exception, handle_validation_error
from .image_generations import generate_images
from .metrics import Metrics
from .middleware.api_key import PUBLIC_PATHS
from .middleware.stack import middleware_stack
from .schema import (
    ChatCompletion,
    ChatRequest,
    ErrorReply,
    Health,
    ImageRequest,
    ImagesReply,
    ModelList,
    ServedModel,
)
from .service import DEFAULT_MODEL, Service
from .settings import Settings

if TYPE_CHECKING:
    from ..engine.engine import Engine

_Handler = TypeVar("_Handler", bound=Callable[..., Any])
_NO_PAGE = "<!doctype html><title>mlx_janus</title><p>The page is not installed.</p>"
_CHUNKS = "Server-sent events: chat.completion.chunk objects, then `[DONE]`."
_IMAGE_EVENTS = "Server-sent events: image_generation.partial_image and image_generation.completed."
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "The request is refused."},
    "5XX": {"model": ErrorReply, "description": "The server cannot complete the request."},
}


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """Return the application.

    Args:
        engine: runs the model; the caller starts and closes it.
        settings: access and limits.
    """
    service = Service(engine, settings, Metrics(engine))
    app = FastAPI(
        title="mlx_janus",
        version=__version__,
        description="OpenAI's API for one Janus model: answers about images, and image generation.",
        docs_url=None,  # the documentation pages load scripts of other hosts
        redoc_url=None,
        redirect_slashes=False,
        middleware=middleware_stack(settings, service.metrics),
        exception_handlers={
            HTTPException: handle_http_exception,
            RequestValidationError: handle_validation_error,
        },
    )
    app.include_router(_generation_routes(service))
    app.include_router(_model_routes(service))
    app.include_router(_server_routes(service))
    if settings.api_key is not None:
        _describe_key(app)
    return app


class _StrictRequest(Request):
    """A request that refuses JSON with NaN, lone surrogates, or excessive depth."""

    async def json(self) -> Any:
        """Return the body's value; FastAPI calls this before it validates the body.

        Raises:
            APIError: the body is not JSON, or has one of the refused contents.
        """
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise APIError(400, f"the body is not JSON: {error}") from None


class _JSONRoute(APIRoute):
    """A route that accepts only JSON, which the forms of web pages cannot send."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, after a check that refuses other types with status 415."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            content_type = request.headers.get("content-type", "")
            media_type = content_type.partition(";")[0].strip().lower()
            if media_type != "application/json":
                raise APIError(415, "the body must be JSON: send 'Content-Type: application/json'")
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_json


def _streamed_or_errors(description: str) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's description of the streamed reply and the errors of a route."""
    events = {"schema": {"type": "string", "description": description}}
    return {200: {"content": {"text/event-stream": events}}, **_ERRORS}


def _generation_routes(service: Service) -> APIRouter:
    """Return the routes that use the model."""
    router = APIRouter(prefix="/v1", route_class=_JSONRoute, tags=["generation"])

    @router.post(
        "/chat/completions", response_model=ChatCompletion, responses=_streamed_or_errors(_CHUNKS)
    )
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation. `stream` sends the answer piece by piece."""
        return await complete_chat(body, request, service)

    @router.post(
        "/images/generations",
        response_model=ImagesReply,
        responses=_streamed_or_errors(_IMAGE_EVENTS),
    )
    async def create_image(body: ImageRequest, request: Request) -> Response:
        """Generate images from a prompt. `stream` sends each image once it is finished."""
        return await generate_images(body, request, service)

    return router


def _model_routes(service: Service) -> APIRouter:
    """Return the routes about the served model."""
    router = APIRouter(responses=_ERRORS, tags=["server"])
    engine = service.engine

    def served_model() -> ServedModel:
        return ServedModel(id=engine.name, created=service.since)

    @_get(router, "/v1/models/", include_in_schema=False)
    @_get(router, "/v1/models")
    async def list_models() -> ModelList:
        """List the models. A server has exactly one."""
        return ModelList(data=[served_model()])

    @_get(router, "/v1/models/{name:path}")
    async def retrieve_model(name: str) -> ServedModel:
        """Describe the model of this name."""
        if name not in (engine.name, DEFAULT_MODEL):
            message = f"there is no model {name!r} here: use {engine.name!r}"
            raise APIError(404, message, param="model", code="model_not_found")
        return served_model()

    return router


def _server_routes(service: Service) -> APIRouter:
    """Return the routes about the server, and the page."""
    router = APIRouter(responses=_ERRORS, tags=["server"])
    engine = service.engine
    page, page_headers = _page()

    @_get(
        router,
        "/health",
        responses={503: {"model": Health, "description": "The server is stopping."}},
    )
    async def health(response: Response) -> Health:
        """Report the load, and whether requests are accepted: status 503 if the server stops."""
        counts = engine.counts
        stopping = engine.stopping
        if stopping:
            response.status_code = 503
        return Health(
            status="stopping" if stopping else "ok",
            model=engine.name,
            waiting=counts.waiting,
            answering=counts.answering,
            drawing=counts.drawing,
        )

    @_get(
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

    @_get(router, "/", response_class=HTMLResponse)
    async def show_page() -> Response:
        """Return a web page for chatting and for generating images."""
        return HTMLResponse(page, headers=page_headers)

    return router


def _get(router: APIRouter, path: str, **options: Any) -> Callable[[_Handler], _Handler]:
    """Return a decorator that adds a GET route, and a HEAD route that /openapi.json leaves out."""

    def add(handle: _Handler) -> _Handler:
        router.head(path, **options | {"include_in_schema": False})(handle)
        return router.get(path, **options)(handle)

    return add


def _page() -> tuple[str, dict[str, str]]:
    """Return the page and its headers, whose policy allows only the page's own style and script."""
    resource = files(__package__) / "page.html"
    text = resource.read_text(encoding="utf-8") if resource.is_file() else _NO_PAGE

    def hashes(tag: str) -> str:
        """Return the policy's sources for a tag: the hashes of the page's elements of this tag."""
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = [hashlib.sha256(content.encode()).digest() for content in contents]
        sources = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
        return " ".join(sources) or "'none'"  # the stand-in page has neither style nor script

    policy = (
        f"default-src 'none'; style-src {hashes('style')}; script-src {hashes('script')}; "
        "connect-src 'self'; img-src 'self' data: blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}


def _describe_key(app: FastAPI) -> None:
    """Describe in /openapi.json which routes need the key. The middleware checks the key."""
    openapi_without_key = app.openapi

    def openapi() -> dict[str, Any]:
        description = openapi_without_key()
        scheme = HTTPBearer().model.model_dump(by_alias=True, exclude_none=True, mode="json")
        description.setdefault("components", {})["securitySchemes"] = {"key": scheme}
        for path, item in description["paths"].items():
            for operation in item.values():
                # [] is OpenAPI's "none needed"; {"key": []} names the scheme above.
                operation["security"] = [] if path in PUBLIC_PATHS else [{"key": []}]
        return description

    app.openapi = openapi  # type: ignore[method-assign]
