"""Print the tables of docs/tiny.md: ``python benchmarks/tiny_card.py``.

The figures are those of the model, its log and its scores.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

import mlx_janus  # noqa: F401  OpenBLAS before MLX

# isort: split
from mlx.utils import tree_flatten

from mlx_janus.training.loop import read_log
from mlx_janus.training.tiny.recipe import TinyRecipe
from mlx_janus.weights.load import load_model
from mlx_janus.weights.sources import TINY

ROOT = Path(__file__).resolve().parent.parent
_TRAINS = {
    "codec": "the image codec",
    "merged": "its decoder, with merged codes",
    "encoder": "the vision encoder",
    "drawing": "the language model and the image pathway, on captions",
    "joint": "everything except encoder and codec, both losses",
    "places": "the same, with mostly questions for places and numbers",
}


def sizes() -> list[str]:
    """Return a line for each part of the model."""
    model = load_model(TINY)
    c = model.config
    codec = c.generation.codec
    aligner = c.generation.aligner
    head = c.generation.head
    about = {
        "vision_model": f"SigLIP: {c.understanding.layers} layers, width {c.understanding.width}, "
        f"{c.understanding.heads} heads, patches of {c.understanding.patch_size}",
        "aligner": f"{c.aligner.input_dim} to {c.aligner.output_dim}, depth {c.aligner.depth}",
        "gen_vision_model": f"VQ: {codec.codebook_size} codes of {codec.codebook_dim}, "
        f"{' x '.join(str(codec.ch * m) for m in codec.ch_mult)} channels",
        "gen_aligner": f"{aligner.input_dim} to {aligner.output_dim}, depth {aligner.depth}",
        "gen_head": f"{head.input_dim} to {head.hidden_dim} to {head.output_dim}",
        "gen_embed": f"{codec.codebook_size} x {aligner.input_dim}",
        "language_model": f"Llama: {c.language.num_hidden_layers} layers, "
        f"width {c.language.hidden_size}, {c.language.num_attention_heads} heads, "
        f"vocabulary {c.language.vocab_size}",
    }
    counts = {
        name: sum(a.size for _, a in tree_flatten(model[name].parameters())) for name in about
    }
    lines = [f"| `{name}` | {text} | {counts[name]:,} |" for name, text in about.items()]
    stored = sum(file.stat().st_size for file in TINY.iterdir())
    return [*lines, f"| all | {stored:,} bytes stored | {sum(counts.values()):,} |"]


def stages(log: Path) -> list[str]:
    """Return a line for each stage of training."""
    recipe = TinyRecipe()
    last = {line["stage"]: line for line in read_log(log)}
    lines = []
    for stage, trains in _TRAINS.items():
        own = getattr(recipe, stage)
        batch = getattr(own, "batch", None) or f"{own.drawing_batch} captions"
        if getattr(own, "answering_batch", 0):
            batch = f"{own.answering_batch} conversations, {batch}"
        lines.append(
            f"| {stage} | {trains} | {own.steps} | {batch} | {last[stage]['seconds'] / 60:.0f} |"
        )
    return lines


def compared(files: tuple[Path, ...]) -> list[str]:
    """Return a line for each file of scores, with the score of every part of the benchmark."""
    lines = []
    for file in files:
        scores: dict[str, Any] = json.loads(file.read_text())
        existence = mean(answers["accuracy"] for answers in scores["existence"].values())
        attributes = mean(scores["attributes"].values())
        drawing = scores["drawing"]["overall"]
        lines.append(f"| {file.stem} | {existence:.1%} | {attributes:.1%} | {drawing:.1%} |")
    return lines


@click.command()
@click.option(
    "--log",
    type=click.Path(path_type=Path),
    default=ROOT / "docs" / "tiny-log.jsonl",
    help="Log of the training.",
)
@click.argument("scores", nargs=-1, type=click.Path(exists=True, path_type=Path))
def main(log: Path, scores: tuple[Path, ...]) -> None:
    """Print sizes, stages, and a line for each of SCORES, files of ``evaluate shapes --output``."""
    for title, lines in (("sizes", sizes()), ("stages", stages(log)), ("scores", compared(scores))):
        click.echo("\n".join([f"{title}:", *lines, ""]))


if __name__ == "__main__":
    main()
