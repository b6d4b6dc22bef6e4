"""``mlx-janus serve``: one model over HTTP, as OpenAI's API has it, and a page to talk and draw in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from ..errors import JanusError, OptionError
from .arguments import LoadArguments, load_pipeline
from .options import quiet_option, version_option, weights_options
from .progress import byte_progress
from .runner import Command, import_mlx, note, say

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..pipeline import JanusPipeline
    from ..server.connections import StopSignals
    from ..server.settings import Settings

_KEY = "MLX_JANUS_API_KEY"


@click.command(cls=Command)
@weights_options
@click.option("--host", default="127.0.0.1", show_default=True, metavar="HOST", help="Name or address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    metavar="PORT",
    help="Port to listen at; 0: a free one.",
)
@click.option(
    "--api-key",
    metavar="KEY",
    envvar=_KEY,
    help="Ask every request for this key, also taken from MLX_JANUS_API_KEY, where `ps` does not show it; a host that "
    "others reach needs one.",
)
@click.option(
    "--allow-url-images", is_flag=True, help="Fetch pictures that requests name, from public https addresses."
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this site use the server, such as https://chat.example.org; may be repeated.",
)
@click.option(
    "--queue",
    type=click.IntRange(1, 10_000),
    default=64,
    show_default=True,
    metavar="N",
    help="How many requests may wait; the next is told to come again.",
)
@click.option(
    "--log-requests",
    is_flag=True,
    help="A line on stderr for each request: method, route, status, sizes and seconds, nothing of what it says.",
)
@quiet_option
@version_option
@click.pass_context
def main(ctx: click.Context, /, **options: Any) -> None:
    """Serve one model to OpenAI's clients and to a browser.

    Routes: /v1/chat/completions, /v1/images/generations, /v1/models, /health, /metrics, /openapi.json, and the page at
    /. The address goes to stdout when all is ready. Ctrl-C or SIGTERM lets what is under way finish; a second Ctrl-C
    does not. Needs more packages: pip install "mlx-janus[server]".

    \b
    Examples:
      mlx-janus serve
      mlx-janus serve -m deepseek-ai/Janus-Pro-1B --port 8000
      mlx-janus serve -m janus-pro-7b --bits 4 --cors-origin https://chat.example.org
      MLX_JANUS_API_KEY=$(openssl rand -hex 24) mlx-janus serve -m janus-pro-1b --host 0.0.0.0
    """
    settings = _settings(options)
    with _listening(settings) as listener:
        _check_packages()
        import_mlx()
        _convert(options)

        def load() -> JanusPipeline:
            with ctx.scope(cleanup=False):  # the thread that loads has no context of its own
                return load_pipeline(LoadArguments.of(options))

        if asyncio.run(_serve(load, settings, listener, options["queue"])) == signal.SIGINT:
            raise KeyboardInterrupt


def _settings(options: dict[str, Any]) -> Settings:
    from ..server.settings import Settings

    host, key = options["host"], options["api_key"]
    if key is None:
        key = os.environ.get(_KEY)  # click takes an empty one for none
    requests = max(256, options["queue"] + 64)  # those that wait, and those under way
    try:
        return Settings(
            host=host[1:-1] if host.startswith("[") and host.endswith("]") else host,  # as addresses of the web have it
            port=options["port"],
            api_key=key,
            allow_url_images=options["allow_url_images"],
            cors_origins=options["cors_origins"],
            most_requests=requests,
            most_connections=2 * requests,
            log_requests=options["log_requests"],
        )
    except OptionError as error:
        raise click.UsageError(f"{error}.") from None


@contextlib.contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    """A socket that has its address before minutes are spent on a model; it takes connections later.

    Raises:
        JanusError: the address is taken, or not this machine's.
    """
    from ..server.settings import is_loopback

    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        if settings.api_key is None and not is_loopback(str(address[0])):
            raise JanusError(f"{settings.host} is {address[0]}, which other machines reach: set a key with --api-key")
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: an empty or a very long part of a name
        reason = error.strerror if isinstance(error, OSError) else "it is no name"
        raise JanusError(f"{settings.host} is no address to listen at ({reason}): check --host") from None
    with listener:
        try:
            if os.name == "posix":  # elsewhere it would let two servers have one port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            place = f"{settings.host}:{settings.port}"
            raise JanusError(f"{place} cannot be listened at ({error.strerror}): name another --port") from None
        yield listener


def _check_packages() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise JanusError(f"{error.name} is not installed: pip install 'mlx-janus[server]'") from None


def _convert(options: dict[str, Any]) -> None:
    """Download and convert where needed, in this thread, which Ctrl-C stops."""
    from ..weights.sources import find_converted

    if options["model"] is None:
        return
    with byte_progress() as progress:
        find_converted(
            options["model"],
            bits=options["bits"],
            recipe=options["recipe"],
            dtype=options["dtype"],
            revision=options["revision"],
            progress=progress,
        )


async def _serve(load: Callable[[], JanusPipeline], settings: Settings, listener: socket.socket, queue: int) -> int:
    """Serve until a signal comes, and return its number."""
    from ..engine.engine import Engine
    from ..server.app import create_app
    from ..server.connections import GRACE, StoppableServer, StopSignals, configured

    engine = Engine(load, waiting=queue)
    with StopSignals() as signals:
        try:
            if not await _loaded(engine, signals):
                return signals.number
            if settings.log_requests:
                _log_requests()
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what it would say of errors is said by us
            server = StoppableServer(
                configured(create_app(engine, settings), settings),
                close=lambda: engine.close(GRACE),
                ready=lambda: _greet(engine.name, settings, listener),
            )
            # A server without its engine answers nothing: whoever watches it shall see it end, and may start it again.
            watching = [asyncio.create_task(server.stop_after(event)) for event in (signals.came, engine.ended)]
            await server.serve(sockets=[listener])
            for task in watching:
                task.cancel()
            if engine.failure is not None:
                raise JanusError("the model's thread has failed, as told above: start the server again")
            return signals.number
        finally:
            await engine.close(0)


async def _loaded(engine: Engine, signals: StopSignals) -> bool:
    """Load the model; False if a signal comes before it is there, after the piece of work that is under way."""
    starting, stopping = asyncio.create_task(engine.start()), asyncio.create_task(signals.came.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if signals.number:
        await engine.close(0)
        await asyncio.gather(starting, return_exceptions=True)
        return False
    await starting
    return True


def _greet(name: str, settings: Settings, listener: socket.socket) -> None:
    host, port = settings.host, listener.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    note(f"{name} is ready. A page is at the address below, OpenAI's API under /v1. Ctrl-C stops.")
    click.echo(f"http://{shown}:{port}")


def _log_requests() -> None:
    log = logging.getLogger("mlx_janus.server.requests")

    class Say(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with contextlib.suppress(OSError):  # nobody reads stderr any more: requests go on
                say(record.getMessage())

    log.addHandler(Say())
    log.propagate = False
    log.setLevel(logging.INFO)
