"""Measure every claim about speed in one run: ``make bench`` or ``python benchmarks/bench.py``.

The weights are random and have a published shape, because speed and memory do not depend on their
values. The same command runs on a Mac, on CUDA and on a CPU. If a part fails, or its peer is not
installed, the others still run, and a line below the table names it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

import mlx_janus  # noqa: F401  OpenBLAS before MLX

# isort: split
import mlx.core as mx

from benchmarks import parts, peers
from benchmarks.parts import Row, Setup
from benchmarks.random_model import random_model
from benchmarks.real_size import machine

PARTS: dict[str, Callable[[Setup], Iterable[Row]]] = {
    "drawing": parts.drawing,
    "answering": parts.answering,
    "batch": parts.batch,
    "first-token": parts.first_token,
    "turns": parts.turns,
    "bytes": parts.bytes_read,
    "memory": parts.memory,
    "vq-decode": parts.vq_decode,
    "passes": parts.passes,
    "windows": parts.windows,
    "transformers": peers.transformers,
    "mlx-vlm": peers.mlx_vlm,
}


def measure(setup: Setup, names: Iterable[str]) -> tuple[list[Row], list[str]]:
    """Return the rows of these parts, and a line for each part without rows."""
    rows: list[Row] = []
    missing: list[str] = []
    for name in names:
        click.echo(f"{name} ...", err=True)
        try:
            rows += PARTS[name](setup)
        except peers.PeerMissingError as error:
            missing.append(f"{name}: {error}")
        except Exception as error:
            missing.append(f"{name}: failed, {type(error).__name__}: {error}")
        mx.clear_cache()
    return rows, missing


def table(rows: Iterable[Row]) -> list[str]:
    """Return the rows as a Markdown table."""
    lines = ["| measured | ours over the other | ours | the other |", "|---|---|---|---|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        lines.append(f"| {row.what} | {ratio} | {row.ours} | {row.other} |")
    return lines


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--model",
    type=click.Choice(["1b", "7b", "tiny"]),
    default="1b",
    show_default=True,
    help="Published shape.",
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=16, show_default=True, help="Steps of each kind."
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Runs of each other measurement.",
)
@click.option("--bits", type=click.Choice(["4", "8"]), help="Quantize the language model.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type to compute in.  [default: float32 on a CPU, bfloat16 on a GPU]",
)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(list(PARTS)),
    help="Measure this part; may be repeated.",
)
def main(
    model: str, steps: int, repeats: int, bits: str | None, dtype: str | None, only: tuple[str, ...]
) -> None:
    """Measure our steps and those of others in turns, and print a Markdown table, ratios first.

    Optional peers: pip install torch==2.13.0 transformers; pip install mlx-vlm.
    """
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    mx.random.seed(0)
    janus = random_model(
        model, dtype or ("float32" if on_cpu else "bfloat16"), int(bits) if bits else None
    )  # type: ignore[arg-type]
    steps = min(steps, janus.config.generation.tokens - 1)
    rows, missing = measure(Setup(janus, steps, repeats), only or PARTS)
    weights = f"random weights, {janus.config.dtype}" + (f", {bits} bits" if bits else "")
    click.echo(f"Machine: {machine()}, {'CPU' if on_cpu else 'GPU'}\n")
    click.echo(
        f"Janus of the shape {model}, {weights}; "
        f"medians of {steps} steps, or of {repeats} runs of other measurements.\n"
    )
    click.echo("\n".join(table(rows)))
    if missing:
        click.echo("\nNot measured:\n\n" + "\n".join(f"- {line}" for line in missing))


if __name__ == "__main__":
    main()
