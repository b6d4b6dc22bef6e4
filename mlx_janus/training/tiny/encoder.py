"""The vision encoder's training stage, in place of SigLIP's pretraining on images and captions.

Linear heads predict labels of every patch: the shape and colour of the thing that it shows, the
thing's place, and its edges. The heads are discarded afterwards. These dense labels of a synthetic
world teach in minutes the features that naming and counting things need.
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
_BACKGROUND_WEIGHT = 0.15  # weight in the loss of a patch that shows no thing; most show none
_CELLS_PER_SIDE = 4  # cells along each side of a patch
_DIRECTIONS = 16  # bins of the direction of an edge, over the full circle
_QUERY_KEY_SCALE = 1.2  # factor on the initial weights: a larger one sharpens the attention
_ATTENTION_DISTANCES = (1, 2, 1, 2, 3, 4)  # patches, by layer: from a query to its key
# A patch may belong to a thing that is nearer than _REACH_IN_RADII * radius + _REACH_MARGIN.
_REACH_IN_RADII = 0.8
_REACH_MARGIN = 3.0  # pixels
_THING_DIFFERENCE = 0.15  # pixels from -1 to 1 belong to things if they differ more from a corner


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

    ``head`` reads the encoder's output and predicts ``patch_labels``. ``outline`` and ``edges``
    read the output of the encoder's first block and predict the results of the functions
    ``outlines`` and ``edges``.
    """

    def __init__(self, config: SiglipConfig):
        super().__init__()
        width = config.width
        label_count = len(SHAPE_LABELS) + len(COLOUR_LABELS)
        value_count = 6  # the centre's logit, and the 5 values of the place
        self.encoder = SiglipVisionTower(config)
        self.outline = nn.Linear(width, _CELLS_PER_SIDE**2)
        self.edges = nn.Linear(width, 4 * _DIRECTIONS)
        self.head = nn.Linear(width, label_count + value_count)

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
    """Return the share of pixels that belong to things, in each cell of every patch.

    A patch has ``_CELLS_PER_SIDE`` x ``_CELLS_PER_SIDE`` cells.

    (B, S, S, 3) -> (B, grid * grid, cells), each share from 0 to 1.
    """
    side = pixels.shape[1]
    cell_side = side // (grid * _CELLS_PER_SIDE)  # pixels
    is_thing = _differs_from_corner(pixels)
    # Each of the two axes of an image becomes three: patch, cell in the patch, pixel in the cell.
    sizes = (grid, _CELLS_PER_SIDE, cell_side)
    blocks = is_thing.reshape(-1, *sizes, *sizes)
    shares = blocks.mean((3, 6))  # (B, patch row, cell row, patch column, cell column)
    by_patch = shares.transpose(0, 1, 3, 2, 4)  # the axes of the patch, then those of the cell
    batch = len(pixels)
    patches = grid * grid
    flat = by_patch.reshape(batch, patches, -1)
    return flat.astype(np.float32)


def edges(pixels: np.ndarray, grid: int) -> np.ndarray:
    """Return the strength of the edges in each direction, in each quarter of every patch.

    Histograms of oriented gradients are good targets for vision transformers (Wei et al., 2022).

    (B, S, S, 3) -> (B, grid * grid, 4 * _DIRECTIONS).
    """
    is_thing = _differs_from_corner(pixels)
    mask = is_thing.astype(np.float32)  # 1 on a thing, 0 on the background
    down, right = np.gradient(mask, axis=(1, 2))
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
    sums = blocks.sum((3, 6))  # (B, patch row, half row, patch column, half column, direction)
    sums = sums / half  # an edge across a quarter has about ``half`` pixels
    by_patch = sums.transpose(0, 1, 3, 2, 4, 5)  # the axes of the patch, then those of the half
    batch = len(pixels)
    patches = grid * grid
    flat = by_patch.reshape(batch, patches, -1)
    return flat.astype(np.float32)


def _differs_from_corner(pixels: np.ndarray) -> np.ndarray:
    """Mark the pixels that differ from the top left one, which is background: (B, S, S) bool."""
    corner = pixels[:, :1, :1]
    differences = np.abs(pixels - corner)
    largest = differences.max(-1)
    return largest > _THING_DIFFERENCE


