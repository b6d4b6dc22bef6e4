"""Pictures in and out: files, bytes and PIL images to what the vision encoder reads, and drawn pixels to PNG files.

A picture comes from anywhere, so reading one ends in an upright, opaque RGB picture or in one ``ImageError``, whatever
the file does to its decoder. Only well-known raster formats are tried: PIL would hand an EPS to Ghostscript.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from ..config import ImageConfig
from ..errors import ImageError, OutputError
from ..files import draft_beside

ImageSource: TypeAlias = str | os.PathLike[Any] | bytes | Image.Image
Read = TypeVar("Read")

MAX_PIXELS = 100_000_000
_ROWS = 256  # of a deep grey picture, scaled at once

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF", "ICO")  # JPEG brings MPO
_READABLE = "PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF or ICO"
SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif", ".ico"),
}

_TURNS = {  # EXIF orientation to what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# PIL warns through the process-wide filters, and changing those is not safe in two threads at once.
_WARNINGS = threading.Lock()


def as_images(images: Sequence[ImageSource] | ImageSource) -> list[ImageSource]:
    """A list, of one where a single picture was given."""
    if isinstance(images, (str, bytes, bytearray, os.PathLike, Image.Image)):
        return [images]
    return list(images)


def open_image(source: ImageSource) -> Image.Image:
    """Read a picture: upright, opaque, 8-bit RGB.

    EXIF orientation is applied and transparency is laid over white; of an animation it is the first frame (of a PIL
    image, the frame it stands at). 16-bit grey is scaled; float grey is taken as [0, 1] or [0, 255] if it lies there,
    and otherwise stretched from its lowest to its highest value, as are 32-bit integers. A PIL image is not modified.

    Raises:
        ImageError: missing, unreadable, empty, damaged, no picture, of an unsupported format, or above 100 megapixels.
    """
    if isinstance(source, Image.Image):
        name = "the PIL image given"
        with _as_image_errors(name, b""):
            return _upright_rgb(source, name)
    if isinstance(source, bytes):
        return decode_image(source, "the picture given as bytes")
    if not isinstance(source, str | os.PathLike):
        raise ImageError(f"a picture must be a path, bytes or a PIL image, got {type(source).__name__}")
    with _opened(source) as (file, name):
        return _decode(file, name, _upright_rgb)


def decode_image(data: bytes, name: str, *, most_pixels: int | None = None) -> Image.Image:
    """``open_image`` of a file's bytes, of fewer pixels if need be; ``name`` is what an error calls them."""
    return _decode(io.BytesIO(data), _printable(name), functools.partial(_upright_rgb, most_pixels=most_pixels))


def read_text_chunks(path: str | os.PathLike[Any]) -> dict[str, str]:
    """The text chunks of a PNG file, and of a picture in another format none.

    Raises:
        ImageError: as ``open_image``.
    """
    with _opened(path) as (file, name):
        return _decode(file, name, _text_chunks)


@contextlib.contextmanager
def _opened(source: str | os.PathLike[Any]) -> Iterator[tuple[BinaryIO, str]]:
    """A file that can go back, and its name for errors."""
    text = os.fsdecode(source)
    name = _printable(text)
    try:
        with Path(text).open("rb") as file:
            # A pipe (/dev/stdin, a shell's process substitution) cannot go back, which decoders need.
            yield (file if file.seekable() else io.BytesIO(file.read())), name
    except FileNotFoundError:
        if text.startswith(("http://", "https://")):
            raise ImageError(f"{name} is a web address: download the picture and give its file") from None
        raise ImageError(f"{name} does not exist: check the path") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a folder: give a picture file in it") from None
    except PermissionError:
        raise ImageError(f"{name} may not be read: allow it with chmod +r, or copy the file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{name} cannot be opened ({reason}): check the path") from None


def preprocess(image: Image.Image, config: ImageConfig) -> npt.NDArray[np.float32]:
    """The vision encoder's input: (S, S, 3) float32, in [-1, 1] with the published mean and std of 0.5.

    Follows DeepSeek's ``VLMImageProcessor`` (``janus/models/image_processing_vlm.py``) for an RGB picture, as
    ``open_image`` gives it.
    """
    pixels = np.array(resize_and_pad(image, config), dtype=np.float32)
    pixels *= np.float32(1 / 255)
    pixels -= np.array(config.mean, dtype=np.float32)
    pixels /= np.array(config.std, dtype=np.float32)
    return pixels


