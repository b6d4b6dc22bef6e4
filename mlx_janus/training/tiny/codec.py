"""The first stage: the image codec (VQ-GAN's encoder, codebook and decoder, without its adversary).

The loss is the distance between picture and reconstruction plus the commitment of the encoder to its codes. The first
steps pass the normalised vectors through as they are; then the codebook is laid out by k-means over them, and follows
the mean of what is assigned to each code (van den Oord et al., 2017, appendix A). Codes that fall out of use are put
where the quantization error is largest.
"""

from __future__ import annotations

import math
from functools import partial

import mlx.core as mx
import numpy as np

from ...config import VQConfig
from ...models.vq import VQModel, normalize
from ...worlds import shapes
from ..loop import Learner, compiled_gradient, part_of
from .recipe import CodecRecipe

_ON_SHAPES = 4.0  # weight of a pixel that differs from the picture's corner, above that of a plain one
_LAID_OUT_FROM = 8  # batches
_FORGET = 0.98  # of the running means, a step
_UNUSED = 0.05  # mean uses a step below which a code is moved
_MOVE_EVERY = 20  # steps
_LOOKED_AT = 60  # batches, to tell which codes stand for plain background
_PLAIN = 4.0  # times as often on plain patches as on others
_KEPT = 16  # codes for plain background


