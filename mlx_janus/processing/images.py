"""Images in: files, bytes and PIL images become the vision encoder's input.

Reading returns an upright, opaque RGB image or raises an ``ImageError``, for every failure of a
decoder. Only well-known raster formats are tried: PIL would pass an EPS file to Ghostscript.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from ..config import ImageConfig
from ..errors import ImageError, OptionError
from ..files import POINTER_ADVICE, is_git_pointer
from ..installation import install_command
from ..limits import MAX_DECODED_BYTES
from .file_names import local_path, printable
from .image_data import JPEG, count_scans, image_data, open_jpeg, with_end_marker
from .pixels import opaque_rgb


class ArrayLike(Protocol):
    """An array of NumPy, MLX or another library that NumPy can read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""


class FileLike(Protocol):
    """A file that is open for reading in binary mode."""

    def read(self) -> bytes:
        """Return the rest of the file."""


ImageSource: TypeAlias = (
    str | os.PathLike[Any] | bytes | bytearray | memoryview | Image.Image | FileLike | ArrayLike
)
Box: TypeAlias = tuple[int, int, int, int]
"""A part of an image: left, top, right and bottom in pixels; right and bottom are outside."""
Result = TypeVar("Result")

_PIXEL_BYTES = 4  # of an RGB image in PIL, and the most of an image in any mode
_MAX_SCANNED = 2_000_000_000  # pixels that a JPEG's scans decode; encoders write about 10 scans
MAX_PIXELS = MAX_DECODED_BYTES // _PIXEL_BYTES  # pixels of one image as it is decoded

# PIL reads MPO as JPEG.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF", "ICO")
_READABLE = "PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF, HEIC or ICO"
SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif", ".ico"),
}

