"""The image codec's two stages (VQ-GAN's encoder, codebook and decoder, without its adversary).

Half of the images are named scenes, half have any colours and outlines. The loss is the
reconstruction error, the encoder's commitment to its codes, and the variance of the vectors of an
image's plain patches: one background should be one token. The first steps pass the normalised
vectors on unquantized. Then some of these vectors become the codebook, and each code follows the
running mean of the vectors assigned to it (van den Oord et al., 2017, appendix A). Codes that fall
out of use move to where the quantization error is largest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import mlx.core as mx
import numpy as np
from scipy import ndimage
from scipy.cluster.vq import kmeans2

from ...config import VQConfig
from ...models.vq import VQModel, normalize
from ...worlds import open_scenes, shapes
from ..loop import Learner, compiled_gradient, part_of
from .codec_start import start_from_images
from .recipe import CodecRecipe

_FIGURE_WEIGHT = 4.0  # added to the weight 1 of a pixel of a figure of ``_USUAL_AREA``
_EDGE_WEIGHT = 3.0  # added where such a pixel is next to another colour
_USUAL_AREA = 150.0  # pixels; smaller figures weigh more per pixel, and larger ones less
_EXTREME_WEIGHTS = (0.5, 8.0)  # least and greatest factor of ``_FIGURE_WEIGHT`` for a figure
_FIGURE = 0.05  # least difference from the corner pixel (0 to 2) of a pixel of a figure
_EDGE = 0.1  # least difference between neighbours of different colours
_PLAIN_WEIGHT = 1.0  # weight of the variance of plain patches' vectors
_CANDIDATES = 3  # named scenes, of which the hardest is trained on
_STAR_HARDNESS = 3.0  # hardness of a star, in that of another shape of its size
_START_BATCHES = 6  # batches from which the initial weights are computed
_CODEBOOK_BATCHES = 24  # batches whose vectors initialise the codebook
_ALIKE = 0.1  # vectors that are equal after rounding to this give one code
_NEW_USES = 0.05  # uses per step that a new code begins with
_DECAY = 0.99  # decay per step of the codes' running means
_UNUSED = 0.01  # mean uses per step; a code with fewer is moved
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
        if self.trains_encoder:
            # Part 100 and more: no other batches have these numbers.
            batches = [self._pixels(0, 100 + part) for part in range(_START_BATCHES)]
            seeds = [seed, 5]  # 5: for the initial weights; other uses have 1, 2 and 6
            random = np.random.default_rng(seeds)
            start_from_images(self.model, [mx.array(pixels) for pixels in batches], random)
        else:  # the subclass loads trained weights
            self.model.encoder.freeze()
            self.model.quant_conv.freeze()
        self._learner = Learner(
            self.model,
            rate=recipe.rate,
            steps=recipe.steps,
            warmup=50,
            muon_rate=recipe.muon_rate,
        )
        # For each code, a running mean over the steps of the number of vectors that are assigned to
        # it (``_uses``), and of the sum of these vectors (``_sums``).
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
        """Train on the batch of step ``index``.

        Returns:
            Measurements by name: loss, psnr (in dB), commitment and norm (of the gradients). While
            the codebook is trained, there are two more: codes_in_use and perplexity.
        """
        unquantized_steps = self._recipe.unquantized_steps
        quantized = index >= unquantized_steps
        if index == unquantized_steps > 0:  # with 0, there is a trained codebook already
            self._initialise_codebook(index)
        pixels = self._pixels(index, 0)
        gradient = self._quantized_gradient if quantized else self._unquantized_gradient
        batch = {
            "pixels": pixels,
            "weights": _pixel_weights(pixels),
            "plain": _plain_patches(pixels, self._cell),
        }
        (loss, measured), gradients = gradient(batch)
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

    @property
    def _cell(self) -> int:
        """Pixels per side of the patch of one token."""
        doublings = len(self.model.decoder.conv_blocks) - 1
        return 2**doublings

    def _pixels(self, index: int, part: int, *, with_open_scenes: bool = True) -> np.ndarray:
        """Render a batch of training scenes, (batch, S, S, 3); ``index`` and ``part`` seed it.

        Part 0 is the batch of step ``index``; other parts are for the codebook and the start.
        """
        seeds = [self._seed, 1, index, part]  # 1: for scenes; other uses have 2, 5 and 6
        random = np.random.default_rng(seeds)
        size = self._recipe.batch
        open_size = round(self._recipe.open_share * size) if with_open_scenes else 0
        images = []
        for _ in range(open_size):
            open_scene = open_scenes.sample_open_scene(random)
            images.append(open_scenes.pixels(open_scene))
        for kind in random.choice(shapes.BUSY, size - open_size):
            candidates = [shapes.sample_scene(random, kind) for _ in range(_CANDIDATES)]
            hardest = max(candidates, key=_hardness)
            images.append(shapes.pixels(hardest))
        return np.stack(images)

    def _initialise_codebook(self, index: int) -> None:
        """Set the codes to distinct vectors of the encoder, before step ``index``."""
        batches = []
        for part in range(1, 1 + _CODEBOOK_BATCHES):  # part 0 is the step's own batch
            pixels = self._pixels(index, part)
            z = _encode(self.model, mx.array(pixels))
            width = z.shape[-1]
            batch = np.array(z).reshape(-1, width)
            batches.append(batch)
        vectors = np.concatenate(batches)
        size = len(self._uses)
        seeds = [self._seed, 2]  # 2: for this choice; other uses have 1, 5 and 6
        random = np.random.default_rng(seeds)
        _, distinct = np.unique(np.round(vectors / _ALIKE), axis=0, return_index=True)
        any_vectors = random.integers(len(vectors), size=size)  # used if too few are distinct
        chosen = np.concatenate([random.permutation(distinct), any_vectors])[:size]
        sums = _NEW_USES * mx.array(vectors[chosen])
        self._set_codebook(sums, mx.full((size,), _NEW_USES))

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
        """Move each code towards the mean of its vectors.

        Every ``_MOVE_EVERY`` steps, also move unused codes to the vectors with the largest errors.

        Args:
            vectors: (vectors, width), normalised.
            ids: (vectors,), the code of each vector.
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
                sums[moved] = _NEW_USES * vectors[worst[:number]]
                uses[moved] = mx.full((number,), _NEW_USES)
        self._set_codebook(sums, uses)


