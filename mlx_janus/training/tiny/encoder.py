"""The vision encoder's stage, in place of SigLIP's own pretraining on images and captions.

A linear head, which is discarded afterwards, predicts for every patch its shape, its colour and
whether it holds a thing's centre. The dense labels of a synthetic world teach in minutes the
features that naming and counting things need.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx import nn
from scipy.fft import dct

from ...config import SiglipConfig
from ...models.siglip import SiglipVisionTower
from ...worlds import shapes
from ..loop import Learner, compiled_gradient
from .recipe import EncoderRecipe

SHAPE_LABELS = ("none", *shapes.SHAPES)
COLOUR_LABELS = ("none", *shapes.COLOURS)
_BACKGROUND_WEIGHT = 0.15  # weight of a patch without a shape: most have none
_CELLS = 4  # cells per side of a patch
_DIRECTIONS = 16  # bins over the full circle of an edge's directions
_SHARPNESS = 1.2  # factor on the initial queries and keys
_REACH = 0.8  # a patch belongs to a thing nearer than _REACH radii plus _MARGIN
_MARGIN = 3.0  # pixels
_DIFFERENT = 0.15  # difference from the background, of 2, that makes a pixel part of a thing


class _Predictions(NamedTuple):
    """Logits and values for every patch."""

    shape: mx.array  # (B, N, shapes)
    colour: mx.array  # (B, N, colours)
    centre: mx.array  # (B, N)
    place: mx.array  # (B, N, 5)
    outline: mx.array  # (B, N, _CELLS * _CELLS)
    edges: mx.array  # (B, N, 4 * _DIRECTIONS)


class _EncoderWithHeads(nn.Module):
    """The encoder, a linear head over its patches, and two over its first block for outlines."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.encoder = SiglipVisionTower(config)
        self.outline = nn.Linear(config.width, _CELLS**2)
        self.edges = nn.Linear(config.width, 4 * _DIRECTIONS)
        self.head = nn.Linear(config.width, len(SHAPE_LABELS) + len(COLOUR_LABELS) + 6)

    def __call__(self, pixels: mx.array) -> _Predictions:
        tower = self.encoder.vision_tower
        x = tower.blocks[0](tower.embed(pixels))
        outline = self.outline(x)
        edges = self.edges(x)
        for block in tower.blocks[1:]:
            x = block(x)
        out = self.head(tower.norm(x))
        ends = [len(SHAPE_LABELS), len(SHAPE_LABELS) + len(COLOUR_LABELS)]
        shape, colour, rest = mx.split(out, ends, axis=-1)
        centre = rest[..., 0]
        place = rest[..., 1:]
        return _Predictions(shape, colour, centre, place, outline, edges)


def outlines(pixels: np.ndarray, grid: int) -> np.ndarray:
    """Measure how much of each cell of a patch is not background.

    (B, S, S, 3) -> (B, grid * grid, _CELLS * _CELLS), each from 0 to 1.
    """
    differs = _differs_from_corner(pixels)
    cell = pixels.shape[1] // (grid * _CELLS)
    blocks = differs.reshape(-1, grid, _CELLS, cell, grid, _CELLS, cell)
    shares = blocks.mean((3, 6))  # (B, row, i, column, j)
    by_patch = shares.transpose(0, 1, 3, 2, 4)  # (B, row, column, i, j)
    return by_patch.reshape(len(pixels), grid * grid, -1).astype(np.float32)


def edges(pixels: np.ndarray, grid: int) -> np.ndarray:
    """Measure the edges of each direction in each quarter of a patch.

    (B, S, S, 3) -> (B, grid * grid, 4 * _DIRECTIONS): histograms of oriented gradients, known as
    good targets for vision transformers (Wei et al., 2022).
    """
    down, right = np.gradient(_differs_from_corner(pixels).astype(np.float32), axis=(1, 2))
    strength = np.hypot(down, right)
    circles = np.arctan2(down, right) / (2 * np.pi)  # from -0.5 to 0.5
    direction = np.round(circles * _DIRECTIONS).astype(int) % _DIRECTIONS
    each = strength[..., None] * (direction[..., None] == np.arange(_DIRECTIONS))
    half = pixels.shape[1] // (2 * grid)
    blocks = each.reshape(-1, grid, 2, half, grid, 2, half, _DIRECTIONS)
    sums = blocks.sum((3, 6)) / half  # (B, row, i, column, j, direction)
    by_patch = sums.transpose(0, 1, 3, 2, 4, 5)  # (B, row, column, i, j, direction)
    return by_patch.reshape(len(pixels), grid * grid, -1).astype(np.float32)


def _differs_from_corner(pixels: np.ndarray) -> np.ndarray:
    """Mark the pixels that differ from the top left one, which is background: (B, S, S)."""
    corner = pixels[:, :1, :1]
    return np.abs(pixels - corner).max(-1) > _DIFFERENT


