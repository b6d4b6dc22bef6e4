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
_REACHES = (1, 2, 1, 2, 3, 4)  # patches between a patch and those it attends to, for each layer
_REACH = 0.8  # a patch belongs to a thing nearer than _REACH radii plus _MARGIN
_MARGIN = 3.0  # pixels
_DIFFERENT = 0.15  # difference from the corner, on a range of 2, that makes a pixel part of a thing


class _Predictions(NamedTuple):
    """Logits and values for every patch; N patches."""

    shape: mx.array  # (B, N, shapes)
    colour: mx.array  # (B, N, colours)
    centre: mx.array  # (B, N)
    place: mx.array  # (B, N, 5): rows 3 to 7 of ``patch_labels``
    outline: mx.array  # (B, N, _CELLS * _CELLS)
    edges: mx.array  # (B, N, 4 * _DIRECTIONS)


class _EncoderWithHeads(nn.Module):
    """The encoder, a linear head over its output, and two over its first block.

    The two heads predict ``outlines`` and ``edges``.
    """

    def __init__(self, config: SiglipConfig):
        super().__init__()
        width = config.width
        names = len(SHAPE_LABELS) + len(COLOUR_LABELS)
        values = 6  # the centre's logit, and the 5 values of the place
        self.encoder = SiglipVisionTower(config)
        self.outline = nn.Linear(width, _CELLS**2)
        self.edges = nn.Linear(width, 4 * _DIRECTIONS)
        self.head = nn.Linear(width, names + values)

    def __call__(self, pixels: mx.array) -> _Predictions:
        tower = self.encoder.vision_tower
        first, *others = tower.blocks
        x = tower.embed(pixels)
        x = first(x)
        outline = self.outline(x)
        edges = self.edges(x)
        for block in others:
            x = block(x)
        x = tower.norm(x)
        out = self.head(x)
        shapes_end = len(SHAPE_LABELS)
        colours_end = shapes_end + len(COLOUR_LABELS)
        ends = [shapes_end, colours_end]
        shape, colour, values = mx.split(out, ends, axis=-1)
        return _Predictions(
            shape=shape,
            colour=colour,
            centre=values[..., 0],
            place=values[..., 1:],
            outline=outline,
            edges=edges,
        )


def outlines(pixels: np.ndarray, grid: int) -> np.ndarray:
    """Measure the share of each cell that differs from the background, for every patch.

    A patch has ``_CELLS`` rows of ``_CELLS`` cells.

    (B, S, S, 3) -> (B, grid * grid, _CELLS * _CELLS), each from 0 to 1.
    """
    side = pixels.shape[1]
    cell = side // (grid * _CELLS)  # pixels per side
    differs = _differs_from_corner(pixels)
    blocks = differs.reshape(-1, grid, _CELLS, cell, grid, _CELLS, cell)
    shares = blocks.mean((3, 6))  # (B, row, i, column, j)
    by_patch = shares.transpose(0, 1, 3, 2, 4)  # (B, row, column, i, j)
    batch = len(pixels)
    patches = grid * grid
    flat = by_patch.reshape(batch, patches, -1)
    return flat.astype(np.float32)


def edges(pixels: np.ndarray, grid: int) -> np.ndarray:
    """Measure the strength of the edges in each direction, in each quarter of every patch.

    (B, S, S, 3) -> (B, grid * grid, 4 * _DIRECTIONS): histograms of oriented gradients, known as
    good targets for vision transformers (Wei et al., 2022).
    """
    differs = _differs_from_corner(pixels)
    things = differs.astype(np.float32)  # 1 on a thing, 0 on the background
    down, right = np.gradient(things, axis=(1, 2))
    strength = np.hypot(down, right)
    angle = np.arctan2(down, right)
    circles = angle / (2 * np.pi)  # from -0.5 to 0.5
    rounded = np.round(circles * _DIRECTIONS)
    direction = rounded.astype(int) % _DIRECTIONS
    directions = np.arange(_DIRECTIONS)
    is_direction = direction[..., None] == directions
    each = strength[..., None] * is_direction
    side = pixels.shape[1]
    half = side // (2 * grid)  # pixels per side of a quarter
    blocks = each.reshape(-1, grid, 2, half, grid, 2, half, _DIRECTIONS)
    sums = blocks.sum((3, 6)) / half  # (B, row, i, column, j, direction)
    by_patch = sums.transpose(0, 1, 3, 2, 4, 5)  # (B, row, column, i, j, direction)
    batch = len(pixels)
    patches = grid * grid
    flat = by_patch.reshape(batch, patches, -1)
    return flat.astype(np.float32)