class MergedCodecStage(CodecStage):
    """The codec's second stage: merge the codes of plain background, then train only the decoder.

    Three quarters of a named scene are plain, and the codec spreads many similar codes over them.
    Its choice among them is noise to the language model. A few of these codes are kept. The
    codebook rows of the others are set to zero, so they are never chosen: vectors have unit length,
    and some other row is always nearer. Encoder and codebook are not trained, because training
    would spread the codes again. Codes for the backgrounds of open scenes are not merged.

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

        The codes of plain background are clustered. In each cluster one code is kept: its vector
        becomes the cluster's centre, and it gets the uses of all codes of the cluster. The other
        codes are never used again.

        Args:
            sums: running sum of the vectors assigned to each code; changed in place.
            uses: running count of the uses of each code; changed in place.
        """
        size = len(uses)
        plain = self._plain_codes(size)
        embedding = self.model.quantize.embedding
        vectors = np.array(embedding.weight)[plain]
        seeds = [self._seed, 6]  # 6: for this k-means; other uses have 1, 2 and 5
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
            if not len(codes):  # k-means may leave a cluster empty
                continue
            kept = codes[0]
            cluster_uses = mx.array(uses[codes])  # NumPy's sum would be rounded differently
            total = cluster_uses.sum().item()
            sums[codes] = 0
            uses[codes] = 0
            sums[kept] = centre * total
            uses[kept] = total
        self._set_codebook(mx.array(sums), mx.array(uses))

    def _plain_codes(self, size: int) -> np.ndarray:
        """Return the indices of the codes that plain patches use far more than other patches.

        ``size`` is the number of all codes.
        """
        plain_uses = np.zeros(size)
        other_uses = np.zeros(size)
        for index in range(_SURVEY_BATCHES):
            # Part 1: other scenes than those of the training batches, which have part 0.
            pixels = self._pixels(index, 1, with_open_scenes=False)
            tokens = self.model.encode(mx.array(pixels))
            ids = np.array(tokens)
            batch, length = ids.shape
            is_plain = _plain_patches(pixels, self._cell, _DIFFERENT).reshape(batch, length) > 0
            plain_uses += np.bincount(ids[is_plain], minlength=size)
            other_uses += np.bincount(ids[~is_plain], minlength=size)
        return np.flatnonzero(plain_uses > _PLAIN * other_uses)


def _hardness(scene: shapes.Scene) -> float:
    """Return a measure of how hard a scene is to reconstruct.

    Each thing adds to it, and a small thing adds more. A star adds ``_STAR_HARDNESS`` times as much
    as another shape of its size, because a small star is easily taken for a circle.
    """
    hardness = 0.0
    for thing in scene.things:
        hardness += (_STAR_HARDNESS if thing.shape == "star" else 1.0) / thing.size
    return hardness


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