class CodecStage:
    """Trains a ``VQModel`` on pictures of the training scenes."""

    name = "codec"
    learns_to_encode = True

    def __init__(self, config: VQConfig, recipe: CodecRecipe, seed: int):
        self.recipe, self.steps, self.seed = recipe, recipe.steps, seed
        mx.random.seed(seed)
        self.model = VQModel(config)
        self.model.quantize.freeze()
        if not self.learns_to_encode:
            self.model.encoder.freeze()
            self.model.quant_conv.freeze()
        self.learner = Learner(self.model, rate=recipe.rate, steps=recipe.steps, warmup=50, muon_rate=recipe.muon_rate)
        size, width = config.codebook_size, config.codebook_dim
        self.uses, self.sums = mx.ones((size,)), mx.zeros((size, width))
        self._losses = [compiled_gradient(self.model, partial(_loss, quantized=q)) for q in (False, True)]
        mx.eval(self.model.parameters())

    def state(self) -> dict[str, mx.array]:
        return {**self.learner.state(), "codebook.uses": self.uses, "codebook.sums": self.sums}

    def restore(self, state: dict[str, mx.array]) -> None:
        self.learner.restore(state)
        codebook = part_of(state, "codebook.")
        self.uses, self.sums = codebook["uses"], codebook["sums"]

    def step(self, index: int) -> dict[str, float]:
        quantized = index >= self.recipe.unquantized_steps
        if index == self.recipe.unquantized_steps > 0:
            self._lay_out(index)
        pixels = self._batch(index, 0)
        (loss, (error, commitment, z, ids)), gradients = self._losses[quantized](pixels)
        norm = self.learner.update(gradients)
        metrics = {
            "loss": loss.item(),
            "psnr": 10 * math.log10(4 / float(np.array(error))),
            "commitment": commitment.item(),
            "norm": norm.item(),
        }
        if quantized and self.learns_to_encode:
            self._follow(z, ids, index)
            used = mx.exp(-(p := self.uses / self.uses.sum() + 1e-9) @ mx.log(p))
            metrics["codes_in_use"] = float(np.array(self.uses > _UNUSED).sum())
            metrics["perplexity"] = used.item()
        return metrics

    def _batch(self, index: int, part: int) -> mx.array:
        random = np.random.default_rng([self.seed, 1, index, part])
        kinds = random.choice(shapes.BUSY, self.recipe.batch)
        return mx.array(np.stack([shapes.pixels(shapes.sample_scene(random, kind)) for kind in kinds]))

    def _lay_out(self, index: int) -> None:
        from scipy.cluster.vq import kmeans2

        vectors = []
        for part in range(1, 1 + _LAID_OUT_FROM):
            z = normalize(self.model.quant_conv(self.model.encoder(self._batch(index, part))))
            vectors.append(np.array(z).reshape(-1, z.shape[-1]))
        size = self.uses.shape[0]
        random = np.random.default_rng([self.seed, 2])
        centres, _ = kmeans2(np.concatenate(vectors), size, iter=5, minit="++", missing="warn", seed=random)
        self._place(mx.array(centres.astype(np.float32)), mx.ones((size,)))

    def _place(self, sums: mx.array, uses: mx.array) -> None:
        self.sums, self.uses = sums, uses
        self.model.quantize.embedding.weight = normalize(sums)
        mx.eval(self.sums, self.uses, self.model.quantize.parameters())

    def _follow(self, z: mx.array, ids: mx.array, index: int) -> None:
        """Move each code towards the mean of what is assigned to it; unused ones to where the error is largest."""
        uses = _FORGET * self.uses + (1 - _FORGET) * mx.zeros_like(self.uses).at[ids].add(1.0)
        sums = _FORGET * self.sums + (1 - _FORGET) * mx.zeros_like(self.sums).at[ids].add(z)
        if index % _MOVE_EVERY == 0 and index < 0.8 * self.steps:
            errors = ((z - self.model.quantize.look_up(ids)) ** 2).sum(-1)
            worst = mx.argsort(-errors)
            unused = np.flatnonzero(np.array(uses) < _UNUSED)[: ids.size // 8]
            if unused.size:
                places = mx.array(unused)
                sums[places] = z[worst[: unused.size]]
                uses[places] = mx.ones((unused.size,))
        self._place(sums, uses)


class MergedCodecStage(CodecStage):
    """Goes on with a trained codec after merging the codes that it spends on plain background.

    Three quarters of a picture are plain, and over them the codec spreads hundreds of codes that look alike. Which one
    it takes is noise to the language model. These codes become a few; the rows of the others become zero, which is
    nearest to nothing; and the decoder gets used to it. Encoder and codebook stay as they are: they would spread again.

    Args:
        config: of the codec.
        recipe: of these steps.
        seed: of batches, and of the clustering.
        trained: the final state of ``CodecStage``.
    """

    name = "merged"

    learns_to_encode = False

    def __init__(self, config: VQConfig, recipe: CodecRecipe, seed: int, trained: dict[str, mx.array]):
        super().__init__(config, recipe, seed + 3)
        self.model.load_weights(list(part_of(trained, "model.").items()), strict=True)
        book = part_of(trained, "codebook.")
        self._merge(book["sums"], book["uses"])

    def _merge(self, sums: mx.array, uses: mx.array) -> None:
        from scipy.cluster.vq import kmeans2

        size = uses.shape[0]
        plain, other = np.zeros((2, size))
        for i in range(_LOOKED_AT):
            pixels = self._batch(i, 1)
            ids = np.array(self.model.encode(pixels))
            shaped = np.abs(np.array(pixels) - np.array(pixels)[:, :1, :1]).max(-1) > 0.15
            grid, cell = int(ids.shape[1] ** 0.5), self.model_cell
            held = shaped.reshape(len(ids), grid, cell, grid, cell).any((2, 4)).reshape(ids.shape)
            plain += np.bincount(ids[~held], minlength=size)
            other += np.bincount(ids[held], minlength=size)
        spent = np.flatnonzero(plain > _PLAIN * other)
        rows = np.array(self.model.quantize.embedding.weight)[spent]
        random = np.random.default_rng([self.seed, 6])
        centres, nearest = kmeans2(rows, _KEPT, iter=20, minit="++", missing="warn", seed=random)
        merged_sums, merged_uses = np.array(sums), np.array(uses)
        for k in range(_KEPT):
            codes = spent[nearest == k]
            if len(codes):
                total = uses[mx.array(codes)].sum()
                merged_sums[codes], merged_uses[codes] = 0, 0
                merged_sums[codes[0]], merged_uses[codes[0]] = centres[k] * float(np.array(total)), np.array(total)
        self._place(mx.array(merged_sums), mx.array(merged_uses))

    @property
    def model_cell(self) -> int:
        """Pixels of a token on a side."""
        return int(2 ** (len(self.model.decoder.conv_blocks) - 1))


def _loss(
    model: VQModel, pixels: mx.array, quantized: bool
) -> tuple[mx.array, tuple[mx.array, mx.array, mx.array, mx.array]]:
    z = normalize(model.quant_conv(model.encoder(pixels)))
    flat = mx.stop_gradient(z).reshape(-1, z.shape[-1])
    ids = mx.zeros((flat.shape[0],), mx.uint32)
    commitment, passed = mx.array(0.0), z
    if quantized:
        ids = model.quantize.nearest(flat)
        codes = mx.stop_gradient(model.quantize.look_up(ids)).reshape(z.shape)
        commitment = ((z - codes) ** 2).sum(-1).mean()
        passed = z + mx.stop_gradient(codes - z)
    off = model.decoder(model.post_quant_conv(passed)) - pixels
    squares = off * off
    shaped = mx.abs(pixels - pixels[:, :1, :1]).max(-1, keepdims=True) > 0.05
    weights = 1 + _ON_SHAPES * shaped
    loss = (weights * (mx.abs(off) + 3 * squares)).mean() + 0.25 * commitment
    return loss, (squares.mean(), commitment, flat, ids)
