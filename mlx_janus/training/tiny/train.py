"""The training of Janus-Tiny, from random weights to a model folder that ``load`` takes."""

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
from ..loop import Report, Stage, load_state, part_of, run_stage, wait_for_stage
from .auxiliary_heads import JanusWithHeads
from .codec import CodecStage, MergedCodecStage
from .encoder import EncoderStage
from .joint import JointStage, build_model
from .recipe import CODEC, ENCODER, JointRecipe, TinyRecipe, tiny_config
from .vocabulary import train_tokenizer

MODEL_FOLDER = "model"
JOINT_STAGES = ("drawing", "joint", "places")  # stages of the whole model, in order
SOURCE = "mlx_janus.train tiny"


def train_tiny(
    output: Path,
    recipe: TinyRecipe | None = None,
    *,
    every: float = 120.0,
    report: Report | None = None,
) -> JanusModel:
    """Train Janus-Tiny, from its checkpoints if there are any, and write ``output/model``.

    If two processes run this function, the first trains the codec while the second trains the
    vision encoder. Then both share every step.

    Args:
        output: folder that gets ``checkpoints/``, ``log.jsonl`` and ``model/``.
        recipe: steps, batches, learning rates and seed; None: ``TinyRecipe()``.
        every: least number of seconds between two checkpoints of a stage.
        report: called after every step, in the first process only.

    Returns:
        The model. In the first process, it has the weights in ``output/model``, the mean of the
        last two stages. In a second one, it has the weights of the last stage.

    Raises:
        CheckpointError: a checkpoint is damaged, or belongs to another recipe or seed.
        OutputError: a file cannot be written, or ``output/model`` is not an earlier result.
    """
    recipe = recipe or TinyRecipe()
    run = _Run(output, recipe.seed, every, report)
    _train_codec_and_encoder(run, recipe)
    wait_for_stage(output, "merged", recipe.merged.steps)
    wait_for_stage(output, "encoder", recipe.encoder.steps)
    seed = recipe.seed
    tokenizer = train_tokenizer(PromptConfig(), seed)
    config = tiny_config(tokenizer.get_vocab_size())
    prompts = Prompts(tokenizer, config.prompt, image_tokens=config.understanding.tokens)
    encoder = load_state(output, "encoder")
    janus = build_model(config, load_state(output, "merged"), encoder, seed)
    trainee = JanusWithHeads(janus)
    for name in JOINT_STAGES:
        stage = JointStage(trainee, prompts, getattr(recipe, name), seed, name)
        used = _without_later_stages(recipe, name)
        run.train_stage(stage, config.to_dict(), used, writes=run.is_first)
    if run.is_first:  # this process wrote both checkpoints, so they exist
        joint = load_state(output, "joint")
        average_weights(janus, joint, load_state(output, "places"), recipe.share_of_last)
        folder = output / MODEL_FOLDER
        save_model(
            janus, tokenizer.to_str(), folder, dtype=config.dtype, source=SOURCE, overwrite=True
        )
    return janus


class _Run:
    """A training run of Janus-Tiny, as seen by one of its processes."""

    def __init__(self, output: Path, seed: int, every: float, report: Report | None):
        group = mx.distributed.init()
        rank = group.rank()
        last = group.size() - 1
        self.output = output
        self.is_first = rank == 0
        self.is_last = rank == last
        self._seed = seed
        self._every = every
        self._report = report if self.is_first else None

    def train_stage(self, stage: Stage, *depends_on: object, writes: bool = True) -> None:
        """Run a stage, from its checkpoint if there is one.

        A checkpoint that was saved with another seed or other ``depends_on`` is refused.

        Args:
            stage: the stage to run; it is left in its final state.
            depends_on: configs and recipes on which the stage's result depends, besides the seed.
            writes: whether this process writes the stage's checkpoints and log.
        """
        values = [self._seed, *depends_on]
        recipe = json.dumps(values, default=asdict, sort_keys=True)
        run_stage(
            stage,
            self.output,
            recipe=recipe,
            every=self._every,
            report=self._report,
            writes=writes,
        )


def _train_codec_and_encoder(run: _Run, recipe: TinyRecipe) -> None:
    """Train the codec in the first process, and the vision encoder in the last.

    A single process is both the first and the last.
    """
    seed = recipe.seed
    if run.is_first:
        codec = CodecStage(CODEC, recipe.codec, seed)
        run.train_stage(codec, CODEC.to_dict(), recipe.codec)
        trained = load_state(run.output, "codec")
        merged = MergedCodecStage(CODEC, recipe.merged, seed, trained)
        run.train_stage(merged, CODEC.to_dict(), recipe.codec, recipe.merged)
    if run.is_last:
        encoder = EncoderStage(ENCODER, recipe.encoder, seed)
        run.train_stage(encoder, ENCODER.to_dict(), recipe.encoder)


def _without_later_stages(recipe: TinyRecipe, name: str) -> TinyRecipe:
    """Return a recipe with default values for the stages after stage ``name``.

    Stage ``name`` does not depend on later stages, so its checkpoint stays valid when their values
    change.
    """
    index = JOINT_STAGES.index(name)
    later = JOINT_STAGES[index + 1 :]
    defaults: dict[str, Any] = dict.fromkeys(later, JointRecipe())
    return replace(recipe, **defaults)


def average_weights(
    model: JanusModel,
    earlier: dict[str, mx.array],
    later: dict[str, mx.array],
    later_share: float,
) -> None:
    """Load the weighted mean of two stages' weights into a model (Wortsman et al., 2022).

    The model then answers questions about held-out combinations better than after either stage.

    Args:
        model: changed in place.
        earlier: final state of the earlier stage.
        later: final state of the later stage.
        later_share: weight of the later stage in the mean, from 0 to 1.
    """
    # A stage's state also holds the training heads and the optimizer.
    earlier_weights = part_of(earlier, "model.janus.")
    later_weights = part_of(later, "model.janus.")
    means = []
    for name, _ in tree_flatten(model.parameters()):
        mean = (1 - later_share) * earlier_weights[name] + later_share * later_weights[name]
        means.append((name, mean))
    model.load_weights(means, strict=True)
