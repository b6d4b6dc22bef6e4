"""Linear heads that give the language model more to learn than the next token.

They are discarded after training.

**Tracking**, for image tokens: the things begun so far, and the things that remain. The model
generates an image row by row, and a thing spans several rows. The cross-entropy of tokens never
shows directly to which thing a row belongs, or which things are finished. A synthetic world knows
this for every token.

**Placing**, for answers: the place of a thing when it is named. The question whether one thing is
left of another takes three look-ups, and a yes or a no teaches none of them by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

import mlx.core as mx
import numpy as np
from mlx import nn

from ...models.janus import JanusModel
from ...worlds import shapes
from .encoder import COLOUR_LABELS, SHAPE_LABELS, patch_labels, place_in_image

_MOST = 4  # things in a scene
_NAMES = len(shapes.SHAPES) + len(shapes.COLOURS)
COUNT_BITS = _MOST * _NAMES  # length of ``encode_counts``
_OWNER_LOGITS = len(SHAPE_LABELS) + len(COLOUR_LABELS)  # logits for the thing at a position
_COUNTS_WEIGHT = 3.0  # weight in the loss: most bits are 0, so their mean is small
_ANGLES = np.linspace(0, 2 * np.pi, 64, endpoint=False)  # radians, samples of a circle


class TrackingHead(nn.Module):
    """Linear head over hidden states, for the things at each position and for two counts.

    It tells the thing at a position, the thing one position before, and the counts of the things
    begun before the position and of all others.
    """

    def __init__(self, hidden: int):
        super().__init__()
        logits = 2 * _OWNER_LOGITS + 2 * COUNT_BITS
        self.out = nn.Linear(hidden, logits)

    def loss(
        self,
        hidden: mx.array,
        owners: mx.array,
        begun: mx.array,
        ahead: mx.array,
    ) -> mx.array:
        """Return the mean loss over positions: of the labels of things, plus of the count bits.

        Args:
            hidden: (B, n, hidden), where state ``k`` predicts token ``k``.
            owners: (B, n, 2) labels of the shape and the colour at position ``k``.
            begun: (B, n, ``COUNT_BITS``) ``encode_counts`` of the things begun before ``k``.
            ahead: (B, n, ``COUNT_BITS``) ``encode_counts`` of all other things.
        """
        out = self.out(hidden)
        # Logits of the thing at each position, of the thing one position before, and of the counts.
        ends = [_OWNER_LOGITS, 2 * _OWNER_LOGITS]
        here, before, counts = mx.split(out, ends, axis=-1)

        shifted = owners[:, :-1]
        one_in_front = [(0, 0), (1, 0), (0, 0)]
        previous = mx.pad(shifted, one_in_front)  # before the first position: label 0, "none"
        shapes_end = len(SHAPE_LABELS)
        owner_loss = mx.zeros(())
        for logits, labels in ((here, owners), (before, previous)):
            shape, colour = mx.split(logits, [shapes_end], axis=-1)
            right_shape = labels[..., 0]
            right_colour = labels[..., 1]
            shape_losses = nn.losses.cross_entropy(shape, right_shape)
            colour_losses = nn.losses.cross_entropy(colour, right_colour)
            owner_loss = owner_loss + shape_losses.mean()
            owner_loss = owner_loss + colour_losses.mean()

        targets = mx.concatenate([begun, ahead], axis=-1)
        count_loss = nn.losses.binary_cross_entropy(counts, targets)
        return owner_loss + _COUNTS_WEIGHT * count_loss


class PlacingHead(nn.Module):
    """Linear head over a middle layer: the place of a thing's centre, where the thing is named."""

    def __init__(self, hidden: int):
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.out = nn.Linear(hidden, 2)

    def loss(self, middle: mx.array, places: mx.array) -> mx.array:
        """Return the mean loss over the names; 0 for a batch without names.

        Args:
            middle: (B, L, hidden), the middle layer's output.
            places: (B, L, 3) from ``placing_targets``: x, y, and 1 where a thing is named.
        """
        normed = self.norm(middle)
        predicted = self.out(normed)
        targets = places[..., :2]
        is_named = places[..., 2]
        errors = nn.losses.smooth_l1_loss(predicted, targets, reduction="none")
        errors = errors.sum(-1)
        total = (errors * is_named).sum()
        number = is_named.sum()
        return total / mx.maximum(number, 1)  # no division by 0 for a batch without names


