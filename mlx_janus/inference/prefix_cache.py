"""A KV cache that remembers which tokens and images it holds.

Every position has a key: a token's id, or for an image the hash of its content and which part of it. A new prompt is
compared with these keys; the longest common prefix is kept and the rest is read. So a further question costs its own
tokens only, and a change of the past costs the tokens after the change.
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
"""The content of a position: a token's id, or the hash of an image and which part of it."""


def image_digest(image: Image.Image) -> str:
    """Return the SHA-256 of an image's size and pixels, in hexadecimal."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


class ImageFeatureCache:
    """Features of images that were encoded, by content.

    Args:
        janus: the model that encodes.
        limit: how many are kept, the last used ones; None: all.
    """

    def __init__(self, janus: LoadedModel, limit: int | None = None):
        self._janus = janus
        self._limit = limit
        self._features: OrderedDict[str, mx.array] = OrderedDict()  # (tokens, hidden)
        janus.caches.add(self)

    def clear(self) -> None:
        """Forget all features."""
        self._features.clear()

    def keys(self, ids: Sequence[int], digests: Sequence[str]) -> list[Key]:
        """Return the keys of a prompt's ids, which show these images, in order."""
        prompts = self._janus.prompts
        parts = itertools.product(digests, range(prompts.image_tokens))
        return [next(parts) if i == prompts.special.image else i for i in ids]

    def rows(
        self, keys: Sequence[Key], shown: Mapping[str, Image.Image], watch: Stopwatch
    ) -> list[mx.array]:
        """Return (positions, hidden) arrays for those keys that stand for images, encoding the new ones.

        Args:
            keys: positions to read.
            shown: the images among them, by digest.
            watch: times the encoding.
        """
        for _ in self.encode(keys, shown, watch):
            pass
        places = [key for key in keys if isinstance(key, tuple)]
        rows = [
            self._features[digest][mx.array([part for _, part in group])]
            for digest, group in itertools.groupby(places, operator.itemgetter(0))
        ]
        while self._limit is not None and len(self._features) > self._limit:
            self._features.popitem(last=False)
        return rows

    def encode(
        self, keys: Sequence[Key], shown: Mapping[str, Image.Image], watch: Stopwatch | None = None
    ) -> Iterator[None]:
        """Encode the new images among ``keys`` one at a time, yielding after each."""
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
        janus.caches.add(self)

    def clear(self) -> None:
        """Forget everything that was read."""
        self.keys = []
        self._cache = None

    @property
    def nbytes(self) -> int:
        """Bytes that the KV cache takes."""
        return (
            sum(a.nbytes for a in cache_arrays(self._cache))
            if self._cache and self._cache[0].offset
            else 0
        )

    def common(self, keys: Sequence[Key]) -> int:
        """Return how many positions need not be read again: of the common prefix at most all but the last one."""
        pairs = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(self.keys, keys, strict=False)
        )
        return min(sum(1 for _ in pairs), len(keys) - 1)

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
        """Read a prompt from where it differs, and answer as ``answer_events`` does. Closing stops within a step.

        A pass that fails or is interrupted empties the cache: its layers may differ in the positions they hold.

        Args:
            ids: the prompt.
            keys: the keys of the prompt.
            images: gives the features at the images' positions.
            shown: the prompt's images, by digest.
            options: sampling and length.
            step: as for ``Prompt``.
        """
        known: list[Key] = [*keys]
        cache = self._cache = self._cache or self._janus.model.make_cache()
        self.keys = self.keys[: self.common(keys)]
        trim_cache(cache, cache[0].offset - len(self.keys))
        read = len(self.keys)

        def features(watch: Stopwatch) -> list[mx.array]:
            return images.rows(keys[read:], shown, watch)

        events = answer_events(self._janus, Prompt(ids, features, cache, read, step), options)
        sound = False
        try:
            for event in events:
                if isinstance(event, Finished):
                    known += event.result.tokens
                yield event
            sound = True
        except GeneratorExit:  # closed between two passes
            sound = True
            raise
        finally:
            events.close()
            self.keys = known[: cache[0].offset] if sound else []
            if sound:
                trim_cache(cache, cache[0].offset - len(self.keys))
            else:
                self._cache = None
