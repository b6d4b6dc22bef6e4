"""Reading PyTorch ``.bin`` checkpoints without torch and without unpickling.

``torch.save`` of ``{name: tensor}`` writes a zip of uncompressed entries. ``<root>/data.pkl`` is a
pickle that describes tensors as views of storages. ``<root>/data/<key>`` holds the bytes of one
storage. ``torch_pickle.py`` interprets the pickle and never executes it.

Source: ``torch/serialization.py`` (``_save``, ``_load``) and ``torch/_utils.py``
(``_rebuild_tensor_v2``).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from ..files import POINTER_ADVICE, is_git_pointer
from .torch_pickle import (
    MAX_DIMS,
    DamagedError,
    RefusedError,
    TensorRecord,
    interpret,
    quote,
    type_name,
)

_DTYPES: dict[str, mx.Dtype] = {
    "bfloat16": mx.bfloat16,
    "float16": mx.float16,
    "float32": mx.float32,
    "float64": mx.float64,
    "int8": mx.int8,
    "int16": mx.int16,
    "int32": mx.int32,
    "int64": mx.int64,
    "uint8": mx.uint8,
    "uint16": mx.uint16,
    "uint32": mx.uint32,
    "uint64": mx.uint64,
    "bool": mx.bool_,
}
_ITEM_BYTES = {name: dtype.size for name, dtype in _DTYPES.items()}
_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
"""Unsigned integer type of an item's width, by bytes per item."""

_MAX_PICKLE = 64 << 20  # bytes of data.pkl; a 7B model's has about 200 kB
_MAX_DIRECTORY = 16 << 20  # bytes of the zip's central directory; a 7B model's has about 100 kB
_MAX_SIDE = (1 << 31) - 1  # MLX stores sizes in 32 bits
_MAX_ITEMS = 1 << 60  # items of a tensor: at 8 bytes each, its size is below 2^63 bytes
_MAX_VIEWS = 2  # bytes of tensors for each byte of storage: tied weights are two views
_MAX_NAME = 1024  # characters of a tensor's name

# Advice at the end of error messages.
_DOWNLOAD_AGAIN = "download it again"
_RESAVE = "re-save it with a current PyTorch, or download the safetensors form"
_USE_SAFETENSORS = "do not load it with PyTorch; use the safetensors form"


def _error(path: Path, problem: str, fix: str = _DOWNLOAD_AGAIN) -> CheckpointError:
    """Return the error of a file, for the caller to raise: its path, the problem and the fix."""
    return CheckpointError(f"{path}: {problem}: {fix}")


# Public


@dataclass(frozen=True)
class StoredTensor:
    """Type, shape and place of a tensor in a file, checked against the file's layout."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # one of those that torch_pickle.py knows, such as "bfloat16"
    strides: tuple[int, ...]  # items
    storage_offset: int  # items from the start of the storage to the tensor's first item
    file_offset: int  # bytes from the start of the file to the storage
    storage_bytes: int

    @property
    def size(self) -> int:
        """Number of items."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the items in their stored type; ``read`` returns half as many for float64."""
        return self.size * _ITEM_BYTES[self.dtype]

    @property
    def contiguous(self) -> bool:
        """Whether the items are stored in C order without gaps."""
        expected_stride = 1  # the last dimension's
        for side, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if side > 1 and stride != expected_stride:  # a side of 1 may have any stride
                return False
            expected_stride *= side
        return True

    def read(self) -> mx.array:
        """Read the values into a C-contiguous array.

        float64 is rounded to float32, since Apple's GPUs have no float64; values out of float32's
        range become infinite. Values of other types are exact. Reading bool, float64 or a
        non-contiguous tensor needs memory for a second copy, which includes any gaps between items.

        Raises:
            CheckpointError: the file is missing or unreadable, or was cut short after its header
                was read.
        """
        item_bytes = _ITEM_BYTES[self.dtype]
        # Bytes from the start of the file to the tensor's first item.
        start = self.file_offset + self.storage_offset * item_bytes
        if self.contiguous or self.size == 0:
            return read_range(self.path, start, self.shape, self.dtype)
        # Read the storage from the tensor's first item to its last, gaps included.
        stored = np.empty(_spanned_items(self.shape, self.strides), f"u{item_bytes}")
        _read_into(_writable_bytes(stored), self.path, start)
        # View these items in the tensor's shape. A side of 1 needs no stride, and its stored stride
        # may be too large for NumPy.
        sides = zip(self.shape, self.strides, strict=True)
        byte_strides = [0 if side == 1 else stride * item_bytes for side, stride in sides]
        view = np.lib.stride_tricks.as_strided(stored, self.shape, byte_strides)
        # Copy the view into an MLX array.
        array = _unsigned_zeros(self.shape, self.dtype)
        target = np.frombuffer(_writable_bytes(array), stored.dtype).reshape(self.shape)
        np.copyto(target, view)
        return _reinterpret(array, self.dtype)


