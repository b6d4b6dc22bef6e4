"""The image data of a file, without the metadata for which PIL would refuse the file.

PIL stops at a text chunk or colour profile above 1 MB, at a wrong checksum in a comment, and at a
JPEG without its end marker. Viewers show all of these. So PIL gets a file that has the pixels, the
transparency and the EXIF orientation of the original, and little else.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import math
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from PIL import Image, JpegImagePlugin

from ..errors import ImageError
from .pixels import bands

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"

_SCAN_MARKER = b"\xff\xda"  # of a JPEG
_END_MARKER = b"\xff\xd9"  # of a JPEG
_FILLERS = (b"\0" * 64, b"U" * 64)  # two endings for a JPEG's compressed data
_MOST_SKIPPED = 100_000  # chunks or segments of metadata in one file
_LARGEST_CHECKED = 1 << 20  # bytes of an EXIF or text chunk; a longer one is dropped unread
_WANTED_KINDS = {b"tRNS", b"eXIf"}  # PNG chunks: transparency and EXIF
_TEXT_KINDS = {b"tEXt", b"zTXt", b"iTXt"}  # PNG chunks of text
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


def open_jpeg(file: BinaryIO, max_pixels: int) -> Image.Image:
    """Open a JPEG. One with too many pixels gets half its width and height, if they then fit.

    Its decoder makes the small image directly, and the large one never takes memory. A JPEG of
    several scans keeps its size, because its decoder collects all scans at full size first.

    Args:
        file: a JPEG from ``image_data``.
        max_pixels: the largest number of pixels of the opened image.

    Raises:
        SyntaxError: the file is no JPEG, or is cut in its header.
    """
    file.seek(0)
    # ``Image.open`` would refuse a JPEG of more than 179 megapixels, before its size is halved.
    image = JpegImagePlugin.JpegImageFile(file)
    width, height = image.size
    half_pixels = math.ceil(width / 2) * math.ceil(height / 2)
    if half_pixels <= max_pixels < width * height and _has_one_scan(file):
        image.draft(None, (max(1, width // 2), max(1, height // 2)))
    return image


def count_scans(file: BinaryIO) -> int:
    """Return the number of scans of a JPEG. Each takes the time of decoding the whole image."""
    file.seek(0)
    scans = 0
    last_byte = b""  # a marker may begin in one block and end in the next
    while block := file.read(1 << 20):
        scans += (last_byte + block).count(_SCAN_MARKER)
        last_byte = block[-1:]
    return scans


def _has_one_scan(file: BinaryIO) -> bool:
    """Return whether a JPEG is sequential, and its first scan has all colours.

    Args:
        file: a JPEG whose header PIL has read.
    """
    position = 2  # after the start marker
    components = 0  # colours of a sequential JPEG; 0: none so far
    while True:
        file.seek(position)
        header = file.read(10)
        if len(header) < 10 or header[0] != 0xFF:
            return False
        marker, length = struct.unpack(">BH", header[1:4])
        if marker == 0xDA:  # a scan, whose data begins with the number of its components
            return 0 < components == header[4]
        if marker in (0xC0, 0xC1):  # a frame; precision, height and width precede the number
            components = header[9]
        position += 2 + length


def with_end_marker(file: BinaryIO, max_pixels: int) -> BinaryIO | None:
    """Return a JPEG with the end marker that it lacks; None if more than that is missing.

    Nothing tells directly whether the compressed data is complete. But a decoder ignores bytes
    after complete data, and takes them as pixels after incomplete data. So the image is decoded
    with two different endings. Equal pixels mean that nothing was missing.

    Args:
        file: a JPEG from ``image_data``, already checked for its size in pixels.
        max_pixels: as for ``open_jpeg``.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read(1) == _END_MARKER[:1]:
        size -= 1  # only half of the marker is missing
    digests = set()
    for filler in _FILLERS:
        ending = _RangeFile(file, [(0, size)], filler + _END_MARKER)
        with open_jpeg(io.BufferedReader(ending), max_pixels) as image:
            digests.add(_pixel_digest(image))
    if len(digests) > 1:
        return None
    return io.BufferedReader(_RangeFile(file, [(0, size)], _END_MARKER))


