"""The recipe of Janus-Tiny, from nothing to a folder that ``load`` takes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ...config import PromptConfig
from ...models.janus import JanusModel
from ...processing.prompts import Prompts
from ...weights.save import save_model
from ..loop import Report, Stage, load_state, part_of, run_stage
from ..two_processes import wait_for_all
from .auxiliary_heads import drop_heads
from .codec import CodecStage, MergedCodecStage
from .encoder import EncoderStage
from .joint import JointStage, build_model
from .recipe import CODEC, ENCODER, JointRecipe, TinyRecipe, tiny_config
from .vocabulary import train_tokenizer

MODEL_FOLDER = "model"
JOINT_STAGES = ("drawing", "joint", "places")  # of the whole model, in order
SOURCE = "mlx_janus.train tiny"


def train_tiny(
    output: Path, recipe: TinyRecipe | None = None, *, every: float = 120.0, report: Report | None = None
) -> JanusModel:
    """Train Janus-Tiny, from the checkpoints in ``output`` if there are any, and write ``output/model``.

    Of two processes (``processes.run_side_by_side``) the first trains the codec while the second trains the encoder;
    then they share every step.

    Args:
        output: gets ``checkpoints/``, ``log.jsonl`` and ``model/``.
        recipe: steps, batches, rates and seed; None: those of the model in the package.
        every: seconds between checkpoints.
        report: called after every step.

    Raises:
        CheckpointError: a checkpoint is damaged, or of another recipe or seed.
        OutputError: something cannot be written, or ``output/model`` is another model's.
    """
    recipe = recipe or TinyRecipe()
    group = mx.distributed.init()
    first, last = group.rank() == 0, group.rank() == group.size() - 1

    def run(stage: Stage, *depends_on: object, writes: bool = True) -> None:
        facts = json.dumps([recipe.seed, *depends_on], default=asdict, sort_keys=True)
        shown = report if first else None
        run_stage(stage, output, recipe=facts, every=every, report=shown, writes=writes)

    if first:
        run(CodecStage(CODEC, recipe.codec, recipe.seed), CODEC.to_dict(), recipe.codec)
        merged = MergedCodecStage(CODEC, recipe.merged, recipe.seed, load_state(output, "codec"))
        run(merged, CODEC.to_dict(), recipe.codec, recipe.merged)
    if last:
        run(EncoderStage(ENCODER, recipe.encoder, recipe.seed), ENCODER.to_dict(), recipe.encoder)
    wait_for_all()
    tokenizer = train_tokenizer(PromptConfig(), recipe.seed)
    config = tiny_config(tokenizer.get_vocab_size())
    prompts = Prompts(tokenizer, config.prompt, image_tokens=config.understanding.tokens)
    model = build_model(config, load_state(output, "merged"), load_state(output, "encoder"), recipe.seed)
    ahead = list(JOINT_STAGES)
    for name in JOINT_STAGES:
        ahead.remove(name)  # what a stage depends on is the recipe but for the stages after it
        unseen: dict[str, Any] = dict.fromkeys(ahead, JointRecipe())
        facts = replace(recipe, **unseen)
        stage = JointStage(model, prompts, getattr(recipe, name), recipe.seed, name)
        run(stage, config.to_dict(), facts, writes=first)
    if not first:  # the first writes what is read here
        return model
    drop_heads(model)
    average_weights(model, load_state(output, "joint"), load_state(output, "places"), recipe.share_of_last)
    text = prompts.tokenizer.to_str()
    save_model(model, text, output / MODEL_FOLDER, dtype=config.dtype, source=SOURCE, overwrite=True)
    return model


def average_weights(model: JanusModel, one: dict[str, mx.array], other: dict[str, mx.array], share: float) -> None:
    """Give a model the mean of two stages' weights, with so much of the second (Wortsman et al., 2022).

    What is held out is answered about better by the mean than by either.
    """
    one, other = part_of(one, "model."), part_of(other, "model.")
    names = [name for name, _ in tree_flatten(model.parameters())]  # heads of training alone are in the states too
    model.load_weights([(name, (1 - share) * one[name] + share * other[name]) for name in names], strict=True)
