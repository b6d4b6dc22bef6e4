"""``mlx-janus serve``: one model over HTTP, as OpenAI's API has it, and a page to talk and draw in."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from ..errors import OptionError
from .arguments import LoadArguments, load_pipeline
from .options import quiet_option, version_option, weights_options
from .progress import byte_progress
from .runner import Command, import_mlx, note, say
from .wording import to_flags

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline
    from ..server.settings import Settings

_KEY = "MLX_JANUS_API_KEY"


@click.command(cls=Command)
@weights_options
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="HOST",
    help="Name or address to listen at.",
)
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
    "--allow-url-images",
    is_flag=True,
    help="Fetch pictures that requests name, from public https addresses.",
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
    from ..server.run import run_server

    settings = _settings(options)
    arguments = LoadArguments.of(options)

    def load() -> JanusPipeline:
        with ctx.scope(cleanup=False):  # click's context is one of the main thread alone
            return load_pipeline(arguments)

    if settings.log_requests:
        _log_requests()
    stopped_by = run_server(
        settings,
        load,
        queue=options["queue"],
        prepare=lambda: _download_and_convert(arguments),
        ready=_greet,
    )
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt


def _settings(options: Mapping[str, Any]) -> Settings:
    from ..server.settings import Settings

    host, key = options["host"], options["api_key"]
    if key is None:
        key = os.environ.get(_KEY)  # click takes an empty one for none
    requests = max(256, options["queue"] + 64)  # those that wait, and those under way
    try:
        return Settings(
            host=host[1:-1]
            if host.startswith("[") and host.endswith("]")
            else host,  # as addresses of the web have it
            port=options["port"],
            api_key=key,
            allow_url_images=options["allow_url_images"],
            cors_origins=options["cors_origins"],
            most_requests=requests,
            most_connections=2 * requests,
            log_requests=options["log_requests"],
        )
    except OptionError as error:
        raise click.UsageError(f"{to_flags(str(error))}.") from None


def _download_and_convert(arguments: LoadArguments) -> None:
    """Make the model's converted folder, if it does not exist."""
    import_mlx()
    from ..weights.sources import find_converted

    if arguments.model is None:
        return
    with byte_progress() as progress:
        find_converted(
            arguments.model,
            bits=arguments.bits,
            recipe=arguments.recipe,
            dtype=arguments.dtype,
            revision=arguments.revision,
            progress=progress,
        )


def _greet(name: str, url: str) -> None:
    note(f"{name} is ready. A page is at the address below, OpenAI's API under /v1. Ctrl-C stops.")
    click.echo(url)


def _log_requests() -> None:
    """Print the server's log of requests on stderr."""

    class PrintingHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with contextlib.suppress(OSError):  # nobody reads stderr any more: requests go on
                say(record.getMessage())

    log = logging.getLogger("mlx_janus.server.requests")
    log.addHandler(PrintingHandler())
    log.propagate = False
    log.setLevel(logging.INFO)
