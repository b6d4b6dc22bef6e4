"""Linear heads that give the language model more to learn than the next token.

They are discarded after training.

A thing is a coloured shape of the synthetic world.

**Tracking**, for image tokens: which things have begun before a token, and which have not. The
model generates an image row by row, and a thing spans several rows. The cross-entropy of tokens
never shows directly to which thing a token belongs, or which things have begun. A synthetic world
knows this for every token.

**Placing**, for answers: the place of a thing in the image, where the text names the thing. The
question whether one thing is left of another needs the place of each and a comparison. The answer
yes or no teaches none of these three steps by itself.
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

_MOST_THINGS = 4  # things in a scene, at most
_COUNTED_WORDS = len(shapes.SHAPES) + len(shapes.COLOURS)  # each shape and each colour has a count
COUNT_BITS = _MOST_THINGS * _COUNTED_WORDS  # length of ``encode_counts``
_OWNER_LOGITS = len(SHAPE_LABELS) + len(COLOUR_LABELS)  # number of logits for one thing
_COUNTS_WEIGHT = 3.0  # weight in the loss: most bits are 0, so their mean loss is small
_CIRCLE_ANGLES = np.linspace(0, 2 * np.pi, 64, endpoint=False)  # radians, samples of a circle


class TrackingHead(nn.Module):
    """Linear head over the hidden states of image tokens.

    The owner of a position is the thing that the image shows there. A thing begins at its
    ``first_token``. For each position, the head predicts the shape and colour of its owner and of
    the previous position's owner. It also predicts how many things of each shape, and of each
    colour, begin before the position, and how many do not.
    """

    def __init__(self, hidden: int):
        super().__init__()
        logit_count = 2 * _OWNER_LOGITS + 2 * COUNT_BITS
        self.out = nn.Linear(hidden, logit_count)

    def loss(
        self,
        hidden: mx.array,
        owners: mx.array,
        begun: mx.array,
        ahead: mx.array,
    ) -> mx.array:
        """Return the loss of the owners plus the weighted loss of the counts, means over positions.

        Args:
            hidden: (B, n, hidden), where state ``k`` predicts token ``k``.
            owners: (B, n, 2) shape and colour label of the owner of each position.
            begun: (B, n, ``COUNT_BITS``) ``encode_counts`` of the things that begin before each
                position.
            ahead: (B, n, ``COUNT_BITS``) ``encode_counts`` of the things that do not.
        """
        out = self.out(hidden)
        owners_end = _OWNER_LOGITS
        previous_end = owners_end + _OWNER_LOGITS
        ends = [owners_end, previous_end]
        owner_logits, previous_logits, count_logits = mx.split(out, ends, axis=-1)

        # The owners, moved on by one position. The first position gets label 0, which is "none".
        all_but_last_owner = owners[:, :-1]
        one_in_front = [(0, 0), (1, 0), (0, 0)]
        previous_owners = mx.pad(all_but_last_owner, one_in_front)
        shapes_end = len(SHAPE_LABELS)
        owner_loss = mx.zeros(())
        for logits, labels in ((owner_logits, owners), (previous_logits, previous_owners)):
            shape_logits, colour_logits = mx.split(logits, [shapes_end], axis=-1)
            shape_labels = labels[..., 0]
            colour_labels = labels[..., 1]
            shape_losses = nn.losses.cross_entropy(shape_logits, shape_labels)
            colour_losses = nn.losses.cross_entropy(colour_logits, colour_labels)
            owner_loss = owner_loss + shape_losses.mean()
            owner_loss = owner_loss + colour_losses.mean()

        targets = mx.concatenate([begun, ahead], axis=-1)
        count_loss = nn.losses.binary_cross_entropy(count_logits, targets)
        return owner_loss + _COUNTS_WEIGHT * count_loss


class PlacingHead(nn.Module):
    """Linear head that predicts, from a middle layer's output, the place of each named thing."""

    def __init__(self, hidden: int):
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.out = nn.Linear(hidden, 2)

    def loss(self, middle: mx.array, places: mx.array) -> mx.array:
        """Return the mean loss over the tokens that name a thing; 0 if there are none.

        Args:
            middle: (B, L, hidden), the middle layer's output.
            places: (B, L, 3) from ``placing_targets``: for each token x, y, and 1 if it names a
                thing.
        """
        normed = self.norm(middle)
        predicted = self.out(normed)
        targets = places[..., :2]
        is_named = places[..., 2]
        errors = nn.losses.smooth_l1_loss(predicted, targets, reduction="none")
        errors = errors.sum(-1)
        total = (errors * is_named).sum()
        named_count = is_named.sum()
        return total / mx.maximum(named_count, 1)  # no division by 0


class JanusWithHeads(nn.Module):
    """A Janus model and the auxiliary heads that are trained with it.

    The heads are not in ``janus``, so that it is saved without them.
    """

    def __init__(self, janus: JanusModel):
        super().__init__()
        self.janus = janus
        # ``add_heads`` creates them.
        self.tracking_head: TrackingHead | None = None
        self.placing_head: PlacingHead | None = None

    def add_heads(self, *, tracking: bool, placing: bool) -> None:
        """Create the wanted heads, except those that exist already."""
        hidden = self.janus.config.language.hidden_size
        if tracking and self.tracking_head is None:
            self.tracking_head = TrackingHead(hidden)
        if placing and self.placing_head is None:
            self.placing_head = PlacingHead(hidden)


