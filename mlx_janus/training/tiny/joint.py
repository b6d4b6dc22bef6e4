"""The last three training stages: the whole model, with a frozen vision encoder and image codec.

The losses are the cross-entropy of answers and of image tokens (arXiv 2410.13848, section 3.3). The
vision encoder and the image codec are trained in earlier stages. The paper's last stage also trains
the encoder, but here the gradients of a few answers per step undo the encoder's training
(docs/lab-notes.md). The table of image embeddings and the image head start from the codebook, so
that similar codes have similar embeddings and similar logits. Drawing two things takes longest to
learn, so the first of these stages trains on captions only.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_map

from ...config import JanusConfig
from ...models.janus import JanusModel
from ...models.vq_parts import token_config
from ...processing.prompts import Prompts
from ...worlds import language, shapes
from ..loop import Learner, compiled_gradient, part_of
from ..losses import (
    image_token_loss,
    image_token_states,
    insert_features,
    select_positions,
    weighted_cross_entropy,
)
from ..two_processes import sum_over_processes
from .auxiliary_heads import JanusWithHeads
from .batches import caption_batch, conversation_batch
from .recipe import JointRecipe

_HEAD_ROW_NORM = 0.6  # of an initial row of the image head, about that of a random row
_BATCH_SEEDS = {"drawing": 5, "joint": 6, "places": 7}  # so that no stage repeats another's batches
_MEASURED = (
    "text_loss",
    "text_right",
    "image_loss",
    "image_right",
    "tracking_loss",
    "placing_loss",
)


def build_model(
    config: JanusConfig,
    codec: dict[str, mx.array],
    encoder: dict[str, mx.array],
    seed: int,
) -> JanusModel:
    """Create a model from the trained codec and vision encoder.

    The table of image embeddings starts as a copy of the codebook, and the image head as a random
    projection of it. All other weights are random; this function sets MLX's global random seed for
    them.

    Args:
        config: the model's config.
        codec: final state of the codec's last stage.
        encoder: final state of the vision encoder's stage.
        seed: seed of the random weights.
    """
    mx.random.seed(seed + 2)  # the earlier stages have ``seed`` and ``seed + 1``
    model = JanusModel(config)
    codec_weights = part_of(codec, "model.")
    encoder_weights = part_of(encoder, "model.encoder.")  # without the heads of its training
    model.gen_vision_model.load_weights(list(codec_weights.items()), strict=True)
    model.vision_model.load_weights(list(encoder_weights.items()), strict=True)
    codebook = model.gen_vision_model.quantize.embedding
    model.gen_embed.weight = mx.array(codebook.weight)  # similar codes, similar embeddings
    head = model.gen_head.vision_head
    head.weight = _rows_from_codebook(codebook.weight, head.weight.shape[1])
    return model


def _rows_from_codebook(codebook: mx.array, width: int) -> mx.array:
    """Project a codebook to initial rows of the image head; similar codes get similar rows.

    Then a code gets a high logit where training has shown only similar codes. With random rows, the
    model would take longer to learn the codes of held-out pairs.

    Args:
        codebook: (codes, codebook_dim), normalised; zeros for a code that is never used.
        width: length of a row.

    Returns:
        (codes, width), with rows of norm ``_HEAD_ROW_NORM``, or of zeros.
    """
    codebook_dim = codebook.shape[1]
    projection = mx.random.normal((width, codebook_dim))
    orthonormal, _ = mx.linalg.qr(projection, stream=mx.cpu)  # it keeps the angles between codes
    return _HEAD_ROW_NORM * codebook @ orthonormal.T


class _Half(NamedTuple):
    """The results of half a step."""

    gradients: Any
    measured: Mapping[str, mx.array]  # by name, one of _MEASURED
    positions: int  # text and image tokens of the batch, for the speed


class JointStage:
    """A training stage: a Janus model learns with its auxiliary heads; some parts are frozen.

    A step has two halves. One is a batch of conversations and the other a batch of captions, or
    both are batches of captions. The step's gradient is the mean over both halves. One process
    computes both halves; two processes (``mlx.launch -n 2``) compute one each, with the same
    result.

    Args:
        trainee: the model and its heads. It is changed in place: parts are frozen, and heads that
            the recipe needs are added.
        prompts: the model's tokenizer and template.
        recipe: steps, batches and learning rates.
        seed: seed of the batches and, as MLX's global seed, of new heads.
        name: the stage's name: "drawing", "joint" or "places".
    """

    def __init__(
        self,
        trainee: JanusWithHeads,
        prompts: Prompts,
        recipe: JointRecipe,
        seed: int,
        name: str = "joint",
    ):
        self.name = name
        self.steps = recipe.steps
        self.trainee = trainee
        self._prompts = prompts
        self._recipe = recipe
        self._seeds = (seed, _BATCH_SEEDS[name])
        mx.random.seed(seed + 3)  # for the weights of new heads
        trainee.add_heads(
            tracking=recipe.tracking > 0,
            placing=recipe.placing > 0,
        )
        _freeze_parts(trainee, learns_answers=recipe.answering_batch > 0)
        self._learner = Learner(
            trainee,
            rate=recipe.rate,
            steps=recipe.steps,
            warmup=recipe.warmup,
            muon_rate=recipe.muon_rate,
            weight_decay=0.02,
            final_rate=recipe.final_rate,
        )
        group = mx.distributed.init()
        self._halves = range(2)[group.rank() :: group.size()]  # both, or only this process's half
        text_loss = partial(answering_loss, placing_weight=recipe.placing)
        image_loss = partial(drawing_loss, tracking_weight=recipe.tracking)
        self._text_gradient = compiled_gradient(trainee, text_loss)
        self._image_gradient = compiled_gradient(trainee, image_loss)
        mx.eval(trainee.parameters())

    def state(self) -> dict[str, mx.array]:
        """Return the model as ``model.janus.*``, the heads, and the optimizer's state."""
        return self._learner.state()

    def restore(self, state: dict[str, mx.array]) -> None:
        """Continue from arrays that ``state()`` returned earlier."""
        self._learner.restore(state)

    def step(self, index: int) -> dict[str, float]:
        """Train on the batches of step ``index``, and return the measurements for the log.

        The measurements are the means of those in ``_MEASURED``, the norm of the gradients before
        clipping ("norm") and the speed ("tokens_per_second").
        """
        started = time.perf_counter()
        halves = [self._compute_half(index, half) for half in self._halves]
        gradients = _mean_gradients([half.gradients for half in halves])
        gradients = nn.average_gradients(gradients)  # over the processes
        # Products of matrices round differently in another memory layout. With one layout, one
        # process and two have the same result.
        gradients = tree_map(mx.contiguous, gradients)
        norm = self._learner.update(gradients)
        metrics = _mean_measurements([half.measured for half in halves])
        metrics["norm"] = float(norm)

        own_positions = sum(half.positions for half in halves)
        positions = sum_over_processes(mx.array(float(own_positions)))
        seconds = time.perf_counter() - started
        metrics["tokens_per_second"] = float(positions) / seconds
        return metrics

    def _compute_half(self, index: int, half: int) -> _Half:
        """Compute the gradients of half 0 or 1 of step ``index``.

        Half 0 is a batch of conversations if the recipe has any; all other halves are captions.
        """
        seeds = [*self._seeds, index, half]
        random = np.random.default_rng(seeds)
        has_conversations = self._recipe.answering_batch > 0
        if has_conversations and half == 0:
            result = self._conversation_half(random, index)
        else:
            result = self._caption_half(random)
        mx.eval(result.gradients, result.measured)
        return result

    def _conversation_half(self, random: np.random.Generator, index: int) -> _Half:
        """Compute the gradients of a batch of conversations.

        In the recipe's first ``lookup_steps`` steps, the question topics have other shares:
        ``language.LOOKUPS``.
        """
        recipe = self._recipe
        is_early = index < recipe.lookup_steps
        shares = language.LOOKUPS if is_early else recipe.shares
        size = recipe.answering_batch
        batch = conversation_batch(self._prompts, random, size, shares)
        (_, measured), gradients = self._text_gradient(batch)
        return _Half(gradients, measured, batch["ids"].size)

    def _caption_half(self, random: np.random.Generator) -> _Half:
        """Compute the gradients of a batch of captions with their images.

        The recipe's ``drawing_batch`` is the number of captions in a step. A step without
        conversations has two batches of captions, each with half of them.
        """
        recipe = self._recipe
        size = recipe.drawing_batch
        if not recipe.answering_batch:
            size = size // 2
        kinds = shapes.PAIRED if recipe.paired else shapes.KINDS
        batch = caption_batch(self._prompts, random, size, recipe.dropped_prompts, kinds)
        (_, measured), gradients = self._image_gradient(batch)
        image_tokens = token_config(self.trainee.janus.config).tokens  # per image
        positions = batch["ids"].size + size * image_tokens
        return _Half(gradients, measured, positions)