def resize_and_pad(image: Image.Image, config: ImageConfig) -> Image.Image:
    """The longest side brought to S, the rest filled with the background: an S x S RGB picture, centred."""
    size = config.image_size
    longest = max(image.size)
    # The reference truncates, in this order of operations; rounding gives another side for half of all pictures.
    width, height = (min(max(int(side / longest * size), config.min_size), size) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (size, size), config.background)
    square.paste(resized, ((size - width) // 2, (size - height) // 2))
    return square


def to_image(pixels: npt.NDArray[Any]) -> Image.Image:
    """(H, W, 3) floats as the VQ decoder gives them, about [-1, 1] and not clipped, to RGB.

    Truncates to bytes, as the reference's ``generation_inference.py`` does. NaN becomes 0.
    """
    values = np.clip((np.asarray(pixels, dtype=np.float32) + 1) / 2 * 255, 0, 255)
    return Image.fromarray(np.nan_to_num(values, copy=False).astype(np.uint8))


def save_png(image: Image.Image, path: str | os.PathLike[str], text: Mapping[str, str]) -> Path:
    """Write a PNG with text chunks and return the path it really has.

    A file that exists is kept: ``out.png`` becomes ``out_2.png``, then ``out_3.png``. Whoever looks at the path sees no
    partial picture, and processes that save to one path at once each get their own. A path without a suffix gets
    ``.png``. ``text`` is stored by sorted key, as Latin-1 or else as UTF-8.

    Raises:
        OutputError: another suffix, a folder, a missing parent folder, no permission, no space; nothing is left behind.
    """
    target = _png_path(Path(path))
    try:
        data = png_bytes(image, text)
        with draft_beside(target) as draft:
            with draft.open("xb") as file:
                file.write(data)
            return _claim(draft, target)  # not write_atomically, which would replace a file that is there
    except (OSError, ValueError) as error:
        raise OutputError(_why_not_written(error, target)) from error


def free_paths(path: str | os.PathLike[str], n: int) -> list[Path]:
    """Names for n pictures: ``[out.png]``, or ``out-1.png`` to ``out-n.png``. ``save_png`` keeps what is there already.

    Raises:
        OutputError: another suffix, or a folder: known before anything is drawn.
    """
    path = _png_path(Path(path))
    if n == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(1, n + 1)]


# Reading


def _decode(file: BinaryIO, name: str, read: Callable[[Image.Image, str], Read]) -> Read:
    head = file.read(4096)
    file.seek(0)
    if not head:
        raise ImageError(f"{name} is empty: give a picture, {_READABLE}")
    with _as_image_errors(name, head):
        Image.init()
        formats = [f for f in _FORMATS if f in Image.OPEN]  # AVIF and HEIF are not in every build
        return read(Image.open(file, formats=formats), name)


@contextlib.contextmanager
def _as_image_errors(name: str, head: bytes) -> Iterator[None]:
    """Turn whatever PIL raises into ``ImageError`` and drop its warnings. ``head``: the file's first bytes, if any."""
    try:
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} {_not_identified(head)}") from None
    except MemoryError:
        raise ImageError(f"{name} needs more memory than there is: make the picture smaller") from None
    except Exception as error:  # decoders of foreign data raise nearly anything
        raise ImageError(f"{name} is damaged or cut short: download or export it again") from error


def _not_identified(head: bytes) -> str:
    """Why no decoder took a file that starts so, and what to do."""
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")) or head[8:12] == b"WEBP":
        return "is damaged or cut short: download or export it again"
    if b"<svg" in head.lower():
        return "is an SVG drawing, which is not supported: export it as PNG"
    if head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif", b"msf", b"avi"):
        return "is a HEIC or AVIF picture that cannot be read here: export it as JPEG or PNG"
    if head.startswith(b"%PDF"):
        return "is a PDF, which is not supported: export the page as PNG"
    return f"is no picture that can be read: use {_READABLE}"


def _too_large(name: str, size: tuple[int, int] | None = None, most_pixels: int | None = None) -> ImageError:
    what = f" ({size[0]} x {size[1]})" if size else ""
    return ImageError(f"{name} has more than {(most_pixels or MAX_PIXELS) // 10**6} megapixels{what}: make it smaller")


def _check_size(image: Image.Image, name: str, most_pixels: int | None = None) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width} x {height} pixels: give a picture with something in it")
    if width * height > (most_pixels or MAX_PIXELS):
        raise _too_large(name, image.size, most_pixels)


