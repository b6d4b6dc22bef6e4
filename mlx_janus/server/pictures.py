"""Pictures of a request: data URLs to small RGB pictures, and drawn ones to base64."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re

from PIL import Image

from ..config import ImageConfig
from ..errors import ImageError
from ..processing.images import decode_image, resize_and_pad
from ..processing.png import png_bytes
from .errors import explained
from .settings import Settings

MAX_PICTURES = 16
_MOST_PIXELS = 50_000_000
_DATA_URL = re.compile(
    r"data:(image/[a-z0-9.+-]{1,40}|application/octet-stream)(;[a-z0-9=.-]{1,40})?;base64,", re.IGNORECASE
)
_FETCHES = 4  # at once, each of which has a thread


class PictureReader:
    """Reads what requests name, one picture at a time, so that large ones are not in memory together.

    Args:
        settings: the limits, and whether addresses are fetched.
        config: how the model wants a picture: they are brought to that size at once, and kept so.
    """

    def __init__(self, settings: Settings, config: ImageConfig):
        self._settings, self._config = settings, config
        self._decoding, self._fetching = asyncio.Lock(), asyncio.Semaphore(_FETCHES)

    async def read(self, url: str, place: str) -> Image.Image:
        """A square picture.

        Args:
            url: that names it.
            place: the field that this stands in, for errors.

        Raises:
            Problem: too large, damaged, or not given as it must be.
        """
        try:
            if url[:8].lower() == "https://":
                data: str | bytes = await self._fetch(url)
            else:
                data = self._encoded(url)
            async with self._decoding:
                return await asyncio.to_thread(self._decode, data)
        except ImageError as error:
            raise explained(error, place) from None

    async def _fetch(self, url: str) -> bytes:
        if not self._settings.allow_url_images:
            raise ImageError("this server fetches no pictures: send it as data:image/png;base64,...")
        from ..processing.web import fetch_public

        async with self._fetching:
            return await asyncio.to_thread(fetch_public, url, max_bytes=self._settings.picture_limit)

    def _encoded(self, url: str) -> str:
        """The base64 of a data URL."""
        found = _DATA_URL.match(url)
        if found is None:
            allowed = " or an https address" if self._settings.allow_url_images else ""
            raise ImageError(f"a picture must be given as data:image/png;base64,...{allowed}, got {url[:30]!r}")
        if (len(url) - found.end()) * 3 // 4 > self._settings.picture_limit + 2:
            raise self._too_large()
        return url[found.end() :]

    def _decode(self, data: str | bytes) -> Image.Image:
        if isinstance(data, str):
            try:
                text = "".join(data.split())  # some write lines, and some leave the end's signs out
                data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
            except (binascii.Error, ValueError):  # ValueError: not ASCII
                raise ImageError("the picture's base64 is damaged or cut short: send it anew") from None
        if len(data) > self._settings.picture_limit:
            raise self._too_large()
        return resize_and_pad(decode_image(data, "the picture", max_pixels=_MOST_PIXELS), self._config)

    def _too_large(self) -> ImageError:
        return ImageError(f"the picture is larger than {self._settings.picture_limit / 1e6:g} MB: make it smaller")


async def to_base64(image: Image.Image, text: dict[str, str]) -> str:
    """A PNG with text chunks, in base64."""
    data = await asyncio.to_thread(png_bytes, image, text)
    return base64.b64encode(data).decode("ascii")
