"""Measure what quantization costs Janus-Tiny: ``python benchmarks/recipes.py``.

``--sensitivity`` adds each kind of layer by itself, and ``--scores`` the shapes benchmark. A row
compares the quantized model with the float model on the same sequences (teacher forcing), so only
the weights differ. The quantized layers are unpacked and computed in float32, which is faster on a
CPU.

- Drawing: captions of scenes, each followed by the image tokens that the codec gives its image. The
  distribution has the model's own guidance and temperature 1, at every image token.
- Answering: questions about images with the true answers, at every token of the answers.

``mlx_janus/evaluation/divergence.py`` defines the divergences. "bits" is the mean for each weight
of the quantized layers, including scales. "drawing weights" is the bytes that a step of image
generation reads, stored in the model's own type.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run as a bare script

import mlx_janus  # OpenBLAS before MLX

# isort: split
import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_map_with_path

from mlx_janus.config import RECIPES, JanusConfig, QuantizationConfig
from mlx_janus.decode.sampling import guide
from mlx_janus.evaluation.answers import measure_attributes, measure_existence
from mlx_janus.evaluation.divergence import Divergence, mean_divergence
from mlx_janus.evaluation.drawing import measure_drawing
from mlx_janus.evaluation.sizes import Sizes
from mlx_janus.models.janus import JanusModel
from mlx_janus.training.losses import insert_features
from mlx_janus.training.tiny.batches import ConversationBatch, conversation_batch
from mlx_janus.weights.footprint import weight_bytes
from mlx_janus.weights.quantize import (
    Precision,
    Rule,
    bits_per_weight,
    plan_by_rule,
    plan_quantization,
    quantize_model,
)
from mlx_janus.weights.sources import TINY
from mlx_janus.worlds import language, shapes

_KINDS = (
    "q_proj k_proj",
    "v_proj",
    "o_proj",
    "gate_proj up_proj",
    "down_proj",
    "lm_head",
    "gen_head",
    "gen_aligner aligner",
)
_BATCH = 4  # conversations in a pass


@dataclass(frozen=True)
class Sequences:
    """The sequences that both models read."""

    captions: list[tuple[mx.array, mx.array]]
    """Ids (2, L), with the caption and without, and image tokens (n,)."""
    conversations: list[ConversationBatch]


def make_sequences(janus: mlx_janus.JanusPipeline, pictures: int, seed: int = 0) -> Sequences:
    """Make ``pictures`` captioned images, and conversations about as many other images."""
    random = np.random.default_rng([seed, 31])
    prompts = janus.prompts
    captions = []
    for _ in range(pictures):
        scene = shapes.sample_scene(random)
        ids = prompts.drawing(language.caption(scene, random))
        tokens = janus.model.encode_image_tokens(mx.array(shapes.pixels(scene))[None])[0]
        captions.append((mx.array([ids, prompts.unconditional(ids)]), tokens))
    sizes = [min(_BATCH, pictures - first) for first in range(0, pictures, _BATCH)]
    return Sequences(captions, [conversation_batch(prompts, random, size) for size in sizes])


def guided_logits(model: JanusModel, sequences: Sequences) -> Iterator[mx.array]:
    """Yield the guided logits of every image token of each caption: (n, codes)."""
    for ids, tokens in sequences.captions:
        drawn = model.embed_image_tokens(mx.broadcast_to(tokens[None, :-1], (2, len(tokens) - 1)))
        hidden = model.hidden_states(mx.concatenate([model.embed_text(ids), drawn], axis=1))
        logits = mx.split(model.image_logits(hidden[:, -len(tokens) :]), 2)
        yield guide(*logits, model.config.generation.cfg_weight)[0]


def answer_logits(model: JanusModel, sequences: Sequences) -> Iterator[mx.array]:
    """Yield the logits of the answers' tokens for each batch: (tokens, vocabulary)."""
    for batch in sequences.conversations:
        text = model.embed_text(mx.array(batch["ids"]))
        features = model.understand(mx.array(batch["pixels"]))
        embeddings = insert_features(text, features, mx.array(batch["images"]))
        hidden = model.hidden_states(embeddings)
        rows, columns = np.nonzero(batch["weights"])
        yield model.text_logits(hidden[mx.array(rows), mx.array(batch["positions"][rows, columns])])


def unpack(model: JanusModel) -> None:
    """Replace quantized layers by linear layers with the same values."""

    def unpacked(_: str, layer: nn.Module) -> nn.Module:
        if not isinstance(layer, nn.QuantizedLinear):
            return layer
        linear = nn.Linear(1, 1, bias="bias" in layer)
        how = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        weight = mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **how)
        # Only a ``ScaledLinear`` has a scale of its own.
        linear.weight = weight.astype(mx.float32) * layer.get("layer_scale", 1.0)
        if "bias" in layer:
            linear.bias = layer.bias
        return linear

    model.update_modules(
        tree_map_with_path(unpacked, model.leaf_modules(), is_leaf=nn.Module.is_module)
    )


def plans(config: JanusConfig, *, sensitivity: bool) -> dict[str, QuantizationConfig]:
    """Return the plans to compare, by name."""
    found = {f"{bits} bits": plan_quantization(config, bits) for bits in (8, 4)}
    found |= {name: plan_quantization(config, recipe=name) for name in RECIPES}
    if sensitivity:
        whole = plan_by_rule(config, Rule(Precision(4), Precision(4)))
        for names in _KINDS:
            layers = tuple(
                layer for layer in whole.layers if set(layer.path.split(".")) & set(names.split())
            )
            found[f"4 bits: {names}"] = replace(whole, layers=layers)
    return found


