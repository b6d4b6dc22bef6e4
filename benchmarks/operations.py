"""Compare variants of an image step, operations and time: ``python benchmarks/operations.py``.

The table has the operations that a GPU would launch in one step of each variant, and the median of
the ratios to the plain step's time, measured in turns on this machine. Views are no operations;
MLX's fused normalisation, rotation and attention count as one each. The tokens of all variants are
compared.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

import mlx_janus

# isort: split
import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models.base import scaled_dot_product_attention

from benchmarks.machine import machine
from benchmarks.published_shapes import MODELS
from benchmarks.random_model import config
from mlx_janus.decode import image
from mlx_janus.decode.image import DrawOptions, draw_tokens, text_rows
from mlx_janus.models.backbone import Cache
from mlx_janus.models.janus import JanusModel

PROMPT = [1, 2, 3, 4, 5, 6]
_VIEWS = {
    "Broadcast",
    "Transpose",
    "Flatten",
    "Unflatten",
    "Reshape",
    "Slice",
    "Squeeze",
    "ExpandDims",
    "Split",
}


class FusedAttention(nn.Module):
    """mlx-lm's attention with one product for q, k and v, and one rotation for q and k."""

    def __init__(self, attention: Any):
        super().__init__()
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv_proj = nn.Linear(1, 1, bias=False)
        self.qkv_proj.weight = mx.concatenate([part.weight for part in parts])
        self.o_proj = attention.o_proj
        self.rope = attention.rope
        self.scale = attention.scale
        self.ends = (attention.n_heads, attention.n_heads + attention.n_kv_heads)
        self.head_dim = attention.head_dim

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        rows, length, _ = x.shape
        heads = self.qkv_proj(x).reshape(rows, length, -1, self.head_dim).transpose(0, 2, 1, 3)
        rotated = self.rope(heads[:, : self.ends[1]], offset=cache.offset)
        keys, values = cache.update_and_fetch(rotated[:, self.ends[0] :], heads[:, self.ends[1] :])
        out = scaled_dot_product_attention(
            rotated[:, : self.ends[0]], keys, values, cache=cache, scale=self.scale, mask=mask
        )
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(rows, length, -1))


class FusedMLP(nn.Module):
    """mlx-lm's MLP with one product for gate and up."""

    def __init__(self, mlp: Any):
        super().__init__()
        self.gate_up_proj = nn.Linear(1, 1, bias=False)
        self.gate_up_proj.weight = mx.concatenate([mlp.gate_proj.weight, mlp.up_proj.weight])
        self.down_proj = mlp.down_proj

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(nn.silu(gate) * up)


@contextmanager
def plain(_: JanusModel) -> Iterator[None]:
    """Leave the step as it is on a CPU."""
    yield


@contextmanager
def compiled_choice(_: JanusModel) -> Iterator[None]:
    """Compile the choice of a token, as on a GPU."""
    make_sampler = image.make_sampler
    with patch.object(
        image, "make_sampler", lambda options, compiled: make_sampler(options, compiled=True)
    ):
        yield


@contextmanager
def fused_projections(model: JanusModel) -> Iterator[None]:
    """Compute four products a layer instead of seven."""
    layers = model.language_model.model.layers
    before = [(layer.self_attn, layer.mlp) for layer in layers]
    for layer in layers:
        layer.self_attn = FusedAttention(layer.self_attn)
        layer.mlp = FusedMLP(layer.mlp)
        mx.eval(layer.parameters())
    try:
        yield
    finally:
        for layer, (attention, mlp) in zip(layers, before, strict=True):
            layer.self_attn = attention
            layer.mlp = mlp


@contextmanager
def embedding_table(model: JanusModel) -> Iterator[None]:
    """Compute the embeddings of all image tokens once, and look them up."""
    ids = mx.arange(model.config.generation.codec.codebook_size)
    table = mx.concatenate([model.embed_image_tokens(part) for part in mx.split(ids, 16)])
    mx.eval(table)
    with patch.object(JanusModel, "embed_image_tokens", lambda _, tokens: table[tokens]):
        yield


