"""The recipe of Janus-Tiny, from nothing to a folder that ``load`` takes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ..config import PromptConfig
from ..models.janus import JanusModel
from ..prompts import Prompts
from ..weights.save import save_model
from .codec import CodecStage, MergedCodecStage
from .encoder import EncoderStage
from .joint import JointStage, build_model
from .loop import Report, Stage, load_state, run_stage
from .recipe import CODEC, ENCODER, TinyRecipe, tiny_config
from .vocabulary import train_tokenizer

MODEL_FOLDER = "model"
SOURCE = "mlx_janus.train tiny"


def train_tiny(
    output: Path, recipe: TinyRecipe | None = None, *, every: float = 120.0, report: Report | None = None
) -> JanusModel:
    """Train Janus-Tiny, from the checkpoints in ``output`` if there are any, and write ``output/model``.

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

    def run(stage: Stage, *depends_on: object) -> None:
        facts = json.dumps([recipe.seed, *depends_on], default=asdict, sort_keys=True)
        run_stage(stage, output, recipe=facts, every=every, report=report)

    run(CodecStage(CODEC, recipe.codec, recipe.seed), CODEC.to_dict(), recipe.codec)
    merged = MergedCodecStage(CODEC, recipe.merged, recipe.seed, load_state(output, "codec"))
    run(merged, CODEC.to_dict(), recipe.codec, recipe.merged)
    run(EncoderStage(ENCODER, recipe.encoder, recipe.seed), ENCODER.to_dict(), recipe.encoder)
    tokenizer = train_tokenizer(PromptConfig(), recipe.seed)
    config = tiny_config(tokenizer.get_vocab_size())
    prompts = Prompts(tokenizer, config.prompt, image_tokens=config.understanding.tokens)
    model = build_model(config, load_state(output, "merged"), load_state(output, "encoder"), recipe.seed)
    run(JointStage(model, prompts, recipe.joint, recipe.seed), config.to_dict(), recipe)
    text = prompts.tokenizer.to_str()
    save_model(model, text, output / MODEL_FOLDER, dtype=config.dtype, source=SOURCE, overwrite=True)
    return model
