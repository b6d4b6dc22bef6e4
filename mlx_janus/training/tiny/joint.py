"""The last stages: the whole model on both losses of the paper, with encoder and image codec frozen.

Cross-entropy on the text of answers and on image tokens (arXiv 2410.13848, section 3.3). Encoder and codec come from
the stages before. The paper trains the encoder in its last stage too; here the gradients of a few answers a step undo
what it has learnt (docs/lab-notes.md). The table of image embeddings begins as the codebook, so that codes that look
alike begin alike. Drawing two things takes longest to learn, so a stage of captions alone comes first.
A step's gradient is the mean of its halves'.
"""

from __future__ import annotations

import time
from dataclasses import astuple
from functools import partial
from typing import Any

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
from .auxiliary_heads import PlacingHead, TrackingHead
from .batches import PICTURE_AT, answering_batch, drawing_batch
from .recipe import JointRecipe


def build_model(config: JanusConfig, codec: dict[str, mx.array], encoder: dict[str, mx.array], seed: int) -> JanusModel:
    """A new model with a trained codec and vision encoder: the states of their stages."""
    mx.random.seed(seed + 2)
    model = JanusModel(config)
    model.gen_vision_model.load_weights(list(part_of(codec, "model.").items()), strict=True)
    model.vision_model.load_weights(list(part_of(encoder, "model.encoder.").items()), strict=True)
    model.gen_embed.weight = mx.array(model.gen_vision_model.quantize.embedding.weight)
    return model


class JointStage:
    """Trains a ``JanusModel``, all but its vision encoder and its codec.

    A step is two halves: conversations and captions, or captions twice. Two processes (``mlx.launch -n 2``) do a half
    each, one does both; the result is the same.

    Args:
        model: changed in place.
        prompts: the model's tokenizer and template.
        recipe: steps, batches and rates.
        seed: of the batches.
        name: of the stage.
    """

    def __init__(self, model: JanusModel, prompts: Prompts, recipe: JointRecipe, seed: int, name: str = "joint"):
        self.recipe, self.steps, self.seed, self.name = recipe, recipe.steps, seed, name
        self.model, self.prompts = model, prompts
        mx.random.seed(seed + 3)
        if recipe.tracking and "tracking_head" not in model:
            model.tracking_head = TrackingHead(model.config.language.hidden_size)
        if recipe.placing and "placing_head" not in model:
            model.placing_head = PlacingHead(model.config.language.hidden_size)
        model.unfreeze()
        model.gen_vision_model.freeze()
        model.vision_model.freeze()
        if not recipe.answering_batch:
            model.aligner.freeze()
            model.language_model.lm_head.freeze()
        self.learner = Learner(
            model, rate=recipe.rate, steps=recipe.steps, warmup=recipe.warmup, muon_rate=recipe.muon_rate, decay=0.02,
            final_rate=recipe.final_rate,
        )  # fmt: skip
        self._batches = _SEEDS[name]
        group = mx.distributed.init()
        self._mine = range(2)[group.rank() :: group.size()]  # halves of every step
        self._answering = compiled_gradient(model, partial(answering_loss, placing=recipe.placing))
        self._drawing = compiled_gradient(model, partial(drawing_loss, tracking=recipe.tracking))
        mx.eval(model.parameters())

    def state(self) -> dict[str, mx.array]:
        return self.learner.state()

    def restore(self, state: dict[str, mx.array]) -> None:
        self.learner.restore(state)

    def step(self, index: int) -> dict[str, float]:
        started = time.perf_counter()
        gradients, measured = None, mx.zeros((2, len(_MEASURED)))
        for half in self._mine:
            answering = self.recipe.answering_batch and half == 0
            towards, found = (self._answers if answering else self._captions)(index, half)
            gradients = towards if gradients is None else tree_map(lambda a, b: (a + b) / 2, gradients, towards)
            measured = measured + found
            mx.eval(gradients, measured)
        # in one layout, whether a ring carried them or not: with another one products round otherwise
        norm = self.learner.update(tree_map(mx.contiguous, nn.average_gradients(gradients)))
        values, counts = np.array(mx.distributed.all_sum(measured, stream=mx.cpu))
        means = {name: float(v / n) for name, v, n in zip(_MEASURED[:-1], values, counts, strict=False) if n}
        tokens_per_second = float(values[-1]) / (time.perf_counter() - started)
        return {**means, "norm": float(norm), "tokens_per_second": tokens_per_second}

    def _answers(self, index: int, half: int) -> tuple[Any, mx.array]:
        random = np.random.default_rng([self.seed, self._batches, index, half])
        shares = language.LOOKUPS if index < self.recipe.lookup_steps else self.recipe.shares
        batch = answering_batch(self.prompts, random, self.recipe.answering_batch, shares)
        (_, loss, right, placed), gradients = self._answering(*map(mx.array, astuple(batch)))
        measured = {"text_loss": loss, "text_right": right, "positions": batch.ids.size}
        return gradients, _row(**measured, **({"placing_loss": placed} if self.recipe.placing else {}))

    def _captions(self, index: int, half: int) -> tuple[Any, mx.array]:
        random = np.random.default_rng([self.seed, self._batches, index, half])
        size = self.recipe.drawing_batch if self.recipe.answering_batch else self.recipe.drawing_batch // 2
        kinds = shapes.PAIRED if self.recipe.paired else shapes.KINDS
        batch = drawing_batch(self.prompts, random, size, self.recipe.dropped_prompts, kinds)
        (_, loss, right, tracked), gradients = self._drawing(*map(mx.array, astuple(batch)))
        positions = batch.ids.size + size * token_config(self.model.config).tokens
        measured = {"image_loss": loss, "image_right": right, "positions": positions}
        return gradients, _row(**measured, **({"tracking_loss": tracked} if self.recipe.tracking else {}))


