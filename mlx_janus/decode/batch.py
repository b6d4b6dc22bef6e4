"""Continuous batching of images: an image can join a batch at any step and leaves when complete.

Each image has its own prompt, guidance and sampling. Its rows read the same tokens as they would
without the other images, and its noise depends on its seed and positions only. So the other images
change it by rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..models.backbone import RaggedCache, add_rows, cache_arrays, keep_rows
from ..models.janus import JanusModel
from ..models.vq_parts import token_config
from .image import PREFILL_STEP, DrawOptions
from .prefill import prefill_all
from .sampling import choose, guide, position_keys

_CLEAR_EVERY = 256  # steps between two frees of MLX's buffer cache


@dataclass(eq=False)
class BatchImage:
    """An image of a batch, with its tokens so far."""

    seed: int
    options: DrawOptions
    _chosen: list[tuple[mx.array, int]] = field(default_factory=list, repr=False)
    """For each token: the tokens of all images at that step, and this image's index among them."""

    def __len__(self) -> int:
        """Return the number of tokens so far."""
        return len(self._chosen)

    def append(self, tokens: mx.array, index: int) -> None:
        """Append the token at ``index`` of a step's tokens."""
        self._chosen.append((tokens, index))

    def tokens(self, count: int | None = None) -> np.ndarray:
        """Return the first ``count`` tokens in raster order, (n,) int32; None: all so far."""
        ids = []
        for tokens, index in self._chosen[:count]:
            ids.append(np.array(tokens)[index])
        return np.array(ids, np.int32)


class Rows(NamedTuple):
    """The batch rows of one image; without guidance, both are the same row."""

    conditional: int
    unconditional: int