def patch_labels(scene: shapes.Scene, grid: int) -> np.ndarray:
    """Label every patch of a scene -> (8, grid * grid).

    A patch belongs to the nearest thing within reach (``_REACH_IN_RADII``), if any. Row 2 is 1 if
    the centre of any thing is in the patch. All other rows describe the thing that the patch
    belongs to, and are 0 if there is none:

    - 0 and 1: indices into ``SHAPE_LABELS`` and ``COLOUR_LABELS``
    - 3 and 4: offset from the patch's centre to the thing's, to the right and down, in patches
    - 5: the thing's size in patches
    - 6 and 7: x and y of ``place_in_image``
    """
    labels = np.zeros((8, grid, grid), np.float32)
    # These rows are views of ``labels``, so that the loop below fills ``labels``.
    shape, colour, has_centre, right, down, size, place_x, place_y = labels
    patch_side = shapes.SIDE / grid  # pixels
    patches = np.mgrid[0:grid, 0:grid]
    corners = patches * patch_side
    centres = corners + patch_side / 2
    y, x = centres
    # From each patch's centre to that of its thing, in radii of the thing.
    nearest = np.full((grid, grid), np.inf)
    for thing in scene.things:
        to_right = thing.x - x
        downwards = thing.y - y
        distance = np.hypot(to_right, downwards)
        reach = _REACH_IN_RADII * thing.radius + _REACH_MARGIN
        within_reach = distance < reach
        in_radii = distance / thing.radius  # so that large and small things compare
        belongs = within_reach & (in_radii < nearest)
        nearest[belongs] = in_radii[belongs]
        shape[belongs] = SHAPE_LABELS.index(thing.shape)
        colour[belongs] = COLOUR_LABELS.index(thing.colour)
        row = int(thing.y // patch_side)
        column = int(thing.x // patch_side)
        has_centre[row, column] = 1
        right[belongs] = to_right[belongs] / patch_side
        down[belongs] = downwards[belongs] / patch_side
        size[belongs] = thing.size / patch_side
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

    ``_ATTENTION_DISTANCES`` holds the distance for each layer. Layers after its end stay random.

    With random weights attention is nearly uniform, and training would have to find the neighbours
    first. Here the first features of a patch are a sinusoidal encoding of its position, and nothing
    else. A head's keys are these features. Its queries are the same features, rotated by an offset.
    So a patch attends to the patch at that offset, as in a convolution (Cordonnier et al., 2020).
    Training may change all these weights.
    """
    tower = encoder.vision_tower
    position_width = config.width // config.heads  # position features: as many as a head has
    content_width = config.width - position_width  # all other features, for a patch's content
    longest = 2 * config.grid  # wavelength in patches
    lowest = 2 * np.pi / longest
    # Radians per patch. Each frequency gives four features: a sine and a cosine of the row, and a
    # sine and a cosine of the column.
    frequencies = np.geomspace(lowest, 2.2, position_width // 4)
    position_features = _position_features(frequencies, config.grid)
    tower.pos_embed = _append_zeros(position_features, content_width)[None]

    projection = tower.patch_embed.proj
    filters = _patch_filters(config, position_width)
    projection.weight = mx.array(filters)
    is_content = mx.arange(config.width) >= position_width  # position features get no bias
    projection.bias *= is_content.astype(mx.float32)

    identity = np.eye(position_width)
    keys = np.tile(identity, (config.heads, 1))  # in every head, the position features themselves
    local_keys = _append_zeros(_QUERY_KEY_SCALE * keys, content_width)
    for distance, block in zip(_ATTENTION_DISTANCES, tower.blocks, strict=False):
        queries = _neighbour_queries(frequencies, distance, config.heads)
        local_queries = _append_zeros(_QUERY_KEY_SCALE * queries, content_width)
        qkv = block.attn.qkv  # one linear layer for queries, keys and values
        query, key, value = mx.split(qkv.weight, 3, axis=0)
        # The random weights are scaled down and added to the local ones.
        query = 0.3 * query + local_queries
        key = 0.3 * key + local_keys
        parts = [query, key, value]
        qkv.weight = mx.concatenate(parts)


def _position_features(frequencies: np.ndarray, grid: int) -> np.ndarray:
    """Return the sinusoidal encoding of every patch's position: (grid * grid, 4 * frequencies)."""
    positions = np.mgrid[0:grid, 0:grid]
    row, column = positions.reshape(2, -1, 1)
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
    """Return the query weights of all heads for n position features: (heads * n, n).

    The query of head 0 is the position features of the patch ``distance`` patches above. Head 1 has
    those of the patch below, head 2 left, head 3 right, and head 4 above again.
    """
    above = _rotation(frequencies, -distance, 0)
    below = _rotation(frequencies, distance, 0)
    left = _rotation(frequencies, 0, -distance)
    right = _rotation(frequencies, 0, distance)
    neighbours = [above, below, left, right]
    weights = [neighbours[head % 4] for head in range(heads)]
    return np.concatenate(weights)


def _patch_filters(config: SiglipConfig, position_width: int) -> np.ndarray:
    """Return the initial patch embedding: (width, P, P, 3), one filter for each feature.

    Filters in order:

    - ``position_width`` filters of zeros, because a patch's pixels do not change its position
    - the discrete cosine transform of brightness, lowest frequencies first
    - the mean of each colour channel in each of the patch's four quarters
    - zeros for the remaining features, if any
    """
    P = config.patch_size  # pixels per side
    zero_filter = np.zeros((P, P, 3))
    colour_filters = []
    for quarter in range(4):
        for channel in range(3):
            colour_filter = _quarter_filter(P, quarter, channel)
            colour_filters.append(colour_filter)

    filters = [zero_filter] * position_width
    identity = np.eye(P)
    cosines = dct(identity, norm="ortho", axis=0)  # row i: cosine wave of frequency i
    frequencies = sorted(np.ndindex(P, P), key=sum)  # pairs (down, across), lowest sum first
    wave_count = config.width - position_width - len(colour_filters)
    for i, j in frequencies[:wave_count]:
        down = cosines[i]
        across = cosines[j]
        wave = np.outer(down, across)
        brightness_filter = wave[..., None].repeat(3, -1)  # the same for red, green and blue
        is_constant = i == j == 0  # this filter measures the mean brightness, which is large
        scale = 0.04 if is_constant else 0.15
        filters.append(brightness_filter * scale)
    filters += colour_filters
    missing = config.width - len(filters)
    filters += [zero_filter] * missing
    return np.array(filters, np.float32)


def _quarter_filter(size: int, quarter: int, channel: int) -> np.ndarray:
    """Return a filter that averages a colour channel over a quarter of a patch: (size, size, 3).

    Quarters 0 to 3 are top left, top right, bottom left and bottom right.
    """
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
    """Return the matrix that turns the position features at (y, x) into those at (y + dy, x + dx).

    For n frequencies it is (4 * n, 4 * n). The features are n sines and n cosines of the row, then
    n sines and n cosines of the column (``_position_features``). Offsets are in patches.
    """
    n = len(frequencies)
    rotation = np.zeros((4 * n, 4 * n))
    for axis, offset in enumerate((dy, dx)):  # the features of the row, then those of the column
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
    """Append ``columns`` columns of zeros to a matrix, and convert it to MLX."""
    widths = [(0, 0), (0, columns)]
    padded = np.pad(matrix, widths)
    return mx.array(padded.astype(np.float32))


class EncoderStage:
    """A training stage, in which a ``SiglipVisionTower`` learns the labels of scenes' patches.

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
        seeds = [self._seed, 3, index]  # 3: this stage; other stages have other numbers
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
    """Return the weighted sum of all heads' losses, and measurements for the log.

    The measurement "edges_off" is the sum of squared errors of the predicted edges, divided by the
    sum of the squared targets. The others are means over the patches that show a thing.

    Args:
        model: the encoder with its heads.
        batch: pixels (B, S, S, 3), labels (8, B, N), and outlines and edges (B, N, ...).
    """
    predicted = model(batch["pixels"])
    labels = batch["labels"]
    shape, colour = labels[:2].astype(mx.int32)
    has_centre = labels[2]
    places = labels[3:].transpose(1, 2, 0)  # (B, N, 5)
    shows_thing = labels[0] > 0
    thing_patches = shows_thing.sum()
    weights = mx.where(shows_thing, 1.0, _BACKGROUND_WEIGHT)
    total_weight = weights.sum()
    shape_losses = nn.losses.cross_entropy(predicted.shape, shape)
    colour_losses = nn.losses.cross_entropy(predicted.colour, colour)
    weighted_losses = weights * (shape_losses + colour_losses)
    label_loss = weighted_losses.sum() / total_weight
    centre_loss = nn.losses.binary_cross_entropy(predicted.centre, has_centre)
    outline_loss = nn.losses.binary_cross_entropy(predicted.outline, batch["outlines"])

    place_errors = nn.losses.smooth_l1_loss(predicted.place, places, reduction="none")
    thing_errors = place_errors.sum(-1) * shows_thing
    place_loss = thing_errors.sum() / thing_patches

    edge_targets = batch["edges"]
    edge_errors = (predicted.edges - edge_targets) ** 2
    weighted_errors = weights[..., None] * edge_errors
    loss = label_loss + 2 * centre_loss + 2 * outline_loss + place_loss
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
