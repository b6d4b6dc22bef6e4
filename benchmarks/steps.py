"""Our steps beside mlx-lm's bare Llama of the same shape, in one run: ``python benchmarks/steps.py``.

Random float32 weights of Janus-Pro-1B's shape (``--model``: another). Steps of both kinds are taken in turns; what is
printed first is the median of the ratios of neighbours. The bound for a drawing step is mlx-lm's Llama body with two
rows plus the gen head's and the gen aligner's own time; for an answering step it is mlx-lm's ``generate_step``. Both
loops have the next step under way when they give a token; here each waits for it, so that it is not the other's burden.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

import mlx_janus  # noqa: F401  OpenBLAS before MLX

# isort: split
import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step

from benchmarks.published_shapes import MODELS, Sizes
from benchmarks.real_size import machine
from mlx_janus.config import (
    DrawingConfig,
    GenHeadConfig,
    ImageConfig,
    JanusConfig,
    LlamaConfig,
    MLPConfig,
    PromptConfig,
    SiglipConfig,
    VQConfig,
)
from mlx_janus.decode.image import DrawOptions, draw_tokens
from mlx_janus.decode.text import TextOptions, answer_tokens
from mlx_janus.decode.window import SETTLED, time_passes
from mlx_janus.models.janus import JanusModel

PROMPT = 32  # tokens


def config(s: Sizes) -> JanusConfig:
    """The sizes as a config."""
    return JanusConfig(
        understanding=SiglipConfig(
            kind="siglip", image_size=s.image_size, patch_size=s.patch_size, width=s.width, layers=s.vision_layers,
            heads=s.vision_heads, mlp_width=s.mlp_ratio * s.width,
        ),
        generation=VQConfig(
            kind="vq", codebook_size=s.codebook_size, codebook_dim=s.codebook_dim, ch=s.ch, ch_mult=s.ch_mult,
            num_res_blocks=s.num_res_blocks, z_channels=s.z_channels,
        ),
        language=LlamaConfig(
            kind="llama", vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.intermediate,
            num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.heads,
            head_dim=s.hidden // s.heads, max_position_embeddings=16384,
        ),
        aligner=MLPConfig(kind="mlp_gelu", input_dim=s.width, output_dim=s.hidden),
        gen_aligner=MLPConfig(kind="mlp_gelu", input_dim=s.codebook_dim, output_dim=s.hidden),
        gen_head=GenHeadConfig(
            kind="vision_head", input_dim=s.hidden, hidden_dim=s.hidden, output_dim=s.codebook_size
        ),
        image=ImageConfig(image_size=s.image_size),
        prompt=PromptConfig(),
        drawing=DrawingConfig(),
        dtype="float32",
    )  # fmt: skip


def drawing(model: JanusModel, pictures: int, steps: int) -> Iterator[float]:
    """Seconds of each of our drawing steps, the prompt's apart."""
    ids = list(range(1, PROMPT + 1))
    return _timed(draw_tokens(model, [ids], ids, [(0, seed) for seed in range(pictures)], DrawOptions()), steps)


def bare_drawing(model: JanusModel, steps: int) -> Iterator[float]:
    """Seconds of mlx-lm's body with two rows, as its own cache grows, plus head and aligner by themselves."""
    body, cache = model.language_model.model, model.make_cache()
    ids = mx.ones((2, PROMPT), dtype=mx.int32)
    mx.eval(body(ids, cache))
    one, code = mx.ones((2, 1), dtype=mx.int32), mx.ones((2, 1), dtype=mx.int32)
    hidden = mx.ones((2, 1, model.config.language.hidden_size))
    for _ in range(steps):
        started = time.perf_counter()
        mx.eval(body(one, cache))
        mx.eval(model.gen_head(hidden))
        mx.eval(model.gen_aligner(model.gen_embed(code)))
        yield time.perf_counter() - started