def _pixel_digest(image: Image.Image) -> bytes:
    """Return the SHA-256 of an image's pixels."""
    digest = hashlib.sha256()
    for _, band in bands(image):
        digest.update(band.tobytes())
    return digest.digest()


class _RangeFile(io.RawIOBase):
    """A readable file that joins byte ranges of another file, and then ``tail``.

    One call of ``readinto`` gives bytes of one range only. ``io.BufferedReader`` repeats the call
    until it has enough.

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
        self._offsets = []  # where each range begins in the joined file
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
        """Move to the position ``offset``, counted from ``whence``, and return the position."""
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
        self._position = max(0, origins[whence] + offset)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Read into a buffer, and return the number of bytes: 0 at the end of the file."""
        with memoryview(buffer) as view:
            data = self._read_from_one_range(len(view))
            view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read_from_one_range(self, most: int) -> bytes:
        """Read at most this many bytes at the position, all from one range or from the tail."""
        if self._position >= self._tail_offset:
            tail_start = self._position - self._tail_offset
            return self._tail[tail_start : tail_start + most]
        # The last range that begins at the position or before it.
        index = bisect.bisect_right(self._offsets, self._position) - 1
        start, end = self._ranges[index]
        start += self._position - self._offsets[index]
        self._file.seek(start)
        return self._file.read(min(most, end - start))


