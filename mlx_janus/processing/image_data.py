"""The image data of a file, without the metadata for which PIL would refuse the file.

PIL stops at a text chunk or colour profile above 1 MB, at a wrong checksum in a comment, and at a
JPEG without its end marker. Viewers show all of these. So PIL gets a file that has the pixels, the
transparency and the EXIF orientation of the original, and little else.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from PIL import Image

from ..errors import ImageError

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"

_END_MARKER = b"\xff\xd9"  # of a JPEG
_FILLERS = (b"\0" * 64, b"U" * 64)  # two endings for a JPEG's compressed data
_MOST_SKIPPED = 100_000  # chunks or segments of metadata in one file
_LARGEST_CHECKED = 1 << 20  # bytes of an EXIF or text chunk; a longer one is dropped unread
_READ_KINDS = {b"tRNS", b"eXIf"}
_TEXT_KINDS = {b"tEXt", b"zTXt", b"iTXt"}
_TRANSPARENT_COLOUR = {0: 2, 2: 6}  # PNG colour type -> bytes of a tRNS chunk; 0: grey, 2: RGB


def image_data(file: BinaryIO, name: str, with_text: bool = False) -> BinaryIO:
    """Return a file with the image data of a PNG, JPEG or WebP; other files are returned as is.

    Args:
        file: can seek; it stays open and is read later.
        name: the image's name in error messages.
        with_text: keep the text chunks of a PNG, if they are intact and below 1 MB.

    Raises:
        ImageError: the file has more than 100,000 chunks of metadata.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head.startswith(PNG):
        kept = _merged(_png_ranges(file, size, name, with_text))
        return io.BufferedReader(_RangeFile(file, kept))
    if head.startswith(JPEG):
        kept = _merged(_jpeg_ranges(file, size, name))
        return io.BufferedReader(_RangeFile(file, kept))
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return _webp_of_true_size(file, head, size)
    file.seek(0)
    return file


def with_end_marker(file: BinaryIO) -> BinaryIO | None:
    """Return a JPEG with the end marker that it lacks; None if more than that is missing.

    Nothing tells directly whether the compressed data is complete. But a decoder ignores bytes
    after complete data, and takes them as pixels after incomplete data. So the image is decoded
    with two different endings. Equal pixels mean that nothing was missing.

    Args:
        file: a JPEG from ``image_data``, already checked for its size in pixels.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read(1) == _END_MARKER[:1]:
        size -= 1  # only half of the marker is missing
    digests = set()
    for filler in _FILLERS:
        ending = _RangeFile(file, [(0, size)], filler + _END_MARKER)
        with Image.open(io.BufferedReader(ending), formats=["JPEG"]) as image:
            digests.add(hashlib.sha256(image.tobytes()).digest())
    if len(digests) > 1:
        return None
    return io.BufferedReader(_RangeFile(file, [(0, size)], _END_MARKER))


class _RangeFile(io.RawIOBase):
    """A readable file that joins byte ranges of another file, and then ``tail``.

    A read gives bytes of one range only; ``io.BufferedReader`` reads on.

    Args:
        file: the other file, which stays open.
        ranges: start and end of each range.
        tail: bytes after the last range.
    """

    def __init__(self, file: BinaryIO, ranges: list[tuple[int, int]], tail: bytes = b""):
        super().__init__()
        self._file = file
        self._tail = tail
        self._ranges = ranges
        self._offsets = []  # of each range, in this file
        offset = 0
        for start, end in ranges:
            self._offsets.append(offset)
            offset += end - start
        self._tail_offset = offset
        self._size = offset + len(tail)
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position, counted as for any file, and return it."""
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
        self._position = max(0, origins[whence] + offset)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill a buffer from the position on, and return the number of bytes read."""
        with memoryview(buffer) as view:
            data = self._read_from_one_range(len(view))
            view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read_from_one_range(self, most: int) -> bytes:
        """Read at most this many bytes at the position, all from one range or from the tail."""
        if self._position >= self._tail_offset:
            start = self._position - self._tail_offset
            return self._tail[start : start + most]
        index = bisect.bisect_right(self._offsets, self._position) - 1
        start, end = self._ranges[index]
        start += self._position - self._offsets[index]
        self._file.seek(start)
        return self._file.read(min(most, end - start))


def _merged(ranges: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join each range that begins where the one before it ends; drop empty ranges."""
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        if start >= end:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


# PNG