def answering(model: JanusModel, steps: int) -> Iterator[float]:
    """Seconds of each of our answering steps."""
    embeddings = model.embed_text(mx.arange(PROMPT)[None])[0]
    return _timed(answer_tokens(model, embeddings, TextOptions(max_tokens=steps + 2)), steps)


def bare_answering(model: JanusModel, steps: int) -> Iterator[float]:
    """Seconds of each step of mlx-lm's own loop and model."""
    return _timed(generate_step(mx.arange(PROMPT), model.language_model, max_tokens=steps + 2), steps)


def _timed(stream: Any, steps: int) -> Iterator[float]:
    next(stream)
    mx.synchronize()
    for _ in range(steps):
        started = time.perf_counter()
        next(stream)
        mx.synchronize()
        yield time.perf_counter() - started
    stream.close()


def compare(ours: Callable[[], Iterator[float]], other: Callable[[], Iterator[float]]) -> tuple[float, float, float]:
    """Steps in turns: the median ratio of neighbours, and both medians."""
    pairs = np.array(list(zip(ours(), other(), strict=True)))
    return float(np.median(pairs[:, 0] / pairs[:, 1])), *map(float, np.median(pairs, axis=0))


@click.command()
@click.option("--model", type=click.Choice(["1b", "7b", "tiny"]), default="1b", show_default=True)
@click.option("--steps", type=int, default=16, show_default=True)
def main(model: str, steps: int) -> None:
    """Print ratios first, then seconds, memory, and what wide passes cost."""
    mx.random.seed(0)
    janus = JanusModel(config(MODELS[model].sizes))
    for array in (*janus.drawing_arrays(), *janus.answering_arrays(pictures=False)):
        mx.eval(array)
    click.echo(f"Machine: {machine()}\nJanus of the shape {model}, random float32 weights, {mx.default_device()}\n")

    rows = [
        ("drawing", *compare(lambda: drawing(janus, 1, steps), lambda: bare_drawing(janus, steps))),
        ("answering", *compare(lambda: answering(janus, steps), lambda: bare_answering(janus, steps))),
    ]
    click.echo("| step | ours over the bound, median of pairs | ours, s | the bound, s |\n|---|---|---|---|")
    for name, ratio, ours, bound in rows:
        click.echo(f"| {name} | {ratio:.3f} | {ours:.4f} | {bound:.4f} |")

    four, one = (float(np.median(list(drawing(janus, n, steps)))) for n in (4, 1))
    click.echo(
        f"\nFour pictures together over four one by one: {four / (4 * one):.2f} ({four:.3f} s and {one:.3f} s a step)"
    )

    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    list(drawing(janus, 1, steps))
    llama = janus.config.language
    values = llama.num_hidden_layers * llama.num_key_value_heads * llama.head_dim  # of a position, in keys
    cache = 2 * 2 * (PROMPT + janus.config.image_tokens) * values * 4
    over = (mx.get_peak_memory() - held - cache) / 1e6
    click.echo(f"\nPeak memory of drawing above the weights and one KV cache ({cache / 1e6:.0f} MB): {over:.0f} MB")

    before = mx.get_active_memory()
    mx.eval(janus.decoding_arrays())
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    started = time.perf_counter()
    mx.eval(janus.decode_image_tokens(mx.zeros((1, janus.config.image_tokens), dtype=mx.int32)))
    click.echo(
        f"\nDecoding one picture's tokens: {time.perf_counter() - started:.2f} s, peak memory "
        f"{(mx.get_peak_memory() - held) / 1e6:.0f} MB above the weights, the codec's {(held - before) / 1e6:.0f} MB"
    )

    click.echo("\n| positions in a pass, two rows | s | times a pass of one |\n|---|---|---|")
    seconds = time_passes(janus, 2)
    for width in SETTLED:
        if width in seconds:
            click.echo(f"| {width} | {seconds[width]:.3f} | {seconds[width] / seconds[1]:.2f} |")


if __name__ == "__main__":
    main()