class DrawingBatch:
    """Images that advance by one token a step.

    Args:
        model: the weights.
    """

    def __init__(self, model: JanusModel):
        self.images: list[BatchImage] = []
        self._model = model
        self._tokens = token_config(model.config).tokens
        self._steps = 0
        self._clear()

    def _clear(self) -> None:
        """Forget all images, as none are left or an error made their caches inconsistent."""
        self.images = []
        self._cache: RaggedCache = []  # KV cache of all rows
        self._rows: list[Rows] = []  # the rows of each image
        self._keys = mx.zeros((0, 0, 2), mx.uint32)  # (n, positions, 2): random keys
        self._next = mx.zeros((0,), mx.uint32)  # (n,): tokens chosen but not read yet

    def add(
        self, ids: Sequence[int], unconditional: Sequence[int], images: Sequence[BatchImage]
    ) -> None:
        """Start images of one prompt, which is read once for all of them.

        If the cache cannot be extended, the error is raised and the batch loses all its images.

        Args:
            ids: the prompt, ending with begin-of-image.
            unconditional: the prompt with pads in place of its words, of the same length.
            images: new images, all with guidance or all without.
        """
        model = self._model
        count = len(images)
        guided = images[0].options.rows == 2  # a conditional and an unconditional row
        prompts = [list(ids)]
        copies = [0] * count  # for each row, the index of its prompt
        rows = [Rows(i, i) for i in range(count)]
        if guided:
            prompts.append(list(unconditional))
            copies += [1] * count
            rows = [Rows(i, i + count) for i in range(count)]
        cache = model.make_ragged_cache(len(prompts))
        embeddings = model.embed_text(mx.array(prompts))
        hidden = prefill_all(model, embeddings, cache, PREFILL_STEP)
        keep_rows(cache, copies)  # copies each prompt's row, once for each image
        keys = position_keys([image.seed for image in images], self._tokens)
        logits = model.image_logits(hidden[mx.array(copies)])
        first = _choose(logits, keys[:, 0], images, rows)
        mx.async_eval(first, keys, cache_arrays(cache))
        self._join(cache, rows, keys, first, images)

    def _join(
        self,
        cache: RaggedCache,
        rows: list[Rows],
        keys: mx.array,
        first: mx.array,
        images: Sequence[BatchImage],
    ) -> None:
        """Append images whose prompt is read, and the rows of these images, to the batch.

        Args:
            cache: holds the prompt in the rows of these images only.
            rows: the rows of each image in ``cache``.
            keys: a random key for each image and position, (n, positions, 2).
            first: the first token of each image, (n,).
            images: the images.
        """
        if not self.images:
            self._cache = cache
            self._rows = rows
            self._keys = keys
            self._next = first
        else:
            try:
                add_rows(self._cache, cache)
            except BaseException:  # some layers may have the new rows, others not
                self._clear()
                raise
            offset = 1 + max(max(pair) for pair in self._rows)
            moved = [Rows(pair.conditional + offset, pair.unconditional + offset) for pair in rows]
            self._rows = [*self._rows, *moved]
            self._keys = mx.concatenate([self._keys, keys])
            self._next = mx.concatenate([self._next, first])
        self.images = [*self.images, *images]

    def remove(self, images: Sequence[BatchImage]) -> None:
        """Remove images from the batch, complete or not; ignore those that are not in it.

        If the cache cannot be reduced, the error is raised and the batch loses all its images.
        """
        gone = set(images)
        kept = [i for i, image in enumerate(self.images) if image not in gone]
        if len(kept) == len(self.images):
            return
        if not kept:
            self._clear()
            return
        pairs = [self._rows[i] for i in kept]
        rows = sorted({row for pair in pairs for row in pair})
        try:
            keep_rows(self._cache, rows)
        except BaseException:  # some layers may have lost rows, others not
            self._clear()
            raise
        moved = {row: new for new, row in enumerate(rows)}
        self._rows = [Rows(moved[pair.conditional], moved[pair.unconditional]) for pair in pairs]
        self._keys = self._keys[mx.array(kept)]
        self._next = self._next[mx.array(kept)]
        self.images = [self.images[i] for i in kept]

    def step(self) -> list[BatchImage]:
        """Add the next token to every image; the next pass is already running on return.

        Returns:
            The images that are complete now, which have left the batch.
        """
        if not self.images:
            return []
        tokens = self._next
        for index, image in enumerate(self.images):
            image.append(tokens, index)
        complete = [image for image in self.images if len(image) == self._tokens]
        self.remove(complete)
        if self.images:
            self._next = self._following()
            mx.async_eval(self._next)
        mx.eval(tokens)
        self._steps += 1
        if self._steps % _CLEAR_EVERY == 0:
            mx.clear_cache()
        return complete

    def _following(self) -> mx.array:
        """Read the tokens chosen last, and return the next ones: (n,)."""
        model = self._model
        owners: dict[int, int] = {}  # row to the index of its image
        for index, pair in enumerate(self._rows):
            owners[pair.conditional] = index
            owners[pair.unconditional] = index
        images_of_rows = [owners[row] for row in range(len(owners))]
        tokens = self._next[mx.array(images_of_rows)]
        embeddings = model.embed_image_tokens(tokens[:, None])
        hidden = model.hidden_states(embeddings, self._cache)
        logits = model.image_logits(hidden[:, 0])
        positions = mx.array([len(image) for image in self.images])
        keys = self._keys[mx.arange(len(self.images)), positions]
        return _choose(logits, keys, self.images, self._rows)


def _choose(
    logits: mx.array, keys: mx.array, images: Sequence[BatchImage], rows: Sequence[Rows]
) -> mx.array:
    """Choose a token for every image by its own options.

    Args:
        logits: (rows, codes).
        keys: a random key for each image, (n, 2).
        images: n images.
        rows: the rows of each image in ``logits``.

    Returns:
        The tokens, (n,).
    """
    guided = logits[mx.array([pair.conditional for pair in rows])]
    if any(pair.conditional != pair.unconditional for pair in rows):
        unconditional = logits[mx.array([pair.unconditional for pair in rows])]
        # An image without guidance has one row and weight 1, so that ``guide`` returns its logits.
        weights = mx.array([image.options.cfg_weight for image in images], logits.dtype)
        guided = guide(guided, unconditional, weights[:, None])
    # ``choose`` takes one temperature and top_p, so images are grouped by them.
    groups: dict[tuple[float, float], list[int]] = {}
    for index, image in enumerate(images):
        sampling = (image.options.temperature, image.options.top_p)
        groups.setdefault(sampling, []).append(index)
    if len(groups) == 1:
        ((temperature, top_p),) = groups
        return choose(guided, keys, temperature, top_p)
    chosen = []
    order: list[int] = []
    for (temperature, top_p), members in groups.items():
        places = mx.array(members)
        chosen.append(choose(guided[places], keys[places], temperature, top_p))
        order += members
    # From the order of the groups back to that of the images.
    return mx.concatenate(chosen)[mx.array(np.argsort(order))]
