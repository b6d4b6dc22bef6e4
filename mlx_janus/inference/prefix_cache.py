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
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx
from PIL import Image

from ..decode.text import PREFILL_STEP
from ..models.backbone import Cache, cache_arrays, trim_cache
from ..processing.images import preprocess
from ..processing.pixels import bands
from .loaded import LoadedModel, Stopwatch
from .text_generation import Finished, Prompt, TextEvent, answer_events

if TYPE_CHECKING:
    from ..decode.text import TextOptions

Key = int | tuple[str, int]
"""The content of a position: a token id, or an image's hash and an index in the image."""


def image_digest(image: Image.Image) -> str:
    """Return the SHA-256 of an image's size and pixels, in hexadecimal."""
    digest = hashlib.sha256(f"{image.size}".encode())
    for _, band in bands(image):  # the bytes of the whole image would take as much memory again
        digest.update(band.tobytes())
    return digest.hexdigest()


class ImageFeatureCache:
    """The vision encoder's features of images, by the image's hash (digest).

    A key is the content of one position of a prompt: a token id, or a (digest, index) pair at the
    index-th position of an image.

    Args:
        janus: the model that encodes.
        limit: number of images to keep; the least recently used are forgotten. None: keep all.
    """

    def __init__(self, janus: LoadedModel, limit: int | None = None):
        self._janus = janus
        self._limit = limit
        # (tokens, hidden) for each digest, the most recently used last.
        self._features: OrderedDict[str, mx.array] = OrderedDict()
        janus.caches.add(self)  # emptied when the model is closed

    def clear(self) -> None:
        """Forget all features."""
        self._features.clear()

    def keys(self, ids: Sequence[int], digests: Sequence[str]) -> list[Key]:
        """Return the key of each position of a prompt.

        Args:
            ids: the prompt, with a placeholder id at each position of an image.
            digests: the hashes of the prompt's images, in order.
        """
        positions = self._janus.prompts.image_tokens  # of each image
        # One (digest, index) for each placeholder, in order.
        image_keys = itertools.product(digests, range(positions))
        placeholder = self._janus.prompts.special.image
        return [next(image_keys) if token == placeholder else token for token in ids]

    def features_at(
        self, keys: Sequence[Key], images: Mapping[str, Image.Image], stopwatch: Stopwatch
    ) -> list[mx.array]:
        """Return the features at the image positions of ``keys``; encode images if necessary.

        Args:
            keys: keys of consecutive positions of a prompt.
            images: the images of these positions, by digest.
            stopwatch: times the encoding.

        Returns:
            (positions, hidden) arrays. Together they have a row for each image position, in order.
        """
        for _ in self.encode(keys, images, stopwatch):  # encodes an image in each iteration
            pass
        image_keys = [key for key in keys if isinstance(key, tuple)]
        features = []
        for digest, group in itertools.groupby(image_keys, key=operator.itemgetter(0)):
            indices = [index for _, index in group]
            features.append(self._features[digest][mx.array(indices)])
        # Forget images only now, because this prompt may show more images than the limit.
        while self._limit is not None and len(self._features) > self._limit:
            self._features.popitem(last=False)
        return features

    def encode(
        self,
        keys: Sequence[Key],
        images: Mapping[str, Image.Image],
        stopwatch: Stopwatch | None = None,
    ) -> Iterator[None]:
        """Encode those images among ``keys`` that are not held yet, and yield after each.

        More images than the limit may be held afterwards, until the next ``features_at``.

        Args:
            keys: keys of positions of a prompt.
            images: the images of these positions, by digest.
            stopwatch: times the encoding; None: no timing.
        """
        # A dict drops repeated digests and keeps their order.
        digests = dict.fromkeys(key[0] for key in keys if isinstance(key, tuple))
        for digest in digests:
            if digest not in self._features:
                pixels = preprocess(images[digest], self._janus.config.image)
                features = self._janus.encode([pixels], stopwatch)
                self._features[digest] = features[0]
                yield
            self._features.move_to_end(digest)  # now the most recently used


class PrefixCache:
    """A KV cache and the keys of the positions that it holds.

    A key is the content of one position: a token id, or an image's hash (digest) and an index in
    the image.

    Args:
        janus: the model.
    """

    def __init__(self, janus: LoadedModel):
        self.keys: list[Key] = []
        self._janus = janus
        self._cache: Cache | None = None
        janus.caches.add(self)  # emptied when the model is closed

    def clear(self) -> None:
        """Empty the KV cache."""
        self.keys = []
        self._cache = None

    @property
    def nbytes(self) -> int:
        """The bytes of the KV cache."""
        if not self._cache or not self._cache[0].offset:  # no arrays before the first position
            return 0
        return sum(array.nbytes for array in cache_arrays(self._cache))

    def common_length(self, keys: Sequence[Key]) -> int:
        """Return the length of the prefix that the cache and a prompt have in common.

        The prompt's last position is not counted, because it must be read to get its logits.
        """
        length = 0
        for held, wanted in zip(self.keys, keys, strict=False):
            if held != wanted:
                break
            length += 1
        return min(length, len(keys) - 1)

    def _trim_to(self, keys: Sequence[Key]) -> Cache:
        """Trim the KV cache to the prefix that it has in common with a prompt, and return it."""
        cache = self._cache or self._janus.model.make_cache()
        self._cache = cache
        self.keys = self.keys[: self.common_length(keys)]
        surplus = cache[0].offset - len(self.keys)
        trim_cache(cache, surplus)
        return cache

    def answer(
        self,
        ids: Sequence[int],
        keys: Sequence[Key],
        feature_cache: ImageFeatureCache,
        images: Mapping[str, Image.Image],
        options: TextOptions,
        *,
        step: int = PREFILL_STEP,
        continues: bool = False,
    ) -> Generator[TextEvent, None, None]:
        """Read the uncached part of a prompt, and answer. Closing the generator ends the answer.

        If a pass of the model fails or is interrupted, the cache is emptied, because its layers may
        then hold different positions.

        Args:
            ids: the prompt.
            keys: the keys of the prompt's positions.
            feature_cache: encodes the prompt's images.
            images: the prompt's images, by digest.
            options: sampling and length.
            step: prompt positions read between two events.
            continues: whether the prompt ends with the beginning of the answer.

        Yields:
            The events of ``answer_events``: progress in the prompt, tokens, and the result.
        """
        known: list[Key] = [*keys]  # the answer's tokens are added when it is complete
        cache = self._trim_to(keys)
        cached = len(self.keys)  # prompt positions in the cache
        features = partial(feature_cache.features_at, keys[cached:], images)
        prompt = Prompt(ids, features, cache, cached, step, continues)
        events = answer_events(self._janus, prompt, options)
        consistent = False  # whether all layers hold the same positions
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
            if consistent:
                self._keep(known)
            else:
                self.clear()

    def _keep(self, known: Sequence[Key]) -> None:
        """Keep the positions whose keys are ``known``, and drop the others.

        After an early close, the cache also holds tokens of the answer. Their keys are not known.
        """
        cache = self._cache
        assert cache is not None  # ``_trim_to`` has made it
        positions = cache[0].offset
        self.keys = list(known[:positions])
        trim_cache(cache, positions - len(self.keys))
