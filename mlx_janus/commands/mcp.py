"""`mlx-janus mcp`: tools for programs that speak the Model Context Protocol."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .arguments import LoadArguments, load_pipeline
from .options import complete_folders, quiet_option, version_option, weights_options
from .outputs import make_folder
from .runner import Command, explain, import_mlx, note, say

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline


@click.command(cls=Command)
@weights_options
@click.option(
    "-o",
    "--output-dir",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    shell_complete=complete_folders,
    help="Save each image in this folder too, and tell the program its path.  "
    "[default: images are only sent]",
)
@quiet_option
@version_option
@click.pass_context
def main(ctx: click.Context, /, output_dir: Path | None, **options: Any) -> None:
    """Offer one model as tools to programs such as Claude Desktop, by the Model Context Protocol.

    Tools: generate_image, ask_about_image, edit_image. The program starts this command, and talks
    to it on stdin and stdout. The model is loaded in the background. The command ends when the
    program closes stdin. `mlx-janus serve` offers the same tools over HTTP, at /mcp.
    Needs the extra "mcp". Without it, the command prints the line that installs it.

    \b
    Examples:
      mlx-janus mcp
      mlx-janus mcp -m janus-pro-1b --bits 4
      mlx-janus mcp -m janus-4o-7b --output-dir ~/Pictures/Janus
    """
    from ..mcp.package import check_installed

    check_installed()
    if output_dir is not None:
        make_folder(output_dir, "--output-dir")
        output_dir = output_dir.resolve()
    import_mlx()
    from ..mcp.stdio import run_stdio

    arguments = LoadArguments.from_options(options)

    def load() -> JanusPipeline:
        """Load the model in the context of this command, which holds --quiet."""
        # The engine calls this in its thread, where click has no current context.
        with ctx.scope(cleanup=False):
            return load_pipeline(arguments)

    if sys.stdin.isatty():
        note("This command waits for a program that speaks MCP. Ctrl-C stops it.")
    run_stdio(load, explain=_explain, report=_report, output_folder=output_dir)


def _explain(error: Exception) -> str:
    """Return one line about an error; log the traceback of a bug."""
    message = explain(error)
    if message is None:
        logging.getLogger("mlx_janus.mcp").error("internal error", exc_info=error)
        message = f"internal error: {type(error).__name__}"
    return message


def _report(message: str) -> None:
    """Print an error to stderr, and other lines unless the command is quiet."""
    if message.startswith("Error:"):
        say(message)
    else:
        note(message)
