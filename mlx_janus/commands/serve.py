"""``mlx-janus serve``: serve one model through OpenAI's HTTP API and a web page."""

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
from .wording import flags_in_log_messages, to_flags

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline
    from ..server.settings import Settings

_KEY_VARIABLE = "MLX_JANUS_API_KEY"  # in the environment


@click.command(cls=Command)
@weights_options
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="HOST",
    help="Host name or address to listen on.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    metavar="PORT",
    help="Port to listen on; 0: any free port.",
)
@click.option(
    "--api-key",
    metavar="KEY",
    envvar=_KEY_VARIABLE,
    help="Key that every request must send. `ps` shows it to other users, unless you set "
    "MLX_JANUS_API_KEY instead. Required for a HOST that other machines can reach.",
)
@click.option(
    "--allow-url-images",
    is_flag=True,
    help="Download images that requests name by a public https address.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Allow pages of this site, or this browser extension, to use the server: "
    "https://chat.example.org, chrome-extension://ID, or chrome-extension://* for any. "
    "* allows every origin, but web pages only if there is a key. May be repeated.",
)
@click.option(
    "--served-model-name",
    "served_names",
    multiple=True,
    metavar="NAME",
    help="Name of the model in lists and replies, instead of its own. May be repeated.",
)
@click.option(
    "--model-alias",
    "model_aliases",
    multiple=True,
    metavar="NAME",
    help="A further name that requests may give the model, such as gpt-4o. May be repeated.",
)
@click.option(
    "--upscale-to-size",
    is_flag=True,
    help="Enlarge generated images to the size that a request asks for, such as 1024x1024.",
)
@click.option(
    "--queue",
    type=click.IntRange(1, 10_000),
    default=64,
    show_default=True,
    metavar="N",
    help="Number of requests that may wait. Further requests are refused with status 429.",
)
@click.option(
    "--log-requests",
    is_flag=True,
    help="Print a line to stderr for each request: method, route, status, sizes and seconds, but "
    "no content.",
)
@quiet_option
@version_option
@click.pass_context
def main(ctx: click.Context, /, **options: Any) -> None:
    """Serve one model to clients of OpenAI's API and to a browser.

    Routes: /v1/chat/completions, /v1/images/generations, /v1/models, /health, /metrics,
    /openapi.json, and the web page at /. The address is printed to stdout when the server is ready.
    Ctrl-C or SIGTERM stops the server after the running requests; a second Ctrl-C stops it at once.
    Needs the extra "server". Without it, the command prints the line that installs it.

    \b
    Examples:
      mlx-janus serve
      mlx-janus serve -m deepseek-ai/Janus-Pro-1B --port 8000
      mlx-janus serve -m janus-pro-7b --bits 4 --cors-origin https://chat.example.org
      MLX_JANUS_API_KEY=$(openssl rand -hex 24) mlx-janus serve -m janus-pro-1b --host 0.0.0.0
    """
    from ..server.run import run_server

    settings = _server_settings(options)
    arguments = LoadArguments.from_options(options)

    def load() -> JanusPipeline:
        # The server calls this in another thread, where click has no current context. Enter the
        # command's context, because it holds --quiet.
        with ctx.scope(cleanup=False):
            return load_pipeline(arguments)

    if "*" in settings.cors_origins and settings.api_key is None:
        note("without a key, --cors-origin '*' allows apps and extensions, but no web page")
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
        raise KeyboardInterrupt  # exit as every command does after Ctrl-C


def _server_settings(options: Mapping[str, Any]) -> Settings:
    """Make the server's settings from click's values.

    Raises:
        click.UsageError: the server refuses a value.
    """
    from ..server.settings import Settings

    host = options["host"]
    if host.startswith("[") and host.endswith("]"):  # an IPv6 address in brackets, as in URLs
        host = host[1:-1]
    key = options["api_key"]
    if key is None:
        # click ignores an empty environment variable. Pass it on, so that ``Settings`` refuses it.
        key = os.environ.get(_KEY_VARIABLE)
    # At least 64 requests may be handled while the queue is full.
    most_requests = max(256, options["queue"] + 64)
    try:
        return Settings(
            host=host,
            port=options["port"],
            api_key=key,
            allow_url_images=options["allow_url_images"],
            cors_origins=options["cors_origins"],
            served_names=options["served_names"],
            model_aliases=options["model_aliases"],
            upscale_to_size=options["upscale_to_size"],
            most_requests=most_requests,
            most_connections=2 * most_requests,
            log_requests=options["log_requests"],
        )
    except OptionError as error:
        raise click.UsageError(f"{to_flags(str(error))}.") from None


def _download_and_convert(arguments: LoadArguments) -> None:
    """Download and convert the model, unless its converted folder is in the cache."""
    import_mlx()
    from ..weights.sources import find_converted

    if arguments.model is None:  # Janus-Tiny, which is part of the package
        return
    with byte_progress() as progress, flags_in_log_messages():
        find_converted(
            arguments.model,
            bits=arguments.bits,
            recipe=arguments.recipe,
            dtype=arguments.dtype,
            revision=arguments.revision,
            progress=progress,
        )


def _greet(name: str, url: str) -> None:
    """Print that the model ``name`` is ready, and the server's address."""
    note(f"{name} is ready: a web page at the address below, OpenAI's API under /v1. Ctrl-C stops.")
    click.echo(url)


def _log_requests() -> None:
    """Print the server's log of requests to stderr, even with --quiet."""

    class PrintingHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with contextlib.suppress(OSError):  # stderr is closed: keep serving
                say(record.getMessage())

    log = logging.getLogger("mlx_janus.server.requests")
    log.addHandler(PrintingHandler())
    log.propagate = False  # otherwise a parent logger might print each line again
    log.setLevel(logging.INFO)
