"""Reading PyTorch ``.bin`` checkpoints without torch and without unpickling.

``torch.save`` of ``{name: tensor}`` writes a zip of uncompressed entries. ``<prefix>/data.pkl`` is
a pickle that describes tensors as views of storages; ``<prefix>/data/<key>`` are the bytes of the
storages. ``torch_pickle.py`` interprets the pickle and never executes it.

Source: ``torch/serialization.py`` (``_save``, ``_load``) and ``torch/_utils.py``
(``_rebuild_tensor_v2``).
"""

from __future__ import annotations

import io
import itertools
import math
import stat
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from .torch_pickle import DamagedError, RefusedError, TensorRecord, describe, interpret, quote

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
_CARRIERS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
"""Types that bytes are read as, by bytes per item."""

_MAX_PICKLE = 64 << 20  # bytes of data.pkl; a 7B model's has about 200 kB
_MAX_DIRECTORY = 16 << 20  # bytes of the zip's central directory; a 7B model's has about 100 kB
_MAX_DIMS = 8  # dimensions of a tensor
_MAX_SIDE = (1 << 31) - 1  # MLX stores sizes in 32 bits
_MAX_NAME = 1024  # characters of a tensor's name

# Advice at the end of error messages.
_AGAIN = "download it again"
_RESAVE = "re-save it with a current PyTorch, or download the safetensors form"
_SAFER = "do not load it with PyTorch; use the safetensors form"


def _error(path: Path, problem: str, fix: str = _AGAIN) -> CheckpointError:
    """Return an error that names the file, the problem and the fix; the caller raises it."""
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
        expected = 1
        for side, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if side > 1 and stride != expected:
                return False
            expected *= side
        return True

    def read(self) -> mx.array:
        """Read the values into a C-contiguous array.

        Bool, float64 and any tensor that is not contiguous need memory for a second copy. That of a
        tensor with gaps includes the gaps. float64 becomes float32, since Apple's GPUs have no
        float64; values out of its range become infinite. All other values are exact.

        Raises:
            CheckpointError: the file is missing or unreadable, or was cut short after its header
                was read.
        """
        start = self.file_offset + self.storage_offset * _ITEM_BYTES[self.dtype]
        if self.contiguous or self.size == 0:
            return read_range(self.path, start, self.shape, self.dtype)
        raw = np.empty(_extent(self.shape, self.strides), f"u{_ITEM_BYTES[self.dtype]}")
        _fill(self.path, start, _bytes_of(raw))
        # A side of 1 may have any stride, even one that NumPy cannot represent.
        sides = zip(self.shape, self.strides, strict=True)
        steps = [0 if side == 1 else stride * raw.itemsize for side, stride in sides]
        blank = _blank(self.shape, self.dtype)
        target = np.frombuffer(_bytes_of(blank), raw.dtype).reshape(self.shape)
        np.copyto(target, np.lib.stride_tricks.as_strided(raw, self.shape, steps))
        return _typed(blank, self.dtype)


def read_range(path: Path, offset: int, shape: tuple[int, ...], dtype: str) -> mx.array:
    """Read an array from the bytes of a file, little-endian and in C order.

    Only bool and float64 need memory for a second copy.

    Args:
        path: the file.
        offset: bytes from the start of the file.
        shape: the array's shape; each side below 2^31.
        dtype: type of the bytes, a key of ``_DTYPES``. float64 becomes float32, since Apple's GPUs
            have no float64; values out of its range become infinite.

    Raises:
        CheckpointError: the file is missing, unreadable or too short.
    """
    blank = _blank(shape, dtype)
    if blank.size:
        _fill(path, offset, _bytes_of(blank))
    return _typed(blank, dtype)


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a PyTorch checkpoint by name, in the file's order.

    Reads the zip's headers and the pickle, but none of the values.

    Raises:
        CheckpointError: the file is missing, unreadable, damaged, truncated, compressed, encrypted,
            big-endian, in the old format without a zip, or not a plain dict of tensors. Anything
            else in the pickle is refused, and named in the message.
    """
    path = Path(path)
    try:
        # Call ``stat`` first: opening a pipe would block forever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise _error(path, "is no file", "name the .bin file itself")
        with _BoundedFile(path) as file:
            spans = _read_directory(path, file)
            prefix = _find_prefix(path, spans)
            _check_byte_order(path, file, spans, prefix)
            program = _read_entry(path, file, spans, f"{prefix}/data.pkl", _MAX_PICKLE)
    except FileNotFoundError:
        raise _error(path, "is missing", "download the whole model folder") from None
    except OSError as error:
        raise _error(
            path, f"cannot be read ({error.strerror})", "check the disk and its rights"
        ) from None
    content = _read_records(path, program)
    return {name: _locate(path, name, value, prefix, spans) for name, value in content.items()}


# Bytes to arrays, on the CPU stream: a GPU could read them too early, and does not know float64.


def _blank(shape: tuple[int, ...], dtype: str) -> mx.array:
    """Make zeros that ``memoryview`` can overwrite: unsigned integers as wide as ``dtype``.

    When they are filled, ``_typed`` reads them as ``dtype``.
    """
    blank = mx.zeros(shape, _CARRIERS[_ITEM_BYTES[dtype]], stream=mx.cpu)
    mx.eval(blank)
    return blank


def _typed(blank: mx.array, dtype: str) -> mx.array:
    """Return the items of a filled ``_blank`` as ``dtype``. Only float64 and bool are copied.

    float64 becomes float32.
    """
    if dtype == "bool":
        x = mx.not_equal(blank, 0, stream=mx.cpu)
    else:
        x = blank.view(_DTYPES[dtype], stream=mx.cpu)
    if dtype == "float64":
        x = x.astype(mx.float32, stream=mx.cpu)
    mx.eval(x)
    return x


def _bytes_of(array: Any) -> memoryview:
    """Return the memory of an MLX or NumPy array as writable bytes."""
    return memoryview(array).cast("B")


def _fill(path: Path, offset: int, target: memoryview) -> None:
    """Fill ``target`` with the bytes of a file from ``offset`` on.

    Raises:
        CheckpointError: the file is missing, unreadable or too short.
    """
    done = 0
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


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Count the storage's items from a tensor's first to its last; 0 for an empty tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))


# The zip


class _Span(NamedTuple):
    """Offset and size of a zip entry's content, in bytes of the file."""

    start: int
    size: int