_UPRIGHT = {  # EXIF orientation -> the transposition that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# PIL warns through the process-wide filters. Two threads must not change those at the same time,
# so one image is decoded at a time.
_WARNING_FILTERS_LOCK = threading.Lock()


def as_images(images: Sequence[ImageSource] | ImageSource) -> list[ImageSource]:
    """Return a list of the given images. A single image becomes a list of one.

    An array or an open file is one image, although both can be iterated.

    Raises:
        OptionError: the value is neither an image nor iterable.
    """
    if isinstance(images, str | bytes | bytearray | memoryview | os.PathLike | Image.Image):
        return [images]
    if _is_array(images) or hasattr(images, "read"):
        return [cast(ImageSource, images)]
    if not isinstance(images, Iterable):
        raise OptionError(f"images must be an image or several, got {type(images).__name__}")
    return list(images)


def open_image(source: ImageSource) -> Image.Image:
    """Read an image as upright, opaque, 8-bit RGB.

    EXIF orientation is applied, and transparent pixels are laid over white. Of an animation, only
    the first frame is read; of a PIL image, the current frame. A PIL image is not modified.

    16-bit grey is scaled to 8 bits. Float grey is scaled from [0, 1], or from [0, 255] if a value
    is above 1. Grey with values outside these ranges is stretched: its lowest value becomes black
    and its highest white.

    A JPEG of more than 100 megapixels is decoded at half its width and height, unless it is
    progressive. The memory for decoding is about 8 bytes per pixel of the result, 10 for a
    progressive JPEG and for AVIF, 16 for WebP.

    Raises:
        ImageError: the image is missing, unreadable, empty, damaged, in an unsupported format, or
            above 100 megapixels. A JPEG that is not progressive may have 400.
        OptionError: the source is not an ``ImageSource``.
    """
    if isinstance(source, Image.Image):
        name = "the PIL image given"
        with _as_image_errors(name, b""):  # no file, so no first bytes
            return _upright_rgb(source, name)
    if isinstance(source, bytes | bytearray | memoryview):
        return decode_image(bytes(source), "the image given as bytes")
    if isinstance(source, str | os.PathLike):
        return read_file(source, _decoded_rgb)
    if _is_array(source):
        return open_image(_from_array(_as_array(source)))
    if hasattr(source, "read"):
        return decode_image(_read_open_file(source), "the image in the open file")
    raise OptionError(
        "images must be paths, bytes, PIL images, open files or arrays (H, W, 3 or 4) of uint8, "
        f"got {type(source).__name__}"
    )


def _is_array(source: object) -> bool:
    """Return whether an object has a shape and a dtype, as arrays do."""
    return hasattr(source, "shape") and hasattr(source, "dtype")


def _as_array(source: Any) -> npt.NDArray[Any]:
    """Return an array of another library as NumPy's.

    Raises:
        ImageError: NumPy has no such type, such as bfloat16, or cannot read the array.
    """
    try:
        return np.asarray(source)
    except (TypeError, ValueError, RuntimeError):
        kind = str(source.dtype).rpartition(".")[2]  # without the name of the library
        raise _wrong_array(tuple(source.shape), kind) from None


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    """Convert an (H, W, 3) or (H, W, 4) array of uint8 to a PIL image.

    Raises:
        ImageError: the array has another shape or type, or no pixels.
    """
    shape = array.shape
    is_image = len(shape) == 3 and shape[2] in (3, 4) and 0 not in shape
    if array.dtype != np.uint8 or not is_image:
        raise _wrong_array(shape, str(array.dtype))
    return Image.fromarray(np.ascontiguousarray(array))


def _wrong_array(shape: Sequence[int], kind: str) -> ImageError:
    """Return the error about an array that is no image; ``kind`` is the type of its numbers."""
    sizes = "x".join(map(str, shape))  # of all axes
    return ImageError(
        "an array must be (H, W, 3) or (H, W, 4) of uint8, one for each image, "
        f"got {sizes} of {kind}"
    )


def _read_open_file(file: Any) -> bytes:
    """Return the bytes from an open file's position to its end.

    Raises:
        ImageError: the file is open as text, is at its end, or cannot be read.
    """
    try:
        data = file.read()
    except (OSError, ValueError) as error:  # ValueError: the file is closed
        raise ImageError(f"the open file cannot be read ({error}): open it again") from None
    if not isinstance(data, bytes):
        raise ImageError("the open file gives text: open it in binary mode ('rb')")
    if not data:
        raise ImageError("the open file is at its end: call seek(0) on it first")
    return data


def decode_image(data: bytes, name: str) -> Image.Image:
    """Read an image from the bytes of a file, as ``open_image`` does.

    Args:
        data: the file's content.
        name: the image's name in error messages.

    Raises:
        ImageError: the data is empty, damaged, in an unsupported format, or above the limit.
    """
    return _open_and_read(io.BytesIO(data), printable(name), _decoded_rgb)


def preprocess(image: Image.Image, config: ImageConfig) -> npt.NDArray[np.float32]:
    """Return the vision encoder's input for an RGB image from ``open_image``.

    Follows DeepSeek's ``VLMImageProcessor`` (``janus/models/image_processing_vlm.py``).

    Returns:
        (S, S, 3) float32, where S is the config's ``image_size``. The values are in [-1, 1] if the
        mean and the std are the published ones, both 0.5.
    """
    square = resize_and_pad(image, config)
    mean = np.array(config.mean, dtype=np.float32)
    std = np.array(config.std, dtype=np.float32)
    pixels = np.array(square, dtype=np.float32)
    pixels *= np.float32(1 / 255)
    pixels -= mean
    pixels /= std
    return pixels


def resize_and_pad(image: Image.Image, config: ImageConfig) -> Image.Image:
    """Scale an image until its longest side is S, and centre it on an S x S background.

    S is the config's ``image_size``. ``letterbox`` gives the place of the image.
    """
    left, top, right, bottom = letterbox(image.size, config)
    resized = image.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (config.image_size, config.image_size), config.background)
    square.paste(resized, (left, top))
    return square


def letterbox(size: tuple[int, int], config: ImageConfig) -> Box:
    """Return the place of a scaled image on its square background of S x S pixels.

    S is the config's ``image_size``. A side that would be shorter than the config's ``min_size`` is
    stretched to that length.

    Args:
        size: width and height of the image, in pixels.
        config: the sizes of the preprocessing.
    """
    background_side = config.image_size
    longest = max(size)

    def scale(side: int) -> int:
        """Return the pixels of a side after scaling."""
        # DeepSeek's code divides, multiplies and truncates in this order. Rounding would make a
        # side one pixel longer in half of all images.
        scaled = int(side / longest * background_side)
        return min(max(scaled, config.min_size), background_side)

    width, height = map(scale, size)
    left = (background_side - width) // 2
    top = (background_side - height) // 2
    return left, top, left + width, top + height


def to_image(pixels: npt.NDArray[Any]) -> Image.Image:
    """Convert the VQ decoder's output to an RGB image.

    The output has the shape (H, W, 3), with floats around [-1, 1]. They are scaled to [0, 255],
    clipped and truncated, as in DeepSeek's ``generation_inference.py``. NaN becomes 0.
    """
    floats = np.asarray(pixels, dtype=np.float32)
    values = (floats + 1) / 2 * 255
    clipped = np.clip(values, 0, 255)
    finite = np.nan_to_num(clipped, copy=False)  # clipping keeps NaN
    return Image.fromarray(finite.astype(np.uint8))


