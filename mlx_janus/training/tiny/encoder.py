"""The vision encoder's training stage, in place of SigLIP's pretraining on images and captions.

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
_CELLS_PER_SIDE = 4  # cells along each side of a patch
_DIRECTIONS = 16  # bins over the full circle of an edge's directions
_QUERY_KEY_SCALE = 1.2  # factor on the initial local queries and keys: more is sharper attention
_ATTENTION_DISTANCES = (1, 2, 1, 2, 3, 4)  # patches from a patch to those it attends to, by layer
_REACH_IN_RADII = 0.8  # a patch belongs to a thing nearer than this many radii plus _REACH_MARGIN
_REACH_MARGIN = 3.0  # pixels
_DIFFERENT = 0.15  # difference from the corner, on a range of 2, that makes a pixel part of a thing


class _Predictions(NamedTuple):
    """Predictions of the heads for each of N patches."""

    shape: mx.array  # (B, N, shapes) logits
    colour: mx.array  # (B, N, colours) logits
    centre: mx.array  # (B, N) logits
    place: mx.array  # (B, N, 5): rows 3 to 7 of ``patch_labels``
    outline: mx.array  # (B, N, cells) logits
    edges: mx.array  # (B, N, 4 * _DIRECTIONS)


class _EncoderWithHeads(nn.Module):
    """The vision encoder and its three linear heads.

    ``head`` reads the encoder's output. ``outline`` and ``edges`` read the output of the encoder's
    first block, and learn the results of the functions ``outlines`` and ``edges``.
    """

    def __init__(self, config: SiglipConfig):
        super().__init__()
        width = config.width
        labels = len(SHAPE_LABELS) + len(COLOUR_LABELS)
        values = 6  # the centre's logit, and the 5 values of the place
        self.encoder = SiglipVisionTower(config)
        self.outline = nn.Linear(width, _CELLS_PER_SIDE**2)
        self.edges = nn.Linear(width, 4 * _DIRECTIONS)
        self.head = nn.Linear(width, labels + values)

    def __call__(self, pixels: mx.array) -> _Predictions:
        """Run the encoder on pixels (B, S, S, 3), and all heads."""
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
    """Measure the share of pixels in each cell of a patch that differ from the background.

    A patch has ``_CELLS_PER_SIDE`` x ``_CELLS_PER_SIDE`` cells.

    (B, S, S, 3) -> (B, grid * grid, cells), each from 0 to 1.
    """
    side = pixels.shape[1]
    cell_side = side // (grid * _CELLS_PER_SIDE)  # pixels
    differs = _differs_from_corner(pixels)
    # Each of the two axes of an image becomes three: patch, cell in the patch, pixel in the cell.
    blocks = differs.reshape(-1, grid, _CELLS_PER_SIDE, cell_side, grid, _CELLS_PER_SIDE, cell_side)
    shares = blocks.mean((3, 6))  # (B, row, i, column, j)
    by_patch = shares.transpose(0, 1, 3, 2, 4)  # (B, row, column, i, j)
    batch = len(pixels)
    patches = grid * grid
    flat = by_patch.reshape(batch, patches, -1)
    return flat.astype(np.float32)


def edges(pixels: np.ndarray, grid: int) -> np.ndarray:
    """Measure the strength of the edges in each direction, in each quarter of every patch.

    These are histograms of oriented gradients, which are good targets for vision transformers
    (Wei et al., 2022).

    (B, S, S, 3) -> (B, grid * grid, 4 * _DIRECTIONS).
    """
    differs = _differs_from_corner(pixels)
    things = differs.astype(np.float32)  # 1 on a thing, 0 on the background
    down, right = np.gradient(things, axis=(1, 2))
    strength = np.hypot(down, right)
    angle = np.arctan2(down, right)
    share_of_circle = angle / (2 * np.pi)  # from -0.5 to 0.5
    rounded = np.round(share_of_circle * _DIRECTIONS)
    direction = rounded.astype(int) % _DIRECTIONS
    directions = np.arange(_DIRECTIONS)
    is_direction = direction[..., None] == directions
    strengths = strength[..., None] * is_direction  # (B, S, S, _DIRECTIONS)
    side = pixels.shape[1]
    half = side // (2 * grid)  # pixels per side of a quarter
    # Each of the two axes of an image becomes three: patch, half of the patch, pixel in the half.
    blocks = strengths.reshape(-1, grid, 2, half, grid, 2, half, _DIRECTIONS)
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

    A patch belongs to the nearest thing within reach, if any. Row 2 is 1 if the centre of any thing
    is in the patch. All other rows describe the thing that the patch belongs to, and are 0 if there
    is none. Rows 0 and 1: indices into ``SHAPE_LABELS`` and ``COLOUR_LABELS``. Rows 3 and 4: offset
    from the patch's centre to the thing's, to the right and down, in patches. Row 5: the thing's
    size in patches. Rows 6 and 7: ``place_in_image``.
    """
    labels = np.zeros((8, grid, grid), np.float32)
    # These are views: the loop below sets the items of ``labels``.
    shape, colour, centre, right, down, extent, place_x, place_y = labels
    patch_side = shapes.SIDE / grid  # pixels
    patches = np.mgrid[0:grid, 0:grid]
    corners = patches * patch_side
    centres = corners + patch_side / 2
    y, x = centres
    nearest = np.full((grid, grid), np.inf)  # in radii, from a patch to its thing
    for thing in scene.things:
        to_right = thing.x - x
        to_bottom = thing.y - y
        distance = np.hypot(to_right, to_bottom)
        reach = _REACH_IN_RADII * thing.radius + _REACH_MARGIN
        within_reach = distance < reach
        in_radii = distance / thing.radius  # so that large and small things compare
        belongs = within_reach & (in_radii < nearest)
        nearest[belongs] = in_radii[belongs]
        shape[belongs] = SHAPE_LABELS.index(thing.shape)
        colour[belongs] = COLOUR_LABELS.index(thing.colour)
        row = int(thing.y // patch_side)
        column = int(thing.x // patch_side)
        centre[row, column] = 1
        right[belongs] = to_right[belongs] / patch_side
        down[belongs] = to_bottom[belongs] / patch_side
        extent[belongs] = thing.size / patch_side
        image_x, image_y = place_in_image(thing)
        place_x[belongs] = image_x
        place_y[belongs] = image_y
    return labels.reshape(8, -1)


def place_in_image(thing: shapes.Thing) -> tuple[float, float]:
    """Return x and y of a thing's centre, each from -2 (left or top) to 2 (right or bottom)."""
    x = 4 * thing.x / shapes.SIDE
    y = 4 * thing.y / shapes.SIDE
    return x - 2, y - 2


def init_local_attention(encoder: SiglipVisionTower, config: SiglipConfig) -> None:
    """Initialise attention heads to attend to patches above, below, left and right.

    ``_ATTENTION_DISTANCES`` holds each layer's distance in patches. Later layers stay random.

    With random weights attention is flat, and training would have to find the neighbours first.
    Here the first features of a patch are sines and cosines of its place only. A head's keys are
    these features, and its queries are the features rotated by an offset, so that a patch attends
    to the patch at that offset, as in a convolution (Cordonnier et al., 2020). Training may change
    all these weights.
    """
    tower = encoder.vision_tower
    place_width = config.width // config.heads  # features of place: as many as a head has
    content_width = config.width - place_width  # all other features, for a patch's content
    longest = 2 * config.grid  # wavelength in patches
    lowest = 2 * np.pi / longest
    # Radians per patch. Each frequency gives a sine and a cosine of the row and of the column.
    frequencies = np.geomspace(lowest, 2.2, place_width // 4)
    place_features = _place_features(frequencies, config.grid)
    tower.pos_embed = _append_zeros(place_features, content_width)[None]

    projection = tower.patch_embed.proj
    filters = _patch_filters(config, place_width)
    projection.weight = mx.array(filters)
    is_content = mx.arange(config.width) >= place_width  # features of place get no bias
    projection.bias *= is_content.astype(mx.float32)

    same_place = np.eye(place_width)
    keys = np.tile(same_place, (config.heads, 1))
    local_keys = _append_zeros(_QUERY_KEY_SCALE * keys, content_width)
    for distance, block in zip(_ATTENTION_DISTANCES, tower.blocks, strict=False):
        queries = _neighbour_queries(frequencies, distance, config.heads)
        local_queries = _append_zeros(_QUERY_KEY_SCALE * queries, content_width)
        qkv = block.attn.qkv  # the weights of queries, keys and values
        query, key, value = mx.split(qkv.weight, 3, axis=0)
        # The random weights stay, but smaller.
        query = 0.3 * query + local_queries
        key = 0.3 * key + local_keys
        parts = [query, key, value]
        qkv.weight = mx.concatenate(parts)


def _place_features(frequencies: np.ndarray, grid: int) -> np.ndarray:
    """Return sines and cosines of every patch's row and column: (grid * grid, 4 * frequencies)."""
    places = np.mgrid[0:grid, 0:grid]
    row, column = places.reshape(2, -1, 1)
    row_angles = row * frequencies
    column_angles = column * frequencies
    features = [
        np.sin(row_angles),
        np.cos(row_angles),
        np.sin(column_angles),
        np.cos(column_angles),
    ]
    return np.concatenate(features, axis=-1)


def _neighbour_queries(
    frequencies: np.ndarray,
    distance: int,
    heads: int,
) -> np.ndarray:
    """Return query weights of all heads, which act on the sines and cosines of a patch's position.

    Head 0 attends to the patch ``distance`` patches above, head 1 below, head 2 left, head 3 right,
    and so on again from head 4: a position's features, rotated by an offset, are those of the
    position at that offset. With n such features, the shape is (heads * n, n).
    """
    above = _rotation(frequencies, -distance, 0)
    below = _rotation(frequencies, distance, 0)
    left = _rotation(frequencies, 0, -distance)
    right = _rotation(frequencies, 0, distance)
    neighbours = [above, below, left, right]
    weights = [neighbours[head % 4] for head in range(heads)]
    return np.concatenate(weights)


def _patch_filters(config: SiglipConfig, place_width: int) -> np.ndarray:
    """Return the initial patch embedding: (width, P, P, 3), one filter for each feature.

    Filters in order: ``place_width`` zeros, because a patch's pixels do not change the features of
    place; waves of the cosine transform of brightness; the colours of the patch's four quarters;
    and zeros, if there are fewer waves than features.
    """
    P = config.patch_size
    zero_filter = np.zeros((P, P, 3))
    colour_filters = []
    for quarter in range(4):
        for channel in range(3):
            colour_filter = _quarter_filter(P, quarter, channel)
            colour_filters.append(colour_filter)

    filters = [zero_filter] * place_width
    identity = np.eye(P)
    cosines = dct(identity, norm="ortho", axis=0)  # row i: wave of frequency i
    frequencies = sorted(np.ndindex(P, P), key=sum)  # of rows and of columns, lowest first
    waves = config.width - place_width - len(colour_filters)
    for i, j in frequencies[:waves]:
        down = cosines[i]
        across = cosines[j]
        wave = np.outer(down, across)
        brightness_filter = wave[..., None].repeat(3, -1)
        is_mean = i == j == 0  # this wave is the patch's mean brightness, the largest value
        scale = 0.04 if is_mean else 0.15
        filters.append(brightness_filter * scale)
    filters += colour_filters
    missing = config.width - len(filters)
    filters += [zero_filter] * missing
    return np.array(filters, np.float32)


def _quarter_filter(size: int, quarter: int, channel: int) -> np.ndarray:
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
    """Return a matrix that moves the features of place by dy, dx patches.

    For n frequencies it is (4 * n, 4 * n). The features are n sines and n cosines of the row, then
    n sines and n cosines of the column (``_place_features``).
    """
    n = len(frequencies)
    rotation = np.zeros((4 * n, 4 * n))
    for axis, offset in enumerate((dy, dx)):
        start = 2 * n * axis
        middle = start + n
        end = middle + n
        sine_part = slice(start, middle)
        cosine_part = slice(middle, end)
        angles = frequencies * offset
        cosines = np.diag(np.cos(angles))
        sines = np.diag(np.sin(angles))
        # sin(a + b) = sin a cos b + cos a sin b, and cos(a + b) = cos a cos b - sin a sin b.
        rotation[sine_part, sine_part] = cosines
        rotation[cosine_part, cosine_part] = cosines
        rotation[sine_part, cosine_part] = sines
        rotation[cosine_part, sine_part] = -sines
    return rotation


def _append_zeros(matrix: np.ndarray, columns: int) -> mx.array:
    """Append columns of zeros to a matrix, and convert it to MLX."""
    widths = [(0, 0), (0, columns)]
    padded = np.pad(matrix, widths)
    return mx.array(padded.astype(np.float32))


class EncoderStage:
    """A training stage: a ``SiglipVisionTower`` learns the patch labels of the training scenes.

    The constructor seeds MLX's global random generator.

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
        """Continue from arrays that ``state()`` returned earlier."""
        self._learner.restore(state)

    def step(self, index: int) -> dict[str, float]:
        """Train on the batch of step ``index``, and return the step's measurements for the log."""
        batch = self._batch(index)
        (loss, measured), gradients = self._gradient(batch)
        norm = self._learner.update(gradients)
        metrics = {"loss": loss.item()}
        for name, value in measured.items():
            metrics[name] = value.item()
        metrics["norm"] = norm.item()
        return metrics

    def _batch(self, index: int) -> dict[str, np.ndarray]:
        """Render the scenes of a step, and return their pixels and the targets of all heads."""
        grid = self._config.grid
        seeds = [self._seed, 3, index]  # 3: random numbers of this stage only
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
    """Return the sum of all heads' losses, and measurements for the log.

    The measurement "edges_off" is the squared error of all patches, divided by the squared strength
    of their edges. The other measurements are means over the patches that show a thing.

    Args:
        model: the encoder with its heads.
        batch: pixels (B, S, S, 3), labels (8, B, N), and outlines and edges for N patches.
    """
    predicted = model(batch["pixels"])
    labels = batch["labels"]
    shape, colour = labels[:2].astype(mx.int32)  # indices of labels
    is_centre = labels[2]
    places = labels[3:].transpose(1, 2, 0)  # (B, N, 5)
    shows_thing = labels[0] > 0
    thing_patches = shows_thing.sum()
    weights = mx.where(shows_thing, 1.0, _BACKGROUND_WEIGHT)
    total_weight = weights.sum()
    shape_losses = nn.losses.cross_entropy(predicted.shape, shape)
    colour_losses = nn.losses.cross_entropy(predicted.colour, colour)
    weighted_losses = weights * (shape_losses + colour_losses)
    name_loss = weighted_losses.sum() / total_weight
    centre_loss = nn.losses.binary_cross_entropy(predicted.centre, is_centre)
    outline_loss = nn.losses.binary_cross_entropy(predicted.outline, batch["outlines"])

    place_errors = nn.losses.smooth_l1_loss(predicted.place, places, reduction="none")
    thing_errors = place_errors.sum(-1) * shows_thing
    place_loss = thing_errors.sum() / thing_patches

    edge_targets = batch["edges"]
    edge_errors = (predicted.edges - edge_targets) ** 2
    weighted_errors = weights[..., None] * edge_errors
    loss = name_loss + 2 * centre_loss + 2 * outline_loss + place_loss
    loss = loss + 5 * weighted_errors.sum() / total_weight

    best_shape = predicted.shape.argmax(-1)
    best_colour = predicted.colour.argmax(-1)
    shapes_right = (best_shape == shape) & shows_thing
    colours_right = (best_colour == colour) & shows_thing
    edge_strength = (edge_targets**2).sum()
    return loss, {
        "shapes_right": shapes_right.sum() / thing_patches,
        "colours_right": colours_right.sum() / thing_patches,
        "places_off": place_loss,
        "edges_off": edge_errors.sum() / edge_strength,
    }