def _text_chunks(image: Image.Image, name: str) -> dict[str, str]:
    _check_size(image, name)
    image.load()
    return {key: str(value) for key, value in getattr(image, "text", {}).items()}


def _upright_rgb(image: Image.Image, name: str, most_pixels: int | None = None) -> Image.Image:
    _check_size(image, name, most_pixels)
    image.load()
    _check_size(image, name, most_pixels)  # an ICO says in its header what its frames need not keep to
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken metadata is no reason to refuse a whole picture
        turn = None
    result = _opaque_rgb(image)
    if turn is not None:
        result = result.transpose(turn)
    result.info.clear()  # it would turn the picture once more, or make a colour transparent, if opened again
    return result


def _opaque_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_grey(image)
    if image.has_transparency_data:
        straight = image.convert("LA") if image.mode == "La" else image  # La converts to nothing else
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, straight.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, which PIL's own conversion would clip to [0, 255], as RGB."""
    values = np.asarray(image)
    if image.mode == "F":
        finite = np.isfinite(values)
        low, high = float(values.min(where=finite, initial=np.inf)), float(values.max(where=finite, initial=-np.inf))
        low, high = (low, high) if low <= high else (0.0, 0.0)  # nothing is finite
    else:
        low, high = float(values.min()), float(values.max())
    usual = (1.0, 255.0) if image.mode == "F" else (65535.0,)
    for white in usual:
        if low >= 0 and high <= white:
            low, high = 0.0, white
            break
    key = image.info.get("transparency")  # a PNG's tRNS chunk: one grey value that is transparent
    grey = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _ROWS):  # a large picture as 64-bit numbers would be eight times as large
        rows = values[start : start + _ROWS].astype(np.float64)
        scaled = (np.nan_to_num(rows, nan=low, posinf=high, neginf=low) - low) / ((high - low) or 1.0)
        grey[start : start + _ROWS] = scaled * 255 + 0.5
        if isinstance(key, int):
            grey[start : start + _ROWS][rows == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _printable(text: str) -> str:
    """A path as one line of reasonable length."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return line if len(line) <= 300 else f"{line[:140]}...{line[-140:]}"


# Writing


def _png_path(path: Path) -> Path:
    try:
        is_folder = path.is_dir()
    except OSError:
        is_folder = False  # writing will say what is wrong
    if is_folder:
        raise OutputError(f"{_printable(str(path))} is a folder: give the name of a file in it, such as janus.png")
    if not path.suffix:
        return path.with_name(f"{path.name}.png")
    if path.suffix.lower() != ".png":
        name = _printable(str(path))
        raise OutputError(f"{name}: only .png is written, got {_printable(path.suffix)}: name it {path.stem}.png")
    return path


def png_bytes(image: Image.Image, text: Mapping[str, str]) -> bytes:
    """A PNG file with text chunks, as ``save_png`` writes it."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in sorted(text.items()):
        # NUL ends a text chunk, and a lone surrogate (an undecodable byte of a command line) has no encoding.
        chunks.add_text(key, value.replace("\0", "").encode("utf-8", "replace").decode("utf-8"))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def _claim(draft: Path, target: Path) -> Path:
    """Move a finished file to the first free name, taken by an exclusive create: hard links are not everywhere."""
    for i in itertools.count(1):
        candidate = target if i == 1 else target.with_name(f"{target.stem}_{i}{target.suffix}")
        try:
            os.close(os.open(candidate, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        try:
            return draft.replace(candidate)
        except BaseException:  # Ctrl-C too
            with contextlib.suppress(OSError):
                if draft.exists():  # else the move was made, and the name holds the picture
                    candidate.unlink()
            raise
    raise AssertionError("itertools.count ends")  # pragma: no cover


def _why_not_written(error: OSError | ValueError, target: Path) -> str:
    name, folder = _printable(str(target)), _printable(str(target.parent))
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.ENOENT:
        return f"{name} cannot be written: make the folder {folder} first"
    if code == errno.ENOTDIR:
        return f"{name} cannot be written: {folder} is no folder"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{name} cannot be written: {folder} allows no new files, choose another folder"
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"{name} cannot be written: the disk is full, free some space"
    if code == errno.ENAMETOOLONG:
        return f"{name} cannot be written: give it a shorter name"
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return f"{name} cannot be written ({reason}): choose another file or folder"
