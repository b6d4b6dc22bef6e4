"""``mlx-janus convert``: convert a PyTorch model to a folder that MLX loads directly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import DTYPES, GROUP_SIZES
from .options import (
    bits_option,
    complete_folders,
    flag_needs,
    recipe_option,
    refuse_if,
    refuse_two_revisions,
    roles_option,
    version_option,
    whole_number,
)
from .progress import byte_progress
from .runner import Command, import_mlx, say
from .wording import to_flags

if TYPE_CHECKING:
    from ..weights.convert import Conversion, ConvertOptions, Source

# Parameters of the options that --verify refuses.
_CONVERSION_ONLY = ("bits", "recipe", "group_size", "dtype", "roles", "overwrite")


def _why_upload_refused(ctx: click.Context) -> str | None:
    """Return why the value of --upload is refused; None if it is owner/name or not given."""
    from ..weights.hub import HUB_ID

    name = ctx.params["upload"]
    if name and not HUB_ID.fullmatch(name):
        return f"--upload takes owner/name, got {name[:200]!r}."
    return None


def _repository(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Return the value of --upload, with the address of a repository replaced by owner/name.

    Any other value is returned unchanged. So is an address with a revision, because nothing can be
    uploaded to a revision: ``_why_upload_refused`` then refuses it.
    """
    from ..errors import CheckpointError
    from ..weights.addresses import split_revision

    if value is None:
        return None
    try:
        name, revision = split_revision(value)
    except CheckpointError:
        return value
    return value if revision else name


_RULES = (
    refuse_if(
        lambda values: values["verify"] and any(values[name] for name in _CONVERSION_ONLY),
        "--verify checks OUTPUT as it was made: "
        "leave out --bits, --recipe, --group-size, --dtype, --roles and --overwrite.",
    ),
    flag_needs("--group-size", "--bits", "add --bits 4 or 8, or leave it out"),
    flag_needs("--private", "--upload", "name a repository"),
    _why_upload_refused,
)


@click.command(cls=Command, rules=_RULES)
@click.argument("source", callback=refuse_two_revisions, shell_complete=complete_folders)
@click.argument("output", type=click.Path(path_type=Path))
@bits_option
@recipe_option
@click.option(
    "--group-size",
    type=click.Choice([str(size) for size in GROUP_SIZES]),
    callback=whole_number,
    help="Number of weights that share one scale, with --bits.  [default: 64]",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Float type of stored weights; the image codec keeps its own.  [default: the source's]",
)
@roles_option
@click.option(
    "--revision",
    metavar="REV",
    callback=refuse_two_revisions,
    help="Branch, tag or commit, if SOURCE is on the Hub.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it is a converted model.")
@click.option(
    "--verify", is_flag=True, help="Write nothing; compare OUTPUT with SOURCE, value by value."
)
@click.option(
    "--upload",
    metavar="REPO",
    callback=_repository,
    help="Upload OUTPUT and a model card to this model repository on the Hub. A new repository is "
    "public, unless you give --private or your account's default is private.",
)
@click.option(
    "--private",
    is_flag=True,
    help="Create the repository as private; refuse to upload to a public one.",
)
@version_option
def main(
    source: str,
    output: Path,
    revision: str | None,
    verify: bool,
    upload: str | None,
    private: bool,
    **conversion: Any,
) -> None:
    """Convert the PyTorch model SOURCE into the new folder OUTPUT.

    SOURCE is a folder, a Hub id, an address of the Hub or a short name, in DeepSeek's or
    transformers' layout, with .safetensors or .bin files. None of its code is run. OUTPUT appears
    only when it is complete. The conversion needs less than 3.5 GB of memory for a model of any
    size. Nothing is uploaded without --upload, which needs a token (`hf auth login`).

    \b
    Examples:
      python -m mlx_janus.convert deepseek-ai/Janus-Pro-1B models/janus-pro-1b
      python -m mlx_janus.convert deepseek-ai/Janus-Pro-7B models/janus-pro-7b-4bit --bits 4
      python -m mlx_janus.convert deepseek-ai/Janus-Pro-7B models/janus-pro-7b-light --recipe light
      python -m mlx_janus.convert ./Janus-1.3B models/janus-1.3b --dtype bfloat16
      python -m mlx_janus.convert ./Janus-1.3B models/janus-1.3b --verify
      python -m mlx_janus.convert janus-pro-7b models/7b-4bit --bits 4 --upload me/7b-4bit --private
    """
    import_mlx()
    from ..weights.folder import check_output
    from ..weights.sources import find_source
    from ..weights.upload import check_upload, upload_converted

    options = _convert_options(conversion)
    if upload:
        check_upload(upload)
    if not verify:
        check_output(output, overwrite=options.overwrite)  # before anything is downloaded
    found_source = find_source(source, revision)
    if verify:
        _verify(found_source, output)
    else:
        _convert(found_source, output, options)
    if upload:  # also after --verify, so that a folder made earlier can be uploaded
        advice = f"try again with --verify --upload {upload}, which does not convert again"
        click.echo(upload_converted(output, found_source, upload, private=private, again=advice))


def _verify(source: Source, output: Path) -> None:
    """Check that the folder ``output`` matches its source, and print a summary to stderr.

    Raises:
        JanusError: they differ, or one of them cannot be read.
    """
    from ..weights.verify import verify_conversion

    with byte_progress() as progress:
        count = verify_conversion(source, output, progress)
    say(f"{output} matches {source.name}: {count} tensors compared.")


def _convert(source: Source, output: Path, options: ConvertOptions) -> None:
    """Convert the source into the folder ``output``, and print a summary to stderr."""
    from ..weights.convert import convert_checkpoint

    with byte_progress() as progress:
        conversion = convert_checkpoint(source, output, options, progress)
    for line in _summary(conversion):
        say(line)


def _convert_options(values: Mapping[str, Any]) -> ConvertOptions:
    """Make the converter's options from click's values, given by parameter name."""
    from ..weights.convert import ConvertOptions
    from ..weights.quantize import DEFAULT_GROUP_SIZE

    return ConvertOptions(
        bits=values["bits"],
        group_size=values["group_size"] or DEFAULT_GROUP_SIZE,
        dtype=values["dtype"],
        overwrite=values["overwrite"],
        recipe=values["recipe"],
        roles=values["roles"],
    )


def _summary(conversion: Conversion) -> list[str]:
    """Return lines for the user about the written files, the roles and the quantization."""
    from ..memory import format_size

    size = format_size(conversion.size)
    lines = [f"Wrote {conversion.path}: {conversion.tensors} tensors, {size}."]
    lines.append(f"Roles: {conversion.roles}.")
    lines += [f"Note: {to_flags(note)}." for note in conversion.notes]
    quantization = conversion.config.quantization
    if quantization is None:
        return lines
    if quantization.recipe:
        method = f"by {quantization.choice}"  # "by the recipe light"
    else:
        method = f"to {quantization.choice} (heads and adaptors to 8)"  # "to 4 bits (...)"
    kept_float = ", ".join(quantization.kept_float or ()) or "none"
    lines.append(f"Quantized {len(quantization.layers)} layers {method}.")
    lines.append(f"Layers too narrow to be quantized, kept float: {kept_float}.")
    return lines
