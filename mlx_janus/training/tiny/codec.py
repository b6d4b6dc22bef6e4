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

_SHAPE_WEIGHT = 4.0  # added to the weight 1 of a pixel that differs from the corner pixel
_KMEANS_BATCHES = 8  # batches whose vectors initialise the codebook
_DECAY = 0.98  # decay per step of the codes' running means
_UNUSED = 0.05  # mean uses per step; a code with fewer is moved
_MOVE_EVERY = 20  # steps
_SURVEY_BATCHES = 60  # batches in which the codes of plain background are counted
_PLAIN = 4.0  # ratio of uses in plain patches to uses in others; above it, a code is plain
_PLAIN_CLUSTERS = 16  # codes that are kept for plain background
_DIFFERENT = 0.15  # difference from the corner pixel (0 to 2); above it, a patch is not plain


class CodecStage:
    """A training stage: a ``VQModel`` learns images of the training scenes."""

    name = "codec"
    trains_encoder = True

    def __init__(self, config: VQConfig, recipe: CodecRecipe, seed: int):
        self.steps = recipe.steps
        self._recipe = recipe
        self._seed = seed
        mx.random.seed(seed)
        self.model = VQModel(config)
        self.model.quantize.freeze()  # codes follow running means, not gradients
        if not self.trains_encoder:
            self.model.encoder.freeze()
            self.model.quant_conv.freeze()
        self._learner = Learner(
            self.model,
            rate=recipe.rate,
            steps=recipe.steps,
            warmup=50,
            muon_rate=recipe.muon_rate,
        )
        # For each code, the vectors assigned to it in a step: running means of count and sum.
        size = config.codebook_size
        self._uses = mx.ones((size,))
        self._sums = mx.zeros((size, config.codebook_dim))
        unquantized_loss = partial(_loss, quantized=False)
        quantized_loss = partial(_loss, quantized=True)
        self._unquantized_gradient = compiled_gradient(self.model, unquantized_loss)
        self._quantized_gradient = compiled_gradient(self.model, quantized_loss)
        mx.eval(self.model.parameters())

    def state(self) -> dict[str, mx.array]:
        """Return the learner's state, and the codes' running means as ``codebook.*``."""
        state = self._learner.state()
        state["codebook.uses"] = self._uses
        state["codebook.sums"] = self._sums
        return state

    def restore(self, state: dict[str, mx.array]) -> None:
        """Continue from a state that ``state`` returned."""
        self._learner.restore(state)
        self._uses = state["codebook.uses"]
        self._sums = state["codebook.sums"]

    def step(self, index: int) -> dict[str, float]:
        """Train on step ``index``.

        Returns:
            loss, psnr (in dB), commitment and norm (of the gradients); while the codebook is
            trained also codes_in_use and perplexity.
        """
        unquantized_steps = self._recipe.unquantized_steps
        quantized = index >= unquantized_steps
        if index == unquantized_steps > 0:  # 0: a merged codec has a codebook
            self._initialise_codebook(index)
        pixels = self._pixels(index, 0)
        gradient = self._quantized_gradient if quantized else self._unquantized_gradient
        (loss, measured), gradients = gradient({"pixels": pixels})
        norm = self._learner.update(gradients)

        squared_error = measured["squared_error"].item()
        signal_to_noise = 4 / squared_error  # 4: the square of the pixels' range, 2
        metrics = {
            "loss": loss.item(),
            "psnr": 10 * math.log10(signal_to_noise),
            "commitment": measured["commitment"].item(),
            "norm": norm.item(),
        }
        if quantized and self.trains_encoder:  # with a frozen encoder, the codebook is fixed too
            vectors = measured["vectors"]
            ids = measured["ids"]
            self._update_codebook(vectors, ids, index)
            in_use = np.array(self._uses > _UNUSED)
            perplexity = _perplexity(self._uses)
            metrics["codes_in_use"] = float(in_use.sum())
            metrics["perplexity"] = perplexity.item()
        return metrics

    def _pixels(self, index: int, part: int) -> np.ndarray:
        """Render a batch of training scenes, (batch, S, S, 3); ``index`` and ``part`` seed it.

        Part 0 is the batch of step ``index``; other parts are for the codebook.
        """
        seeds = [self._seed, 1, index, part]  # 1: for scenes; the k-means have 2 and 6
        random = np.random.default_rng(seeds)
        kinds = random.choice(shapes.BUSY, self._recipe.batch)
        images = []
        for kind in kinds:
            scene = shapes.sample_scene(random, kind)
            images.append(shapes.pixels(scene))
        return np.stack(images)

    def _initialise_codebook(self, index: int) -> None:
        """Set the codes by k-means over the encoder's vectors, before step ``index``."""
        from scipy.cluster.vq import kmeans2

        batches = []
        for part in range(1, 1 + _KMEANS_BATCHES):
            pixels = self._pixels(index, part)
            z = _encode(self.model, mx.array(pixels))
            width = z.shape[-1]
            batch = np.array(z).reshape(-1, width)
            batches.append(batch)
        vectors = np.concatenate(batches)
        size = len(self._uses)
        seeds = [self._seed, 2]  # 2: for this k-means; other uses have 1 and 6
        centres, _ = kmeans2(
            vectors,
            size,
            iter=5,
            minit="++",
            missing="warn",
            seed=np.random.default_rng(seeds),
        )
        sums = centres.astype(np.float32)  # each centre counts as one use
        uses = mx.ones((size,))
        self._set_codebook(mx.array(sums), uses)

    def _set_codebook(self, sums: mx.array, uses: mx.array) -> None:
        """Set the running means, and each code to its normalised sum."""
        self._sums = sums
        self._uses = uses
        self.model.quantize.embedding.weight = normalize(sums)
        mx.eval(self._sums, self._uses, self.model.quantize.parameters())

    def _update_codebook(
        self,
        vectors: mx.array,
        ids: mx.array,
        index: int,
    ) -> None:
        """Move each code towards the mean of its vectors, and unused codes to the largest errors.

        Args:
            vectors: (vectors, width), normalised.
            ids: (vectors,) their codes.
            index: the step.
        """
        new_uses = mx.zeros_like(self._uses)
        new_uses = new_uses.at[ids].add(1.0)
        new_sums = mx.zeros_like(self._sums)
        new_sums = new_sums.at[ids].add(vectors)
        uses = _DECAY * self._uses + (1 - _DECAY) * new_uses
        sums = _DECAY * self._sums + (1 - _DECAY) * new_sums
        is_due = index % _MOVE_EVERY == 0
        if is_due and index < 0.8 * self.steps:  # not near the end: codes must settle
            codes = self.model.quantize.look_up(ids)
            squares = (vectors - codes) ** 2
            errors = squares.sum(-1)
            worst = mx.argsort(-errors)
            is_unused = np.array(uses) < _UNUSED
            most = ids.size // 8  # codes moved at once, each to a different vector
            unused = np.flatnonzero(is_unused)[:most]
            number = unused.size
            if number:
                moved = mx.array(unused)
                sums[moved] = vectors[worst[:number]]
                uses[moved] = mx.ones((number,))
        self._set_codebook(sums, uses)


