"""Write docs/cli.md, the commands' help texts: ``python docs/write_cli.py``.

The tests fail if it is stale.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

from mlx_janus.__main__ import COMMANDS, main

TARGET = Path(__file__).with_name("cli.md")
_WIDTH = 100


def page() -> str:
    """Return the Markdown of docs/cli.md: the help text of each command."""
    parts = [
        "# Commands\n",
        "Written by `python docs/write_cli.py` from the commands' own `--help`.\n",
    ]
    parts += _section(main, "mlx-janus")
    for name in COMMANDS:
        parts += _section(
            importlib.import_module(f"mlx_janus.commands.{name}").main, f"mlx-janus {name}"
        )
    return "\n".join(parts)


def _section(command: click.Command, path: str) -> list[str]:
    """Return the section of a command, and the sections of its subcommands.

    Args:
        command: the command. For ``main``, ``page`` adds the subcommands itself.
        path: the words of the command line, such as "mlx-janus models add".
    """
    context = click.Context(
        command,
        info_name=path,
        terminal_width=_WIDTH,
        max_content_width=_WIDTH,
        **command.context_settings,
    )
    text = command.get_help(context).rstrip()
    parts = [f"## {path}\n", f"```\n{text}\n```\n"]
    if isinstance(command, click.Group) and command is not main:
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            parts += _section(inner, f"{path} {name}")
    return parts


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
