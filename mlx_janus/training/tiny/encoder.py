"""The second stage: the vision encoder alone, in place of SigLIP's own pretraining on pictures and captions.

Every patch learns to tell which shape and colour it belongs to, and whether an object's centre is in it, through a
linear head that is dropped afterwards. What a feature is needed for later, telling and counting objects, is learnt here
in minutes from the dense labels that a synthetic world gives.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx import nn
from scipy.fft import dct

from ...config import SiglipConfig
from ...models.siglip import SiglipVisionTower
from ...worlds import shapes
from ..loop import Learner, compiled_gradient
from .recipe import EncoderRecipe

SHAPE_LABELS, COLOUR_LABELS = ("none", *shapes.SHAPES), ("none", *shapes.COLOURS)
_OF_BACKGROUND = 0.15  # weight of a patch without a shape: most are
_CELLS = 4  # of a patch, on a side
_DIRECTIONS = 16  # of an edge, all around
_SHARP = 1.2  # of queries and keys at the beginning
_REACH = 0.8, 3.0  # a patch belongs to a thing whose centre is nearer than this times its radius, plus pixels


class _Labeller(nn.Module):
    """The encoder, a linear head over its patches, and one over its first block's, which outlines objects."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.encoder = SiglipVisionTower(config)
        self.outline = nn.Linear(config.width, _CELLS**2)
        self.edges = nn.Linear(config.width, 4 * _DIRECTIONS)
        self.head = nn.Linear(config.width, len(SHAPE_LABELS) + len(COLOUR_LABELS) + 6)

    def __call__(self, pixels: mx.array) -> tuple[mx.array, ...]:
        tower = self.encoder.vision_tower
        x = tower.blocks[0](tower.embed(pixels))
        outline, edges = self.outline(x), self.edges(x)
        for block in tower.blocks[1:]:
            x = block(x)
        out = self.head(tower.norm(x))
        shape, colour, rest = mx.split(out, [len(SHAPE_LABELS), len(SHAPE_LABELS) + len(COLOUR_LABELS)], axis=-1)
        return shape, colour, rest[..., 0], rest[..., 1:], outline, edges


def outlines(pixels: np.ndarray, grid: int) -> np.ndarray:
    """(B, S, S, 3) -> (B, grid * grid, _CELLS * _CELLS): how much of each cell of a patch differs from the corner."""
    differs = np.abs(pixels - pixels[:, :1, :1]).max(-1) > 0.15
    cell = pixels.shape[1] // (grid * _CELLS)
    cells = differs.reshape(-1, grid, _CELLS, cell, grid, _CELLS, cell).mean((3, 6))  # (B, row, i, column, j)
    return cells.transpose(0, 1, 3, 2, 4).reshape(len(pixels), grid * grid, _CELLS**2).astype(np.float32)


def edges(pixels: np.ndarray, grid: int) -> np.ndarray:
    """(B, S, S, 3) -> (B, grid * grid, 4 * _DIRECTIONS): how much edge of each direction a patch's quarters hold.

    Histograms of oriented gradients, which are known as good targets for vision transformers (Wei et al., 2022).
    """
    differs = (np.abs(pixels - pixels[:, :1, :1]).max(-1) > 0.15).astype(np.float32)
    down, right = np.gradient(differs, axis=(1, 2))
    strength = np.hypot(down, right)
    direction = np.round((np.arctan2(down, right) / (2 * np.pi)) * _DIRECTIONS).astype(int) % _DIRECTIONS
    each = strength[..., None] * (direction[..., None] == np.arange(_DIRECTIONS))
    half = pixels.shape[1] // (2 * grid)
    sums = each.reshape(-1, grid, 2, half, grid, 2, half, _DIRECTIONS).sum((3, 6)) / half
    return sums.transpose(0, 1, 3, 2, 4, 5).reshape(len(pixels), grid * grid, -1).astype(np.float32)


