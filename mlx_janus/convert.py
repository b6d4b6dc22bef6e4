"""``python -m mlx_janus.convert``: a PyTorch model becomes a folder that loads at once."""

from __future__ import annotations

from pathlib import Path

import click

from .options import Command, byte_progress, complete_folders, say, version_option


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", shell_complete=complete_folders)
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--bits", type=click.Choice(["4", "8"]), help="Quantize the language model.  [default: keep it float]")
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    help="Weights that share one scale, with --bits.  [default: 64]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Store float weights so; the image codec keeps its own type.  [default: the source's]",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit, if SOURCE is on the Hub.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it is a converted model.")
@click.option("--verify", is_flag=True, help="Write nothing: check OUTPUT against SOURCE, value by value.")
@version_option
def main(
    source: str,
    output: Path,
    bits: str | None,
    group_size: str | None,
    dtype: str | None,
    revision: str | None,
    overwrite: bool,
    verify: bool,
) -> None:
    """Convert SOURCE, a PyTorch model folder or a Hub id, into the folder OUTPUT.

    DeepSeek's layout and transformers' are read, from .safetensors or .bin files; no code of the source runs. OUTPUT
    appears when it is whole. Memory stays under 3.5 GB whatever the model's size.

    \b
    Examples:
      python -m mlx_janus.convert deepseek-ai/Janus-Pro-1B models/janus-pro-1b
      python -m mlx_janus.convert deepseek-ai/Janus-Pro-7B models/janus-pro-7b-4bit --bits 4
      python -m mlx_janus.convert ./Janus-1.3B models/janus-1.3b --dtype bfloat16
      python -m mlx_janus.convert ./Janus-1.3B models/janus-1.3b --verify
    """
    if verify and (bits or group_size or dtype or overwrite):
        given = "--bits, --group-size, --dtype and --overwrite"
        raise click.UsageError(f"--verify checks OUTPUT as it was made: leave {given} out.")
    if group_size and not bits:
        raise click.UsageError("--group-size goes with --bits: add --bits 4 or 8, or leave it out.")
    from .memory import format_size
    from .weights.convert import ConvertOptions, check_output, convert_checkpoint, verify_conversion
    from .weights.quantize import DEFAULT_GROUP_SIZE
    from .weights.sources import find_source

    size = int(group_size) if group_size else DEFAULT_GROUP_SIZE
    options = ConvertOptions(int(bits) if bits else None, size, dtype, overwrite)  # type: ignore[arg-type]
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
        return
    say(f"Wrote {made.path}: {made.tensors} tensors, {format_size(made.size)}.")
    if quantization := made.config.quantization:
        kept = ", ".join(quantization.kept_float or ()) or "none"
        say(f"Quantized {len(quantization.layers)} layers to {quantization.bits} bits (heads and adaptors to 8).")
        say(f"Layers too narrow to be quantized, kept float: {kept}.")


if __name__ == "__main__":
    main(prog_name="python -m mlx_janus.convert")
