"""Drawing many pictures at once that neither begin nor end together (continuous batching).

A picture may join at any step, with a prompt, guidance and choice of its own, and leaves when it is whole. Its rows
have read what they would have read alone, its noise is of its seed and its positions: so it is the picture that it
would be alone, but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..models.backbone import RaggedCache, add_rows, cache_arrays, keep_rows
from ..models.janus import JanusModel
from ..models.vq_parts import token_config
from .image import PREFILL_STEP, DrawOptions
from .prefill import prefill_all
from .sampling import choose, guide, position_keys

_CLEAR_EVERY = 256  # steps, as in ``image.draw_tokens``


@dataclass(eq=False)
class Picture:
    """A picture that is being drawn."""

    seed: int
    options: DrawOptions
    _drawn: list[tuple[mx.array, int]] = field(
        default_factory=list, repr=False
    )  # tokens of a step, and its place

    def __len__(self) -> int:
        """How many of its tokens are drawn."""
        return len(self._drawn)

    def append(self, step: mx.array, place: int) -> None:
        """Take the token at ``place`` of a step's tokens."""
        self._drawn.append((step, place))

    def tokens(self, count: int | None = None) -> np.ndarray:
        """Return (n,) int32: the first ``count`` tokens in raster order; None: all that are drawn."""
        return np.array([np.array(step)[place] for step, place in self._drawn[:count]], np.int32)


class DrawingBatch:
    """Pictures that advance by one token a step.

    Args:
        model: the weights.
    """

    def __init__(self, model: JanusModel):
        self.pictures: list[Picture] = []
        self._model = model
        self._tokens = token_config(model.config).tokens
        self._steps = 0
        self._clear()

    def _clear(self) -> None:
        self.pictures = []
        self._cache: RaggedCache = []
        self._rows: list[
            tuple[int, int]
        ] = []  # of each picture; without guidance both are the same
        self._keys = mx.zeros((0, 0, 2), mx.uint32)  # (n, positions, 2)
        self._next = mx.zeros((0,), mx.uint32)  # (n,): chosen and not read yet

    def add(
        self, ids: Sequence[int], unconditional: Sequence[int], pictures: Sequence[Picture]
    ) -> None:
        """Begin pictures of one prompt, which is read once for all of them.

        Args:
            ids: the prompt, ending with begin-of-image.
            unconditional: as many ids, the prompt padded out.
            pictures: of which nothing is drawn, all guided or none.
        """
        model, n, guided = self._model, len(pictures), pictures[0].options.rows == 2
        read_once = [list(ids), list(unconditional)] if guided else [list(ids)]
        cache = model.make_ragged_cache(len(read_once))
        hidden = prefill_all(model, model.embed_text(mx.array(read_once)), cache, PREFILL_STEP)
        copies = [0] * n + [1] * n * guided
        keep_rows(cache, copies)
        rows = [(i, i + n * guided) for i in range(n)]
        keys = position_keys([picture.seed for picture in pictures], self._tokens)
        first = _choose(model.image_logits(hidden[mx.array(copies)]), keys[:, 0], pictures, rows)
        mx.async_eval(first, keys, cache_arrays(cache))
        self._join(cache, rows, keys, first, pictures)

    def _join(
        self,
        cache: RaggedCache,
        rows: list[tuple[int, int]],
        keys: mx.array,
        first: mx.array,
        pictures: Sequence[Picture],
    ) -> None:
        if not self.pictures:
            self._cache, self._rows, self._keys, self._next = cache, rows, keys, first
        else:
            try:
                add_rows(self._cache, cache)
            except BaseException:  # some layers may have them, others not
                self._clear()
                raise
            before = 1 + max(map(max, self._rows))
            self._rows = [*self._rows, *((c + before, u + before) for c, u in rows)]
            self._keys = mx.concatenate([self._keys, keys])
            self._next = mx.concatenate([self._next, first])
        self.pictures = [*self.pictures, *pictures]

    def remove(self, pictures: Sequence[Picture]) -> None:
        """Give up pictures that are being drawn."""
        gone = set(pictures)
        kept = [i for i, picture in enumerate(self.pictures) if picture not in gone]
        if len(kept) == len(self.pictures):
            return
        if not kept:
            self._clear()
            return
        rows = sorted({row for i in kept for row in self._rows[i]})
        try:
            keep_rows(self._cache, rows)
        except BaseException:
            self._clear()
            raise
        place = {row: new for new, row in enumerate(rows)}
        self._rows = [(place[c], place[u]) for c, u in (self._rows[i] for i in kept)]
        self._keys, self._next = self._keys[mx.array(kept)], self._next[mx.array(kept)]
        self.pictures = [self.pictures[i] for i in kept]

    def step(self) -> list[Picture]:
        """Draw the next token of every picture; the following pass is under way as this returns.

        Returns:
            The pictures that are whole now, which are in the batch no more.
        """
        if not self.pictures:
            return []
        tokens = self._next
        for place, picture in enumerate(self.pictures):
            picture.append(tokens, place)
        whole = [picture for picture in self.pictures if len(picture) == self._tokens]
        self.remove(whole)
        if self.pictures:
            self._next = self._following()
            mx.async_eval(self._next)
        mx.eval(tokens)
        self._steps += 1
        if self._steps % _CLEAR_EVERY == 0:
            mx.clear_cache()
        return whole

    def _following(self) -> mx.array:
        """Read the tokens that were chosen last, and choose the next ones: (n,)."""
        owners = {row: i for i, rows in enumerate(self._rows) for row in rows}
        tokens = self._next[mx.array([owners[row] for row in range(len(owners))])][:, None]
        hidden = self._model.hidden_states(self._model.embed_image_tokens(tokens), self._cache)[
            :, 0
        ]
        positions = mx.array([len(picture) for picture in self.pictures])
        keys = self._keys[mx.arange(len(self.pictures)), positions]
        return _choose(self._model.image_logits(hidden), keys, self.pictures, self._rows)


def _choose(
    logits: mx.array, keys: mx.array, pictures: Sequence[Picture], rows: Sequence[tuple[int, int]]
) -> mx.array:
    """(rows, codes) logits, (n, 2) keys -> (n,) tokens, of every picture by its own options."""
    conditional = logits[mx.array([c for c, _ in rows])]
    if any(c != u for c, u in rows):
        unconditional = logits[
            mx.array([u for _, u in rows])
        ]  # without guidance the picture's own row
        weights = mx.array([picture.options.cfg_weight for picture in pictures], logits.dtype)[
            :, None
        ]
        conditional = guide(conditional, unconditional, weights)
    kinds: dict[tuple[float, float], list[int]] = {}
    for place, picture in enumerate(pictures):
        kinds.setdefault((picture.options.temperature, picture.options.top_p), []).append(place)
    if len(kinds) == 1:
        return choose(conditional, keys, *next(iter(kinds)))
    parts = [
        choose(conditional[mx.array(p)], keys[mx.array(p)], *kind) for kind, p in kinds.items()
    ]
    places = [place for part in kinds.values() for place in part]
    return mx.concatenate(parts)[mx.array(np.argsort(places))]