class Comparison:
    """Comparisons of quantized models with the float model.

    Args:
        model: folder of the float model.
        pictures: images for each task.
    """

    def __init__(self, model: str | Path, pictures: int):
        self.name = model
        self.janus = self.load()
        self.sequences = make_sequences(self.janus, pictures)
        self.guided = list(guided_logits(self.janus.model, self.sequences))
        self.answers = list(answer_logits(self.janus.model, self.sequences))
        mx.eval(self.guided, self.answers)

    def load(self, plan: QuantizationConfig | None = None) -> mlx_janus.JanusPipeline:
        """Load the model in float32, quantized by a plan and unpacked."""
        janus = mlx_janus.load(self.name, dtype="float32")
        if plan:
            quantize_model(janus.model, plan)
            unpack(janus.model)
            mx.eval(janus.model.parameters())  # lazy arrays belong to this thread
        return janus

    def drawing_bytes(self, plan: QuantizationConfig | None) -> int:
        """Return the bytes that an image step reads, with floats of 16 bits."""
        model = JanusModel(self.janus.config)
        if plan:
            quantize_model(model, plan)
        return weight_bytes(model.drawing_arrays().values(), 2)

    def bits(self, plan: QuantizationConfig) -> float:
        """Return the mean bits for each weight of a plan's layers."""
        modules = dict(self.janus.model.named_modules())
        sizes = [modules[layer.path].weight.size for layer in plan.layers]
        total = sum(
            size * bits_per_weight(layer) for size, layer in zip(sizes, plan.layers, strict=True)
        )
        return total / sum(sizes)

    def divergences(self, plan: QuantizationConfig) -> tuple[Divergence, Divergence]:
        """Return the divergences of drawing and of answering."""
        model = self.load(plan).model
        guided = guided_logits(model, self.sequences)
        drawing = mean_divergence(zip(self.guided, guided, strict=True))
        answers = answer_logits(model, self.sequences)
        return drawing, mean_divergence(zip(self.answers, answers, strict=True))

    def row(self, plan: QuantizationConfig) -> list[str]:
        """Return the cells of a plan's row."""
        drawing, answering = self.divergences(plan)
        return [
            f"{self.bits(plan):.2f}",
            f"{self.drawing_bytes(plan) / 1e6:.2f} MB",
            f"{drawing.kl:.5f}",
            f"{drawing.overlap:.2%}",
            f"{drawing.top1:.1%}",
            f"{answering.kl:.5f}",
            f"{answering.top1:.2%}",
        ]


def scores(janus: mlx_janus.JanusPipeline, sizes: Sizes) -> list[str]:
    """Return the cells of a model's scores in the shapes benchmark.

    They are the means of existence and of attributes, and the overall score of drawing.
    """
    existence = measure_existence(janus, sizes, 0, lambda *_: None).values()
    attributes = measure_attributes(janus, sizes, 0, lambda *_: None).values()
    drawn = measure_drawing(janus, sizes, 0, lambda *_: None)["overall"]
    means = (
        sum(answers.accuracy for answers in existence) / len(existence),
        sum(attributes) / len(attributes),
        drawn,
    )
    return [f"{share:.1%}" for share in means]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-m", "--model", help="A float folder.  [default: Janus-Tiny]")
@click.option(
    "--pictures",
    type=click.IntRange(1, 10_000),
    default=100,
    show_default=True,
    help="Images for each task.",
)
@click.option("--sensitivity", is_flag=True, help="Also each kind of layer by itself in 4 bits.")
@click.option(
    "--scores",
    "judged",
    is_flag=True,
    help="Also the benchmark's scores, which take minutes a row.",
)
@click.option(
    "--asked", type=click.IntRange(1), default=100, show_default=True, help="Images of --scores."
)
@click.option(
    "--prompts",
    type=click.IntRange(1),
    default=12,
    show_default=True,
    help="Prompts of each task of --scores.",
)
def main(
    model: str | None, pictures: int, sensitivity: bool, judged: bool, asked: int, prompts: int
) -> None:
    """Print the size of every form, and the distance of its predictions from the float model's."""
    config = JanusConfig.load(Path(model or TINY) / "config.json")
    if config.quantization or config.image_size != shapes.SIDE:
        raise click.UsageError(
            f"{model} is quantized, or its images are not {shapes.SIDE} pixels wide."
        )
    comparison = Comparison(model or TINY, pictures)
    sizes = Sizes(pictures=asked, prompts=prompts)
    titles = ["weights", "bits", "drawing weights", "KL, drawing", "1 - TV", "top-1"]
    titles += ["KL, text", "top-1"]
    titles += ["existence", "attributes", "drawing"] if judged else []
    click.echo(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    float_bytes = f"{comparison.drawing_bytes(None) / 1e6:.2f} MB"
    row = ["float", "16", float_bytes, "0", "100%", "100%", "0", "100%"]
    row += scores(comparison.janus, sizes) if judged else []
    click.echo(f"| {' | '.join(row)} |")
    for name, plan in plans(config, sensitivity=sensitivity).items():
        row = [name, *comparison.row(plan)]
        row += scores(comparison.load(plan), sizes) if judged else []
        click.echo(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
