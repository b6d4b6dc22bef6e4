"""``python -m mlx_janus.convert``: a PyTorch model becomes a folder that loads at once."""

from __future__ import annotations

from pathlib import Path

import click

from ..config import DTYPES, GROUP_SIZES
from .options import (
    Command,
    bits_option,
    byte_progress,
    complete_folders,
    import_mlx,
    recipe_option,
    say,
    version_option,
)


@click.command(cls=Command)
@click.argument("source", shell_complete=complete_folders)
@click.argument("output", type=click.Path(path_type=Path))
@bits_option
@recipe_option
@click.option(
    "--group-size",
    type=click.Choice([str(size) for size in GROUP_SIZES]),
    help="Weights that share one scale, with --bits.  [default: 64]",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Store float weights so; the image codec keeps its own type.  [default: the source's]",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit, if SOURCE is on the Hub.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it is a converted model.")
@click.option("--verify", is_flag=True, help="Write nothing: check OUTPUT against SOURCE, value by value.")
@click.option(
    "--upload",
    metavar="REPO",
    help="Put OUTPUT and a model card into this model repository on the Hub. If it is not there it is made, for all to "
    "see unless you give --private or your account's default is private.",
)
@click.option("--private", is_flag=True, help="Make that repository a private one; one that is public is refused.")
@version_option
def main(
    source: str,
    output: Path,
    bits: str | None,
    recipe: str | None,
    group_size: str | None,
    dtype: str | None,
    revision: str | None,
    overwrite: bool,
    verify: bool,
    upload: str | None,
    private: bool,
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
    if verify and (bits or recipe or group_size or dtype or overwrite):
        given = "--bits, --recipe, --group-size, --dtype and --overwrite"
        raise click.UsageError(f"--verify checks OUTPUT as it was made: leave {given} out.")
    if group_size and not bits:
        raise click.UsageError("--group-size goes with --bits: add --bits 4 or 8, or leave it out.")
    if private and not upload:
        raise click.UsageError("--private goes with --upload: name a repository.")
    from ..weights.hub import HUB_ID

    if upload and not HUB_ID.fullmatch(upload):
        raise click.UsageError(f"--upload takes owner/name, got {upload[:200]!r}.")
    import_mlx()
    from ..memory import format_size
    from ..weights.convert import ConvertOptions, convert_checkpoint
    from ..weights.folder import check_output
    from ..weights.quantize import DEFAULT_GROUP_SIZE
    from ..weights.sources import find_source
    from ..weights.upload import check_upload, upload_converted
    from ..weights.verify import verify_conversion

    size = int(group_size) if group_size else DEFAULT_GROUP_SIZE
    options = ConvertOptions(int(bits) if bits else None, size, dtype, overwrite, recipe)  # type: ignore[arg-type]
    if upload:
        check_upload(upload)
    if not verify:
        check_output(output, overwrite=overwrite)  # before anything is downloaded
    found = find_source(source, revision)
    with byte_progress() as progress:
        if verify:
            count = verify_conversion(found, output, progress)
        else:
            made = convert_checkpoint(found, output, options, progress)
    if verify:
        say(f"{output} is what {found.name} gives: {count} tensors compared.")
    else:
        say(f"Wrote {made.path}: {made.tensors} tensors, {format_size(made.size)}.")
        if quantization := made.config.quantization:
            kept = ", ".join(quantization.kept_float or ()) or "none"
            way = f"by {quantization.choice}" if recipe else f"to {quantization.choice} (heads and adaptors to 8)"
            say(f"Quantized {len(quantization.layers)} layers {way}.")
            say(f"Layers too narrow to be quantized, kept float: {kept}.")
    if upload:
        again = f"try again with --verify --upload {upload}, which converts nothing"
        click.echo(upload_converted(output, found, upload, private=private, again=again))
