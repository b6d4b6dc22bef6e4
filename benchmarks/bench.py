"""Measure every claim about speed in one run: ``make bench`` or ``python benchmarks/bench.py``.

The weights are random and have a published shape, because speed and memory do not depend on their
values. The same command runs on a Mac, on CUDA and on a CPU. If a part fails, or its peer is not
installed, the others still run, and a line below the table names it. ``--report`` also writes the
table to a file, as a section for ``benchmarks/RESULTS.md``.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import click
from click.core import ParameterSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

import mlx_janus  # noqa: F401  OpenBLAS before MLX

# isort: split
import mlx.core as mx

from benchmarks import parts, peers
from benchmarks.machine import chip, facts, machine
from benchmarks.parts import Row, Setup
from benchmarks.random_model import random_model

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


def report(result: str, command: str) -> str:
    """Return a section for ``benchmarks/RESULTS.md``: the machine, the command and its result.

    It has no path of the home folder, which would tell the user's name.

    Args:
        result: Markdown below the line about the machine.
        command: the command line that measured it.
    """
    month = f"{datetime.date.today():%B %Y}"
    rows = [f"| {name} | {value} |" for name, value in {**facts(), "measured in": month}.items()]
    table_of_facts = "\n".join(["| machine | |", "|---|---|", *rows])
    text = f"## {chip()}\n\n{table_of_facts}\n\n```bash\n{command}\n```\n\n{result}\n"
    return text.replace(str(Path.home()), "~")


def command_line(context: click.Context) -> str:
    """Return the command line without the report's file."""
    words = ["python benchmarks/bench.py"]
    for parameter in context.command.params:
        name = str(parameter.name)
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if not given or name == "report_file":
            continue
        value = context.params[name]
        values = value if isinstance(value, tuple) else (value,)
        words += [f"{parameter.opts[0]} {item}" for item in values]
    return " ".join(words)


def check_new_file(
    _context: click.Context, _parameter: click.Parameter, path: Path | None
) -> Path | None:
    """Check, before minutes of measuring, that a file can be made.

    Raises:
        click.BadParameter: the file exists, or its folder does not.
    """
    if path is not None and path.exists():
        raise click.BadParameter(f"{path} exists: name another file")
    if path is not None and not path.parent.is_dir():
        raise click.BadParameter(f"the folder {path.parent} does not exist: make it first")
    return path


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
@click.option(
    "--report",
    "report_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    callback=check_new_file,
    help="Also write the table and a description of the machine to a new Markdown file.",
)
@click.pass_context
def main(
    context: click.Context,
    model: str,
    steps: int,
    repeats: int,
    bits: str | None,
    dtype: str | None,
    only: tuple[str, ...],
    report_file: Path | None,
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
    result = (
        f"Janus of the shape {model}, {weights}; "
        f"medians of {steps} steps, or of {repeats} runs of other measurements.\n\n"
    )
    result += "\n".join(table(rows))
    if missing:
        result += "\n\nNot measured:\n\n" + "\n".join(f"- {line}" for line in missing)
    click.echo(f"Machine: {machine()}, {'CPU' if on_cpu else 'GPU'}\n\n{result}")
    if report_file is not None:
        report_file.write_text(report(result, command_line(context)), encoding="utf-8")
        click.echo(f"wrote {report_file}", err=True)


if __name__ == "__main__":
    main()