def read_range(path: Path, offset: int, shape: tuple[int, ...], dtype: str) -> mx.array:
    """Read an array from the bytes of a file, little-endian and in C order.

    float64 is rounded to float32, since Apple's GPUs have no float64; values out of float32's range
    become infinite. Reading bool or float64 needs memory for a second copy.

    Args:
        path: the file.
        offset: bytes from the start of the file to the first item.
        shape: the array's shape; each side below 2^31.
        dtype: type of the stored items, a key of ``_DTYPES``.

    Raises:
        CheckpointError: the file is missing, unreadable or too short.
    """
    array = _unsigned_zeros(shape, dtype)
    if array.size:
        _read_into(_writable_bytes(array), path, offset)
    return _reinterpret(array, dtype)


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a PyTorch checkpoint by name, in the file's order.

    Reads the zip's headers and the pickle, but none of the tensors' values.

    Raises:
        CheckpointError: the file is missing, unreadable, damaged, truncated, compressed, encrypted,
            big-endian, in PyTorch's old format without a zip, or holds anything but a dict of
            tensors.
    """
    path = Path(path)
    with _open_checkpoint(path) as file:
        entries = _read_directory(path, file)
        root = _find_root(path, entries)
        _check_byte_order(path, file, entries, root)
        pickled = _read_entry(path, file, entries, f"{root}/data.pkl", _MAX_PICKLE)
    records = _read_records(path, pickled)
    tensors = {name: _locate(path, name, record, root, entries) for name, record in records.items()}
    # Two tensors may share a storage, as tied weights do. But a small file could describe any
    # number of tensors that are views of one storage.
    described = sum(tensor.nbytes for tensor in tensors.values())
    data_folder = f"{root}/data/"
    stored = sum(entry.size for name, entry in entries.items() if name.startswith(data_folder))
    if described > _MAX_VIEWS * stored:
        problem = f"describes {described:,} bytes of tensors, but stores {stored:,}"
        raise _error(path, problem, _USE_SAFETENSORS)
    return tensors


class ChecksumReader:
    """A check of a checkpoint's zip entries, fed with the file's bytes in order by its caller.

    Args:
        path: the checkpoint.

    Raises:
        CheckpointError: the file is no zip archive, or one that PyTorch does not write.
    """

    def __init__(self, path: Path):
        self._path = path
        with _open_checkpoint(path) as file:
            entries = _read_directory(path, file)
        self._entries = sorted(
            (entry, name) for name, entry in entries.items() if entry.crc and entry.size
        )
        self._position = 0  # bytes of the file so far
        self._crc = 0  # of the first entry's content so far

    def update(self, block: bytes | memoryview) -> None:
        """Take the next bytes of the file.

        Raises:
            CheckpointError: an entry that ends in this block does not match its checksum.
        """
        view = memoryview(block)
        block_end = self._position + len(view)
        while self._entries:
            entry, name = self._entries[0]
            entry_end = entry.start + entry.size
            # From ``start`` to ``end``: the part of the entry that is in this block.
            start = max(entry.start, self._position)
            end = min(entry_end, block_end)
            if start < end:
                part = view[start - self._position : end - self._position]
                self._crc = zlib.crc32(part, self._crc)
            if entry_end > block_end:
                break  # the entry goes on in the next block
            if self._crc != entry.crc:
                raise _error(self._path, f"is damaged (the checksum of {quote(name)} is wrong)")
            self._entries.pop(0)
            self._crc = 0
        self._position = block_end


# Bytes to arrays, on the CPU stream: a GPU could read them too early, and does not know float64.


def _unsigned_zeros(shape: tuple[int, ...], dtype: str) -> mx.array:
    """Return an array of zeros, as unsigned integers with the item size of ``dtype``.

    The caller overwrites the zeros with the bytes of a file, which ``_reinterpret`` turns into
    ``dtype``.
    """
    zeros = mx.zeros(shape, _UNSIGNED[_ITEM_BYTES[dtype]], stream=mx.cpu)
    mx.eval(zeros)
    return zeros


def _reinterpret(unsigned: mx.array, dtype: str) -> mx.array:
    """Reinterpret the bytes of unsigned integers as ``dtype``, and round float64 to float32.

    Only bool and float64 are copied.
    """
    if dtype == "bool":
        x = mx.not_equal(unsigned, 0, stream=mx.cpu)
    else:
        x = unsigned.view(_DTYPES[dtype], stream=mx.cpu)
    if dtype == "float64":
        x = x.astype(mx.float32, stream=mx.cpu)
    mx.eval(x)
    return x


def _writable_bytes(array: Any) -> memoryview:
    """Return the memory of an MLX or NumPy array as writable bytes."""
    return memoryview(array).cast("B")


def _read_into(target: memoryview, path: Path, offset: int) -> None:
    """Fill ``target`` with the bytes of a file from ``offset`` on.

    Raises:
        CheckpointError: the file is missing, unreadable or too short.
    """
    done = 0  # bytes
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while done < len(target):  # one call reads at most 2 GiB
                count = file.readinto(target[done:])
                if not count:
                    raise _error(path, f"ends {len(target) - done} bytes too early")
                done += count
    except FileNotFoundError:
        raise _error(path, "has gone since its header was read", "put it back") from None
    except OSError as error:
        raise _error(
            path, f"cannot be read ({error.strerror})", "check the disk and its rights"
        ) from None


def _spanned_items(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Count a storage's items from a tensor's first to its last, gaps included.

    An empty tensor spans 0 items. ``strides`` are in items.
    """
    if 0 in shape:
        return 0
    return 1 + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))