class MergedCodecStage(CodecStage):
    """A second stage of a trained codec, after merging its codes of plain background.

    Three quarters of an image are plain, and the codec spreads hundreds of similar codes over them.
    Its choice among them is noise to the language model. A few of these codes are kept. The rows of
    the others become zero, which is nearest to no vector, and the decoder adapts. Encoder and
    codebook are not trained: the codes would spread again.

    Args:
        config: the codec's sizes.
        recipe: steps, batches and learning rates of this stage.
        seed: seed of the batches and of the clustering.
        trained: the final state of ``CodecStage``.
    """

    name = "merged"
    trains_encoder = False

    def __init__(
        self,
        config: VQConfig,
        recipe: CodecRecipe,
        seed: int,
        trained: dict[str, mx.array],
    ):
        super().__init__(config, recipe, seed + 3)  # other scenes than ``CodecStage`` has
        weights = part_of(trained, "model.")
        self.model.load_weights(list(weights.items()), strict=True)
        sums = np.array(trained["codebook.sums"])
        uses = np.array(trained["codebook.uses"])
        self._merge_plain_codes(sums, uses)

    def _merge_plain_codes(self, sums: np.ndarray, uses: np.ndarray) -> None:
        """Merge the many codes of plain background into a few.

        Those codes are clustered. In each cluster one code is kept: its vector becomes the
        cluster's centre, and it gets the uses of all. The others are never used again.

        Args:
            sums: running sum of the vectors assigned to each code; changed in place.
            uses: running count of the uses of each code; changed in place.
        """
        from scipy.cluster.vq import kmeans2

        size = len(uses)
        plain = self._plain_codes(size)
        embedding = self.model.quantize.embedding
        vectors = np.array(embedding.weight)[plain]
        seeds = [self._seed, 6]  # 6: for this k-means; other uses have 1 and 2
        centres, nearest = kmeans2(
            vectors,
            _PLAIN_CLUSTERS,
            iter=20,
            minit="++",
            missing="warn",
            seed=np.random.default_rng(seeds),
        )
        for cluster, centre in enumerate(centres):
            codes = plain[nearest == cluster]
            if not len(codes):
                continue
            kept = codes[0]
            cluster_uses = mx.array(uses[codes])  # MLX rounds sums otherwise than NumPy
            total = cluster_uses.sum().item()
            sums[codes] = 0
            uses[codes] = 0
            sums[kept] = centre * total
            uses[kept] = total
        self._set_codebook(mx.array(sums), mx.array(uses))

    def _plain_codes(self, size: int) -> np.ndarray:
        """Return the indices of the codes of plain background, of ``size`` codes."""
        plain = np.zeros(size)
        other = np.zeros(size)
        doublings = len(self.model.decoder.conv_blocks) - 1
        cell = 2**doublings  # pixels per side of a token
        for index in range(_SURVEY_BATCHES):
            pixels = self._pixels(index, 1)
            tokens = self.model.encode(mx.array(pixels))
            ids = np.array(tokens)
            batch, length = ids.shape
            grid = math.isqrt(length)
            corner = pixels[:, :1, :1]
            differences = np.abs(pixels - corner)
            differs = differences.max(-1) > _DIFFERENT
            # A token's patch shows a shape if any of its pixels differs from the corner.
            cells = differs.reshape(batch, grid, cell, grid, cell)
            shaped = cells.any((2, 4))
            shaped = shaped.reshape(batch, length)
            plain += np.bincount(ids[~shaped], minlength=size)
            other += np.bincount(ids[shaped], minlength=size)
        return np.flatnonzero(plain > _PLAIN * other)