# Files


def read_file(
    path: str | os.PathLike[Any],
    read: Callable[[Image.Image, str], Result],
    *,
    with_text: bool = False,
) -> Result:
    """Open an image file, call ``read`` with the image, and return its result.

    Args:
        path: the file or its file:// address. A pipe is read to its end first, since decoders seek.
        read: called with the image before its pixels are decoded, and with the image's name for
            error messages.
        with_text: keep the text chunks of a PNG; otherwise PIL does not see them.

    Raises:
        ImageError: the file cannot be opened, or ``read`` fails.
    """
    text = os.fsdecode(path)
    name = printable(text)
    with _open_seekable(local_path(text), name) as file:
        return _open_and_read(file, name, read, with_text)


@contextlib.contextmanager
def _open_seekable(path: str, name: str) -> Iterator[BinaryIO]:
    """Yield an open file that can seek.

    Args:
        path: the file.
        name: the file's name in error messages.

    Raises:
        ImageError: the file cannot be opened, or the caller's ``with`` block raises an OSError or
            ValueError.
    """
    try:
        with Path(path).open("rb") as file:
            # A pipe (/dev/stdin, a shell's process substitution) cannot seek, so it is copied.
            yield file if file.seekable() else io.BytesIO(file.read())
    except FileNotFoundError:
        if path.startswith(("http://", "https://")):
            advice = "download the image and give its file"
            raise ImageError(f"{name} is a web address: {advice}") from None
        raise ImageError(f"{name} does not exist: check the path") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a folder: give an image file in it") from None
    except PermissionError:
        raise ImageError(
            f"{name} may not be read: allow it with chmod +r, or copy the file"
        ) from None
    # ValueError: the path holds a NUL character, or the caller's block raised it.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{name} cannot be opened ({reason}): check the path") from None


def _open_and_read(
    file: BinaryIO,
    name: str,
    read: Callable[[Image.Image, str], Result],
    with_text: bool = False,
) -> Result:
    """Open the image in a file, call ``read`` with the image and its name, and return the result.

    ``Image.open`` reads only the header. ``read`` decodes the pixels, so its errors are turned into
    ``ImageError`` too.

    Raises:
        ImageError: the file is empty or cannot be opened as an image, or ``read`` fails.
    """
    head = file.read(4096)
    file.seek(0)
    if not head:
        raise ImageError(f"{name} is empty: give an image, {_READABLE}")
    with _as_image_errors(name, head):
        Image.init()  # registers all of PIL's formats
        if _is_heic(head):
            _add_heic_decoder()
        data = image_data(file, name, with_text)
        if head.startswith(JPEG):
            return _open_and_read_jpeg(data, name, read)
        formats = [f for f in _FORMATS if f in Image.OPEN]  # some builds lack AVIF and HEIF
        return read(Image.open(data, formats=formats), name)


def _check_scans(image: Image.Image, scans: int, name: str) -> None:
    """Refuse a JPEG whose scans together have more than ``_MAX_SCANNED`` pixels to decode.

    Args:
        image: the opened JPEG.
        scans: the number of its scans. Each has all of the image's pixels.
        name: the image's name in error messages.

    Raises:
        ImageError: the scans have more pixels.
    """
    width, height = image.size
    if scans * width * height > _MAX_SCANNED:
        raise ImageError(
            f"{name} has {scans} scans of {width} x {height} pixels, which takes too long: "
            "save it as a baseline JPEG"
        )


def _open_and_read_jpeg(
    data: BinaryIO, name: str, read: Callable[[Image.Image, str], Result]
) -> Result:
    """Open a JPEG, call ``read`` with the image and its name, and return the result.

    Raises:
        ImageError: the image has so many scans that decoding it would take minutes.
        Exception: raised by PIL or ``read``.
    """
    try:
        image = open_jpeg(data, MAX_PIXELS)
        _check_scans(image, count_scans(data), name)
        return read(image, name)
    except OSError as error:  # PIL's error for a file that ends too early
        failure = error.with_traceback(None)  # a traceback would keep the pixels in memory
    # The file may lack nothing but its end marker.
    completed = with_end_marker(data, MAX_PIXELS)
    if completed is None:
        raise failure
    return read(open_jpeg(completed, MAX_PIXELS), name)


def _is_heic(head: bytes) -> bool:
    """Return whether a file with these first bytes is HEIC, the format of an iPhone's photos."""
    brand = head[8:11]  # without its fourth character, which names a variant
    return head[4:8] == b"ftyp" and brand in (b"hei", b"hev", b"mif", b"msf")