# The zip


class _ZipEntry(NamedTuple):
    """The place of a zip entry's content in the file."""

    start: int  # bytes from the start of the file
    size: int  # bytes
    crc: int  # CRC-32 of the content; 0 if the writer computed none


class _BoundedFile(io.FileIO):
    """A file whose ``read`` raises ``BadZipFile`` for more than ``_MAX_DIRECTORY`` bytes.

    ``zipfile`` reads the central directory at once, and a hostile zip may declare a huge directory.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_DIRECTORY:
            raise zipfile.BadZipFile("the central directory is too large")
        # ``FileIO.read`` returns None only for a non-blocking file, which this is not.
        return super().read(-1 if size is None else size) or b""


@contextlib.contextmanager
def _open_checkpoint(path: Path) -> Iterator[_BoundedFile]:
    """Open a checkpoint, and turn errors of reading it into ``CheckpointError``."""
    try:
        # Check the kind of file before opening it, since opening a pipe could block forever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise _error(path, "is no file", "name the .bin file itself")
        with _BoundedFile(path) as file:
            yield file
    except FileNotFoundError:
        raise _error(path, "is missing", "download the whole model folder") from None
    except OSError as error:
        raise _error(
            path, f"cannot be read ({error.strerror})", "check the disk and its rights"
        ) from None


# signature, version, flags, method, time, date, crc, two sizes, two lengths
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
# Flags of a zip entry.
_ENCRYPTED = 0x1 | 0x40 | 0x2000  # encrypted content, strong encryption, masked header
_DATA_DESCRIPTOR = 0x8  # the sizes may be stored after the content
_UTF8_NAME = 0x800
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    NotImplementedError,
    struct.error,
    ValueError,
    OverflowError,
    IndexError,
    OSError,
)
"""Errors that ``zipfile`` raises for damaged files."""


def _check_byte_order(
    path: Path, file: _BoundedFile, entries: dict[str, _ZipEntry], root: str
) -> None:
    """Refuse a big-endian file. A file without a stated order is read as little-endian.

    Raises:
        CheckpointError: the stated order is not "little".
    """
    name = f"{root}/byteorder"
    if name not in entries:  # PyTorch before 2.1 wrote none
        return
    order = _read_entry(path, file, entries, name, limit=64)
    if order != b"little":
        raise _error(path, f"its byte order is {order!r}, only b'little' is read", _RESAVE)


def _check_head(path: Path, head: bytes) -> None:
    """Refuse a file that does not start as a zip does.

    Args:
        path: the file, for the message.
        head: the file's first bytes.

    Raises:
        CheckpointError: the file is empty, a Git LFS pointer, a bare pickle, or anything else that
            is no zip.
    """
    if not head:
        raise _error(path, "is empty")
    if is_git_pointer(head):
        raise _error(path, "is a Git LFS pointer and not the weights", POINTER_ADVICE)
    if head[0] == 0x80:  # PROTO, a pickle's first opcode
        raise _error(
            path, "is a bare pickle (PyTorch's format before 1.6), which is not read", _RESAVE
        )
    if not head.startswith(b"PK\x03\x04"):
        raise _error(path, "is no PyTorch zip file", f"{_DOWNLOAD_AGAIN}, or {_RESAVE}")


def _read_directory(path: Path, file: _BoundedFile) -> dict[str, _ZipEntry]:
    """Return the places of the zip's entries by name.

    The central directory must agree with each entry's local header, and no two entries may overlap.

    Raises:
        CheckpointError: the file is no zip, is damaged, or has a compressed or encrypted entry or
            two entries of one name.
    """
    _check_head(path, file.read(64))
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            directory_start = archive.start_dir
    except _ZIP_ERRORS:
        raise _error(path, "is cut off or damaged (its zip directory cannot be read)") from None
    entries: dict[str, _ZipEntry] = {}
    ranges: list[tuple[int, int]] = []  # start and end of each entry, header included
    for info in infos:
        name = info.orig_filename  # as stored; zipfile cuts ``filename`` at a null character
        if name in entries:
            raise _error(path, f"holds the entry {quote(name)} twice")
        entry = _check_entry(path, file, info, directory_start)
        entries[name] = entry
        ranges.append((info.header_offset, entry.start + entry.size))
    ranges.sort()
    if any(end > next_start for (_, end), (next_start, _) in itertools.pairwise(ranges)):
        raise _error(path, "is damaged (its zip entries overlap)")
    return entries


def _check_entry(
    path: Path, file: _BoundedFile, info: zipfile.ZipInfo, directory_start: int
) -> _ZipEntry:
    """Check that a zip entry can be read, and return the place of its content.

    Args:
        path: the file, for messages.
        file: the same file, open.
        info: the entry in the central directory. The entry's local header must agree with it.
        directory_start: bytes from the start of the file to the central directory.

    Raises:
        CheckpointError: the entry is encrypted, compressed or damaged.
    """
    name = quote(info.orig_filename)
    if info.flag_bits & _ENCRYPTED:
        raise _error(path, f"entry {name} is encrypted, which is not read", _RESAVE)
    if info.compress_type != zipfile.ZIP_STORED:
        raise _error(path, f"entry {name} is compressed, which is not read", _RESAVE)
    damaged = _error(path, f"is cut off or damaged (zip entry {name})")
    header_fits = 0 <= info.header_offset <= directory_start - _LOCAL_HEADER.size
    if not header_fits or info.compress_size != info.file_size:  # equal without compression
        raise damaged
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) != _LOCAL_HEADER.size:
        raise damaged
    signature, _, flags, method, _, _, _, packed_size, size, name_length, extra_length = (
        _LOCAL_HEADER.unpack(header)
    )
    start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    # A local size may be a placeholder: 0xFFFFFFFF if the zip64 field has the size, or 0 if a data
    # descriptor after the content has it.
    placeholders = {0xFFFFFFFF, 0} if flags & _DATA_DESCRIPTOR else {0xFFFFFFFF}
    encoding = "utf-8" if info.flag_bits & _UTF8_NAME else "cp437"
    headers_agree = (
        signature == b"PK\x03\x04"
        and method == zipfile.ZIP_STORED
        and not flags & _ENCRYPTED
        and {packed_size, size} <= {info.file_size, *placeholders}
        and start + info.file_size <= directory_start
        and file.read(name_length) == info.orig_filename.encode(encoding)
    )
    if not headers_agree:
        raise damaged
    return _ZipEntry(start, info.file_size, info.CRC)


def _find_root(path: Path, entries: dict[str, _ZipEntry]) -> str:
    """Return the name of the zip's root folder, which ``torch.save`` chooses.

    It is the folder at the zip's top level that holds ``data.pkl``.

    Raises:
        CheckpointError: there is no such folder, or more than one.
    """
    found = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise _error(
            path,
            f"is no PyTorch checkpoint (a zip with {len(found)} entries <name>/data.pkl)",
            _RESAVE,
        )
    return found[0].removesuffix("/data.pkl")


def _read_entry(
    path: Path, file: _BoundedFile, entries: dict[str, _ZipEntry], name: str, limit: int
) -> bytes:
    """Read the content of a zip entry.

    Raises:
        CheckpointError: the content has more than ``limit`` bytes, or the file is cut off.
    """
    entry = entries[name]
    if entry.size > limit:
        raise _error(
            path,
            f"{quote(name)} has {entry.size} bytes, more than the {limit} that are read",
            _USE_SAFETENSORS,
        )
    content = bytearray(entry.size)
    file.seek(entry.start)
    if file.readinto(content) != entry.size:
        raise _error(path, "is cut off")
    return bytes(content)


# The pickle


def _read_records(path: Path, pickled: bytes) -> dict[str, TensorRecord]:
    """Return the tensors that the bytes of ``data.pkl`` describe, by name.

    Raises:
        CheckpointError: the pickle is refused or damaged, or describes anything but a dict of
            tensors.
    """
    try:
        result = interpret(pickled)
    except RefusedError as refused:
        raise _error(path, f"refused: the pickle {refused}", _USE_SAFETENSORS) from None
    except DamagedError as damaged:
        raise _error(path, f"its data.pkl is damaged ({damaged})") from None
    if type(result) is not dict:
        raise _error(
            path,
            f"holds an object of type {type_name(result)}, not a dict of tensors",
            "save the model's state_dict()",
        )
    for name, value in result.items():  # ``interpret`` accepts only strings as keys
        if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
            raise _error(path, f"the tensor name {quote(name)} is not printable, empty or too long")
        if type(value) is not TensorRecord:
            raise _error(
                path,
                f"entry {quote(name)} is of type {type_name(value)}, not a tensor",
                "save the state dict alone",
            )
    return result


def _locate(
    path: Path, name: str, record: TensorRecord, root: str, entries: dict[str, _ZipEntry]
) -> StoredTensor:
    """Return a tensor with its place in the file.

    Checks that the tensor fits its storage, and the storage its zip entry.

    Args:
        path: the file.
        name: the tensor's name, for messages.
        record: the tensor in the pickle.
        root: name of the zip's root folder.
        entries: places of the zip's entries.

    Raises:
        CheckpointError: the storage is missing or too small, or the tensor has too many dimensions
            or too long a side.
    """
    storage, offset, shape, strides = record

    def tensor_error(problem: str) -> CheckpointError:
        """Return an error that names the tensor."""
        return _error(path, f"tensor {quote(name)} {problem}")

    entry = entries.get(f"{root}/data/{storage.key}")
    if entry is None:
        raise tensor_error(f"lies in the storage {quote(storage.key)}, which the file lacks")
    if storage.size * _ITEM_BYTES[storage.dtype] > entry.size:
        raise tensor_error(
            f"lies in a storage of {storage.size} {storage.dtype} items, "
            f"of which the file has {entry.size} bytes"
        )
    if len(shape) > MAX_DIMS or len(strides) > MAX_DIMS:
        raise tensor_error(f"has more than {MAX_DIMS} dimensions")
    if len(shape) != len(strides):
        raise tensor_error(f"has {len(shape)} sizes and {len(strides)} strides")
    # Count a side of 0 as 1, because MLX multiplies the other sides of an empty array too.
    counted_items = math.prod(max(side, 1) for side in shape)
    if max(shape, default=0) > _MAX_SIDE or counted_items >= _MAX_ITEMS:
        raise tensor_error("has a side that is too long for MLX")
    # Stride 0 repeats an item: also refuse a tensor with more items than its storage.
    needed_items = max(math.prod(shape), offset + _spanned_items(shape, strides))
    if 0 not in shape and needed_items > storage.size:
        raise tensor_error("reaches beyond its storage")
    return StoredTensor(path, shape, storage.dtype, strides, offset, entry.start, entry.size)