class JanusWithHeads(nn.Module):
    """A Janus model and the auxiliary heads that are trained with it.

    The model itself never holds the heads.
    """

    def __init__(self, janus: JanusModel):
        super().__init__()
        self.janus = janus
        self.tracking_head: TrackingHead | None = None
        self.placing_head: PlacingHead | None = None

    def add_heads(self, *, tracking: bool, placing: bool) -> None:
        """Create the wanted heads that are missing; keep existing ones."""
        hidden = self.janus.config.language.hidden_size
        if tracking and self.tracking_head is None:
            self.tracking_head = TrackingHead(hidden)
        if placing and self.placing_head is None:
            self.placing_head = PlacingHead(hidden)


def placing_targets(
    ids: np.ndarray,
    scene: shapes.Scene,
    words: Mapping[str, int],
) -> np.ndarray:
    """Find where a conversation names a thing: (L,) ids -> (L, 3) for ``PlacingHead``.

    A row is x, y and 1 at a shape's word that follows a colour's word, if the scene has exactly one
    such thing; else zeros. Places range from -2 at the left and the top to 2.

    Args:
        ids: a conversation.
        scene: the scene in its image.
        words: token id of each colour's and each shape's word.
    """
    length = len(ids)
    places = np.zeros((length, 3), np.float32)
    second_words = ids[1:]
    first_words = ids[:-1]
    counts = Counter(thing.name for thing in scene.things)
    for thing in scene.things:
        if counts[thing.name] > 1:
            continue
        is_colour = first_words == words[thing.colour]
        is_shape = second_words == words[thing.shape]
        x, y = place_in_image(thing)
        # Row k of places[1:] belongs to the second word of pair k, the shape's.
        places[1:][is_colour & is_shape] = (x, y, 1)
    return places


def tracking_targets(
    scene: shapes.Scene,
    grid: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the targets of ``TrackingHead``: owners (n, 2), begun and ahead (n, ``COUNT_BITS``).

    n = grid * grid is the number of image tokens. Owners are the shape and the colour of the thing
    at a position, as indices into ``SHAPE_LABELS`` and ``COLOUR_LABELS``. "Begun" counts the things
    whose first token is before the position, "ahead" the others.
    """
    labels = patch_labels(scene, grid)
    names = labels[:2]  # the shape and the colour of each patch
    owners = names.T.astype(np.int32)

    position = partial(first_token, grid=grid)
    things = sorted(scene.things, key=position)
    begun = []  # item k: counts where k things are begun
    ahead = []
    for number in range(len(things) + 1):
        begun.append(encode_counts(things[:number]))
        ahead.append(encode_counts(things[number:]))

    starts = np.array([position(thing) for thing in things])
    positions = np.arange(grid * grid)
    is_begun = starts[None] < positions[:, None]  # (n, things)
    numbers = is_begun.sum(1)
    numbers = numbers.astype(int)  # (n,)
    begun_counts = np.stack(begun)
    ahead_counts = np.stack(ahead)
    return owners, begun_counts[numbers], ahead_counts[numbers]


def first_token(thing: shapes.Thing, grid: int) -> int:
    """Return the first position, row by row, whose patch shows part of a thing."""
    outline = _outline_points(thing)
    size = shapes.SIDE / grid
    x = outline[:, 0]
    y = outline[:, 1]
    row = int(y.min() // size)
    bottom = (row + 1) * size
    in_row = x[y < bottom]  # of the topmost row of patches that the thing reaches
    column = int(in_row.min() // size)
    return row * grid + column


def _outline_points(thing: shapes.Thing) -> np.ndarray:
    """Sample points of a thing's outline: (points, 2), x and y in pixels."""
    corners = np.array(thing.outline())
    if not len(corners):  # a circle
        right = thing.radius * np.cos(_ANGLES)
        down = thing.radius * np.sin(_ANGLES)
        x = thing.x + right
        y = thing.y + down
        return np.stack([x, y], axis=1)
    following = np.roll(corners, -1, axis=0)
    shares = np.linspace(0, 1, 16, endpoint=False)
    along = shares[:, None, None]
    from_corner = corners * (1 - along)
    to_next = following * along
    points = from_corner + to_next  # (16, corners, 2)
    return points.reshape(-1, 2)


def encode_counts(things: Sequence[shapes.Thing]) -> np.ndarray:
    """Count things per shape and per colour in thermometer code -> (``COUNT_BITS``,).

    Four bits each: at least one, two, three and four. Pairs of shape and colour are not counted:
    some are held out, and the model would learn that they never occur.
    """
    by_shape = Counter(thing.shape for thing in things)
    by_colour = Counter(thing.colour for thing in things)
    numbers = [by_shape[shape] for shape in shapes.SHAPES]
    numbers += [by_colour[colour] for colour in shapes.COLOURS]
    counts = np.array(numbers)
    steps = np.arange(_MOST)
    at_least = counts[:, None] > steps
    bits = at_least.astype(np.float32)
    return bits.reshape(-1)