def _perplexity(uses: mx.array) -> mx.array:
    """Return the effective number of codes: e to the entropy of their shares of the uses."""
    shares = uses / uses.sum()
    shares = shares + 1e-9  # so that each has a logarithm
    entropy = -shares @ mx.log(shares)
    return mx.exp(entropy)


def _encode(model: VQModel, pixels: mx.array) -> mx.array:
    """Return the encoder's normalised vectors: (B, S, S, 3) -> (B, h, w, codebook_dim)."""
    features = model.encoder(pixels)
    z = model.quant_conv(features)
    return normalize(z)


def _loss(
    model: VQModel, batch: Mapping[str, mx.array], quantized: bool
) -> tuple[mx.array, dict[str, mx.array]]:
    """Return the loss of a reconstruction, and the values that a step reads.

    Args:
        model: the codec.
        batch: "pixels", (B, S, S, 3) in [-1, 1].
        quantized: False to decode the encoder's vectors as they are.

    Returns:
        The loss, and by name: squared_error and commitment (scalars), vectors (B * h * w,
        codebook_dim) and ids (B * h * w,). If not quantized, the commitment and all ids are 0.
    """
    pixels = batch["pixels"]
    z = _encode(model, pixels)
    vectors = mx.stop_gradient(z).reshape(-1, z.shape[-1])
    if quantized:
        ids = model.quantize.nearest(vectors)
        codes = model.quantize.look_up(ids)
        codes = mx.stop_gradient(codes).reshape(z.shape)
        distances = ((z - codes) ** 2).sum(-1)
        commitment = distances.mean()
        # Straight-through estimator: the decoder reads the codes, but the gradient goes to z.
        correction = mx.stop_gradient(codes - z)
        decoded = z + correction
    else:
        ids = mx.zeros((len(vectors),), mx.uint32)  # not used
        commitment = mx.array(0.0)
        decoded = z
    features = model.post_quant_conv(decoded)
    reconstructed = model.decoder(features)
    errors = reconstructed - pixels
    squares = errors * errors

    # The corner pixel stands for the background. Pixels unlike it weigh more.
    corner = pixels[:, :1, :1]
    differences = mx.abs(pixels - corner)
    largest = differences.max(-1, keepdims=True)
    differs = largest > 0.05
    weights = 1 + _SHAPE_WEIGHT * differs
    pixel_losses = mx.abs(errors) + 3 * squares
    reconstruction = (weights * pixel_losses).mean()
    loss = reconstruction + 0.25 * commitment
    return loss, {
        "squared_error": squares.mean(),
        "commitment": commitment,
        "vectors": vectors,
        "ids": ids,
    }