def _pixel_weights(pixels: np.ndarray) -> np.ndarray:
    """Return each pixel's weight in the loss: (B, S, S, 3) -> (B, S, S, 1).

    A background pixel weighs 1. Pixels of a figure weigh more, and pixels of a small figure most,
    because its outline would be learned last otherwise.
    """
    is_figure = _differs_from_corner(pixels, _FIGURE)
    weights = np.ones((*is_figure.shape, 1), np.float32)
    edges = _edges(pixels)
    for image, mask in enumerate(is_figure):
        regions, count = ndimage.label(mask, np.ones((3, 3)))
        if not count:
            continue
        areas = np.bincount(regions.ravel())
        by_region = (_USUAL_AREA / areas).clip(*_EXTREME_WEIGHTS)
        by_region[0] = 0.0  # region 0 is the background
        # The background pixels next to a figure show its outline too.
        weight = ndimage.grey_dilation(by_region[regions], size=(3, 3))
        weights[image, ..., 0] += weight * (_FIGURE_WEIGHT + _EDGE_WEIGHT * edges[image])
    return weights


def _edges(pixels: np.ndarray) -> np.ndarray:
    """Return whether each pixel has a neighbour of another colour: (B, S, S, 3) -> (B, S, S).

    Neighbours are the pixels above, below, left and right.
    """
    down = np.abs(np.diff(pixels, axis=1)).max(-1) > _EDGE
    across = np.abs(np.diff(pixels, axis=2)).max(-1) > _EDGE
    edges = np.zeros(pixels.shape[:3], bool)
    edges[:, 1:] |= down
    edges[:, :-1] |= down
    edges[:, :, 1:] |= across
    edges[:, :, :-1] |= across
    return edges


def _differs_from_corner(pixels: np.ndarray, threshold: float) -> np.ndarray:
    """Return whether each pixel differs from the top left one: (B, S, S, 3) -> (B, S, S).

    The top left pixel has the colour of the background. Two pixels differ if a channel does by more
    than ``threshold``.
    """
    corner = pixels[:, :1, :1]
    differences: np.ndarray = np.abs(pixels - corner).max(-1)
    return differences > threshold


def _plain_patches(pixels: np.ndarray, cell: int, threshold: float = _FIGURE) -> np.ndarray:
    """Return 1 for each patch that is all background, else 0: (B, S, S, 3) -> (B, h, w).

    Args:
        pixels: images in [-1, 1].
        cell: pixels per side of a patch.
        threshold: a pixel that differs more than this from the corner pixel is not background.
    """
    is_figure = _differs_from_corner(pixels, threshold)
    B, S, _ = is_figure.shape
    grid = S // cell
    cells = is_figure.reshape(B, grid, cell, grid, cell)
    shows_figure = np.asarray(cells.any((2, 4)))
    return (~shows_figure).astype(np.float32)


def _plain_variance(z: mx.array, plain: mx.array) -> mx.array:
    """Return the variance of plain patches' vectors within an image, averaged over all patches.

    A patch that is not plain counts as 0 in this average.

    Args:
        z: (B, h, w, codebook_dim).
        plain: (B, h, w), 1 for a plain patch.
    """
    plain = plain[..., None]
    numbers = plain.sum((1, 2), keepdims=True)
    means = (z * plain).sum((1, 2), keepdims=True) / mx.maximum(numbers, 1)
    distances = plain * (z - means) ** 2
    return distances.sum(-1).mean()


def _loss(
    model: VQModel, batch: Mapping[str, mx.array], quantized: bool
) -> tuple[mx.array, dict[str, mx.array]]:
    """Return the loss of a batch, and values for the codebook and the log.

    Args:
        model: the codec.
        batch: "pixels", (B, S, S, 3) in [-1, 1]; "weights", (B, S, S, 1), of the pixels; "plain",
            (B, h, w), 1 for each patch of background.
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

    pixel_losses = mx.abs(errors) + 3 * squares
    reconstruction = (batch["weights"] * pixel_losses).mean()
    plain_variance = _plain_variance(z, batch["plain"])
    loss = reconstruction + 0.25 * commitment + _PLAIN_WEIGHT * plain_variance
    return loss, {
        "squared_error": squares.mean(),
        "commitment": commitment,
        "vectors": vectors,
        "ids": ids,
    }
