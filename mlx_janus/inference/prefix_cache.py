"""A KV cache that remembers which tokens and images it holds.

Every position has a key: a token id, or for an image the hash of its content and the index of the
position in it. A new prompt is compared with these keys; the longest common prefix is kept and the
rest is read. So the next question costs its own tokens only, and a change to an earlier message
costs the tokens after the change.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
from PIL import Image

from ..decode.text import PREFILL_STEP
from ..models.backbone import Cache, cache_arrays, trim_cache
from ..processing.images import preprocess
from .loaded import LoadedModel, Stopwatch
from .text_generation import Finished, Prompt, TextEvent, answer_events

if TYPE_CHECKING:
    from ..decode.text import TextOptions

Key = int | tuple[str, int]
"""The content of a position: a token id, or an image's hash and an index in the image."""


def image_digest(image: Image.Image) -> str:
    """Return the SHA-256 of an image's size and pixels, in hexadecimal."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


class ImageFeatureCache:
    """The features of encoded images, by content.

    Args:
        janus: the model that encodes.
        limit: number of images to keep; the least recently used are forgotten. None: keep all.
    """

    def __init__(self, janus: LoadedModel, limit: int | None = None):
        self._janus = janus
        self._limit = limit
        self._features: OrderedDict[str, mx.array] = OrderedDict()  # (tokens, hidden)
        janus.caches.add(self)  # emptied when the model is closed

    def clear(self) -> None:
        """Forget all features."""
        self._features.clear()

    def keys(self, ids: Sequence[int], digests: Sequence[str]) -> list[Key]:
        """Return the key of each position of a prompt.

        Args:
            ids: the prompt.
            digests: the hashes of its images, in order.
        """
        prompts = self._janus.prompts
        # One (digest, index) for each placeholder, in order.
        image_keys = itertools.product(digests, range(prompts.image_tokens))
        placeholder = prompts.special.image
        return [next(image_keys) if token == placeholder else token for token in ids]

    def rows(
        self, keys: Sequence[Key], shown: Mapping[str, Image.Image], watch: Stopwatch
    ) -> list[mx.array]:
        """Return the features at the images' positions, encoding new images.

        Args:
            keys: positions to read.
            shown: the images among them, by digest.
            watch: times the encoding.

        Returns:
            A (positions, hidden) array for each image, in order.
        """
        for _ in self.encode(keys, shown, watch):
            pass
        image_keys = [key for key in keys if isinstance(key, tuple)]
        rows = []
        for digest, group in itertools.groupby(image_keys, operator.itemgetter(0)):
            indices = [index for _, index in group]
            rows.append(self._features[digest][mx.array(indices)])
        # Forget only now: this prompt may show more images than the limit.
        while self._limit is not None and len(self._features) > self._limit:
            self._features.popitem(last=False)
        return rows

    def encode(
        self, keys: Sequence[Key], shown: Mapping[str, Image.Image], watch: Stopwatch | None = None
    ) -> Iterator[None]:
        """Encode the new images among ``keys``, and yield after each.

        This may exceed the limit: ``rows`` forgets the surplus.
        """
        wanted = dict.fromkeys(key[0] for key in keys if isinstance(key, tuple))
        for digest in wanted:
            if digest not in self._features:
                pixels = preprocess(shown[digest], self._janus.config.image)
                (self._features[digest],) = self._janus.encode([pixels], watch)
                yield
            self._features.move_to_end(digest)


class PrefixCache:
    """A KV cache and the keys of the positions that it holds.

    Args:
        janus: the model.
    """

    def __init__(self, janus: LoadedModel):
        self.keys: list[Key] = []
        self._janus = janus
        self._cache: Cache | None = None
        janus.caches.add(self)  # emptied when the model is closed

    def clear(self) -> None:
        """Forget everything that was read."""
        self.keys = []
        self._cache = None

    @property
    def nbytes(self) -> int:
        """The bytes of the KV cache."""
        if not self._cache or not self._cache[0].offset:
            return 0
        return sum(array.nbytes for array in cache_arrays(self._cache))

    def common(self, keys: Sequence[Key]) -> int:
        """Return the length of the common prefix with a prompt.

        The last position of the prompt never counts: it must be read to get its logits.
        """
        length = 0
        for held, wanted in zip(self.keys, keys, strict=False):
            if held != wanted:
                break
            length += 1
        return min(length, len(keys) - 1)

    def _trim_to(self, keys: Sequence[Key]) -> Cache:
        """Trim the cache to the common prefix with a prompt, and return it."""
        cache = self._cache or self._janus.model.make_cache()
        self._cache = cache
        self.keys = self.keys[: self.common(keys)]
        trim_cache(cache, cache[0].offset - len(self.keys))
        return cache

    def answer(
        self,
        ids: Sequence[int],
        keys: Sequence[Key],
        images: ImageFeatureCache,
        shown: Mapping[str, Image.Image],
        options: TextOptions,
        *,
        step: int = PREFILL_STEP,
    ) -> Generator[TextEvent, None, None]:
        """Read the new part of a prompt and answer. Closing the generator ends the answer.

        A failed or interrupted pass empties the cache: its layers may hold different positions.

        Args:
            ids: the prompt.
            keys: the keys of the prompt.
            images: the features at the images' positions.
            shown: the prompt's images, by digest.
            options: sampling and length.
            step: prompt positions read between two events.

        Yields:
            The events of ``answer_events``.
        """
        known: list[Key] = [*keys]  # will grow by the answer's tokens; the cache may hold fewer
        cache = self._trim_to(keys)
        read = len(self.keys)

        def features(watch: Stopwatch) -> list[mx.array]:
            return images.rows(keys[read:], shown, watch)

        events = answer_events(self._janus, Prompt(ids, features, cache, read, step), options)
        consistent = False  # all layers hold the same positions
        try:
            for event in events:
                if isinstance(event, Finished):
                    known += event.result.tokens
                yield event
            consistent = True
        except GeneratorExit:  # closed between two passes
            consistent = True
            raise
        finally:
            events.close()
            self.keys = known[: cache[0].offset] if consistent else []
            if consistent:  # after an early close, ``known`` lacks the answer's tokens
                trim_cache(cache, cache[0].offset - len(self.keys))
            else:
                self._cache = None
