"""Continuous batching of images: an image can join a batch at any step and leaves when complete.

Each image has its own prompt, guidance and sampling. Its rows read the same tokens as they would
without the other images, and its noise depends only on its seed and positions. So the other images
can change it only through rounding.
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
    """For each token so far: the tokens of all images at a step, and this image's index in them."""

    def __len__(self) -> int:
        """Return the number of tokens so far."""
        return len(self._chosen)

    def append(self, tokens: mx.array, index: int) -> None:
        """Append the token at ``index`` of ``tokens``, the tokens of all images at a step."""
        self._chosen.append((tokens, index))

    def tokens(self, count: int | None = None) -> np.ndarray:
        """Return the first ``count`` tokens in raster order, (n,) int32; None: all so far."""
        ids = []
        for tokens, index in self._chosen[:count]:
            ids.append(np.array(tokens)[index])
        return np.array(ids, np.int32)


class RowPair(NamedTuple):
    """Indices of one image's rows in a batch; without guidance, both indices are equal."""

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
        self._tokens_per_image = token_config(model.config).tokens
        self._steps_done = 0
        self._clear()

    def _clear(self) -> None:
        """Forget all images, because none are left or an error made their rows inconsistent."""
        self.images = []
        self._cache: RaggedCache = []  # KV cache of all rows
        self._row_pairs: list[RowPair] = []  # one for each image
        self._keys = mx.zeros((0, 0, 2), mx.uint32)  # random keys, (n, positions, 2)
        # The images' newest tokens, (n,): neither added to the images nor read by the model yet.
        self._next_tokens = mx.zeros((0,), mx.uint32)

    def add(
        self, ids: Sequence[int], unconditional: Sequence[int], images: Sequence[BatchImage]
    ) -> None:
        """Start images of one prompt, which is read once for all of them.

        If the batch's cache cannot be extended, all images of the batch are lost and the error is
        raised.

        Args:
            ids: the prompt, ending with begin-of-image.
            unconditional: the prompt with pads in place of its words, of the same length; unused
                without guidance.
            images: new images, all with guidance or all without.
        """
        model = self._model
        count = len(images)
        with_guidance = images[0].options.rows == 2
        prompts = [list(ids)]
        prompt_of_row = [0] * count  # for each row, the index of its prompt
        pairs = [RowPair(i, i) for i in range(count)]
        if with_guidance:
            prompts.append(list(unconditional))
            prompt_of_row += [1] * count
            pairs = [RowPair(i, i + count) for i in range(count)]
        cache = model.make_ragged_cache(len(prompts))
        embeddings = model.embed_text(mx.array(prompts))
        hidden = prefill_all(model, embeddings, cache, PREFILL_STEP)
        keep_rows(cache, prompt_of_row)  # repeats the row of each prompt for all images
        keys = position_keys([image.seed for image in images], self._tokens_per_image)
        logits = model.image_logits(hidden[mx.array(prompt_of_row)])
        first_tokens = _choose_tokens(logits, keys[:, 0], images, pairs)
        mx.async_eval(first_tokens, keys, cache_arrays(cache))
        self._join(cache, pairs, keys, first_tokens, images)

    def _join(
        self,
        cache: RaggedCache,
        pairs: list[RowPair],
        keys: mx.array,
        first_tokens: mx.array,
        images: Sequence[BatchImage],
    ) -> None:
        """Append new images to the batch. Their prompt was read into a separate cache.

        Args:
            cache: the cache of the new images only.
            pairs: the rows of each new image in ``cache``.
            keys: a random key for each new image and position, (n, positions, 2).
            first_tokens: the first token of each new image, (n,).
            images: the new images.
        """
        if not self.images:
            self._cache = cache
            self._row_pairs = pairs
            self._keys = keys
            self._next_tokens = first_tokens
        else:
            # The new rows come after the batch's rows, so their indices increase by the number of
            # these: the highest index plus 1.
            offset = 1 + max(max(pair) for pair in self._row_pairs)
            try:
                add_rows(self._cache, cache)
            except BaseException:  # some layers may have the new rows, others not
                self._clear()
                raise
            moved = [
                RowPair(pair.conditional + offset, pair.unconditional + offset) for pair in pairs
            ]
            self._row_pairs = [*self._row_pairs, *moved]
            self._keys = mx.concatenate([self._keys, keys])
            self._next_tokens = mx.concatenate([self._next_tokens, first_tokens])
        self.images = [*self.images, *images]

    def remove(self, images: Sequence[BatchImage]) -> None:
        """Remove images, complete or not; ignore images that are not in the batch.

        If the rows cannot be removed from the cache, all images of the batch are lost and the error
        is raised.
        """
        removed = set(images)
        kept_indices = [i for i, image in enumerate(self.images) if image not in removed]
        if len(kept_indices) == len(self.images):
            return
        if not kept_indices:
            self._clear()
            return
        pairs = [self._row_pairs[i] for i in kept_indices]
        kept_rows = sorted({row for pair in pairs for row in pair})
        try:
            keep_rows(self._cache, kept_rows)
        except BaseException:  # some layers may have lost rows, others not
            self._clear()
            raise
        new_row = {old: new for new, old in enumerate(kept_rows)}
        moved = [RowPair(new_row[pair.conditional], new_row[pair.unconditional]) for pair in pairs]
        self._row_pairs = moved
        self._keys = self._keys[mx.array(kept_indices)]
        self._next_tokens = self._next_tokens[mx.array(kept_indices)]
        self.images = [self.images[i] for i in kept_indices]

    def step(self) -> list[BatchImage]:
        """Add a token to every image, and start the pass that chooses the next tokens.

        Returns:
            The images that are complete now. They are removed from the batch.
        """
        if not self.images:
            return []
        tokens = self._next_tokens
        for index, image in enumerate(self.images):
            image.append(tokens, index)
        complete = [image for image in self.images if len(image) == self._tokens_per_image]
        self.remove(complete)
        if self.images:
            self._next_tokens = self._choose_next_tokens()
            mx.async_eval(self._next_tokens)  # starts the pass without waiting for it
        mx.eval(tokens)
        self._steps_done += 1
        if self._steps_done % _CLEAR_EVERY == 0:
            mx.clear_cache()
        return complete

    def _choose_next_tokens(self) -> mx.array:
        """Read the newest token of every image, and choose the one after it: (n,)."""
        model = self._model
        image_of_row: dict[int, int] = {}  # row -> index of its image
        for index, pair in enumerate(self._row_pairs):
            image_of_row[pair.conditional] = index
            image_of_row[pair.unconditional] = index
        image_indices = [image_of_row[row] for row in range(len(image_of_row))]
        row_tokens = self._next_tokens[mx.array(image_indices)]
        embeddings = model.embed_image_tokens(row_tokens[:, None])
        hidden = model.hidden_states(embeddings, self._cache)
        logits = model.image_logits(hidden[:, 0])
        next_positions = mx.array([len(image) for image in self.images])
        keys = self._keys[mx.arange(len(self.images)), next_positions]
        return _choose_tokens(logits, keys, self.images, self._row_pairs)