def patch_labels(scene: shapes.Scene, grid: int) -> np.ndarray:
    """(8, grid * grid): the shape and the colour as numbers (0 for none), 1 where a centre is, and of the patch's own
    thing how far its centre is to the right and down, and its size, in patches, and where in the picture its centre is,
    from -2 at the left and the top to 2."""
    labels = np.zeros((8, grid, grid), np.float32)
    size = shapes.SIDE / grid
    y, x = np.mgrid[0:grid, 0:grid] * size + size / 2
    nearest = np.full((grid, grid), np.inf)
    for thing in scene.things:
        away = np.hypot(x - thing.x, y - thing.y)
        mine = (away < _REACH[0] * thing.radius + _REACH[1]) & (away / thing.radius < nearest)
        nearest[mine] = (away / thing.radius)[mine]
        labels[0][mine], labels[1][mine] = SHAPE_LABELS.index(thing.shape), COLOUR_LABELS.index(thing.colour)
        labels[3][mine], labels[4][mine] = (thing.x - x)[mine] / size, (thing.y - y)[mine] / size
        labels[5][mine] = thing.size / size
        labels[6][mine], labels[7][mine] = 4 * thing.x / shapes.SIDE - 2, 4 * thing.y / shapes.SIDE - 2
        labels[2][int(thing.y // size), int(thing.x // size)] = 1
    return labels.reshape(8, -1)


def look_around(encoder: SiglipVisionTower, config: SiglipConfig) -> None:
    """Begin with heads that look one patch up, down, left and right; two patches in the next layer, and so on.

    From a random start attention is flat, and neighbours have to be found first. So the first features of a patch begin
    as sines and cosines of its place alone, and each head's queries as these turned by an offset, which makes its
    attention a convolution (Cordonnier et al., 2020). All of it is free to change.
    """
    tower, waves = encoder.vision_tower, config.width // config.heads  # features of place: as many as a head has
    frequencies = np.geomspace(2 * np.pi / (2 * config.grid), 2.2, waves // 4)
    y, x = np.mgrid[0 : config.grid, 0 : config.grid].reshape(2, -1, 1)
    place = np.concatenate([f(v * frequencies) for v in (y, x) for f in (np.sin, np.cos)], axis=-1)
    free = config.width - waves
    tower.pos_embed = mx.pad(mx.array(place.astype(np.float32)), [(0, 0), (0, free)])[None]
    tower.patch_embed.proj.weight = mx.array(_patterns(config, waves))
    tower.patch_embed.proj.bias *= (mx.arange(config.width) >= waves).astype(mx.float32)
    for reach, block in zip((1, 2, 1, 2, 3, 4), tower.blocks, strict=False):
        query, key, value = mx.split(block.attn.qkv.weight, 3, axis=0)
        turned = [_turn(frequencies, dy, dx) for dy, dx in ((-reach, 0), (reach, 0), (0, -reach), (0, reach))]
        heads = np.concatenate([turned[h % 4] for h in range(config.heads)])  # (width, waves)
        still = np.tile(np.eye(waves), (config.heads, 1))
        query, key = (0.3 * w + _pad_columns(_SHARP * m, free) for w, m in ((query, heads), (key, still)))
        block.attn.qkv.weight = mx.concatenate([query, key, value])


def _patterns(config: SiglipConfig, waves: int) -> np.ndarray:
    """(width, P, P, 3): after the features of place, the cosine transform of a patch's brightness, then the colours of
    its quarters."""
    P = config.patch_size
    cosines = dct(np.eye(P), norm="ortho", axis=0)
    order = sorted(np.ndindex(P, P), key=lambda ij: ij[0] + ij[1])
    kernels = [np.zeros((P, P, 3))] * waves
    colours = [np.zeros((P, P, 3)) for _ in range(12)]
    for i, kernel in enumerate(colours):
        row, column = divmod(i // 3, 2)
        half = P // 2
        kernel[row * half : (row + 1) * half, column * half : (column + 1) * half, i % 3] = 1 / half**2
    bright = [np.outer(cosines[i], cosines[j])[..., None].repeat(3, -1) * (0.15 if i + j else 0.04) for i, j in order]
    kernels += bright[: config.width - waves - len(colours)] + colours
    kernels += [np.zeros((P, P, 3))] * (config.width - len(kernels))
    return np.array(kernels, np.float32)


def _turn(frequencies: np.ndarray, dy: float, dx: float) -> np.ndarray:
    """(waves, waves): takes the sines and cosines of a place to those of the place so many patches away."""
    n = len(frequencies)
    turn = np.zeros((4 * n, 4 * n))
    for axis, offset in enumerate((dy, dx)):
        sine, cosine = slice(2 * axis * n, 2 * axis * n + n), slice(2 * axis * n + n, 2 * axis * n + 2 * n)
        turn[sine, sine] = turn[cosine, cosine] = np.diag(np.cos(frequencies * offset))
        turn[sine, cosine], turn[cosine, sine] = (
            np.diag(np.sin(frequencies * offset)),
            -np.diag(np.sin(frequencies * offset)),
        )
    return turn


def _pad_columns(matrix: np.ndarray, columns: int) -> mx.array:
    return mx.array(np.pad(matrix, [(0, 0), (0, columns)]).astype(np.float32))


class EncoderStage:
    """Trains a ``SiglipVisionTower`` on patch labels of the training scenes."""

    name = "encoder"

    def __init__(self, config: SiglipConfig, recipe: EncoderRecipe, seed: int):
        self.config, self.recipe, self.steps, self.seed = config, recipe, recipe.steps, seed
        mx.random.seed(seed + 1)
        self.model = _Labeller(config)
        look_around(self.model.encoder, config)
        self.learner = Learner(self.model, rate=recipe.rate, steps=recipe.steps, warmup=50, muon_rate=recipe.muon_rate)
        self._loss = compiled_gradient(self.model, _loss)
        mx.eval(self.model.parameters())

    def state(self) -> dict[str, mx.array]:
        return self.learner.state()

    def restore(self, state: dict[str, mx.array]) -> None:
        self.learner.restore(state)

    def step(self, index: int) -> dict[str, float]:
        random = np.random.default_rng([self.seed, 3, index])
        scenes = [shapes.sample_scene(random, kind) for kind in random.choice(shapes.BUSY, self.recipe.batch)]
        pixels = np.stack([shapes.pixels(scene) for scene in scenes])
        labels = mx.array(np.stack([patch_labels(scene, self.config.grid) for scene in scenes], axis=1))
        (loss, right), gradients = self._loss(
            mx.array(pixels),
            labels,
            mx.array(outlines(pixels, self.config.grid)),
            mx.array(edges(pixels, self.config.grid)),
        )
        norm = self.learner.update(gradients)
        shape, colour, places, edgy = right.tolist()
        return {
            "loss": loss.item(),
            "shapes_right": shape,
            "colours_right": colour,
            "places_off": places,
            "edges_off": edgy,
            "norm": norm.item(),
        }


def _loss(
    model: _Labeller, pixels: mx.array, labels: mx.array, cells: mx.array, edged: mx.array
) -> tuple[mx.array, mx.array]:
    shape, colour, centre, place, outline, edge = model(pixels)
    names = labels[:2].astype(mx.int32)
    something = labels[0] > 0
    weights = mx.where(something, 1.0, _OF_BACKGROUND)
    named = nn.losses.cross_entropy(shape, names[0]) + nn.losses.cross_entropy(colour, names[1])
    centres = nn.losses.binary_cross_entropy(centre, labels[2])
    loss = (weights * named).sum() / weights.sum() + 2 * centres.mean()
    places = (
        nn.losses.smooth_l1_loss(place, labels[3:].transpose(1, 2, 0), reduction="none").sum(-1) * something
    ).sum()
    loss = loss + 2 * nn.losses.binary_cross_entropy(outline, cells).mean() + places / something.sum()
    loss = loss + 5 * (weights[..., None] * (edge - edged) ** 2).sum() / weights.sum()
    shapes_right, colours_right = shape.argmax(-1) == names[0], colour.argmax(-1) == names[1]
    return loss, mx.stack(
        [
            (shapes_right & something).sum(),
            (colours_right & something).sum(),
            places,
            ((edge - edged) ** 2).sum() / (edged**2).sum() * something.sum(),
        ]
    ) / something.sum()
