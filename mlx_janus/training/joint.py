"""The last stage: the whole model on both losses of the paper, with encoder and image codec frozen.

Cross-entropy on the text of answers and on image tokens (arXiv 2410.13848, section 3.3). Encoder and codec come from
the stages before. The paper trains the encoder in its last stage too; here the gradients of a few answers a step undo
what it has learnt (docs/lab-notes.md). The table of image embeddings begins as the codebook, so that codes that look
alike begin alike. The two losses are computed side by side, in a thread each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_map

from ..config import JanusConfig
from ..models.janus import JanusModel
from ..prompts import Prompts
from ..worlds import language
from .batches import PICTURE_AT, AnsweringBatch, DrawingBatch, answering_batch, drawing_batch
from .loop import Learner, compiled_gradient, part_of
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

    Args:
        model: changed in place.
        prompts: the model's tokenizer and template.
        recipe: steps, batches and rate.
        seed: of the batches.
    """

    name = "joint"

    def __init__(self, model: JanusModel, prompts: Prompts, recipe: JointRecipe, seed: int):
        self.recipe, self.steps, self.seed = recipe, recipe.steps, seed
        self.model, self.prompts = model, prompts
        model.gen_vision_model.freeze()
        model.vision_model.freeze()
        self.learner = Learner(
            model, rate=recipe.rate, steps=recipe.steps, warmup=recipe.warmup, muon_rate=recipe.muon_rate, decay=0.02
        )
        self._answering = compiled_gradient(model, answering_loss)
        self._drawing = compiled_gradient(model, drawing_loss)
        self._beside = ThreadPoolExecutor(1)
        self._compiled = False
        device = mx.default_device()
        self._streams = [mx.new_stream(device), self._beside.submit(mx.new_stream, device).result()]
        mx.eval(model.parameters())

    def state(self) -> dict[str, mx.array]:
        return self.learner.state()

    def restore(self, state: dict[str, mx.array]) -> None:
        self.learner.restore(state)

    def step(self, index: int) -> dict[str, float]:
        started = time.perf_counter()
        random = np.random.default_rng([self.seed, 5, index])
        shares = language.LOOKUPS if index < self.recipe.lookup_steps else language.SHARES
        conversations = answering_batch(self.prompts, random, self.recipe.answering_batch, shares)
        captions = drawing_batch(self.prompts, random, self.recipe.drawing_batch, self.recipe.dropped_prompts)
        beside = self._beside.submit(_evaluated, self._answering, conversations, self._streams[1])
        if not self._compiled:  # the two are traced one after the other
            beside.exception()
            self._compiled = True
        (image, matched), towards_image = _evaluated(self._drawing, captions, self._streams[0])
        (text, right), towards_text = beside.result()
        norm = self.learner.update(tree_map(lambda a, b: a + b, towards_text, towards_image))
        positions = conversations.ids.size + captions.ids.size + captions.ids.shape[0] * self.model.config.image_tokens
        return {
            "text_loss": text.item(),
            "image_loss": image.item(),
            "text_right": right.item(),
            "image_right": matched.item(),
            "norm": norm.item(),
            "tokens_per_second": positions / (time.perf_counter() - started),
        }


def _evaluated(gradient: Callable[..., Any], batch: AnsweringBatch | DrawingBatch, stream: mx.Stream) -> Any:
    """A loss and its gradient, computed on a stream, which is of the calling thread."""
    with mx.stream(stream):
        result = gradient(*map(mx.array, astuple(batch)))
        mx.eval(result)
    return result


def answering_loss(
    model: JanusModel, pixels: mx.array, ids: mx.array, asked: mx.array, said: mx.array, counts: mx.array
) -> tuple[mx.array, mx.array]:
    """Mean cross-entropy of what the assistant says, and the share of its ids that are the likeliest; the arguments are
    an ``AnsweringBatch``."""
    embeddings, features = model.embed_text(ids), model.understand(pixels)
    first, last = PICTURE_AT, PICTURE_AT + features.shape[1]
    hidden = model.hidden_states(mx.concatenate([embeddings[:, :first], features, embeddings[:, last:]], axis=1))
    logits = model.text_logits(_at(hidden, asked))  # (B, M, vocabulary)
    total = counts.sum()
    loss = (nn.losses.cross_entropy(logits, said) * counts).sum() / total
    return loss, ((logits.argmax(-1) == said) * counts).sum() / total


def drawing_loss(model: JanusModel, pixels: mx.array, ids: mx.array, starts: mx.array) -> tuple[mx.array, mx.array]:
    """Mean cross-entropy of the pictures' tokens, and the share of them that are the likeliest; the arguments are a
    ``DrawingBatch``."""
    B, n = ids.shape[0], model.config.image_tokens
    tokens = mx.stop_gradient(model.encode_image_tokens(pixels))  # (B, n)
    places = starts[:, None] + mx.arange(n)  # (B, n): where each token is predicted
    text = model.embed_text(ids)
    embeddings = mx.concatenate([text, mx.zeros((B, n - 1, text.shape[-1]))], axis=1)
    drawn = model.embed_image_tokens(tokens[:, :-1])
    after = mx.broadcast_to(places[:, 1:, None], drawn.shape)
    hidden = model.hidden_states(mx.put_along_axis(embeddings, after, drawn, axis=1))
    logits = model.image_logits(_at(hidden, places))  # (B, n, codes)
    loss = nn.losses.cross_entropy(logits, tokens).mean()
    return loss, (logits.argmax(-1) == tokens).mean()


def _at(hidden: mx.array, places: mx.array) -> mx.array:
    """(B, L, hidden), (B, M) -> (B, M, hidden)."""
    return mx.take_along_axis(hidden, mx.broadcast_to(places[..., None], (*places.shape, hidden.shape[-1])), axis=1)