def placing_targets(
    ids: np.ndarray,
    scene: shapes.Scene,
    word_ids: Mapping[str, int],
) -> np.ndarray:
    """Return the places of the things that a conversation names: (L,) ids -> (L, 3).

    Two successive words name a thing if they are a colour and a shape, and the scene has exactly
    one thing of that colour and shape. The row of the shape's word is then (x, y, 1), with the
    thing's ``place_in_image``. All other rows are zeros.

    Args:
        ids: token ids of the conversation.
        scene: the scene that the conversation is about.
        word_ids: token id of each colour's and each shape's word.
    """
    length = len(ids)
    places = np.zeros((length, 3), np.float32)
    # Pair k is the tokens at positions k and k + 1.
    first_of_pair = ids[:-1]
    second_of_pair = ids[1:]
    second_rows = places[1:]  # a view: row k is that of the second token of pair k
    counts = Counter(thing.name for thing in scene.things)
    for thing in scene.things:
        if counts[thing.name] > 1:  # the colour and shape do not tell which thing is meant
            continue
        is_colour = first_of_pair == word_ids[thing.colour]
        is_shape = second_of_pair == word_ids[thing.shape]
        x, y = place_in_image(thing)
        second_rows[is_colour & is_shape] = (x, y, 1)
    return places


def tracking_targets(
    scene: shapes.Scene,
    grid: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the targets of ``TrackingHead`` for the n = grid * grid image tokens of a scene.

    Returns:
        owners: (n, 2) indices into ``SHAPE_LABELS`` and ``COLOUR_LABELS``, for the thing at each
            position.
        begun: (n, ``COUNT_BITS``) counts of the things whose first token is before the position.
        ahead: (n, ``COUNT_BITS``) counts of all other things.
        The counts are in the code of ``encode_counts``.
    """
    labels = patch_labels(scene, grid)
    shapes_and_colours = labels[:2]
    owners = shapes_and_colours.T.astype(np.int32)

    first_token_of = partial(first_token, grid=grid)
    things = sorted(scene.things, key=first_token_of)
    begun_by_number = []  # item k: counts of the first k things
    ahead_by_number = []  # item k: counts of the things after the first k
    for number in range(len(things) + 1):
        begun_by_number.append(encode_counts(things[:number]))
        ahead_by_number.append(encode_counts(things[number:]))

    starts = np.array([first_token_of(thing) for thing in things])
    positions = np.arange(grid * grid)
    is_begun = starts[None] < positions[:, None]  # (n, things)
    numbers = is_begun.sum(1)  # (n,) number of things begun before each position
    numbers = numbers.astype(int)
    begun = np.stack(begun_by_number)[numbers]
    ahead = np.stack(ahead_by_number)[numbers]
    return owners, begun, ahead


def first_token(thing: shapes.Thing, grid: int) -> int:
    """Return the position of the first image token, row by row, whose patch shows a thing."""
    outline = _outline_points(thing)
    patch_side = shapes.SIDE / grid  # pixels
    x = outline[:, 0]
    y = outline[:, 1]
    row = int(y.min() // patch_side)  # the topmost row of patches that the thing reaches
    bottom = (row + 1) * patch_side  # of this row, in pixels
    x_in_row = x[y < bottom]
    column = int(x_in_row.min() // patch_side)  # the leftmost patch of this row that it reaches
    return row * grid + column


def _outline_points(thing: shapes.Thing) -> np.ndarray:
    """Return sample points on a thing's outline: (points, 2), x and y in pixels."""
    corners = np.array(thing.outline())
    if not len(corners):  # a circle
        right = thing.radius * np.cos(_CIRCLE_ANGLES)
        down = thing.radius * np.sin(_CIRCLE_ANGLES)
        x = thing.x + right
        y = thing.y + down
        return np.stack([x, y], axis=1)
    next_corners = np.roll(corners, -1, axis=0)
    # 16 points on each side, as shares of the way from a corner to the next.
    shares = np.linspace(0, 1, 16, endpoint=False)
    shares = shares[:, None, None]
    points = corners * (1 - shares) + next_corners * shares  # (16, corners, 2)
    return points.reshape(-1, 2)


def encode_counts(things: Sequence[shapes.Thing]) -> np.ndarray:
    """Count things per shape and per colour in thermometer code -> (``COUNT_BITS``,).

    Each count has four bits: at least one, at least two, at least three, and four. Pairs of shape
    and colour are not counted, because some pairs are held out of training. The model would learn
    that these never occur.
    """
    by_shape = Counter(thing.shape for thing in things)
    by_colour = Counter(thing.colour for thing in things)
    numbers = [by_shape[shape] for shape in shapes.SHAPES]
    numbers += [by_colour[colour] for colour in shapes.COLOURS]
    counts = np.array(numbers)
    thresholds = np.arange(_MOST_THINGS)
    exceeds = counts[:, None] > thresholds  # (counts, 4)
    bits = exceeds.astype(np.float32)
    return bits.reshape(-1)