def _add_heic_decoder() -> None:
    """Have PIL read HEIC too, if the package for it is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return
    register_heif_opener()


@contextlib.contextmanager
def _as_image_errors(name: str, head: bytes) -> Iterator[None]:
    """Turn exceptions in a ``with`` body into ``ImageError``, and ignore warnings in the body.

    Only one thread at a time can be in the body, since warning filters belong to the whole process.

    Args:
        name: the image's name in the message.
        head: the file's first bytes, which help to name the problem; empty if there is no file.
    """
    try:
        with _WARNING_FILTERS_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImageError:  # already has a good message
        raise
    # Its message: "Image size (200000000 pixels) exceeds limit of ...".
    except Image.DecompressionBombError as error:
        number = re.search(r"\d+", str(error))
        pixels = int(number.group()) if number else 0
        raise _too_large(name, pixels) from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} {_why_unidentified(head)}") from None
    except MemoryError:
        raise ImageError(f"{name} needs too much memory: make the image smaller") from None
    except Exception as error:  # decoders raise many kinds of exceptions for damaged data
        raise ImageError(f"{name} is damaged or cut short: download or export it again") from error


def _why_unidentified(head: bytes) -> str:
    """Return why no decoder accepts a file with these first bytes, and the fix.

    The text is the end of a sentence that begins with the file's name.
    """
    # PNG, JPEG, GIF, and TIFF of either byte order. They are supported, so the file is damaged.
    signatures = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")
    if head.startswith(signatures) or head[8:12] == b"WEBP":
        return "is damaged or cut short: download or export it again"
    if b"<svg" in head.lower():
        return "is an SVG drawing, which is not supported: export it as PNG"
    if _is_heic(head):
        if "HEIF" in Image.OPEN:
            return "is damaged or cut short: download or export it again"
        fix = f"{install_command('heic')}, or export it as JPEG"
        return f"is a HEIC image, which needs another package: {fix}"
    if head[4:11] == b"ftypavi":
        return "is an AVIF image that cannot be read here: export it as JPEG or PNG"
    if is_git_pointer(head):
        return f"is a Git LFS pointer and not the image: {POINTER_ADVICE}"
    if head.startswith(b"%PDF"):
        return "is a PDF, which is not supported: export the page as PNG"
    return f"is not an image that can be read: use {_READABLE}"


def check_size(image: Image.Image, name: str) -> None:
    """Refuse an image that has no pixels or too many.

    Args:
        image: the image; its pixels need not be decoded.
        name: the image's name in error messages.

    Raises:
        ImageError: the image has no pixels or too many.
    """
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width} x {height} pixels: give an image with pixels in it")
    if width * height > MAX_PIXELS:
        raise _too_large(name, width * height, f"{width} x {height}")


def _too_large(name: str, pixels: int, size: str = "") -> ImageError:
    """Return the error for an image with too many pixels.

    Args:
        name: the image's name.
        pixels: the number of its pixels.
        size: its width and height; "": unknown, since PIL refused to open the image.
    """
    limit = MAX_PIXELS / 1e6
    size = size or f"{pixels:,} pixels"
    given = f"{pixels * _PIXEL_BYTES / 1e6:,.0f} MB when decoded ({size})"
    allowed = f"{limit * _PIXEL_BYTES:g} MB ({limit:g} megapixels)"
    fix = f"make it smaller, or save it as a baseline JPEG, which may have {4 * limit:g} megapixels"
    return ImageError(f"{name} takes {given}, more than {allowed}: {fix}")


# Pixels


def _upright_rgb(image: Image.Image, name: str, *, close: bool = False) -> Image.Image:
    """Decode an opened image and return it as upright, opaque, 8-bit RGB.

    Args:
        image: the image.
        name: its name in error messages.
        close: close the image as soon as it is converted, to free its pixels.

    Raises:
        ImageError: the image has no pixels, or more than 100 million.
    """
    check_size(image, name)  # before the pixels take memory
    image.load()
    check_size(image, name)  # an ICO's image may be larger than its header says
    try:
        exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        transpose = _UPRIGHT.get(orientation)
    except Exception:  # broken metadata is no reason to refuse an intact image
        transpose = None
    result = opaque_rgb(image)
    if close:
        image.close()
    if transpose is not None:
        result = result.transpose(transpose)
    # PIL copies ``info``, which has the EXIF orientation and the transparent colour. The result has
    # them applied. If it is passed to ``open_image``, they must not be applied again.
    result.info.clear()
    return result


_decoded_rgb = functools.partial(_upright_rgb, close=True)  # for an image from a file
