"""Print the memory that the published models need: ``python benchmarks/memory_table.py``.

The figures are computed from the published sizes; nothing is downloaded or measured. They are those
that ``load`` compares with the available memory (``required_memory``): the larger of generating
one image and answering about one. ``--measure`` runs a model with random weights instead, and
prints MLX's peak while it generates and decodes, with the computed figure after it. Each
measurement runs in its own process.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from unittest.mock import patch

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

from benchmarks.published_files import deepseek_config, write_json
from benchmarks.published_shapes import MODELS, deepseek_tensors

if TYPE_CHECKING:
    from mlx_janus.config import JanusConfig
    from mlx_janus.models.janus import JanusModel

PUBLISHED = {"Janus-1.3B": "1.3b", "Janus-Pro-1B": "1b", "Janus-Pro-7B": "7b"}
MACS = (8, 16, 24)  # GiB
SHARE = 2 / 3  # part of a Mac's memory; macOS recommends at least this much to the GPU by default
_PROMPT = 256  # tokens before the measured images
_STEPS = 3  # positions generated of each measured image
BITS = {"float": None, "8 bits": 8, "4 bits": 4}


def published_config(model: str) -> JanusConfig:
    """Return the ``JanusConfig`` that ``load`` reads from the published ``config.json``."""
    from mlx_janus.weights.published import read_published_sizes

    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        write_json(path, deepseek_config(MODELS[model]))
        return read_published_sizes(path)[0]


def needs(model: str, dtype: str) -> list[int]:
    """Return the bytes for one image, generated or asked about: float, 8 bits, 4 bits."""
    from mlx_janus.weights.footprint import required_memory
    from mlx_janus.weights.load import with_quantization

    config = published_config(model)
    return [
        max(required_memory(with_quantization(config, bits, Path(model)), dtype).values())
        for bits in BITS.values()
    ]


def print_tables(dtype: str) -> None:
    """Print the memory of each model, and the widest weights that fit each Mac."""
    from mlx.utils import tree_flatten

    from mlx_janus.models.janus import JanusModel

    print(
        f"| model | parameters | download | {dtype} | 8 bits | 4 bits |\n|---|---|---|---|---|---|"
    )
    needed = {name: needs(model, dtype) for name, model in PUBLISHED.items()}
    for name, model in PUBLISHED.items():
        parameters = sum(
            array.size
            for _, array in tree_flatten(JanusModel(published_config(model)).parameters())
        )
        download = sum(tensor.bytes for tensor in deepseek_tensors(MODELS[model].sizes))
        row = [
            f"{parameters / 1e9:.2f} billion",
            *(f"{size / 1e9:.1f} GB" for size in (download, *needed[name])),
        ]
        print(f"| {name} | {' | '.join(row)} |")
    print(
        f"\n| memory | two thirds of it | {' | '.join(needed)} |\n|---|---|{'---|' * len(needed)}"
    )
    for memory in MACS:
        room = SHARE * memory * 2**30
        fits = [widest(sizes, room, dtype) for sizes in needed.values()]
        print(f"| {memory} GB | {room / 1e9:.1f} GB | {' | '.join(fits)} |")


def widest(sizes: list[int], room: float, dtype: str) -> str:
    """Return the name of the widest weights that fit."""
    names = (dtype, *list(BITS)[1:])
    return next(
        (name for name, size in zip(names, sizes, strict=True) if size <= room), "does not fit"
    )


def peak(cell: str) -> int:
    """Return MLX's peak bytes for a cell of the measured table: "1b float32 8-bits draw 4"."""
    import mlx.core as mx

    from benchmarks.random_model import random_model
    from mlx_janus.memory import materialize

    shape, dtype, bits, task, pictures = cell.split()
    model = random_model(shape, dtype, BITS[bits.replace("-", " ")])
    materialize((model.drawing_arrays() if task == "draw" else model.decoding_arrays()).values())
    mx.clear_cache()
    mx.reset_peak_memory()
    if task == "draw":
        _draw_last_positions(model, int(pictures))
    else:
        mx.eval(
            model.decode_image_tokens(mx.zeros((1, model.config.generation.tokens), dtype=mx.int32))
        )
    return mx.get_peak_memory()


