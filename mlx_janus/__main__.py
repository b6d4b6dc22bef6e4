"""``mlx-janus`` and ``python -m mlx_janus``: the group of all commands."""

from __future__ import annotations

import importlib

import click

from .commands.options import version_option
from .commands.runner import Group

COMMANDS = (
    "generate",
    "caption",
    "chat",
    "serve",
    "convert",
    "evaluate",
    "train",
    "models",
    "doctor",
)  # names of the commands, and of their modules in `commands`


class LazyGroup(Group):
    """A command group that imports a command on first use, so that ``--help`` is fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command, and return the command; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".commands.{cmd_name}", __package__)
        command: click.Command = module.main
        return command


@click.command(cls=LazyGroup)
@version_option
def main() -> None:
    """DeepSeek's Janus on MLX: answers questions about images, and generates images.

    \b
    Examples:
      mlx-janus generate -p "a red circle above a blue square"
      mlx-janus generate -m deepseek-ai/Janus-Pro-1B -p "a red fox in fresh snow"
      mlx-janus caption -m deepseek-ai/Janus-Pro-1B photos -o captions.jsonl
      mlx-janus chat -m deepseek-ai/Janus-Pro-1B
      mlx-janus serve -m deepseek-ai/Janus-Pro-1B
      mlx-janus convert deepseek-ai/Janus-Pro-7B models/janus-pro-7b-4bit --bits 4
    """


if __name__ == "__main__":
    main(prog_name="mlx-janus")
