"""The server as a process: its socket, the engines, uvicorn, and the signals that stop them."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import JanusError
from ..installation import install_command
from .settings import Settings, is_loopback

if TYPE_CHECKING:
    from ..engine.pool import EnginePool, ModelSource
    from ..pipeline import JanusPipeline
    from .connections import StopSignals

_M_MMAP_THRESHOLD = -3  # number of the option in glibc's malloc.h
_OWN_MAPPING = 1 << 20  # bytes from which a block is mapped, and given back, on its own

Load = Callable[[], "JanusPipeline"]
"""Returns the loaded model."""
Ready = Callable[[str, str], None]
"""Called with the model's name and the server's address."""


def run_server(
    settings: Settings,
    load: Load | Sequence[ModelSource],
    *,
    queue: int = 64,
    idle_seconds: float | None = None,
    max_loaded: int | None = None,
    prepare: Callable[[], None] = lambda: None,
    ready: Ready = lambda _name, _url: None,
) -> int:
    """Serve one model or several until SIGINT or SIGTERM. Call it in the main thread.

    Args:
        settings: address, access and limits.
        load: returns the model, and is called in the engine's thread; or the sources of several
            models. The first one is loaded at once, and the others when a request needs them.
        queue: number of requests that may wait.
        idle_seconds: seconds without requests after which a model is unloaded; None: never.
        max_loaded: the maximum number of loaded models; None: as many as fit into memory.
        prepare: downloads and converts models if needed. It is called after the address is bound
            and before ``load``, in this thread, so that Ctrl-C interrupts it.
        ready: called with the first model's name when connections are accepted.

    Returns:
        The number of the signal that stopped the server.

    Raises:
        JanusError: the address cannot be bound or needs a key, a package is missing, the model
            cannot be loaded, or the engine failed.
    """
    _return_freed_memory()
    with _bound_socket(settings) as listener:
        _check_packages()
        prepare()
        limits = {"max_waiting": queue, "idle_seconds": idle_seconds, "max_loaded": max_loaded}
        return asyncio.run(_serve(load, settings, listener, limits, ready))


def _return_freed_memory() -> None:
    """Let this process return the memory of large freed blocks to the system.

    By default glibc keeps blocks of up to 32 MB in its heap once such a block has been freed, and
    returns only the heap's top. So the server would keep the memory of its largest requests. Other
    C libraries are left as they are.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl has no ``mallopt``
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING)


@contextlib.contextmanager
def _bound_socket(settings: Settings) -> Iterator[socket.socket]:
    """Yield a socket that is bound to the address but does not accept connections yet.

    Raises:
        JanusError: the host has no address, its address is in use or belongs to another machine, or
            other machines can reach it although no key is set.
    """
    try:
        found_addresses = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found_addresses[0]  # the system's first choice
        # ``Settings`` has checked only the name, but even "localhost" may have an address that is
        # not loopback.
        if settings.api_key is None and not is_loopback(str(address[0])):
            found = f"{settings.host} is {address[0]}, which other machines can reach"
            raise JanusError(f"{found}: set a key with api_key=...")
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: an empty or too long part of a name
        reason = error.strerror if isinstance(error, OSError) else "it is not a name"
        message = f"{settings.host} is not an address to listen on ({reason}): check host=..."
        raise JanusError(message) from None
    with listener:
        try:
            # This lets a server restart at once on the same port. On Windows, the option would let
            # two servers share a port.
            if os.name == "posix":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            place = f"{settings.host}:{settings.port}"
            message = f"cannot listen on {place} ({error.strerror}): name another port=..."
            raise JanusError(message) from None
        yield listener


def _check_packages() -> None:
    """Check that the server's packages are installed, before minutes are spent on a model.

    Raises:
        JanusError: a package is missing.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        fix = install_command("server")
        raise JanusError(f"{error.name} is not installed: {fix}") from None


async def _serve(
    load: Load | Sequence[ModelSource],
    settings: Settings,
    listener: socket.socket,
    limits: dict[str, Any],
    ready: Ready,
) -> int:
    """Serve until a signal arrives, and return the signal's number.

    Args:
        load: as for ``run_server``.
        settings: address, access and limits.
        listener: the bound socket.
        limits: keyword arguments of the pool.
        ready: as for ``run_server``.

    Raises:
        JanusError: the first model cannot be loaded, or an engine failed.
    """
    from ..engine.pool import EnginePool, ModelSource
    from .app import create_app
    from .connections import GRACE, StoppableServer, StopSignals, uvicorn_config

    pool = EnginePool([ModelSource(load)] if callable(load) else load, **limits)
    with StopSignals() as signals:
        try:
            if not await _start_pool(pool, signals):
                return signals.first
            # Silence uvicorn's own log, because this package logs the errors itself.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            server = StoppableServer(
                uvicorn_config(create_app(pool, settings), settings),
                close_engine=lambda: pool.close(GRACE),
                on_ready=lambda: ready(pool.models[0].name, _url(settings, listener)),
            )
            # Stop at a signal, and also if an engine's thread has failed, so that a supervisor can
            # restart the server.
            stoppers = [
                asyncio.create_task(server.stop_after(event))
                for event in (signals.arrived, pool.failed)
            ]
            await server.serve(sockets=[listener])
            for task in stoppers:
                task.cancel()
            if pool.failure is not None:
                raise JanusError("the model's thread failed (see above): start the server again")
            return signals.first
        finally:
            # 0 seconds of grace. This does nothing if the server has closed the pool.
            await pool.close(0)


async def _start_pool(pool: EnginePool, signals: StopSignals) -> bool:
    """Start the pool, which loads the first model. Return whether it started.

    If a signal arrives first, close the pool and return False. Closing waits while the engine's
    thread loads the model or the weights of one task, because loading cannot be interrupted.

    Raises:
        JanusError: the model cannot be loaded.
    """
    starting = asyncio.create_task(pool.start())
    signal_arrived = asyncio.create_task(signals.arrived.wait())
    await asyncio.wait({starting, signal_arrived}, return_when=asyncio.FIRST_COMPLETED)
    signal_arrived.cancel()
    if signals.first:
        await pool.close(0)
        await asyncio.gather(starting, return_exceptions=True)
        return False
    await starting  # raises the error if the model could not be loaded
    return True


def _url(settings: Settings, listener: socket.socket) -> str:
    """Return the server's URL, with the port that the system chose for port 0."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    port = listener.getsockname()[1]
    return f"http://{host}:{port}"
