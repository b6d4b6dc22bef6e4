"""Continuous batching of images: an image can join a batch at any step and leaves when complete.

Each image has its own prompt, guidance and sampling, and one to three rows of the batch. Its rows
read the same tokens as they would without the other images, and its noise depends only on its seed
and positions. So the other images can change it only through rounding.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..models.backbone import RaggedCache, add_rows, cache_arrays, keep_rows
from ..models.janus import JanusModel
from ..models.vq_parts import token_config
from .image import DrawOptions, Row
from .prefill import prefill
from .sampling import choose, position_keys

_CLEAR_EVERY = 256  # steps between two frees of MLX's buffer cache
_PREFILL_STEP = 256  # positions of a prompt read at once, while the running images wait


@dataclass(eq=False)
class BatchImage:
    """An image of a batch, with its tokens so far."""

    seed: int
    options: DrawOptions
    _chosen: list[tuple[mx.array, int]] = field(default_factory=list, repr=False)
    """For each token so far: the tokens of all images at that step, and this image's index."""

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


ImageRows = tuple[int, ...]
"""The indices of one image's rows in a batch, in the order that ``DrawOptions.guided`` takes."""


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
        self._image_rows: list[ImageRows] = []  # one for each image
        self._keys = mx.zeros((0, 0, 2), mx.uint32)  # random keys, (n, positions, 2)
        # The images' newest tokens, (n,): neither added to the images nor read by the model yet.
        self._next_tokens = mx.zeros((0,), mx.uint32)

    def add(self, rows: Sequence[Row], images: Sequence[BatchImage]) -> None:
        """Start images of one prompt at once, as ``start`` does in parts."""
        for _ in self.start(rows, images):
            pass

    def start(
        self, rows: Sequence[Row], images: Sequence[BatchImage]
    ) -> Generator[None, None, None]:
        """Start images of one prompt. The prompt is read in parts, once for all images.

        The images join the batch after the last part. Between two parts, the caller may advance the
        batch, and add or remove other images. If the batch's cache cannot be extended, all images
        of the batch are lost and the error is raised.

        Args:
            rows: the prompt's rows, as many as the options of each image need. All end with
                begin-of-image, and have the same length.
            images: new images, whose options need equal numbers of rows.

        Yields:
            None after each part of the prompt except the last.
        """
        model = self._model
        count = len(images)
        prompt_of_row = []  # for each row of the new images, the index of its prompt in ``rows``
        for index in range(len(rows)):
            prompt_of_row += [index] * count
        # The first rows of all images come first, then their second rows, and so on.
        image_rows = [tuple(range(i, len(prompt_of_row), count)) for i in range(count)]
        cache = model.make_ragged_cache(len(rows))
        embeddings = mx.stack([row.embed(model) for row in rows])
        for done, hidden in prefill(model, embeddings, cache, _PREFILL_STEP):
            last_hidden = hidden
            if done < embeddings.shape[1]:
                yield
        mx.eval(last_hidden)
        keep_rows(cache, prompt_of_row)  # repeats each row of the prompt for all images
        keys = position_keys([image.seed for image in images], self._tokens_per_image)
        logits = model.image_logits(last_hidden[mx.array(prompt_of_row)])
        first_tokens = _choose_tokens(logits, keys[:, 0], images, image_rows)
        mx.async_eval(first_tokens, keys, cache_arrays(cache))
        self._join(cache, image_rows, keys, first_tokens, images)

    def _join(
        self,
        cache: RaggedCache,
        image_rows: list[ImageRows],
        keys: mx.array,
        first_tokens: mx.array,
        images: Sequence[BatchImage],
    ) -> None:
        """Append new images to the batch. Their prompt was read into a separate cache.

        Args:
            cache: the cache of the new images only.
            image_rows: the rows of each new image in ``cache``.
            keys: a random key for each new image and position, (n, positions, 2).
            first_tokens: the first token of each new image, (n,).
            images: the new images.
        """
        if not self.images:
            self._cache = cache
            self._image_rows = image_rows
            self._keys = keys
            self._next_tokens = first_tokens
        else:
            # The new rows come after the batch's rows, so their indices increase by the number of
            # the batch's rows, which is its highest index plus 1.
            offset = 1 + max(max(rows) for rows in self._image_rows)
            try:
                add_rows(self._cache, cache)
            except BaseException:  # some layers may have the new rows, others not
                self._clear()
                raise
            moved = [tuple(row + offset for row in rows) for rows in image_rows]
            self._image_rows = [*self._image_rows, *moved]
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
        image_rows = [self._image_rows[i] for i in kept_indices]
        kept_rows = sorted(row for rows in image_rows for row in rows)
        try:
            keep_rows(self._cache, kept_rows)
        except BaseException:  # some layers may have lost rows, others not
            self._clear()
            raise
        new_row = {old: new for new, old in enumerate(kept_rows)}
        self._image_rows = [tuple(new_row[row] for row in rows) for rows in image_rows]
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
        mx.eval(tokens)  # waits for the added tokens
        self._steps_done += 1
        if self._steps_done % _CLEAR_EVERY == 0:
            mx.clear_cache()
        return complete

    def _choose_next_tokens(self) -> mx.array:
        """Read the newest token of every image, and choose the one after it: (n,)."""
        model = self._model
        image_of_row: dict[int, int] = {}  # row -> index of its image
        for index, rows in enumerate(self._image_rows):
            image_of_row |= dict.fromkeys(rows, index)
        image_indices = [image_of_row[row] for row in range(len(image_of_row))]
        row_tokens = self._next_tokens[mx.array(image_indices)]
        embeddings = model.embed_image_tokens(row_tokens[:, None])
        hidden = model.hidden_states(embeddings, self._cache)
        logits = model.image_logits(hidden[:, 0])
        next_positions = mx.array([len(image) for image in self.images])
        keys = self._keys[mx.arange(len(self.images)), next_positions]
        return _choose_tokens(logits, keys, self.images, self._image_rows)


def _choose_tokens(
    logits: mx.array,
    keys: mx.array,
    images: Sequence[BatchImage],
    image_rows: Sequence[ImageRows],
) -> mx.array:
    """Choose a token for each of n images, with the guidance and sampling of its options.

    Args:
        logits: (rows, codebook size).
        keys: a random key for each image, (n, 2).
        images: the n images, for their options.
        image_rows: the rows of each image in ``logits``.

    Returns:
        The tokens, (n,).
    """
    groups: dict[DrawOptions, list[int]] = {}  # by their options, the indices of images
    for index, image in enumerate(images):
        groups.setdefault(image.options, []).append(index)
    chosen = []
    order: list[int] = []  # for each token in ``chosen``, the index of its image
    for options, members in groups.items():
        # The first rows of all members, then their second rows, and so on.
        row_lists = zip(*(image_rows[index] for index in members), strict=True)
        guided = options.guided([logits[mx.array(rows)] for rows in row_lists])
        group_keys = keys[mx.array(members)]
        chosen.append(choose(guided, group_keys, options.temperature, options.top_p))
        order += members
    if len(groups) == 1:  # in the order of the images already
        return chosen[0]
    in_image_order = mx.array(np.argsort(order))
    return mx.concatenate(chosen)[in_image_order]
