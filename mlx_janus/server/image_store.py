"""Generated images that clients fetch by URL: kept for an hour, in a bounded amount of memory."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

PATH = "/images/"  # start of the path of a URL; an image's name follows

_TOKEN_BYTES = 24  # random bytes of a name, too many to guess


@dataclass(frozen=True)
class StoredImage:
    """The bytes of an image file."""

    data: bytes
    media_type: str
    expires: float  # by the store's clock, in seconds


class ImageStore:
    """A store of image files under unguessable names.

    The oldest images are dropped first.

    Args:
        max_bytes: maximum number of bytes of all images together.
        seconds: how long an image is kept.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        max_bytes: int = 256_000_000,
        seconds: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._clock = clock
        self._images: OrderedDict[str, StoredImage] = OrderedDict()  # by name, oldest first
        self._bytes = 0  # of all images

    def add(self, data: bytes, suffix: str, media_type: str) -> str:
        """Store an image file and return its name.

        Args:
            data: the file's bytes.
            suffix: end of the name, such as ".png".
            media_type: the file's media type, such as "image/png".
        """
        name = secrets.token_urlsafe(_TOKEN_BYTES) + suffix
        self._images[name] = StoredImage(data, media_type, self._clock() + self._seconds)
        self._bytes += len(data)
        self._drop_old()
        return name

    def get(self, name: str) -> StoredImage | None:
        """Return the image of this name; None if it never existed or has been dropped."""
        self._drop_old()
        return self._images.get(name)

    def _drop_old(self) -> None:
        """Drop the images that have expired, and the oldest ones while there are too many bytes."""
        now = self._clock()
        while self._images:
            name, oldest = next(iter(self._images.items()))
            if oldest.expires > now and self._bytes <= self._max_bytes:
                return
            del self._images[name]
            self._bytes -= len(oldest.data)
