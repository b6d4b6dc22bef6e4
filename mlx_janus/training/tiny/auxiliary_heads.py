"""What a model is asked while it learns, besides the next token, by linear heads that are dropped afterwards.

**Drawing**: what it has begun, and what is to come. A picture's tokens come row by row, and a thing takes several rows.
Which of the things in the caption a row belongs to, and which of them have been drawn already, is nothing that the
cross-entropy of tokens says directly. A synthetic world knows it of every token.

**Answering**: where a thing is that was just named. Whether one thing is left of another takes three finds, and a yes
or a no teaches none of them by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np
from mlx import nn

from ...worlds import shapes
from .encoder import COLOUR_LABELS, SHAPE_LABELS, patch_labels

_MOST = 4  # things in a scene
MARKS = _MOST * (len(shapes.SHAPES) + len(shapes.COLOURS))  # of a set of things
_OWNER = len(SHAPE_LABELS), len(COLOUR_LABELS)
_OF_MARKS = 3.0  # weight in the loss: most marks are off, and their mean is small
_ROUND = np.linspace(0, 2 * np.pi, 64, endpoint=False)


class TrackingHead(nn.Module):
    """Linear, from hidden states: the shape and colour at the last position and at the next, and two sets of marks."""

    def __init__(self, hidden: int):
        super().__init__()
        self.out = nn.Linear(hidden, 2 * sum(_OWNER) + 2 * MARKS)

    def loss(self, hidden: mx.array, owners: mx.array, begun: mx.array, ahead: mx.array) -> mx.array:
        """Mean over positions.

        Args:
            hidden: (B, n, hidden), from which token ``k`` is predicted.
            owners: (B, n, 2) the numbers of shape and colour at position ``k``.
            begun: (B, n, ``MARKS``) of the things begun before it.
            ahead: (B, n, ``MARKS``) of the others.
        """
        out = self.out(hidden)
        now, before, marks = mx.split(out, [sum(_OWNER), 2 * sum(_OWNER)], axis=-1)
        previous = mx.pad(owners[:, :-1], [(0, 0), (1, 0), (0, 0)])
        named = mx.zeros(())
        for logits, owner in ((now, owners), (before, previous)):
            for part, label in zip(mx.split(logits, _OWNER[:1], axis=-1), (owner[..., 0], owner[..., 1]), strict=True):
                named = named + nn.losses.cross_entropy(part, label).mean()
        marked = nn.losses.binary_cross_entropy(marks, mx.concatenate([begun, ahead], axis=-1)).mean()
        return named + _OF_MARKS * marked


class PlacingHead(nn.Module):
    """Linear, from what an inner layer says where a thing has been named: where in the picture its centre is."""

    def __init__(self, hidden: int):
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.out = nn.Linear(hidden, 2)

    def loss(self, inner: mx.array, places: mx.array) -> mx.array:
        """Mean over the names.

        Args:
            inner: (B, L, hidden).
            places: (B, L, 3) as ``name_places`` gives them.
        """
        off = nn.losses.smooth_l1_loss(self.out(self.norm(inner)), places[..., :2], reduction="none").sum(-1)
        return (off * places[..., 2]).sum() / mx.maximum(places[..., 2].sum(), 1)


def name_places(ids: np.ndarray, scene: shapes.Scene, words: Mapping[str, int]) -> np.ndarray:
    """(L,) ids -> (L, 3): where a shape's word follows a colour's and there is one such thing, its place across and
    down, from -2 at the left and the top to 2, and 1; zeros elsewhere.

    Args:
        ids: of a conversation.
        scene: what is in its picture.
        words: the id of each colour's and each shape's word.
    """
    places = np.zeros((len(ids), 3), np.float32)
    counts = Counter(thing.name for thing in scene.things)
    for thing in scene.things:
        if counts[thing.name] == 1:
            named = (ids[1:] == words[thing.shape]) & (ids[:-1] == words[thing.colour])
            places[1:][named] = 4 * thing.x / shapes.SIDE - 2, 4 * thing.y / shapes.SIDE - 2, 1
    return places


def drop_heads(model: nn.Module) -> None:
    """Take off what is of training alone."""
    for name in ("tracking_head", "placing_head"):
        model.pop(name, None)


def track(scene: shapes.Scene, grid: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What ``TrackingHead`` learns of a scene: owners (n, 2), begun and ahead (n, ``MARKS``), for n = grid * grid."""
    owners = patch_labels(scene, grid)[:2].T.astype(np.int32)
    things = sorted(scene.things, key=lambda thing: first_token(thing, grid))
    starts = np.array([first_token(thing, grid) for thing in things])
    upto = [marks(things[:n]) for n in range(len(things) + 1)]
    after = [marks(things[n:]) for n in range(len(things) + 1)]
    counts = (starts[None] < np.arange(grid * grid)[:, None]).sum(1).astype(int)
    return owners, np.stack([upto[n] for n in counts]), np.stack([after[n] for n in counts])


def first_token(thing: shapes.Thing, grid: int) -> int:
    """The first position, row by row, whose patch shows some of a thing."""
    corners = np.array(thing.outline())
    if not len(corners):
        outline = np.stack([thing.x + thing.radius * np.cos(_ROUND), thing.y + thing.radius * np.sin(_ROUND)], axis=1)
    else:
        along = np.linspace(0, 1, 16, endpoint=False)[:, None, None]
        outline = (corners * (1 - along) + np.roll(corners, -1, axis=0) * along).reshape(-1, 2)
    size = shapes.SIDE / grid
    row = int(outline[:, 1].min() // size)
    column = int(outline[outline[:, 1] < (row + 1) * size, 0].min() // size)
    return row * grid + column


def marks(things: Sequence[shapes.Thing]) -> np.ndarray:
    """(``MARKS``,): for each shape and each colour, 1 for whether there are at least one, two, three, four of it.

    Nothing of pairs of shape and colour, of which some are held out, and would be learnt never to come.
    """
    numbers = [sum(thing.shape == shape for thing in things) for shape in shapes.SHAPES]
    numbers += [sum(thing.colour == colour for thing in things) for colour in shapes.COLOURS]
    return np.array([float(n > k) for n in numbers for k in range(_MOST)], np.float32)