class _BoundedFile(io.FileIO):
    """A file whose ``read`` raises ``BadZipFile`` for more than ``_MAX_DIRECTORY`` bytes.

    ``zipfile`` reads the central directory at once, and a hostile zip may declare a huge directory.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_DIRECTORY:
            raise zipfile.BadZipFile("the central directory is too large")
        return super().read(-1 if size is None else size) or b""


# signature, version, flags, method, time, date, crc, two sizes, two lengths
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
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


def _check_byte_order(path: Path, file: _BoundedFile, spans: dict[str, _Span], prefix: str) -> None:
    """Refuse a big-endian file. A file without a stated order is read as little-endian.

    Raises:
        CheckpointError: the stated order is not "little".
    """
    name = f"{prefix}/byteorder"
    if name not in spans:  # PyTorch before 2.1 did not write it
        return
    order = _read_entry(path, file, spans, name, 64)
    if order != b"little":
        raise _error(path, f"its byte order is {order!r}, only b'little' is read", _RESAVE)


def _check_head(path: Path, head: bytes) -> None:
    """Refuse a file that does not start as a zip.

    Args:
        path: the file, for the message.
        head: its first bytes.

    Raises:
        CheckpointError: the file is empty, a Git LFS pointer, a bare pickle, or another file.
    """
    if not head:
        raise _error(path, "is empty")
    if head.startswith(b"version https://git-lfs"):
        raise _error(
            path,
            "is a Git LFS pointer and not the weights",
            "run git lfs pull, or download the file itself",
        )
    if head[0] == 0x80:
        raise _error(
            path, "is a bare pickle (PyTorch's format before 1.6), which is not read", _RESAVE
        )
    if not head.startswith(b"PK\x03\x04"):
        raise _error(path, "is no PyTorch zip file", f"{_AGAIN}, or {_RESAVE}")


def _read_directory(path: Path, file: _BoundedFile) -> dict[str, _Span]:
    """Return the place of every zip entry by name.

    The central directory must agree with the local headers, and no two entries may overlap.

    Raises:
        CheckpointError: the file is no zip, is damaged, or has a compressed, encrypted or repeated
            entry.
    """
    _check_head(path, file.read(64))
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            end = archive.start_dir
    except _ZIP_ERRORS:
        raise _error(path, "is cut off or damaged (its zip directory cannot be read)") from None
    spans: dict[str, _Span] = {}
    bounds: list[tuple[int, int]] = []
    for info in infos:
        if info.orig_filename in spans:
            raise _error(path, f"holds the entry {quote(info.orig_filename)} twice")
        span = _check_entry(path, file, info, end)
        spans[info.orig_filename] = span
        bounds.append((info.header_offset, span.start + span.size))
    bounds.sort()
    if any(before[1] > after[0] for before, after in itertools.pairwise(bounds)):
        raise _error(path, "is damaged (its zip entries overlap)")
    return spans


def _check_entry(path: Path, file: _BoundedFile, info: zipfile.ZipInfo, end: int) -> _Span:
    """Check an entry against its local header, and return the place of its content.

    ``end`` is the offset of the central directory.

    Raises:
        CheckpointError: the entry is encrypted, compressed or damaged.
    """
    name = quote(info.orig_filename)
    # Flags 0x1, 0x40 and 0x2000 (together 0x2041): encryption. Flag 0x800 below: a name in UTF-8.
    if info.flag_bits & 0x2041:
        raise _error(path, f"entry {name} is encrypted, which is not read", _RESAVE)
    if info.compress_type != zipfile.ZIP_STORED:
        raise _error(path, f"entry {name} is compressed, which is not read", _RESAVE)
    damaged = _error(path, f"is cut off or damaged (zip entry {name})")
    if (
        not 0 <= info.header_offset <= end - _LOCAL_HEADER.size
        or info.compress_size != info.file_size
    ):
        raise damaged
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) != _LOCAL_HEADER.size:
        raise damaged
    signature, _, flags, method, _, _, _, packed, size, name_length, extra_length = (
        _LOCAL_HEADER.unpack(header)
    )
    start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    raw_name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    # Local sizes that are stored elsewhere: 0xFFFFFFFF if in the zip64 field, or 0 if in a data
    # descriptor after the content (flag 8).
    absent = {0xFFFFFFFF, 0} if flags & 8 else {0xFFFFFFFF}
    agree = (
        signature == b"PK\x03\x04"
        and method == zipfile.ZIP_STORED
        and not flags & 0x2041
        and {packed, size} <= {info.file_size, *absent}
        and start + info.file_size <= end
        and file.read(name_length) == raw_name
    )
    if not agree:
        raise damaged
    return _Span(start, info.file_size)


def _find_prefix(path: Path, spans: dict[str, _Span]) -> str:
    """Return the folder in the zip that holds ``data.pkl``. ``torch.save`` chooses its name.

    Raises:
        CheckpointError: there is no such folder, or more than one.
    """
    found = [name for name in spans if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise _error(
            path,
            f"is no PyTorch checkpoint (a zip with {len(found)} entries <name>/data.pkl)",
            _RESAVE,
        )
    return found[0].removesuffix("/data.pkl")


def _read_entry(
    path: Path, file: _BoundedFile, spans: dict[str, _Span], name: str, limit: int
) -> bytes:
    """Read an entry of the zip, of at most ``limit`` bytes.

    Raises:
        CheckpointError: the entry is larger, or the file is cut off.
    """
    span = spans[name]
    if span.size > limit:
        raise _error(
            path,
            f"{quote(name)} has {span.size} bytes, more than the {limit} that are read",
            _SAFER,
        )
    content = bytearray(span.size)
    file.seek(span.start)
    if file.readinto(content) != span.size:
        raise _error(path, "is cut off")
    return bytes(content)


# The pickle


def _read_records(path: Path, program: bytes) -> dict[str, TensorRecord]:
    """Interpret the bytes of a data.pkl, which must describe a dict of tensors.

    Raises:
        CheckpointError: the pickle is refused, damaged, or describes something else.
    """
    try:
        result = interpret(program)
    except RefusedError as refused:
        raise _error(path, f"refused: the pickle {refused}", _SAFER) from None
    except DamagedError as damaged:
        raise _error(path, f"its data.pkl is damaged ({damaged})") from None
    if type(result) is not dict:
        raise _error(
            path,
            f"holds an object of type {describe(result)}, not a dict of tensors",
            "save the model's state_dict()",
        )
    for name, value in result.items():
        if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
            raise _error(path, f"the tensor name {quote(name)} is not printable, empty or too long")
        if type(value) is not TensorRecord:
            raise _error(
                path,
                f"entry {quote(name)} is of type {describe(value)}, not a tensor",
                "save the state dict alone",
            )
    return result


def _locate(
    path: Path, name: str, tensor: TensorRecord, prefix: str, spans: dict[str, _Span]
) -> StoredTensor:
    """Check that a tensor is inside its storage, and the storage inside its zip entry.

    ``prefix`` is the folder in the zip, and ``spans`` are the places of the zip's entries.

    Returns:
        The tensor with its place in the file.

    Raises:
        CheckpointError: the storage is missing or too small, or the tensor has too many dimensions
            or too long a side.
    """
    storage, offset, shape, strides = tensor

    def fault(problem: str) -> CheckpointError:
        return _error(path, f"tensor {quote(name)} {problem}")

    span = spans.get(f"{prefix}/data/{storage.key}")
    if span is None:
        raise fault(f"lies in the storage {quote(storage.key)}, which the file lacks")
    if storage.size * _ITEM_BYTES[storage.dtype] > span.size:
        raise fault(
            f"lies in a storage of {storage.size} {storage.dtype} items, "
            f"of which the file has {span.size} bytes"
        )
    if len(shape) > _MAX_DIMS or len(shape) != len(strides):
        raise fault(
            f"has {len(shape)} sizes and {len(strides)} strides, "
            f"of which at most {_MAX_DIMS} each are read"
        )
    # Count zeros as ones: MLX multiplies the other sides of an empty array too.
    if max(shape, default=0) > _MAX_SIDE or math.prod(max(side, 1) for side in shape) >= 1 << 60:
        raise fault("has a side that is too long for MLX")
    # Stride 0 repeats an item: a tensor with more items than its storage is refused too.
    needed = max(math.prod(shape), offset + _extent(shape, strides))
    if 0 not in shape and needed > storage.size:
        raise fault("reaches beyond its storage")
    return StoredTensor(path, shape, storage.dtype, strides, offset, span.start, span.size)