def _png_ranges(
    file: BinaryIO,
    size: int,
    name: str,
    with_text: bool,
) -> Iterator[tuple[int, int]]:
    """Yield the byte ranges of the chunks that PIL gets.

    These are the critical chunks (their names begin with a capital letter), and the transparency,
    EXIF and, on request, text chunks if they are intact.
    """
    read_kinds = _READ_KINDS | _TEXT_KINDS if with_text else _READ_KINDS
    yield 0, len(PNG)
    position = len(PNG)
    colour_type = -1
    skipped = 0
    while position < size:
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            return
        length, kind = struct.unpack(">I4s", header)
        end = position + 12 + length  # 12: length, name and checksum
        if kind == b"IHDR":
            colour_type = file.read(10)[9:10][0] if length >= 10 else -1
        is_read = kind in read_kinds and length <= _LARGEST_CHECKED
        if kind == b"tRNS":
            is_read = is_read and length == _TRANSPARENT_COLOUR.get(colour_type, length)
        is_critical = kind[:1].isupper()
        if is_critical or (is_read and _is_intact(file, position, length)):
            yield position, min(end, size)
        else:
            skipped += 1
            _check_skipped(skipped, name)
        if kind == b"IEND":
            return
        position = end


def _is_intact(file: BinaryIO, position: int, length: int) -> bool:
    """Return whether a chunk's checksum is right, and its text is small when decompressed.

    Args:
        file: a PNG.
        position: where the chunk begins, in bytes.
        length: bytes of the chunk's data.
    """
    file.seek(position + 4)  # 4: the length itself
    kind_and_data = file.read(4 + length)
    checksum = file.read(4)
    if checksum != struct.pack(">I", zlib.crc32(kind_and_data)):
        return False
    kind, data = kind_and_data[:4], kind_and_data[4:]
    compressed = _compressed_text(kind, data)
    try:
        decompressor = zlib.decompressobj()
        text = decompressor.decompress(compressed, _LARGEST_CHECKED)
    except zlib.error:
        return False
    return len(text) < _LARGEST_CHECKED


def _compressed_text(kind: bytes, data: bytes) -> bytes:
    """Return the compressed text of a text chunk; empty if its text is not compressed."""
    _, _, rest = data.partition(b"\0")  # the keyword and its end
    if kind == b"zTXt":
        return rest[1:]  # after the method
    if kind == b"iTXt" and rest[:1] == b"\1":
        _, _, rest = rest[2:].partition(b"\0")  # after flag and method, the language
        _, _, rest = rest.partition(b"\0")  # the keyword's translation
        return rest
    return b""


# JPEG


def _jpeg_ranges(file: BinaryIO, size: int, name: str) -> Iterator[tuple[int, int]]:
    """Yield the byte ranges of the segments that PIL gets, and of all that follows them."""
    yield 0, 2
    position = 2
    skipped = 0
    while True:
        file.seek(position)
        header = file.read(4)
        if len(header) < 4:
            break
        mark, marker, length = struct.unpack(">BBH", header)
        is_segment = mark == 0xFF and 0xC0 <= marker < 0xFF and not 0xD0 <= marker <= 0xDA
        if not is_segment:  # the compressed data begins, or a decoder has to judge
            break
        end = position + 2 + length
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE  # APP0 to APP15, or a comment
        if is_metadata and not _is_read_segment(marker, file.read(min(length - 2, 14))):
            skipped += 1
            _check_skipped(skipped, name)
        else:
            yield position, min(end, size)
        position = end
    yield position, size


def _is_read_segment(marker: int, beginning: bytes) -> bool:
    """Return whether a decoder needs a metadata segment, given its first 14 bytes.

    JFIF and Adobe segments tell the colour space, and EXIF the orientation.
    """
    if marker == 0xE0:
        return beginning.startswith(b"JFIF\0") and len(beginning) >= 14
    if marker == 0xE1:
        return beginning.startswith(b"Exif\0\0")
    if marker == 0xEE:
        return beginning.startswith(b"Adobe") and len(beginning) >= 12
    return False


# WebP


def _webp_of_true_size(file: BinaryIO, head: bytes, size: int) -> BinaryIO:
    """Return a WebP whose header claims no more bytes than there are.

    A file that lost its last byte, often mere padding, gets one.
    """
    (claimed,) = struct.unpack("<I", head[4:8])
    if claimed + 8 <= size:
        file.seek(0)
        return file
    padding = b"\0" if size % 2 else b""
    true_size = struct.pack("<I", size + len(padding) - 8)
    file.seek(8)
    return io.BytesIO(b"RIFF" + true_size + file.read() + padding)


def _check_skipped(skipped: int, name: str) -> None:
    """Refuse a file that is nearly all metadata.

    Raises:
        ImageError: more than 100,000 chunks or segments were skipped.
    """
    if skipped > _MOST_SKIPPED:
        raise ImageError(f"{name} has over {_MOST_SKIPPED:,} pieces of metadata: export it again")
