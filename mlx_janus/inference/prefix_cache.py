"""What the language model has read stays in its KV cache, with a note of what that was.

The note has a key for every position: a token's id, or for a picture its content's hash and which part of it. What is
to be read next is compared with the note, the longest common beginning is kept and the rest is read. So a further
question costs its own tokens only, and whatever changes the past costs what comes after the change.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
from PIL import Image

from ..models.backbone import Cache, cache_arrays, trim_cache
from ..processing.images import preprocess
from .results import TextChunk
from .text_generation import stream_answer

if TYPE_CHECKING:
    from ..decode.text import TextOptions
    from ..pipeline import JanusPipeline

Key = int | tuple[str, int]
"""What stands at a position: a token's id, or which part of which picture."""


def picture_digest(image: Image.Image) -> str:
    """SHA-256 of a picture's size and pixels, in hexadecimal."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


class SeenPictures:
    """Features of pictures that were looked at, by content.

    Args:
        janus: whose encoder looks.
        most: how many are kept, the last used ones; None: all.
    """

    def __init__(self, janus: JanusPipeline, most: int | None = None):
        self._janus, self._most = janus, most
        self._features: OrderedDict[str, mx.array] = OrderedDict()  # (tokens, hidden)

    def keys(self, ids: Sequence[int], digests: Sequence[str]) -> list[Key]:
        """The note of a prompt's ids that show these pictures, in order."""
        prompts = self._janus.prompts
        parts = itertools.product(digests, range(prompts.image_tokens))
        return [next(parts) if i == prompts.special.image else i for i in ids]

    def rows(self, keys: Sequence[Key], shown: Mapping[str, Image.Image]) -> tuple[list[mx.array], float]:
        """(positions, hidden) arrays of what stands at those keys that are of pictures, and the seconds spent on them.

        Args:
            keys: positions to read.
            shown: the pictures among them, by digest; those not seen yet are looked at.
        """
        places = [key for key in keys if isinstance(key, tuple)]
        started = time.perf_counter()
        for _ in self.look(keys, shown):
            pass
        spent = time.perf_counter() - started if places else 0.0
        rows = [
            self._features[digest][mx.array([part for _, part in group])]
            for digest, group in itertools.groupby(places, operator.itemgetter(0))
        ]
        while self._most is not None and len(self._features) > self._most:
            self._features.popitem(last=False)
        return rows, spent

    def look(self, keys: Sequence[Key], shown: Mapping[str, Image.Image]) -> Iterator[None]:
        """Look at the pictures among ``keys`` that were not seen yet, one at a time."""
        wanted = dict.fromkeys(key[0] for key in keys if isinstance(key, tuple))
        for digest in wanted:
            if digest not in self._features:
                (self._features[digest],), _ = self._janus.encode([preprocess(shown[digest], self._janus.config.image)])
                yield
            self._features.move_to_end(digest)


class ReadPrefix:
    """A KV cache, and the note of what it holds.

    Args:
        janus: the model.
    """

    def __init__(self, janus: JanusPipeline):
        self.keys: list[Key] = []
        self._janus = janus
        self._cache: Cache | None = None

    @property
    def nbytes(self) -> int:
        """Memory that the cache takes."""
        return sum(a.nbytes for a in cache_arrays(self._cache)) if self._cache and self._cache[0].offset else 0

    def common(self, keys: Sequence[Key]) -> int:
        """How many positions need not be read again: of the common beginning at most all but the last one."""
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.keys, keys, strict=False))
        return min(sum(1 for _ in pairs), len(keys) - 1)

    def answer(
        self,
        ids: Sequence[int],
        keys: Sequence[Key],
        pictures: SeenPictures,
        shown: Mapping[str, Image.Image],
        options: TextOptions,
        *,
        every_token: bool = False,
    ) -> Iterator[TextChunk]:
        """Read a prompt from where it differs, and answer, as ``answering.stream_answer``. Closing stops within a step.

        What fails amid a pass, or is interrupted there, leaves nothing read: layers may differ in what they hold.

        Args:
            ids: the prompt.
            keys: the note of it.
            pictures: gives what stands at pictures' positions.
            shown: the prompt's pictures, by digest.
            options: choice and length.
            every_token: as for ``answering.stream_answer``.
        """
        known: list[Key] = [*keys]
        cache = self._cache = self._cache or self._janus.model.make_cache()
        self.keys = self.keys[: self.common(keys)]
        trim_cache(cache, cache[0].offset - len(self.keys))
        read = len(self.keys)
        stream = stream_answer(
            self._janus, ids, lambda: pictures.rows(keys[read:], shown), options, cache, read, every_token=every_token
        )
        sound = False
        try:
            for chunk in stream:
                if chunk.result is not None:
                    known += chunk.result.tokens
                yield chunk
            sound = True
        except GeneratorExit:  # closed between two passes
            sound = True
            raise
        finally:
            stream.close()  # type: ignore[attr-defined]
            self.keys = known[: cache[0].offset] if sound else []
            if sound:
                trim_cache(cache, cache[0].offset - len(self.keys))
            else:
                self._cache = None
