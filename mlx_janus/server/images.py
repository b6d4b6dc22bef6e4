"""Images of requests, from URLs to small RGB images, and of replies, from images to base64."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import string
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from ..config import ImageConfig
from ..errors import ImageError
from ..processing.images import decode_image, resize_and_pad
from ..processing.saved_images import encode_image
from .errors import to_api_error
from .settings import Settings

MAX_REQUEST_IMAGES = 16  # images of one request
_MAX_FETCHES = 4  # downloads at once; each takes a thread
_DATA_URL = re.compile(
    r"data:(image/[a-z0-9.+-]{1,40}|application/octet-stream)?(;[a-z0-9=.-]{1,40})?;base64,",
    re.IGNORECASE,
)


class ImageReader:
    """A reader of the images that requests contain or link to.

    It decodes one image at a time, in a thread of its own, so that memory holds only one large
    image. Threads that take turns would each keep freed memory for their next image.

    Args:
        settings: the limits, and whether https addresses are fetched.
        config: the vision encoder's preprocessing; images are returned in the encoder's small size.
    """

    def __init__(self, settings: Settings, config: ImageConfig):
        self._settings = settings
        self._config = config
        self._decoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="image-decoder")
        self._fetch_slots = asyncio.Semaphore(_MAX_FETCHES)

    async def read(self, url: str, field: str) -> Image.Image:
        """Download or decode an image. Return it scaled and padded for the vision encoder.

        Args:
            url: a data URL or an https address.
            field: the field of the body that holds the URL. Errors name the field.

        Raises:
            APIError: the image is too large or damaged, the download fails or is not allowed, or
                the URL is neither a data URL nor an https address.
        """
        try:
            if url[:8].lower() == "https://":
                data: str | bytes = await self._fetch(url)
            else:
                data = self._data_url_base64(url)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._decoder, self._decode, data)
        except ImageError as error:
            raise to_api_error(error, field) from None

    async def _fetch(self, url: str) -> bytes:
        """Download an image; at most ``_MAX_FETCHES`` downloads run at once, others wait.

        Raises:
            ImageError: the settings do not allow downloads, or the download fails.
        """
        if not self._settings.allow_url_images:
            fix = "send the image as data:image/png;base64,..."
            raise ImageError(f"this server fetches no images: {fix}")
        from ..processing.web import fetch_public

        async with self._fetch_slots:
            return await asyncio.to_thread(fetch_public, url, max_bytes=self._settings.image_limit)

    def _data_url_base64(self, url: str) -> str:
        """Return the base64 part of a data URL.

        Raises:
            ImageError: this is not the data URL of an image, or the image is too large.
        """
        prefix = _DATA_URL.match(url)
        if prefix is None:
            alternative = " or an https address" if self._settings.allow_url_images else ""
            rule = f"an image must be given as data:image/png;base64,...{alternative}"
            raise ImageError(f"{rule}, got {url[:30]!r}")
        encoded = url[prefix.end() :]
        # A quick check before decoding: four characters are three bytes, and up to two characters
        # are padding. Line breaks and spaces do not count. _decode checks the exact size.
        characters = len(encoded) - sum(map(encoded.count, string.whitespace))
        if characters * 3 // 4 > self._settings.image_limit + 2:
            raise self._too_large()
        return encoded

    def _decode(self, data: str | bytes) -> Image.Image:
        """Decode a file's bytes, or their base64, to an image of the vision encoder's size.

        Raises:
            ImageError: the base64 or the image is damaged, or the image is too large.
        """
        if isinstance(data, str):
            try:
                text = "".join(data.split())  # some clients break the base64 into lines
                padding = "=" * (-len(text) % 4)  # some clients leave the padding out
                data = base64.b64decode(text + padding, validate=True)
            except (binascii.Error, ValueError):  # ValueError: not ASCII
                message = "the image's base64 is damaged or cut short: send it again"
                raise ImageError(message) from None
        if len(data) > self._settings.image_limit:
            raise self._too_large()
        image = decode_image(data, "the image")
        return resize_and_pad(image, self._config)

    def _too_large(self) -> ImageError:
        limit = f"{self._settings.image_limit / 1e6:g} MB"
        return ImageError(f"the image is larger than {limit}: make it smaller")


@dataclass(frozen=True)
class ReplyFormat:
    """The format of the images of a reply."""

    name: Literal["png", "jpeg", "webp"] = "png"
    quality: int | None = None  # of a JPEG or WebP, from 0 to 100; None: the default
    side: int | None = None  # pixels; square images are enlarged to it, None: not enlarged

    @property
    def suffix(self) -> str:
        """The suffix of a file's name."""
        return f".{self.name}"

    @property
    def media_type(self) -> str:
        """The media type of a file."""
        return f"image/{self.name}"

    async def encode(self, image: Image.Image, metadata: Mapping[str, str]) -> bytes:
        """Return the bytes of an image file with metadata."""
        return await asyncio.to_thread(self._encode, image, metadata)

    async def encode_base64(self, image: Image.Image, metadata: Mapping[str, str]) -> str:
        """Return an image file with metadata, in base64."""
        data = await self.encode(image, metadata)
        return base64.b64encode(data).decode("ascii")

    def _encode(self, image: Image.Image, metadata: Mapping[str, str]) -> bytes:
        if self.side is not None:
            image = image.resize((self.side, self.side), Image.Resampling.LANCZOS)
            if metadata:  # a preview has none
                metadata = {**metadata, "enlarged_to": f"{self.side} (Lanczos)"}
        return encode_image(image, metadata, self.suffix, self.quality)