def _choose_tokens(
    logits: mx.array, keys: mx.array, images: Sequence[BatchImage], pairs: Sequence[RowPair]
) -> mx.array:
    """Choose a token for each of n images, with the guidance and sampling of its options.

    Args:
        logits: (rows, codebook size).
        keys: a random key for each image, (n, 2).
        images: the n images, for their options.
        pairs: the rows of each image in ``logits``.

    Returns:
        The tokens, (n,).
    """
    image_logits = logits[mx.array([pair.conditional for pair in pairs])]
    if any(pair.conditional != pair.unconditional for pair in pairs):  # an image has guidance
        unconditional = logits[mx.array([pair.unconditional for pair in pairs])]
        # An image without guidance has one row and weight 1, so that ``guide`` returns its logits.
        cfg_weights = mx.array([image.options.cfg_weight for image in images], logits.dtype)
        image_logits = guide(image_logits, unconditional, cfg_weights[:, None])
    # ``choose`` takes one temperature and one top_p, so group the indices of images by these two.
    groups: dict[tuple[float, float], list[int]] = {}
    for index, image in enumerate(images):
        sampling = (image.options.temperature, image.options.top_p)
        groups.setdefault(sampling, []).append(index)
    if len(groups) == 1:
        temperature, top_p = next(iter(groups))  # the only key
        return choose(image_logits, keys, temperature, top_p)
    chosen = []
    order: list[int] = []  # for each token in ``chosen``, the index of its image
    for (temperature, top_p), members in groups.items():
        indices = mx.array(members)
        chosen.append(choose(image_logits[indices], keys[indices], temperature, top_p))
        order += members
    in_image_order = mx.array(np.argsort(order))
    return mx.concatenate(chosen)[in_image_order]
