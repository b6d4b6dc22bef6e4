"""The image codec's two stages (VQ-GAN's encoder, codebook and decoder, without its adversary).

The loss is the reconstruction error plus the encoder's commitment to its codes. The first steps
pass the normalised vectors on unquantized. Then k-means over such vectors initialises the codebook,
and each code follows the running mean of the vectors assigned to it (van den Oord et al., 2017,
appendix A). Codes that fall out of use move to where the quantization error is largest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import mlx.core as mx
import numpy as np

from ...config import VQConfig
from ...models.vq import VQModel, normalize
from ...worlds import shapes
from ..loop import Learner, compiled_gradient, part_of
from .recipe import CodecRecipe

_SHAPE_WEIGHT = 4.0  # weight of a pixel that differs from the corner, added to every pixel's 1
_KMEANS_BATCHES = 8  # batches whose vectors initialise the codebook
_DECAY = 0.98  # decay per step of the codes' running means
_UNUSED = 0.05  # mean uses per step; a code with fewer is moved
_MOVE_EVERY = 20  # steps
_SURVEY_BATCHES = 60  # batches that show which codes stand for plain background
_PLAIN = 4.0  # a plain code is used this many times as often for plain patches as for others
_PLAIN_CODES = 16  # codes that plain background keeps
_DIFFERENT = 0.15  # difference from the corner, of 2, that makes a patch not plain


class CodecStage:
    """Trains a ``VQModel`` on images of the training scenes."""

    name = "codec"
    trains_encoder = True

    def __init__(self, config: VQConfig, recipe: CodecRecipe, seed: int):
        self.steps = recipe.steps
        self._recipe = recipe
        self._seed = seed
        mx.random.seed(seed)
        self.model = VQModel(config)
        self.model.quantize.freeze()
        if not self.trains_encoder:
            self.model.encoder.freeze()
            self.model.quant_conv.freeze()
        self._learner = Learner(
            self.model, rate=recipe.rate, steps=recipe.steps, warmup=50, muon_rate=recipe.muon_rate
        )
        # running means per step of each code's number of vectors and of their sum
        self._uses = mx.ones((config.codebook_size,))
        self._sums = mx.zeros((config.codebook_size, config.codebook_dim))
        self._unquantized_gradient = compiled_gradient(self.model, partial(_loss, quantized=False))
        self._quantized_gradient = compiled_gradient(self.model, partial(_loss, quantized=True))
        mx.eval(self.model.parameters())

    def state(self) -> dict[str, mx.array]:
        """Return the learner's state, and the codes' running means as ``codebook.*``."""
        return {**self._learner.state(), "codebook.uses": self._uses, "codebook.sums": self._sums}

    def restore(self, state: dict[str, mx.array]) -> None:
        """Continue from a state that ``state`` returned."""
        self._learner.restore(state)
        self._uses = state["codebook.uses"]
        self._sums = state["codebook.sums"]

    def step(self, index: int) -> dict[str, float]:
        """Train on step ``index``; return the loss, its parts, and the use of the codes."""
        quantized = index >= self._recipe.unquantized_steps
        if index == self._recipe.unquantized_steps > 0:
            self._initialise_codebook(index)
        gradient = self._quantized_gradient if quantized else self._unquantized_gradient
        (loss, measured), gradients = gradient({"pixels": self._pixels(index, 0)})
        norm = self._learner.update(gradients)
        metrics = {
            "loss": loss.item(),
            "psnr": 10 * math.log10(4 / measured["squared_error"].item()),
            "commitment": measured["commitment"].item(),
            "norm": norm.item(),
        }
        if quantized and self.trains_encoder:
            self._update_codebook(measured["vectors"], measured["ids"], index)
            metrics["codes_in_use"] = float(np.array(self._uses > _UNUSED).sum())
            metrics["perplexity"] = _perplexity(self._uses).item()
        return metrics

    def _pixels(self, index: int, part: int) -> np.ndarray:
        """Render a batch of scenes; ``part`` tells batches of one index apart."""
        random = np.random.default_rng([self._seed, 1, index, part])
        kinds = random.choice(shapes.BUSY, self._recipe.batch)
        return np.stack([shapes.pixels(shapes.sample_scene(random, kind)) for kind in kinds])

    def _initialise_codebook(self, index: int) -> None:
        """Set the codes by k-means over the encoder's vectors."""
        from scipy.cluster.vq import kmeans2

        vectors = []
        for part in range(1, 1 + _KMEANS_BATCHES):
            pixels = mx.array(self._pixels(index, part))
            z = normalize(self.model.quant_conv(self.model.encoder(pixels)))
            vectors.append(np.array(z).reshape(-1, z.shape[-1]))
        size = self._uses.shape[0]
        random = np.random.default_rng([self._seed, 2])
        centres, _ = kmeans2(
            np.concatenate(vectors), size, iter=5, minit="++", missing="warn", seed=random
        )
        self._set_codebook(mx.array(centres.astype(np.float32)), mx.ones((size,)))

    def _set_codebook(self, sums: mx.array, uses: mx.array) -> None:
        """Set the running means, and the codes to the directions of their sums."""
        self._sums = sums
        self._uses = uses
        self.model.quantize.embedding.weight = normalize(sums)
        mx.eval(self._sums, self._uses, self.model.quantize.parameters())

    def _update_codebook(self, vectors: mx.array, ids: mx.array, index: int) -> None:
        """Move each code towards the mean of its vectors, and unused codes to the largest errors.

        Args:
            vectors: (vectors, width), normalised.
            ids: (vectors,) their codes.
            index: the step.
        """
        new_uses = mx.zeros_like(self._uses).at[ids].add(1.0)
        new_sums = mx.zeros_like(self._sums).at[ids].add(vectors)
        uses = _DECAY * self._uses + (1 - _DECAY) * new_uses
        sums = _DECAY * self._sums + (1 - _DECAY) * new_sums
        if index % _MOVE_EVERY == 0 and index < 0.8 * self.steps:
            errors = ((vectors - self.model.quantize.look_up(ids)) ** 2).sum(-1)
            worst = mx.argsort(-errors)
            unused = np.flatnonzero(np.array(uses) < _UNUSED)[: ids.size // 8]
            if unused.size:
                codes = mx.array(unused)
                sums[codes] = vectors[worst[: unused.size]]
                uses[codes] = mx.ones((unused.size,))
        self._set_codebook(sums, uses)


class MergedCodecStage(CodecStage):
    """Continues with a trained codec after merging the codes that it spends on plain background.

    Three quarters of an image are plain, and the codec spreads hundreds of similar codes over them.
    Which one it picks is noise to the language model. These codes become a few. The other rows
    become zero, which is nearest to no vector, and the decoder adapts. Encoder and codebook stay as
    they are; with training, the codes would spread again.

    Args:
        config: the codec's sizes.
        recipe: steps, batches and learning rates of this stage.
        seed: seed of the batches and of the clustering.
        trained: the final state of ``CodecStage``.
    """

    name = "merged"
    trains_encoder = False

    def __init__(
        self, config: VQConfig, recipe: CodecRecipe, seed: int, trained: dict[str, mx.array]
    ):
        super().__init__(config, recipe, seed + 3)
        self.model.load_weights(list(part_of(trained, "model.").items()), strict=True)
        sums = np.array(trained["codebook.sums"])
        uses = np.array(trained["codebook.uses"])
        self._merge_plain_codes(sums, uses)

    def _merge_plain_codes(self, sums: np.ndarray, uses: np.ndarray) -> None:
        """Cluster the plain codes; one of each cluster takes its uses, the others become zero."""
        from scipy.cluster.vq import kmeans2

        plain = self._plain_codes(len(uses))
        vectors = np.array(self.model.quantize.embedding.weight)[plain]
        random = np.random.default_rng([self._seed, 6])
        centres, nearest = kmeans2(
            vectors, _PLAIN_CODES, iter=20, minit="++", missing="warn", seed=random
        )
        for k in range(_PLAIN_CODES):
            codes = plain[nearest == k]
            if len(codes):
                total = mx.array(uses[codes]).sum().item()
                sums[codes] = 0
                uses[codes] = 0
                sums[codes[0]] = centres[k] * total
                uses[codes[0]] = total
        self._set_codebook(mx.array(sums), mx.array(uses))

    def _plain_codes(self, size: int) -> np.ndarray:
        """Find the codes that are used mostly for patches of plain background."""
        plain = np.zeros(size)
        other = np.zeros(size)
        cell = 2 ** (len(self.model.decoder.conv_blocks) - 1)  # pixels per side of a token
        for i in range(_SURVEY_BATCHES):
            pixels = self._pixels(i, 1)
            ids = np.array(self.model.encode(mx.array(pixels)))
            grid = math.isqrt(ids.shape[1])
            corner = pixels[:, :1, :1]
            differs = np.abs(pixels - corner).max(-1) > _DIFFERENT
            cells = differs.reshape(len(ids), grid, cell, grid, cell)
            shaped = cells.any((2, 4)).reshape(ids.shape)
            plain += np.bincount(ids[~shaped], minlength=size)
            other += np.bincount(ids[shaped], minlength=size)
        return np.flatnonzero(plain > _PLAIN * other)


def _perplexity(uses: mx.array) -> mx.array:
    """Return the effective number of codes: e to the entropy of their shares."""
    shares = uses / uses.sum() + 1e-9
    return mx.exp(-shares @ mx.log(shares))


def _loss(
    model: VQModel, batch: Mapping[str, mx.array], quantized: bool
) -> tuple[mx.array, dict[str, mx.array]]:
    """Return the loss of a reconstruction, and the parts and vectors that a step reads.

    Args:
        model: the codec.
        batch: "pixels", (B, S, S, 3) in [-1, 1].
        quantized: False to decode the encoder's vectors as they are.
    """
    pixels = batch["pixels"]
    z = normalize(model.quant_conv(model.encoder(pixels)))
    vectors = mx.stop_gradient(z).reshape(-1, z.shape[-1])
    if quantized:
        ids = model.quantize.nearest(vectors)
        codes = mx.stop_gradient(model.quantize.look_up(ids)).reshape(z.shape)
        commitment = ((z - codes) ** 2).sum(-1).mean()
        decoded = z + mx.stop_gradient(codes - z)  # straight-through estimator
    else:
        ids = mx.zeros((vectors.shape[0],), mx.uint32)
        commitment = mx.array(0.0)
        decoded = z
    errors = model.decoder(model.post_quant_conv(decoded)) - pixels
    squares = errors * errors
    corner = pixels[:, :1, :1]
    differs = mx.abs(pixels - corner).max(-1, keepdims=True) > 0.05
    weights = 1 + _SHAPE_WEIGHT * differs
    loss = (weights * (mx.abs(errors) + 3 * squares)).mean() + 0.25 * commitment
    return loss, {
        "squared_error": squares.mean(),
        "commitment": commitment,
        "vectors": vectors,
        "ids": ids,
    }