def _differs_from_corner(pixels: np.ndarray) -> np.ndarray:
    """Mark the pixels that differ from the top left one, which is background: (B, S, S) bool."""
    corner = pixels[:, :1, :1]
    differences = np.abs(pixels - corner)
    largest = differences.max(-1)
    return largest > _DIFFERENT


def patch_labels(scene: shapes.Scene, grid: int) -> np.ndarray:
    """Label every patch of a scene -> (8, grid * grid).

    A patch belongs to the nearest thing that is in reach. All rows but row 2 describe this thing,
    and are 0 without one.

    Rows 0 and 1: indices into ``SHAPE_LABELS`` and ``COLOUR_LABELS``. Row 2: 1 if any thing's
    centre is in the patch. Rows 3 and 4: offset from the patch's centre to the thing's, to the
    right and down, in patches. Row 5: size in patches. Rows 6 and 7: ``place_in_image``.
    """
    labels = np.zeros((8, grid, grid), np.float32)
    size = shapes.SIDE / grid
    # These are views: to set their items is to set those of ``labels``.
    shape, colour, centre, right, down, extent, place_x, place_y = labels
    patches = np.mgrid[0:grid, 0:grid]
    corners = patches * size
    centres = corners + size / 2
    y, x = centres
    nearest = np.full((grid, grid), np.inf)
    for thing in scene.things:
        to_right = thing.x - x
        to_bottom = thing.y - y
        distance = np.hypot(to_right, to_bottom)
        radii = distance / thing.radius  # decides between two things in reach
        reach = _REACH * thing.radius + _MARGIN
        within_reach = distance < reach
        mine = within_reach & (radii < nearest)
        nearest[mine] = radii[mine]
        shape[mine] = SHAPE_LABELS.index(thing.shape)
        colour[mine] = COLOUR_LABELS.index(thing.colour)
        row = int(thing.y // size)
        column = int(thing.x // size)
        centre[row, column] = 1
        right[mine] = to_right[mine] / size
        down[mine] = to_bottom[mine] / size
        extent[mine] = thing.size / size
        image_x, image_y = place_in_image(thing)
        place_x[mine] = image_x
        place_y[mine] = image_y
    return labels.reshape(8, -1)


def place_in_image(thing: shapes.Thing) -> tuple[float, float]:
    """Return x and y of a thing's centre in the image, from -2 (left, top) to 2 (right, bottom)."""
    x = 4 * thing.x / shapes.SIDE
    y = 4 * thing.y / shapes.SIDE
    return x - 2, y - 2


def init_local_attention(encoder: SiglipVisionTower, config: SiglipConfig) -> None:
    """Initialise attention heads to look at patches above, below, left and right.

    ``_REACHES`` says how many patches away each layer looks. Layers beyond its length stay random.

    With random weights attention is flat, and training would have to find the neighbours first.
    Here the first features of a patch are sines and cosines of its place only. A head's keys are
    these features, and its queries are the features rotated by an offset, so that a patch attends
    to the patch at that offset, as in a convolution (Cordonnier et al., 2020). Training may change
    all these weights.
    """
    tower = encoder.vision_tower
    waves = config.width // config.heads  # features of place: as many as a head has
    free = config.width - waves  # the other features, for the content of a patch
    longest = 2 * config.grid  # patches
    lowest = 2 * np.pi / longest
    # Radians per patch. Each frequency gives a sine and a cosine of the row and of the column.
    frequencies = np.geomspace(lowest, 2.2, waves // 4)
    place = _sines_of_places(frequencies, config.grid)
    tower.pos_embed = _pad_columns(place, free)[None]

    projection = tower.patch_embed.proj
    filters = _patch_filters(config, waves)
    projection.weight = mx.array(filters)
    is_free = mx.arange(config.width) >= waves  # features of place get no bias
    projection.bias *= is_free.astype(mx.float32)

    same_place = np.eye(waves)
    keys = np.tile(same_place, (config.heads, 1))
    local_keys = _pad_columns(_SHARPNESS * keys, free)
    for reach, block in zip(_REACHES, tower.blocks, strict=False):
        queries = _neighbour_queries(frequencies, reach, config.heads)
        local_queries = _pad_columns(_SHARPNESS * queries, free)
        qkv = block.attn.qkv  # the weights of queries, keys and values
        query, key, value = mx.split(qkv.weight, 3, axis=0)
        # The random weights stay, but smaller.
        query = 0.3 * query + local_queries
        key = 0.3 * key + local_keys
        parts = [query, key, value]
        qkv.weight = mx.concatenate(parts)


def _sines_of_places(frequencies: np.ndarray, grid: int) -> np.ndarray:
    """Return sines and cosines of every patch's row and column: (grid * grid, waves)."""
    places = np.mgrid[0:grid, 0:grid]
    y, x = places.reshape(2, -1, 1)
    rows = y * frequencies
    columns = x * frequencies
    waves = [
        np.sin(rows),
        np.cos(rows),
        np.sin(columns),
        np.cos(columns),
    ]
    return np.concatenate(waves, axis=-1)


def _neighbour_queries(
    frequencies: np.ndarray,
    reach: int,
    heads: int,
) -> np.ndarray:
    """Return query weights for patches at a distance of ``reach``: (heads * waves, waves).

    The heads in turn look above, below, left and right.
    """
    above = _rotation(frequencies, -reach, 0)
    below = _rotation(frequencies, reach, 0)
    left = _rotation(frequencies, 0, -reach)
    right = _rotation(frequencies, 0, reach)
    neighbours = [above, below, left, right]
    queries = [neighbours[head % 4] for head in range(heads)]
    return np.concatenate(queries)


def _patch_filters(config: SiglipConfig, waves: int) -> np.ndarray:
    """Return the initial patch embedding: (width, P, P, 3).

    The first ``waves`` filters are zero, for the features of place. The next ones are the cosine
    transform of a patch's brightness, then the colours of its quarters. Any left over are zero.
    """
    P = config.patch_size
    nothing = np.zeros((P, P, 3))
    colours = []
    for quarter in range(4):
        for channel in range(3):
            colour = _quarter_colour(P, quarter, channel)
            colours.append(colour)

    filters = [nothing] * waves
    identity = np.eye(P)
    cosines = dct(identity, norm="ortho", axis=0)  # row i: wave of frequency i
    order = sorted(np.ndindex(P, P), key=sum)  # lowest frequencies first
    remaining = config.width - waves - len(colours)
    for i, j in order[:remaining]:
        down = cosines[i]
        across = cosines[j]
        wave = np.outer(down, across)
        brightness = wave[..., None].repeat(3, -1)
        scale = 0.15 if i + j else 0.04  # less for the mean brightness, wave (0, 0)
        filters.append(brightness * scale)
    filters += colours
    missing = config.width - len(filters)  # more than 0 if the patch has too few waves
    filters += [nothing] * missing
    return np.array(filters, np.float32)


def _quarter_colour(size: int, quarter: int, channel: int) -> np.ndarray:
    """Return a filter that averages a colour channel over a quarter of a patch: (size, size, 3)."""
    row, column = divmod(quarter, 2)
    half = size // 2
    top = row * half
    left = column * half
    rows = slice(top, top + half)
    columns = slice(left, left + half)
    kernel = np.zeros((size, size, 3))
    kernel[rows, columns, channel] = 1 / half**2
    return kernel


def _rotation(frequencies: np.ndarray, dy: float, dx: float) -> np.ndarray:
    """Return a matrix that moves a place's sines and cosines by dy, dx patches: (waves, waves)."""
    n = len(frequencies)
    waves = 4 * n
    rotation = np.zeros((waves, waves))
    for axis, offset in enumerate((dy, dx)):
        start = 2 * axis * n
        middle = start + n
        end = middle + n
        sine = slice(start, middle)
        cosine = slice(middle, end)
        angles = frequencies * offset
        cosines = np.diag(np.cos(angles))
        sines = np.diag(np.sin(angles))
        rotation[sine, sine] = cosines
        rotation[cosine, cosine] = cosines
        rotation[sine, cosine] = sines
        rotation[cosine, sine] = -sines
    return rotation


def _pad_columns(matrix: np.ndarray, columns: int) -> mx.array:
    """Append a number of columns of zeros, and convert to MLX."""
    widths = [(0, 0), (0, columns)]
    padded = np.pad(matrix, widths)
    return mx.array(padded.astype(np.float32))


class EncoderStage:
    """Trains a ``SiglipVisionTower`` on patch labels of the training scenes.

    Making a stage seeds MLX's global random generator.

    Args:
        config: sizes of the encoder.
        recipe: steps, batch size and learning rates.
        seed: seed of the initial weights and of the scenes.
    """

    name = "encoder"

    def __init__(
        self,
        config: SiglipConfig,
        recipe: EncoderRecipe,
        seed: int,
    ):
        self.steps = recipe.steps
        self._config = config
        self._recipe = recipe
        self._seed = seed
        mx.random.seed(seed + 1)
        self.model = _EncoderWithHeads(config)
        init_local_attention(self.model.encoder, config)
        self._learner = Learner(
            self.model,
            rate=recipe.rate,
            steps=recipe.steps,
            warmup=50,
            muon_rate=recipe.muon_rate,
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
        """Train on the batch of step ``index``; return its measurements for the log."""
        batch = self._batch(index)
        (loss, measured), gradients = self._gradient(batch)
        norm = self._learner.update(gradients)
        metrics = {"loss": loss.item()}
        for name, value in measured.items():
            metrics[name] = value.item()
        metrics["norm"] = norm.item()
        return metrics

    def _batch(self, index: int) -> dict[str, np.ndarray]:
        """Make the scenes of a step: pixels, and the targets of each head."""
        grid = self._config.grid
        seeds = [self._seed, 3, index]  # 3: the random stream of this stage
        random = np.random.default_rng(seeds)
        kinds = random.choice(shapes.BUSY, self._recipe.batch)
        images = []
        labels = []
        for kind in kinds:
            scene = shapes.sample_scene(random, kind)
            images.append(shapes.pixels(scene))
            labels.append(patch_labels(scene, grid))
        pixels = np.stack(images)
        return {
            "pixels": pixels,
            "labels": np.stack(labels, axis=1),
            "outlines": outlines(pixels, grid),
            "edges": edges(pixels, grid),
        }


def _loss(
    model: _EncoderWithHeads, batch: Mapping[str, mx.array]
) -> tuple[mx.array, dict[str, mx.array]]:
    """Return the loss of all heads, and measurements for the log.

    The shares of right shapes and colours and the error of places are over the patches that show a
    thing. The error of edges is over all patches, relative to the squared strength of the edges.

    Args:
        model: the encoder with its heads.
        batch: pixels (B, S, S, 3), labels (8, B, N), and outlines and edges for N patches.
    """
    predicted = model(batch["pixels"])
    labels = batch["labels"]
    names = labels[:2].astype(mx.int32)  # indices of shape and colour
    shape, colour = names
    is_centre = labels[2]
    places = labels[3:].transpose(1, 2, 0)
    shows_thing = labels[0] > 0
    things = shows_thing.sum()
    weights = mx.where(shows_thing, 1.0, _BACKGROUND_WEIGHT)
    total = weights.sum()
    shape_loss = nn.losses.cross_entropy(predicted.shape, shape)
    colour_loss = nn.losses.cross_entropy(predicted.colour, colour)
    names_loss = weights * (shape_loss + colour_loss)
    name_loss = names_loss.sum() / total
    centre_loss = nn.losses.binary_cross_entropy(predicted.centre, is_centre)
    outline_loss = nn.losses.binary_cross_entropy(predicted.outline, batch["outlines"])

    place_errors = nn.losses.smooth_l1_loss(predicted.place, places, reduction="none")
    thing_errors = place_errors.sum(-1) * shows_thing
    place_loss = thing_errors.sum() / things

    edge_targets = batch["edges"]
    edge_errors = (predicted.edges - edge_targets) ** 2
    weighted_errors = weights[..., None] * edge_errors
    loss = name_loss + 2 * centre_loss + 2 * outline_loss + place_loss
    loss = loss + 5 * weighted_errors.sum() / total

    best_shape = predicted.shape.argmax(-1)
    best_colour = predicted.colour.argmax(-1)
    shapes_right = (best_shape == shape) & shows_thing
    colours_right = (best_colour == colour) & shows_thing
    edge_strength = (edge_targets**2).sum()
    return loss, {
        "shapes_right": shapes_right.sum() / things,
        "colours_right": colours_right.sum() / things,
        "places_off": place_loss,
        "edges_off": edge_errors.sum() / edge_strength,
    }