def _merged(ranges: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join adjacent ranges into one, and drop empty ranges."""
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        if start >= end:
            continue
        if merged and merged[-1][1] == start:  # the range before this one ends here
            start = merged.pop()[0]
        merged.append((start, end))
    return merged


# PNG


def _png_ranges(
    file: BinaryIO,
    size: int,
    name: str,
    with_text: bool,
) -> Iterator[tuple[int, int]]:
    """Yield the start and end of the signature, and of each chunk that PIL gets.

    PIL gets all critical chunks (their names begin with a capital letter). Chunks of transparency,
    EXIF and, if ``with_text`` is set, text must be intact.
    """
    wanted_kinds = _WANTED_KINDS | _TEXT_KINDS if with_text else _WANTED_KINDS
    yield 0, len(PNG)
    position = len(PNG)
    colour_type = -1  # unknown until IHDR is read
    skipped = 0
    while position < size:
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            return
        length, kind = struct.unpack(">I4s", header)
        end = position + 12 + length  # 12: length, name and checksum
        if kind == b"IHDR":  # width, height, bit depth, and then one byte of colour type
            colour_type = file.read(10)[9:10][0] if length >= 10 else -1
        is_wanted = kind in wanted_kinds and length <= _LARGEST_CHECKED
        if kind == b"tRNS":
            right_length = _TRANSPARENT_COLOUR.get(colour_type, length)  # other types: any length
            is_wanted = is_wanted and length == right_length
        is_critical = kind[:1].isupper()
        if is_critical or (is_wanted and _is_intact(file, position, length)):
            yield position, min(end, size)
        else:
            skipped += 1
            _check_skipped(skipped, name)
        if kind == b"IEND":
            return
        position = end


def _is_intact(file: BinaryIO, position: int, length: int) -> bool:
    """Return whether a chunk's checksum is right, and compressed text in it is intact.

    Text that takes 1 MB or more when decompressed counts as damaged.

    Args:
        file: a PNG.
        position: where the chunk begins, in bytes.
        length: bytes of the chunk's data.
    """
    file.seek(position + 4)  # 4: bytes of the length, which the checksum does not cover
    kind_and_data = file.read(4 + length)
    checksum = file.read(4)
    if checksum != struct.pack(">I", zlib.crc32(kind_and_data)):
        return False
    kind = kind_and_data[:4]
    data = kind_and_data[4:]
    compressed = _compressed_text(kind, data)
    try:
        decompressor = zlib.decompressobj()
        text = decompressor.decompress(compressed, _LARGEST_CHECKED)
    except zlib.error:
        return False
    return len(text) < _LARGEST_CHECKED


def _compressed_text(kind: bytes, data: bytes) -> bytes:
    """Return the compressed text of a chunk; empty if the chunk has none."""
    _keyword, _, rest = data.partition(b"\0")
    if kind == b"zTXt":
        return rest[1:]  # 1: the byte of the compression method
    if kind == b"iTXt" and rest[:1] == b"\1":  # the compression flag is set
        _language, _, rest = rest[2:].partition(b"\0")  # 2: the bytes of the flag and the method
        _translated_keyword, _, text = rest.partition(b"\0")
        return text
    return b""


# JPEG


def _jpeg_ranges(file: BinaryIO, size: int, name: str) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each segment that PIL gets, and of the compressed data after them.

    Every segment begins with 0xFF, its marker and its length.
    """
    yield 0, 2  # the start marker, which has no length
    position = 2
    skipped = 0
    while True:
        file.seek(position)
        header = file.read(4)
        if len(header) < 4:
            break
        prefix, marker, length = struct.unpack(">BBH", header)
        # 0xD0 to 0xD9 have no length, and the compressed data begins at 0xDA.
        is_segment = prefix == 0xFF and 0xC0 <= marker < 0xFF and not 0xD0 <= marker <= 0xDA
        if not is_segment:  # the decoder gets the rest, even if it is damaged
            break
        end = position + 2 + length  # 2: the prefix and the marker
        data_length = length - 2  # the length counts its own two bytes
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE  # APP0 to APP15, or a comment
        if is_metadata and not _is_needed_segment(marker, file.read(max(0, min(data_length, 14)))):
            skipped += 1
            _check_skipped(skipped, name)
        else:
            yield position, min(end, size)
        position = end
    yield position, size


def _is_needed_segment(marker: int, beginning: bytes) -> bool:
    """Return whether a decoder needs a metadata segment.

    JFIF and Adobe segments tell the colour space, and EXIF the orientation. A JFIF or Adobe segment
    that is too short is not needed.

    Args:
        marker: the segment's kind.
        beginning: first 14 bytes of the segment's data, fewer if it is shorter.
    """
    if marker == 0xE0:  # APP0
        return beginning.startswith(b"JFIF\0") and len(beginning) >= 14
    if marker == 0xE1:  # APP1
        return beginning.startswith(b"Exif\0\0")
    if marker == 0xEE:  # APP14
        return beginning.startswith(b"Adobe") and len(beginning) >= 12
    return False


# WebP


def _webp_of_true_size(file: BinaryIO, head: bytes, size: int) -> BinaryIO:
    """Return a WebP whose header claims no more bytes than there are.

    A file whose claim is right is returned as is. Otherwise an odd size gets a byte of padding, as
    the format needs an even size.

    Args:
        file: the WebP.
        head: its first 12 bytes.
        size: bytes of the file.
    """
    (claimed,) = struct.unpack("<I", head[4:8])
    if claimed + 8 <= size:  # 8: "RIFF" and the claim itself, which it does not count
        file.seek(0)
        return file
    padding = b"\0" if size % 2 else b""
    true_size = struct.pack("<I", size + len(padding) - 8)
    file.seek(8)
    return io.BytesIO(b"RIFF" + true_size + file.read() + padding)


def _check_skipped(skipped: int, name: str) -> None:
    """Refuse a file with too many pieces of metadata.

    Raises:
        ImageError: more than 100,000 chunks or segments were skipped.
    """
    if skipped > _MOST_SKIPPED:
        raise ImageError(f"{name} has over {_MOST_SKIPPED:,} pieces of metadata: export it again")
