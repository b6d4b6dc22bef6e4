"""Exceptions as replies."""

from __future__ import annotations

from starlette.types import Message, Receive, Scope, Send

from ..errors import to_api_error
from .base import HTTPMiddleware


class ErrorMiddleware(HTTPMiddleware):
    """An error object as the reply to every exception of the application inside."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request. Turn an exception into a reply, unless a reply has begun.

        Raises:
            ConnectionAbortedError: the application failed after its reply had begun.
        """
        reply_begun = False

        async def watching_send(message: Message) -> None:
            """Send a message of the reply, and note that the reply has begun."""
            nonlocal reply_begun
            reply_begun = True
            await send(message)

        try:
            await self.app(scope, receive, watching_send)
        except Exception as error:
            api_error = to_api_error(error)  # logs an internal error, even after a reply has begun
            if reply_begun:  # a second reply is impossible, so make uvicorn break off the first
                raise ConnectionAbortedError from None
            await api_error.response(scope["path"])(scope, receive, send)
