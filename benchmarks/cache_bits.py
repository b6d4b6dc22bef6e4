"""Measure the cost of a quantized KV cache in a long chat: ``python benchmarks/cache_bits.py``.

Janus-Tiny reads long conversations about an image. The text logits at the last positions are
compared with those over the float cache. At a published shape, with random weights, a step over a
long cache is timed with each cache.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

import mlx_janus

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from benchmarks.machine import machine
from benchmarks.published_shapes import MODELS
from benchmarks.random_model import random_model
from mlx_janus.evaluation.divergence import mean_divergence
from mlx_janus.memory import materialize
from mlx_janus.models.backbone import fill_cache
from mlx_janus.models.janus import JanusModel
from mlx_janus.processing.images import preprocess, to_image
from mlx_janus.processing.prompts import Turn
from mlx_janus.worlds import language, shapes

LAST = 16  # positions compared


def quantized(cache: list, bits: int | None, width: int) -> list:
    """Quantize the keys and values of a cache to ``bits``; None returns the cache unchanged."""
    if bits is None:
        return cache
    group = next(g for g in (64, 32) if width % g == 0)
    return [layer.to_quantized(group_size=group, bits=bits) for layer in cache]


def long_chat(janus: mlx_janus.JanusPipeline, seed: int) -> mx.array:
    """Embed a conversation about one image that nearly fills the context: (L, hidden)."""
    random = np.random.default_rng(seed)
    scene = shapes.sample_scene(random, "several", "pairs")
    asked = language.question(scene, random)
    turns = [Turn("user", asked.text, 1)]
    while len(janus.prompts.answering(turns)) < janus.config.language.max_position_embeddings - 64:
        turns.append(Turn("assistant", asked.answer))
        asked = language.question(scene, random)
        turns.append(Turn("user", asked.text))
    ids = np.array(janus.prompts.answering(turns))
    embeddings = janus.model.embed_text(mx.array(ids))
    pixels = preprocess(to_image(shapes.pixels(scene)), janus.config.image)
    patches = np.flatnonzero(ids == janus.prompts.special.image)
    embeddings[mx.array(patches)] = janus.model.understand(mx.array(pixels)[None])[0]
    return embeddings


def last_logits(model: JanusModel, embeddings: mx.array, bits: int | None) -> mx.array:
    """Read the last positions one by one over a cache of the others: (LAST, vocabulary)."""
    cache = model.make_cache()
    mx.eval(model.hidden_states(embeddings[None, :-LAST], cache))
    cache = quantized(cache, bits, model.config.language.head_dim)
    hidden = [model.hidden_states(embeddings[None, -i, None], cache) for i in range(LAST, 0, -1)]
    return model.text_logits(mx.concatenate(hidden, axis=1))[0]


def step_seconds(
    model: JanusModel, positions: int, bits: int | None, steps: int
) -> tuple[float, int]:
    """Return the median seconds of an answering step over a cache, and the cache's bytes."""
    cache = model.make_cache(positions + steps + 1)
    fill_cache(cache, model.config.language, 1, positions, model.dtype)
    cache = quantized(cache, bits, model.config.language.head_dim)
    size = sum(
        array.nbytes
        for layer in cache
        for _, array in tree_flatten(layer.state)
        if hasattr(array, "nbytes")
    )
    one = model.embed_text(mx.array([[1]]))
    times = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        mx.eval(model.text_logits(model.hidden_states(one, cache)))
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:])), size


@click.command()
@click.option("--shape", type=click.Choice(list(MODELS)), default="1b", show_default=True)
@click.option(
    "--positions",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Length of the cache.",
)
@click.option("--steps", type=click.IntRange(1), default=6, show_default=True)
@click.option("--chats", type=click.IntRange(1), default=8, show_default=True)
def main(shape: str, positions: int, steps: int, chats: int) -> None:
    """Print a line for each number of bits."""
    janus = mlx_janus.load()
    read = [long_chat(janus, seed) for seed in range(chats)]
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    model = random_model(shape, "float32" if on_cpu else "bfloat16")
    materialize(model.answering_arrays().values())
    click.echo(f"{machine()}; {model.config.dtype}, {shape}, {positions} positions\n")
    click.echo("| cache | KL, text, Janus-Tiny | top-1 | cache's bytes | time of a step | |")
    click.echo("|---|---|---|---|---|---|")
    plain: float | None = None
    for bits in (None, 8, 4):
        pairs = [
            (last_logits(janus.model, e, None), last_logits(janus.model, e, bits)) for e in read
        ]
        found = mean_divergence(pairs)
        seconds, size = step_seconds(model, positions, bits, steps)
        plain = plain or seconds
        name = f"{bits} bits" if bits else "float"
        click.echo(
            f"| {name} | {found.kl:.5f} | {found.top1:.1%} | {size / 1e6:.0f} MB "
            f"| {seconds:.3f} s | {seconds / plain:.2f} |"
        )


if __name__ == "__main__":
    main()