VARIANTS: dict[str, Callable[[JanusModel], Any]] = {
    "plain": plain,
    "compiled choice": compiled_choice,
    "fused projections": fused_projections,
    "embedding table": embedding_table,
}


def steps(model: JanusModel, count: int) -> tuple[float, list[int]]:
    """Return the median seconds of a step, without the first three, and the tokens."""
    seconds = []
    tokens = []
    prompt = text_rows(PROMPT, PROMPT, DrawOptions())
    stream = draw_tokens(model, [prompt], [(0, 1)], DrawOptions())
    before = time.perf_counter()
    for token in stream:
        after = time.perf_counter()
        seconds.append(after - before)
        before = after
        tokens.append(int(token.item()))
        if len(tokens) == count:
            break
    return float(np.median(seconds[3:])), tokens


def operations(model: JanusModel) -> int:
    """Count the operations that a GPU would launch: nodes of the step's graph except views."""
    caches: list[Cache] = []
    make_cache = JanusModel.make_cache

    def kept(self: JanusModel, positions: int | None = None) -> Cache:
        caches.append(make_cache(self, positions))
        return caches[-1]

    found: list[mx.array] = []
    with (
        patch.object(mx.fast, "rms_norm", lambda x, *_: mx.abs(x)),
        patch.object(mx.fast, "rope", lambda x, *_, **__: mx.abs(x)),
        patch.object(
            mx.fast,
            "scaled_dot_product_attention",
            lambda q, k, v, **_: q + (k[:, :, :1] * v[:, :, :1]),
        ),
        patch.object(JanusModel, "make_cache", kept),
        patch.object(mx, "async_eval", lambda *arrays: (found.append(arrays[0]), None)[1]),
        tempfile.TemporaryDirectory() as folder,
    ):
        prompt = text_rows(PROMPT, PROMPT, DrawOptions())
        stream = draw_tokens(model, [prompt], [(0, 1)], DrawOptions())
        next(stream)  # the first token is evaluated, the second one's graph is built
        dot = Path(folder) / "step.dot"
        arrays = [a for layer in caches[0] for a in (layer.keys, layer.values)]
        mx.export_to_dot(str(dot), found[1], *arrays)
        names = re.findall(r'label ?= ?"([^"]*)", shape ?= ?rect', dot.read_text())
        stream.close()  # type: ignore[attr-defined]
    return sum(name not in _VIEWS for name in names)


@click.command()
@click.option(
    "-m",
    "--model",
    type=click.Choice(["janus-tiny", *MODELS]),
    default="janus-tiny",
    show_default=True,
)
@click.option("--steps", "count", type=click.IntRange(8), default=40, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
def main(model: str, count: int, rounds: int) -> None:
    """Print the variants as a table."""
    janus = (
        mlx_janus.load().model if model == "janus-tiny" else JanusModel(config(MODELS[model].sizes))
    )
    mx.eval(janus.drawing_arrays())
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    counts = {}
    tokens = {}
    for round_ in range(rounds):
        for name, variant in VARIANTS.items():
            with variant(janus):
                taken, tokens[name] = steps(janus, count)
                seconds[name].append(taken)
                if round_ == 0:
                    counts[name] = operations(janus)
    click.echo(f"{machine()}; {model}, {mx.default_device()}\n")
    click.echo("| step | operations | time, as a share of the plain step's | same tokens |")
    click.echo("|---|---|---|---|")
    for name in VARIANTS:
        ratio = np.median(np.array(seconds[name]) / np.array(seconds["plain"]))
        same = "yes" if tokens[name] == tokens["plain"] else "no"
        click.echo(f"| {name} | {counts[name]} | {ratio:.3f} | {same} |")
    click.echo(f"\nA plain step: {np.median(seconds['plain']) * 1e3:.2f} ms.")


if __name__ == "__main__":
    main()
