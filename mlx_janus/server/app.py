"""The routes: OpenAI's for answers and pictures, what says how the server is, and the page."""

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
from .chat_completions import answer
from .errors import Problem, answer_invalid, answer_refusal
from .image_generations import draw
from .metrics import Metrics
from .middleware import OPEN_PATHS, layers
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
_PLACEHOLDER = "<!doctype html><title>mlx_janus</title><p>The page is not there yet.</p>"
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "It is refused."},
    "5XX": {"model": ErrorReply, "description": "It failed."},
}


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The application.

    Args:
        engine: answers and draws; it is started, and closed, by the caller.
        settings: whom it answers, and how much it takes.
    """
    service = Service(engine, settings, Metrics(engine))
    app = FastAPI(
        title="mlx_janus",
        version=__version__,
        description="Answers about pictures, and pictures, by one model, as OpenAI's API has it.",
        docs_url=None,  # they load scripts of other hosts
        redoc_url=None,
        redirect_slashes=False,
        middleware=layers(settings, service.metrics),
        exception_handlers={HTTPException: answer_refusal, RequestValidationError: answer_invalid},
    )
    app.include_router(_making(service))
    app.include_router(_telling(service))
    if settings.api_key is not None:
        _describe_key(app)
    return app


class _StrictRequest(Request):
    """JSON without NaN, half characters, or depths that no message has."""

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise Problem(400, f"the body is no JSON: {error}") from None


class _JSONRoute(APIRoute):
    """A route that takes JSON and nothing else, which no form of a web page can send."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Problem(415, "the body must be JSON: send 'Content-Type: application/json'")
            return await handle(_StrictRequest(request.scope, request.receive))

        return strictly


def _streaming(description: str) -> dict[int | str, dict[str, Any]]:
    """What a route replies that streams if it is asked to."""
    events = {"schema": {"type": "string", "description": description}}
    return {200: {"content": {"text/event-stream": events}}, **_ERRORS}


def _making(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", route_class=_JSONRoute, tags=["making"])
    chunks = "Server-sent events: chat.completion.chunk objects, then `[DONE]`."
    pictures = "Server-sent events: image_generation.partial_image and image_generation.completed."

    @router.post("/chat/completions", response_model=ChatCompletion, responses=_streaming(chunks))
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answers to the last message of a conversation; with `stream`, in pieces as they come."""
        return await answer(body, request, service)

    @router.post("/images/generations", response_model=ImagesReply, responses=_streaming(pictures))
    async def create_image(body: ImageRequest, request: Request) -> Response:
        """Pictures of a prompt; with `stream` each when it is there, and `partial_images` times before."""
        return await draw(body, request, service)

    return router


def _telling(service: Service) -> APIRouter:
    router = APIRouter(responses=_ERRORS, tags=["telling"])
    engine, (page, page_headers) = service.engine, _page()

    def served() -> ServedModel:
        return ServedModel(id=engine.name, created=service.since)

    def get(path: str, **facts: Any) -> Callable[[_Handler], _Handler]:
        """A route for GET, and for HEAD, which need not be described."""

        def add(handle: _Handler) -> _Handler:
            router.head(path, **facts | {"include_in_schema": False})(handle)
            return router.get(path, **facts)(handle)

        return add

    @get("/v1/models/", include_in_schema=False)
    @get("/v1/models")
    async def list_models() -> ModelList:
        """The models that are served: one."""
        return ModelList(data=[served()])

    @get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> ServedModel:
        """One model."""
        if name not in (engine.name, DEFAULT_MODEL):
            message = f"there is no model {name!r} here: it is {engine.name!r}"
            raise Problem(404, message, param="model", code="model_not_found")
        return served()

    @get("/health", responses={503: {"model": Health, "description": "It takes none."}})
    async def health(response: Response) -> Health:
        """Whether the server takes requests, else 503, and what it does."""
        counts, stopping = engine.counts, engine.stopping
        if stopping:
            response.status_code = 503
        return Health(
            status="stopping" if stopping else "ok",
            model=engine.name,
            waiting=counts.waiting,
            answering=counts.answering,
            drawing=counts.drawing,
        )

    @get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @get("/", response_class=HTMLResponse)
    async def show_page() -> Response:
        """A page to talk and draw in."""
        return HTMLResponse(page, headers=page_headers)

    return router


def _page() -> tuple[str, dict[str, str]]:
    """The page, and the policy that lets its own style and script run and nothing else."""
    resource = files(__package__) / "page.html"
    text = resource.read_text(encoding="utf-8") if resource.is_file() else _PLACEHOLDER

    def hashes(tag: str) -> str:
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = [hashlib.sha256(content.encode()).digest() for content in contents]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests) or "'none'"

    policy = (
        f"default-src 'none'; style-src {hashes('style')}; script-src {hashes('script')}; connect-src 'self'; "
        "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}


def _describe_key(app: FastAPI) -> None:
    """Have /openapi.json say where the key is asked for; the middleware asks."""
    plain = app.openapi

    def with_key() -> dict[str, Any]:
        description = plain()
        scheme = HTTPBearer().model.model_dump(by_alias=True, exclude_none=True, mode="json")
        description.setdefault("components", {})["securitySchemes"] = {"key": scheme}
        for path, item in description["paths"].items():
            for operation in item.values():
                operation["security"] = [] if path in OPEN_PATHS else [{"key": []}]
        return description

    app.openapi = with_key  # type: ignore[method-assign]