def _draw_last_positions(model: JanusModel, pictures: int) -> None:
    """Run the last steps of images after 256 prompt tokens, with a KV cache of final length."""
    import mlx.core as mx

    from mlx_janus.decode.sampling import choose, guide, position_keys
    from mlx_janus.models.backbone import fill_cache

    positions = model.config.generation.tokens
    cache = model.make_cache(_PROMPT + positions)
    dtype = model.dtype
    fill_cache(cache, model.config.language, 2 * pictures, _PROMPT + positions - _STEPS, dtype)
    keys = position_keys(range(pictures), positions)
    tokens = mx.zeros((pictures, 1), dtype=mx.int32)
    for position in range(positions - _STEPS, positions):
        hidden = model.hidden_states(model.embed_image_tokens(mx.concatenate([tokens] * 2)), cache)
        logits = guide(*mx.split(model.image_logits(hidden), 2), 5.0)
        tokens = choose(logits, keys[:, position : position + 1], 1.0, 1.0)
        mx.eval(tokens)


def print_measured(shape: str, dtype: str) -> None:
    """Print the table of measured peaks, with the computed figures of a larger model below."""
    from benchmarks.machine import machine
    from benchmarks.random_model import config
    from mlx_janus.weights.footprint import required_memory, task_memory
    from mlx_janus.weights.load import with_quantization

    def measured(form: str, task: str, pictures: int) -> str:
        cell = f"{shape} {dtype} {form.replace(' ', '-')} {task} {pictures}"
        click.echo(f"{cell} ...", err=True)
        command = [sys.executable, __file__, "--cell", cell]
        return _gigabytes(
            int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        )

    cells = (("draw", 1), ("draw", 4), ("decode", 1))
    click.echo(
        f"Machine: {machine()}\n\n"
        f"Measured and, after the slash, computed; {dtype}, or bits of the weights.\n"
    )
    click.echo(
        "| shape | weights | draw 1 image | draw 4 | decode 1 | `load` wants | with low memory |"
    )
    click.echo("|---|---|---|---|---|---|---|")
    for name, find in ((shape, measured), ("7b", lambda *_: "-")):
        for form, bits in BITS.items():
            sizes = with_quantization(config(MODELS[name].sizes), bits, Path(name))
            row = [
                f"{find(form, task, n)} / {_gigabytes(task_memory(sizes, dtype, pictures=n)[task])}"
                for task, n in cells
            ]
            row += [
                _gigabytes(max(required_memory(sizes, dtype, low_memory=low).values()))
                for low in (False, True)
            ]
            click.echo(f"| {name} | {dtype if bits is None else form} | {' | '.join(row)} |")


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type to compute in.  [default: bfloat16; measured on a CPU, float32]",
)
@click.option(
    "--cpu",
    is_flag=True,
    help="For a CPU, where decoding an image takes more memory than on a GPU.",
)
@click.option(
    "--measure", is_flag=True, help="Measure generation and decoding here, with random weights."
)
@click.option(
    "--model",
    type=click.Choice(["1b", "tiny"]),
    default="1b",
    show_default=True,
    help="Shape to measure.",
)
@click.option("--cell", hidden=True)
def main(dtype: str | None, cpu: bool, measure: bool, model: str, cell: str | None) -> None:
    """Print the memory that the published models need, and the Macs that they fit."""
    import mlx_janus  # noqa: F401  # OpenBLAS before MLX

    import mlx.core as mx  # isort: skip

    if cell:
        click.echo(peak(cell))
        return
    if measure:
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        print_measured(model, dtype or ("float32" if on_cpu else "bfloat16"))
        return
    device = mx.Device(mx.DeviceType.cpu if cpu else mx.DeviceType.gpu, 0)
    with patch("mlx.core.default_device", return_value=device):  # no GPU is needed
        print_tables(dtype or "bfloat16")


if __name__ == "__main__":
    main()