_SEEDS = {"drawing": 5, "joint": 6, "places": 7}  # of batches: no stage sees those of another
_MEASURED = (
    "text_loss",
    "text_right",
    "image_loss",
    "image_right",
    "tracking_loss",
    "placing_loss",
    "positions",
)  # the last one is summed


def _row(**measured: mx.array | float) -> mx.array:
    """(2, 7): values in the order of ``_MEASURED``, and ones where there are such."""
    values = [mx.array(measured.get(name, 0.0), mx.float32) for name in _MEASURED]
    return mx.stack([mx.stack(values), mx.array([float(name in measured) for name in _MEASURED])])


def answering_loss(
    model: JanusModel,
    pixels: mx.array,
    ids: mx.array,
    asked: mx.array,
    said: mx.array,
    counts: mx.array,
    places: mx.array,
    placing: float = 0.0,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """What to lower, the mean cross-entropy of what the assistant says, the share of its ids that are the likeliest,
    and the loss of the placing head, so much of which is part of the first; the arguments are an ``AnsweringBatch``."""
    embeddings, features = model.embed_text(ids), model.understand(pixels)
    first, last = PICTURE_AT, PICTURE_AT + features.shape[1]
    hidden, inner = _through(model, mx.concatenate([embeddings[:, :first], features, embeddings[:, last:]], axis=1))
    logits = model.text_logits(_at(hidden, asked))  # (B, M, vocabulary)
    total = counts.sum()
    loss = (nn.losses.cross_entropy(logits, said) * counts).sum() / total
    beside = model.placing_head.loss(inner, places) if placing else mx.zeros(())
    return loss + placing * beside, loss, ((logits.argmax(-1) == said) * counts).sum() / total, beside


def _through(model: JanusModel, embeddings: mx.array) -> tuple[mx.array, mx.array]:
    """``model.hidden_states``, and what the layer in the middle gives, which later positions can still make use of."""
    llama, inner = model.language_model.model, embeddings
    hidden = embeddings
    for number, layer in enumerate(llama.layers, start=1):
        hidden = layer(hidden, "causal")
        if number == (len(llama.layers) + 1) // 2:
            inner = hidden
    return llama.norm(hidden), inner


def drawing_loss(
    model: JanusModel, pixels: mx.array, ids: mx.array, starts: mx.array, *tracked: mx.array, tracking: float = 0.0
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """What to lower, the mean cross-entropy of the pictures' tokens, the share of them that are the likeliest, and the
    loss of the tracking head, so much of which is part of the first; the arguments are a ``DrawingBatch``."""
    B, n = ids.shape[0], token_config(model.config).tokens
    tokens = mx.stop_gradient(model.encode_image_tokens(pixels))  # (B, n)
    places = starts[:, None] + mx.arange(n)  # (B, n): where each token is predicted
    text = model.embed_text(ids)
    embeddings = mx.concatenate([text, mx.zeros((B, n - 1, text.shape[-1]))], axis=1)
    drawn = model.embed_image_tokens(tokens[:, :-1])
    after = mx.broadcast_to(places[:, 1:, None], drawn.shape)
    hidden = model.hidden_states(mx.put_along_axis(embeddings, after, drawn, axis=1))
    hidden = _at(hidden, places)
    logits = model.image_logits(hidden)  # (B, n, codes)
    loss = nn.losses.cross_entropy(logits, tokens).mean()
    beside = model.tracking_head.loss(hidden, *tracked) if tracking else mx.zeros(())
    return loss + tracking * beside, loss, (logits.argmax(-1) == tokens).mean(), beside


def _at(hidden: mx.array, places: mx.array) -> mx.array:
    """(B, L, hidden), (B, M) -> (B, M, hidden)."""
    return mx.take_along_axis(hidden, mx.broadcast_to(places[..., None], (*places.shape, hidden.shape[-1])), axis=1)
