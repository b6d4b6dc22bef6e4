"""The memory that the published models need, as tables: ``python benchmarks/memory_table.py``.

Computed from the published sizes, nothing is downloaded or measured: what ``load`` compares with the memory there is
(``required_memory``), the larger of drawing one picture and answering about one.
"""

from __future__ import annotations

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

PUBLISHED = {"Janus-1.3B": "1.3b", "Janus-Pro-1B": "1b", "Janus-Pro-7B": "7b"}
MACS = (8, 16, 24)  # GiB
SHARE = 2 / 3  # of a Mac's memory, the least that macOS recommends to the GPU by default
BITS = {"float": None, "8 bits": 8, "4 bits": 4}


def published_config(model: str) -> JanusConfig:
    """The ``JanusConfig`` that ``load`` reads off the published ``config.json``."""
    from mlx_janus.weights.published import read_published_sizes

    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        write_json(path, deepseek_config(MODELS[model]))
        return read_published_sizes(path)[0]


def needs(model: str, dtype: str) -> list[int]:
    """Bytes for one picture, drawn or asked about: float, 8 bits, 4 bits."""
    from mlx_janus.weights.load import required_memory, with_bits

    config = published_config(model)
    return [max(required_memory(with_bits(config, bits, Path(model)), dtype).values()) for bits in BITS.values()]


def print_tables(dtype: str) -> None:
    from mlx.utils import tree_flatten

    from mlx_janus.models.janus import JanusModel

    print(f"| model | parameters | download | {dtype} | 8 bits | 4 bits |\n|---|---|---|---|---|---|")
    needed = {name: needs(model, dtype) for name, model in PUBLISHED.items()}
    for name, model in PUBLISHED.items():
        parameters = sum(array.size for _, array in tree_flatten(JanusModel(published_config(model)).parameters()))
        download = sum(tensor.bytes for tensor in deepseek_tensors(MODELS[model].sizes))
        row = [f"{parameters / 1e9:.2f} billion", *(f"{size / 1e9:.1f} GB" for size in (download, *needed[name]))]
        print(f"| {name} | {' | '.join(row)} |")
    print(f"\n| memory | two thirds of it | {' | '.join(needed)} |\n|---|---|{'---|' * len(needed)}")
    for memory in MACS:
        room = SHARE * memory * 2**30
        fits = [widest(sizes, room, dtype) for sizes in needed.values()]
        print(f"| {memory} GB | {room / 1e9:.1f} GB | {' | '.join(fits)} |")


def widest(sizes: list[int], room: float, dtype: str) -> str:
    """The weights with the most bits that fit."""
    names = (dtype, *list(BITS)[1:])
    return next((name for name, size in zip(names, sizes, strict=True) if size <= room), "does not fit")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="bfloat16", show_default=True,
    help="Type to compute in.",
)  # fmt: skip
@click.option("--cpu", is_flag=True, help="For a CPU, where decoding a picture takes more room than on a GPU.")
def main(dtype: str, cpu: bool) -> None:
    """Print what the published models need, and which fit which Mac."""
    import mlx_janus  # noqa: F401  # OpenBLAS before MLX

    import mlx.core as mx  # isort: skip

    device = mx.Device(mx.DeviceType.cpu if cpu else mx.DeviceType.gpu, 0)
    with patch("mlx.core.default_device", return_value=device):  # this machine need not have it
        print_tables(dtype)


if __name__ == "__main__":
    main()
