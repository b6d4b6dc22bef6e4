"""``mlx-janus models``: list, add and remove the models on this machine."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ..errors import JanusError, OutputError
from .options import bits_option, recipe_option, refuse_two_revisions, version_option
from .progress import byte_progress
from .runner import Command, Group, check_working_folder, import_mlx, say
from .wording import flags_in_log_messages

if TYPE_CHECKING:
    from ..weights.cache import ModelEntry

_TITLES = ("ID", "model", "commit", "state", "bits", "type", "size", "last used")


@click.group(cls=Group, invoke_without_command=True)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON array instead, with sizes in bytes."
)
@version_option
@click.pass_context
def main(context: click.Context, as_json: bool) -> None:
    """List the models on this machine: converted, in the Hub's cache, and of other programs.

    Other programs' models are looked for in LM Studio's folders and in ~/models, or in the folders
    that MLX_JANUS_MODELS names, with ":" between them.

    \b
    Short names, for every command with a model: janus-1.3b, janus-pro-1b, janus-pro-7b, tiny.

    \b
    Examples:
      mlx-janus models
      mlx-janus models add janus-pro-7b --bits 4
      mlx-janus models remove 0f3a52c8
      mlx-janus models remove janus-pro-7b --downloads
      mlx-janus models prune
    """
    if context.invoked_subcommand:
        if as_json:
            raise click.UsageError("--json goes only with the list: leave it out.")
        return
    check_working_folder()
    import_mlx()
    from ..weights.cache import list_models

    entries = list_models()
    if as_json:
        objects = [_json_object(entry) for entry in entries]
        click.echo(json.dumps(objects, indent=1, ensure_ascii=False))
        return
    for line in _table([_TITLES, *map(_row, entries)]):
        click.echo(line)


@main.command(cls=Command)
@click.argument("model", callback=refuse_two_revisions)
@bits_option
@recipe_option
@click.option(
    "--revision",
    metavar="REV",
    callback=refuse_two_revisions,
    help="Branch, tag or commit on the Hub.",
)
def add(model: str, bits: int | None, recipe: str | None, revision: str | None) -> None:
    """Download MODEL if needed, and convert it into the cache for `--model MODEL`.

    MODEL is a Hub id, a short name, or a PyTorch model folder. The converted folder's path is
    printed.

    \b
    Examples:
      mlx-janus models add janus-pro-1b
      mlx-janus models add deepseek-ai/Janus-Pro-7B --bits 4
      mlx-janus models add deepseek-ai/Janus-Pro-7B --recipe light
    """
    import_mlx()
    from ..weights.sources import find_converted

    with byte_progress() as progress, flags_in_log_messages():
        folder = find_converted(
            model, bits=bits, recipe=recipe, revision=revision, progress=progress
        )
    click.echo(str(folder))


@main.command(cls=Command)
@click.argument("model")
@click.option("--downloads", is_flag=True, help="Also remove the model from the Hub's cache.")
@click.option("-y", "--yes", is_flag=True, help="Remove without asking.")
def remove(model: str, downloads: bool, yes: bool) -> int:
    """Remove MODEL from the cache.

    MODEL is an ID from the list, or a model name for all conversions of that model. The command
    lists the folders to remove and asks first. It never touches folders outside the caches.

    \b
    Examples:
      mlx-janus models remove 0f3a52c8
      mlx-janus models remove janus-pro-1b --downloads --yes
    """
    import_mlx()
    from ..weights.cache import check_removable, find_models

    found = find_models(model)
    chosen = [
        entry for entry in found if entry.place == "cache" or (downloads and entry.is_download)
    ]
    if not chosen and any(entry.is_download for entry in found):
        place = "the Hub's cache, which other programs share"
        raise JanusError(f"{model} is in {place}: pass --downloads to remove it")
    # Check all models before the first is removed. If none was chosen, the check of the first model
    # found raises the reason.
    for entry in chosen or found:
        check_removable(entry)
    return _remove(chosen, yes)


@main.command(cls=Command)
@click.option("-y", "--yes", is_flag=True, help="Remove without asking.")
def prune(yes: bool) -> int:
    """Remove conversions from the cache that are of no use any more.

    These are superseded ones, whose source has changed and was converted again, and the remains of
    stopped conversions. The command lists them and asks first. A model that a process is reading
    is kept.

    \b
    Examples:
      mlx-janus models prune
      mlx-janus models prune --yes
    """
    import_mlx()
    from ..weights.cache import check_removable, list_models

    chosen = []
    for entry in list_models():
        if entry.state not in ("superseded", "left over"):
            continue
        try:
            check_removable(entry)
        except OutputError as error:
            say(f"Kept: {error}")
            continue
        chosen.append(entry)
    if not chosen:
        say("There is nothing to remove.")
        return 0
    return _remove(chosen, yes)


def _remove(entries: Sequence[ModelEntry], yes: bool) -> int:
    """List models, ask, and remove them; return the exit code.

    Args:
        entries: models that can be removed.
        yes: whether to remove without asking.

    Raises:
        JanusError: nobody can answer, or the removal fails.
    """
    from ..memory import format_size
    from ..weights.cache import freed_bytes, remove_model

    for entry in entries:
        say(f"{entry.id}  {entry.source}, {entry.state}: {entry.path}")
    size = format_size(freed_bytes(entries))
    if not yes and not _user_confirms(size):
        say("Nothing was removed.")
        return 1
    for entry in entries:
        remove_model(entry)
    say(f"Removed {size}.")
    return 0


def _user_confirms(size: str) -> bool:
    """Ask the user whether to remove the models, and return the answer.

    Args:
        size: the total size of the models, such as "2.1 GB".

    Raises:
        JanusError: nobody can answer, because stdin is not a terminal.
    """
    if not _on_terminal():
        raise JanusError(f"there is no terminal to confirm the removal of {size}: pass --yes")
    return click.confirm(f"Remove {size}?", err=True)


def _on_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _row(entry: ModelEntry) -> tuple[str, ...]:
    """Return a model's row of the table, with a cell for each of ``_TITLES``.

    A cell is empty if its value is not known.
    """
    from ..memory import format_size

    last_used = time.strftime("%Y-%m-%d", time.localtime(entry.used)) if entry.used else ""
    # "" for an unreadable model, otherwise the recipe, the bits, or "-" for float weights.
    bits = "" if entry.config is None else entry.recipe or str(entry.bits or "-")
    size = format_size(entry.size)
    commit = entry.revision[:8]
    return (entry.id, entry.source, commit, entry.state, bits, entry.dtype or "", size, last_used)


def _json_object(entry: ModelEntry) -> dict[str, Any]:
    """Return the JSON object about a model. A value that is not known is None."""
    last_used = None
    if entry.used:
        last_used = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.used))
    return {
        "id": entry.id,
        "model": entry.source,
        "commit": entry.revision or None,
        "state": entry.state,
        "bits": entry.bits,
        "recipe": entry.recipe,
        "dtype": entry.dtype,
        "bytes": entry.size,
        "last_used": last_used,
        "path": str(entry.path),
    }


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Return the rows as lines of text, with each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
