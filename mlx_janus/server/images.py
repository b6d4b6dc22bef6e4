"""A reader of the images in requests, and the format of the images in replies."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from PIL import Image
from starlette.requests import Request as HTTPRequest

from ..config import ImageConfig
from ..errors import ImageError
from ..inference.input_records import InputImage, input_image
from ..processing.data_urls import base64_part, decode_base64, too_large
from ..processing.images import decode_image
from ..processing.saved_images import encode_image
from .errors import APIError, to_api_error
from .event_streams import watch_client
from .schema import MAX_INPUT_IMAGES
from .settings import Settings

_MAX_FETCHES = 4  # downloads at once; each takes a thread


@dataclass(frozen=True)
class ImageSource:
    """An image of a request, and the field of the body that holds it."""

    content: str | bytes  # a data URL, an https address, or the bytes of a file
    field: str


def decoding_thread() -> ThreadPoolExecutor:
    """Return a thread that decodes one image at a time."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="image-decoder")


class ImageReader:
    """A reader of the images that requests contain or link to.

    It decodes one image at a time, so that memory holds only one large image. All images are
    decoded in the same thread, because each thread would keep freed memory for its next image.

    Args:
        settings: the limits, and whether https addresses are fetched.
        config: the vision encoder's preprocessing. Images are returned in the encoder's input size.
        decoder: the decoding thread, which the readers of several models share; None: a new thread.
    """

    def __init__(
        self, settings: Settings, config: ImageConfig, decoder: ThreadPoolExecutor | None = None
    ):
        self._settings = settings
        self._config = config
        self._decoder = decoder or decoding_thread()
        self._fetch_slots = asyncio.Semaphore(_MAX_FETCHES)

    async def read_all(
        self, sources: Sequence[ImageSource], request: HTTPRequest, param: str
    ) -> tuple[InputImage, ...]:
        """Read images in order. If the client leaves, stop after the current image.

        The current image is not cancelled, because its thread would decode it to the end anyway.

        Args:
            sources: the images.
            request: the client's request, whose body has been read.
            param: the field of the body that the error names if there are too many images.

        Raises:
            APIError: there are too many images, one cannot be read, or the client leaves.
        """
        if len(sources) > MAX_INPUT_IMAGES:
            message = f"{len(sources)} images are too many: send at most {MAX_INPUT_IMAGES}"
            raise APIError(400, message, param=param)
        images: list[InputImage] = []
        async with watch_client(request) as raise_if_client_left:
            for source in sources:
                images.append(await self.read(source))
                raise_if_client_left()
        return tuple(images)

    async def read(self, source: ImageSource) -> InputImage:
        """Download or decode an image. Return it scaled and padded for the vision encoder.

        Raises:
            APIError: the image is too large or damaged, the download fails or is not allowed, or
                the URL is neither a data URL nor an https address.
        """
        data = source.content
        try:
            if isinstance(data, str):
                is_address = data[:8].lower() == "https://"
                data = await self._fetch(data) if is_address else self._data_url_base64(data)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._decoder, self._decode, data)
        except ImageError as error:
            raise to_api_error(error, source.field) from None

    async def _fetch(self, url: str) -> bytes:
        """Download an image, at most ``_MAX_FETCHES`` at once. Further downloads wait.

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
        encoded = base64_part(url, self._settings.image_limit)
        if encoded is None:
            alternative = " or an https address" if self._settings.allow_url_images else ""
            rule = f"an image must be given as data:image/png;base64,...{alternative}"
            raise ImageError(f"{rule}, got {url[:30]!r}")
        return encoded

    def _decode(self, data: str | bytes) -> InputImage:
        """Decode a file's bytes, or their base64, to an image of the vision encoder's size.

        Raises:
            ImageError: the base64 or the image is damaged, or the image is too large.
        """
        if isinstance(data, str):
            data = decode_base64(data)
        if len(data) > self._settings.image_limit:
            raise too_large(self._settings.image_limit)
        return input_image(decode_image(data, "the image"), data, self._config)


@dataclass(frozen=True)
class ReplyFormat:
    """The format of the images of a reply."""

    name: Literal["png", "jpeg", "webp"] = "png"
    quality: int | None = None  # of a JPEG or WebP, from 0 to 100; None: the default
    side: int | None = None  # pixels; the longer side is enlarged to it, None: not enlarged

    @property
    def suffix(self) -> str:
        """The suffix of a file's name."""
        return f".{self.name}"

    @property
    def media_type(self) -> str:
        """The media type of a file."""
        return f"image/{self.name}"

    def enlarged(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the width and height that an image of this size has in the reply, in pixels."""
        if self.side is None:
            return size
        width, height = size
        longer = max(size)
        return max(round(width * self.side / longer), 1), max(round(height * self.side / longer), 1)

    async def encode(self, image: Image.Image, metadata: Mapping[str, str]) -> bytes:
        """Return the bytes of an image file with metadata."""
        return await asyncio.to_thread(self._encode, image, metadata)

    async def encode_base64(self, image: Image.Image, metadata: Mapping[str, str]) -> str:
        """Return an image file with metadata, in base64."""
        data = await self.encode(image, metadata)
        return base64.b64encode(data).decode("ascii")

    def _encode(self, image: Image.Image, metadata: Mapping[str, str]) -> bytes:
        """Enlarge an image if ``side`` is set, and return the bytes of its file."""
        if self.side is not None:
            image = image.resize(self.enlarged(image.size), Image.Resampling.LANCZOS)
            if metadata:  # a preview has none
                metadata = {**metadata, "enlarged_to": f"{self.side} (Lanczos)"}
        return encode_image(image, metadata, self.suffix, self.quality)