def _freeze_parts(trainee: JanusWithHeads, *, learns_answers: bool) -> None:
    """Freeze the vision encoder and the codec, and train all other parts.

    Unless ``learns_answers``, freeze also the parts that only answers use.
    """
    janus = trainee.janus
    trainee.unfreeze()  # an earlier stage may have frozen other parts
    janus.gen_vision_model.freeze()
    janus.vision_model.freeze()
    if not learns_answers:
        janus.aligner.freeze()
        janus.language_model.lm_head.freeze()


def _mean_gradients(of_halves: Sequence[Any]) -> Any:
    """Average the gradients of one or two halves: those that this process computed."""
    if len(of_halves) == 1:
        return of_halves[0]
    return tree_map(lambda first, second: (first + second) / 2, *of_halves)


def _mean_measurements(of_halves: Sequence[Mapping[str, mx.array]]) -> dict[str, float]:
    """Average each measurement over a step's halves, also over a half of the other process.

    A half of captions has other measurements than a half of conversations. A mean is over the
    halves that have the measurement, and a measurement that no half has is left out.

    Args:
        of_halves: the measurements of each half that this process computed, by name.
    """
    sums = mx.zeros((len(_MEASURED),))
    counts = mx.zeros((len(_MEASURED),))
    for measured in of_halves:
        values = [measured.get(name, mx.zeros(())) for name in _MEASURED]
        present = [float(name in measured) for name in _MEASURED]
        sums = sums + mx.stack(values)
        counts = counts + mx.array(present)
    own = mx.stack([sums, counts])  # of every name, so that all processes have the same shape
    total_sums, total_counts = np.array(sum_over_processes(own))
    means = {}
    for name, total, count in zip(_MEASURED, total_sums, total_counts, strict=True):
        if count:
            means[name] = float(total / count)
    return means


