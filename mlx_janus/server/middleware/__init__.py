"""ASGI middlewares, one a file: the checks that a request passes before a route sees it."""