def patch_labels(scene: shapes.Scene, grid: int) -> np.ndarray:
    """Label every patch of a scene -> (8, grid * grid).

    0 and 1: indices into ``SHAPE_LABELS`` and ``COLOUR_LABELS``. 2: 1 if a thing's centre is in the
    patch. The rest describes the patch's own thing. 3 and 4: offset of its centre to the right and
    down, in patches. 5: its size in patches. 6 and 7: its x and y in the image, from -2 at the left
    and the top to 2.
    """
    labels = np.zeros((8, grid, grid), np.float32)
    size = shapes.SIDE / grid
    y, x = np.mgrid[0:grid, 0:grid] * size + size / 2
    nearest = np.full((grid, grid), np.inf)
    for thing in scene.things:
        distance = np.hypot(x - thing.x, y - thing.y)
        radii = distance / thing.radius
        mine = (distance < _REACH * thing.radius + _MARGIN) & (radii < nearest)
        nearest[mine] = radii[mine]
        labels[0][mine] = SHAPE_LABELS.index(thing.shape)
        labels[1][mine] = COLOUR_LABELS.index(thing.colour)
        labels[2][int(thing.y // size), int(thing.x // size)] = 1
        labels[3][mine] = (thing.x - x)[mine] / size
        labels[4][mine] = (thing.y - y)[mine] / size
        labels[5][mine] = thing.size / size
        labels[6][mine] = 4 * thing.x / shapes.SIDE - 2
        labels[7][mine] = 4 * thing.y / shapes.SIDE - 2
    return labels.reshape(8, -1)


def init_local_attention(encoder: SiglipVisionTower, config: SiglipConfig) -> None:
    """Initialise attention heads to look at patches above, below, left and right.

    The first layer looks at the next patch, later layers look further.

    With random weights attention is flat, and the neighbours would have to be found first. Here the
    first features of a patch are sines and cosines of its place only. Each head's queries are these
    rotated by an offset, which makes its attention a convolution (Cordonnier et al., 2020).
    Training may change all of it.
    """
    tower = encoder.vision_tower
    waves = config.width // config.heads  # features of place: as many as a head has
    free = config.width - waves
    frequencies = np.geomspace(2 * np.pi / (2 * config.grid), 2.2, waves // 4)
    y, x = np.mgrid[0 : config.grid, 0 : config.grid].reshape(2, -1, 1)
    rows = y * frequencies
    columns = x * frequencies
    place = np.concatenate([np.sin(rows), np.cos(rows), np.sin(columns), np.cos(columns)], axis=-1)
    tower.pos_embed = _pad_columns(place, free)[None]
    tower.patch_embed.proj.weight = mx.array(_patch_filters(config, waves))
    tower.patch_embed.proj.bias *= (mx.arange(config.width) >= waves).astype(mx.float32)
    keys = np.tile(np.eye(waves), (config.heads, 1))
    for reach, block in zip((1, 2, 1, 2, 3, 4), tower.blocks, strict=False):
        offsets = ((-reach, 0), (reach, 0), (0, -reach), (0, reach))
        rotations = [_rotation(frequencies, dy, dx) for dy, dx in offsets]
        queries = np.concatenate([rotations[head % 4] for head in range(config.heads)])
        query, key, value = mx.split(block.attn.qkv.weight, 3, axis=0)
        query = 0.3 * query + _pad_columns(_SHARPNESS * queries, free)
        key = 0.3 * key + _pad_columns(_SHARPNESS * keys, free)
        block.attn.qkv.weight = mx.concatenate([query, key, value])


def _patch_filters(config: SiglipConfig, waves: int) -> np.ndarray:
    """Return the initial patch embedding: (width, P, P, 3).

    After the features of place, which are zero, come the cosine transform of a patch's brightness
    and the colours of its quarters.
    """
    P = config.patch_size
    cosines = dct(np.eye(P), norm="ortho", axis=0)
    colours = [_quarter_colour(P, quarter, channel) for quarter in range(4) for channel in range(3)]
    filters = [np.zeros((P, P, 3))] * waves
    order = sorted(np.ndindex(P, P), key=lambda ij: ij[0] + ij[1])
    for i, j in order[: config.width - waves - len(colours)]:
        brightness = np.outer(cosines[i], cosines[j])[..., None].repeat(3, -1)
        filters.append(brightness * (0.15 if i + j else 0.04))
    filters += colours
    filters += [np.zeros((P, P, 3))] * (config.width - len(filters))
    return np.array(filters, np.float32)


def _quarter_colour(size: int, quarter: int, channel: int) -> np.ndarray:
    """Return a filter that sums a colour channel over a quarter of a patch: (size, size, 3)."""
    row, column = divmod(quarter, 2)
    half = size // 2
    rows = slice(row * half, (row + 1) * half)
    columns = slice(column * half, (column + 1) * half)
    kernel = np.zeros((size, size, 3))
    kernel[rows, columns, channel] = 1 / half**2
    return kernel


def _rotation(frequencies: np.ndarray, dy: float, dx: float) -> np.ndarray:
    """Return the matrix that moves a place's sines and cosines by some patches: (waves, waves)."""
    n = len(frequencies)
    rotation = np.zeros((4 * n, 4 * n))
    for axis, offset in enumerate((dy, dx)):
        first = 2 * axis * n
        sine = slice(first, first + n)
        cosine = slice(first + n, first + 2 * n)
        cosines = np.diag(np.cos(frequencies * offset))
        sines = np.diag(np.sin(frequencies * offset))
        rotation[sine, sine] = cosines
        rotation[cosine, cosine] = cosines
        rotation[sine, cosine] = sines
        rotation[cosine, sine] = -sines
    return rotation


def _pad_columns(matrix: np.ndarray, columns: int) -> mx.array:
    """Append columns of zeros."""
    padded = np.pad(matrix, [(0, 0), (0, columns)])
    return mx.array(padded.astype(np.float32))


class EncoderStage:
    """Trains a ``SiglipVisionTower`` on patch labels of the training scenes."""

    name = "encoder"

    def __init__(self, config: SiglipConfig, recipe: EncoderRecipe, seed: int):
        self.steps = recipe.steps
        self._config = config
        self._recipe = recipe
        self._seed = seed
        mx.random.seed(seed + 1)
        self.model = _EncoderWithHeads(config)
        init_local_attention(self.model.encoder, config)
        self._learner = Learner(
            self.model, rate=recipe.rate, steps=recipe.steps, warmup=50, muon_rate=recipe.muon_rate
        )
        self._gradient = compiled_gradient(self.model, _loss)
        mx.eval(self.model.parameters())

    def state(self) -> dict[str, mx.array]:
        """Return the encoder as ``model.encoder.*``, the heads, and the optimizer's state."""
        return self._learner.state()

    def restore(self, state: dict[str, mx.array]) -> None:
        """Continue from a state that ``state`` returned."""
        self._learner.restore(state)

    def step(self, index: int) -> dict[str, float]:
        """Train on step ``index``; return the loss, the shares of right patches, and the errors."""
        (loss, measured), gradients = self._gradient(self._batch(index))
        norm = self._learner.update(gradients)
        return {
            "loss": loss.item(),
            **{name: value.item() for name, value in measured.items()},
            "norm": norm.item(),
        }

    def _batch(self, index: int) -> dict[str, np.ndarray]:
        """Make the scenes of a step: pixels, and the targets of each head."""
        random = np.random.default_rng([self._seed, 3, index])
        kinds = random.choice(shapes.BUSY, self._recipe.batch)
        scenes = [shapes.sample_scene(random, kind) for kind in kinds]
        pixels = np.stack([shapes.pixels(scene) for scene in scenes])
        grid = self._config.grid
        return {
            "pixels": pixels,
            "labels": np.stack([patch_labels(scene, grid) for scene in scenes], axis=1),
            "outlines": outlines(pixels, grid),
            "edges": edges(pixels, grid),
        }


def _loss(
    model: _EncoderWithHeads, batch: Mapping[str, mx.array]
) -> tuple[mx.array, dict[str, mx.array]]:
    """Return the loss of all heads, and the shares and errors over patches that show a thing."""
    predicted = model(batch["pixels"])
    labels = batch["labels"]
    shape, colour = labels[:2].astype(mx.int32)
    shows_thing = labels[0] > 0
    things = shows_thing.sum()
    weights = mx.where(shows_thing, 1.0, _BACKGROUND_WEIGHT)

    shape_loss = nn.losses.cross_entropy(predicted.shape, shape)
    colour_loss = nn.losses.cross_entropy(predicted.colour, colour)
    name_loss = shape_loss + colour_loss
    centre_loss = nn.losses.binary_cross_entropy(predicted.centre, labels[2])
    places = labels[3:].transpose(1, 2, 0)
    place_errors = nn.losses.smooth_l1_loss(predicted.place, places, reduction="none").sum(-1)
    place_loss = (place_errors * shows_thing).sum() / things
    outline_loss = nn.losses.binary_cross_entropy(predicted.outline, batch["outlines"])
    edge_errors = (predicted.edges - batch["edges"]) ** 2

    loss = (weights * name_loss).sum() / weights.sum() + 2 * centre_loss
    loss = loss + 2 * outline_loss + place_loss
    loss = loss + 5 * (weights[..., None] * edge_errors).sum() / weights.sum()
    shapes_right = (predicted.shape.argmax(-1) == shape) & shows_thing
    colours_right = (predicted.colour.argmax(-1) == colour) & shows_thing
    return loss, {
        "shapes_right": shapes_right.sum() / things,
        "colours_right": colours_right.sum() / things,
        "places_off": place_loss,
        "edges_off": edge_errors.sum() / (batch["edges"] ** 2).sum(),
    }