def answering_loss(
    trainee: JanusWithHeads,
    batch: Mapping[str, mx.array],
    placing_weight: float = 0.0,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Return the loss of answers and of the placing head, and measurements by name, for the log.

    Args:
        trainee: the model and its heads.
        batch: a ``ConversationBatch``.
        placing_weight: weight of the placing head's loss; with 0, the head is not run.
    """
    janus = trainee.janus
    text = janus.embed_text(batch["ids"])
    features = janus.understand(batch["pixels"])
    embeddings = insert_features(text, features, batch["images"])
    hidden, middle = _final_and_middle_states(janus, embeddings)
    answer_states = select_positions(hidden, batch["positions"])
    logits = janus.text_logits(answer_states)  # (B, M, vocabulary), at M positions of answers
    targets = batch["targets"]
    weights = batch["weights"]
    loss, accuracy = weighted_cross_entropy(logits, targets, weights)
    measured = {"text_loss": loss, "text_right": accuracy}
    if not placing_weight:
        return loss, measured
    head = trainee.placing_head
    assert head is not None  # ``JointStage`` has added it
    placing_loss = head.loss(middle, batch["places"])
    measured["placing_loss"] = placing_loss
    return loss + placing_weight * placing_loss, measured


def _final_and_middle_states(model: JanusModel, embeddings: mx.array) -> tuple[mx.array, mx.array]:
    """Return the final hidden states, as ``model.hidden_states`` does, and the middle layer's.

    The placing head reads the middle layer, so that the layers after it can use the places.
    """
    llama = model.language_model.model
    hidden = embeddings
    middle = embeddings
    middle_number = (len(llama.layers) + 1) // 2
    for number, layer in enumerate(llama.layers, start=1):
        hidden = layer(hidden, "causal")
        if number == middle_number:
            middle = hidden
    return llama.norm(hidden), middle


def drawing_loss(
    trainee: JanusWithHeads,
    batch: Mapping[str, mx.array],
    tracking_weight: float = 0.0,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Return the loss of image tokens and of the tracking head, and measurements by name.

    Args:
        trainee: the model and its heads.
        batch: a ``CaptionBatch``.
        tracking_weight: weight of the tracking head's loss; with 0, the head is not run.
    """
    janus = trainee.janus
    ids = batch["ids"]
    starts = batch["starts"]
    tokens = janus.encode_image_tokens(batch["pixels"])  # (B, n)
    tokens = mx.stop_gradient(tokens)  # the codec is frozen
    hidden = image_token_states(janus, ids, starts, tokens)
    loss, accuracy = image_token_loss(janus, hidden, tokens)
    measured = {"image_loss": loss, "image_right": accuracy}
    if not tracking_weight:
        return loss, measured
    head = trainee.tracking_head
    assert head is not None  # ``JointStage`` has added it
    tracking_loss = head.loss(
        hidden,
        owners=batch["owners"],
        begun=batch["begun"],
        ahead=batch["ahead"],
    )
    measured["tracking_loss"] = tracking_loss
    return loss + tracking_weight * tracking_loss, measured
