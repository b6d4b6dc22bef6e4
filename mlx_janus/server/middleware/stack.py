"""The order of the middlewares."""

from __future__ import annotations

from starlette.middleware import Middleware

from ..metrics import Metrics
from ..settings import Settings
from .access_log import AccessLogMiddleware
from .api_key import APIKeyMiddleware
from .body_limit import BodyLimitMiddleware
from .cors import CORSHeadersMiddleware
from .error_replies import ErrorMiddleware
from .framing import FramingMiddleware
from .paths import PathMiddleware
from .same_origin import SameOriginMiddleware
from .security_headers import SecurityHeadersMiddleware


def middleware_stack(settings: Settings, metrics: Metrics) -> list[Middleware]:
    """Return the middlewares that the settings call for, outermost first."""
    stack = [
        Middleware(AccessLogMiddleware, metrics=metrics, log_requests=settings.log_requests),
        Middleware(PathMiddleware),
        Middleware(SecurityHeadersMiddleware),
        Middleware(ErrorMiddleware),
        Middleware(FramingMiddleware),
        Middleware(SameOriginMiddleware, settings=settings),
    ]
    # The second ErrorMiddleware is inside the CORS middleware, so that its replies get CORS headers
    # and the allowed sites can read them.
    stack += [Middleware(CORSHeadersMiddleware, settings=settings), Middleware(ErrorMiddleware)]
    if settings.api_key is not None:
        stack.append(Middleware(APIKeyMiddleware, key=settings.api_key))
    # This middleware reads the body. It is the innermost one, so that the body of a request that
    # another middleware refuses is never read.
    stack.append(Middleware(BodyLimitMiddleware, settings=settings))
    return stack
