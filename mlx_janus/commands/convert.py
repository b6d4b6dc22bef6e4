"""``python -m mlx_janus.convert``: a PyTorch model becomes a folder that loads at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import DTYPES, GROUP_SIZES
from .options import (
    bits_option,
    complete_folders,
    goes_with,
    recipe_option,
    refuse_if,
    version_option,
    whole_number,
)
from .progress import byte_progress
from .runner import Command, import_mlx, say

if TYPE_CHECKING:
    from ..weights.convert import Conversion, ConvertOptions, Source

_OF_MAKING = ("bits", "recipe", "group_size", "dtype", "overwrite")  # of no use with --verify


def _no_repository(ctx: click.Context) -> str | None:
    """Refuse an --upload that names no repository."""
    from ..weights.hub import HUB_ID

    name = ctx.params["upload"]
    if name and not HUB_ID.fullmatch(name):
        return f"--upload takes owner/name, got {name[:200]!r}."
    return None


_RULES = (
    refuse_if(
        lambda values: values["verify"] and any(values[name] for name in _OF_MAKING),
        "--verify checks OUTPUT as it was made: leave --bits, --recipe, --group-size, --dtype and --overwrite out.",
    ),
    goes_with("--group-size", "--bits", "add --bits 4 or 8, or leave it out"),
    goes_with("--private", "--upload", "name a repository"),
    _no_repository,
)


@click.command(cls=Command, rules=_RULES)
@click.argument("source", shell_complete=complete_folders)
@click.argument("output", type=click.Path(path_type=Path))
@bits_option
@recipe_option
@click.option(
    "--group-size",
    type=click.Choice([str(size) for size in GROUP_SIZES]),
    callback=whole_number,
    help="Weights that share one scale, with --bits.  [default: 64]",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Store float weights so; the image codec keeps its own type.  [default: the source's]",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit, if SOURCE is on the Hub.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it is a converted model.")
@click.option(
    "--verify", is_flag=True, help="Write nothing: check OUTPUT against SOURCE, value by value."
)
@click.option(
    "--upload",
    metavar="REPO",
    help="Put OUTPUT and a model card into this model repository on the Hub. If it is not there it is made, for all to "
    "see unless you give --private or your account's default is private.",
)
@click.option(
    "--private",
    is_flag=True,
    help="Make that repository a private one; one that is public is refused.",
)
@version_option
def main(
    source: str,
    output: Path,
    revision: str | None,
    verify: bool,
    upload: str | None,
    private: bool,
    **making: Any,
) -> None:
    """Convert SOURCE, a PyTorch model folder, a Hub id or a short name, into the folder OUTPUT.

    DeepSeek's layout and transformers' are read, from .safetensors or .bin files; no code of the source runs. OUTPUT
    appears when it is whole. Memory stays under 3.5 GB whatever the model's size. Nothing is uploaded without --upload,
    which needs a token (`hf auth login`).

    \b
    Examples:
      python -m mlx_janus.convert deepseek-ai/Janus-Pro-1B models/janus-pro-1b
      python -m mlx_janus.convert deepseek-ai/Janus-Pro-7B models/janus-pro-7b-4bit --bits 4
      python -m mlx_janus.convert deepseek-ai/Janus-Pro-7B models/janus-pro-7b-light --recipe light
      python -m mlx_janus.convert ./Janus-1.3B models/janus-1.3b --dtype bfloat16
      python -m mlx_janus.convert ./Janus-1.3B models/janus-1.3b --verify
      python -m mlx_janus.convert janus-pro-7b models/janus-pro-7b-4bit --bits 4 --upload me/janus-4bit --private
    """
    import_mlx()
    from ..weights.folder import check_output
    from ..weights.sources import find_source
    from ..weights.upload import check_upload, upload_converted

    options = _convert_options(making)
    if upload:
        check_upload(upload)
    if not verify:
        check_output(output, overwrite=options.overwrite)  # before anything is downloaded
    found = find_source(source, revision)
    if verify:
        _verify(found, output)
    else:
        _convert(found, output, options)
    if upload:
        again = f"try again with --verify --upload {upload}, which converts nothing"
        click.echo(upload_converted(output, found, upload, private=private, again=again))


def _verify(source: Source, output: Path) -> None:
    from ..weights.verify import verify_conversion

    with byte_progress() as progress:
        count = verify_conversion(source, output, progress)
    say(f"{output} is what {source.name} gives: {count} tensors compared.")


def _convert(source: Source, output: Path, options: ConvertOptions) -> None:
    from ..weights.convert import convert_checkpoint

    with byte_progress() as progress:
        made = convert_checkpoint(source, output, options, progress)
    for line in _summary(made):
        say(line)


def _convert_options(values: Mapping[str, Any]) -> ConvertOptions:
    from ..weights.convert import ConvertOptions
    from ..weights.quantize import DEFAULT_GROUP_SIZE

    return ConvertOptions(
        bits=values["bits"],
        group_size=values["group_size"] or DEFAULT_GROUP_SIZE,
        dtype=values["dtype"],
        overwrite=values["overwrite"],
        recipe=values["recipe"],
    )


def _summary(made: Conversion) -> list[str]:
    """Return lines that tell what was written and how it was quantized."""
    from ..memory import format_size

    lines = [f"Wrote {made.path}: {made.tensors} tensors, {format_size(made.size)}."]
    quantization = made.config.quantization
    if quantization is not None:
        kept = ", ".join(quantization.kept_float or ()) or "none"
        way = f"by {quantization.choice}"
        if not quantization.recipe:
            way = f"to {quantization.choice} (heads and adaptors to 8)"
        lines.append(f"Quantized {len(quantization.layers)} layers {way}.")
        lines.append(f"Layers too narrow to be quantized, kept float: {kept}.")
    return lines
