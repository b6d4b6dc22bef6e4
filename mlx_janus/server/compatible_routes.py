"""The routes of further APIs: Responses, text completions, Anthropic's Messages, and tokens."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from .anthropic.route import count_tokens, create_message
from .anthropic.schema import (
    AnthropicError,
    CountReply,
    CountRequest,
    MessageReply,
    MessagesRequest,
)
from .completions import complete_text
from .completions_schema import Completion, CompletionRequest
from .errors import ANTHROPIC_PATH, APIError
from .responses.reply_schema import ResponsesReply
from .responses.route import create_response
from .responses.schema import ResponsesRequest
from .routing import ERROR_RESPONSES, JSONRoute, event_stream, streamed_responses
from .served_models import ServedModels
from .tokens import (
    DetokenizeReply,
    DetokenizeRequest,
    TokenizeReply,
    TokenizeRequest,
    detokenize,
    tokenize,
)

_ANTHROPIC_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": AnthropicError, "description": "The request is refused."},
    "5XX": {"model": AnthropicError, "description": "The server cannot complete the request."},
}


def compatible_router(models: ServedModels) -> APIRouter:
    """Return a router with the routes of all APIs in this module."""
    router = APIRouter()
    router.include_router(_text_router(models))
    router.include_router(_messages_router(models))
    router.include_router(_token_router(models))
    router.include_router(_refusing_router())
    return router


def _text_router(models: ServedModels) -> APIRouter:
    """Return a router with OpenAI's routes for Responses and for text completions."""
    router = APIRouter(prefix="/v1", route_class=JSONRoute, tags=["generation"])

    @router.post(
        "/responses",
        response_model=ResponsesReply,
        responses=streamed_responses("Server-sent events: OpenAI's response events."),
    )
    async def create_openai_response(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation, call a function or draw an image. Nothing is stored."""
        async with models.use(body.model, request) as service:
            return await create_response(body, request, service)

    @router.post(
        "/completions",
        response_model=Completion,
        responses=streamed_responses("Server-sent events: text_completion objects, then `[DONE]`."),
    )
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue texts, which are read without a chat's template."""
        async with models.use(body.model, request) as service:
            return await complete_text(body, request, service)

    return router


def _messages_router(models: ServedModels) -> APIRouter:
    """Return a router with the routes of Anthropic's API."""
    router = APIRouter(prefix=ANTHROPIC_PATH, route_class=JSONRoute, tags=["generation"])

    @router.post(
        "",
        response_model=MessageReply,
        responses={
            200: event_stream("Server-sent events: Anthropic's message events."),
            **_ANTHROPIC_ERRORS,
        },
    )
    async def create_anthropic_message(body: MessagesRequest, request: Request) -> Response:
        """Answer the last message of a conversation, in the form of Anthropic's API."""
        async with models.use(body.model, request) as service:
            return await create_message(body, request, service)

    @router.post("/count_tokens", responses=_ANTHROPIC_ERRORS)
    async def count_message_tokens(body: CountRequest, request: Request) -> CountReply:
        """Count the tokens of a conversation's prompt, images and tools included."""
        async with models.use(body.model, request) as service:
            return await count_tokens(body, service)

    return router


def _token_router(models: ServedModels) -> APIRouter:
    """Return a router with the routes for token ids."""
    router = APIRouter(
        prefix="/v1", route_class=JSONRoute, responses=ERROR_RESPONSES, tags=["tokens"]
    )

    @router.post("/tokenize")
    async def tokenize_prompt(body: TokenizeRequest, request: Request) -> TokenizeReply:
        """Return the token ids of a text or of a conversation's prompt."""
        async with models.use(body.model, request) as service:
            return await tokenize(body, service)

    @router.post("/detokenize")
    async def detokenize_ids(body: DetokenizeRequest, request: Request) -> DetokenizeReply:
        """Return the text of token ids."""
        async with models.use(body.model, request) as service:
            return await detokenize(body, service)

    return router


def _refusing_router() -> APIRouter:
    """Return a router for some routes of OpenAI that this server does not support.

    Each route refuses every request, and names the route to use instead.
    """
    router = APIRouter(prefix="/v1", include_in_schema=False)

    @router.post("/images/variations")
    async def refuse_variations() -> Response:
        """Refuse a variation of an image.

        Raises:
            APIError: always (404).
        """
        fix = "send the image and a prompt that describes the change to /v1/images/edits"
        raise APIError(404, f"this model makes no variations without a prompt: {fix}")

    @router.api_route("/responses/{path:path}", methods=["GET", "POST", "DELETE"])
    async def refuse_stored_response(path: str) -> Response:
        """Refuse to return, change or delete a response.

        Raises:
            APIError: always (404).
        """
        fix = "send the whole conversation to /v1/responses"
        raise APIError(404, f"this server stores no responses: {fix}")

    return router
