"""PyTorch ``.bin`` checkpoints read without torch and without unpickling.

Such a file (``torch.save`` of ``{name: tensor}``) is a zip of stored entries: ``<prefix>/data.pkl`` is a pickle that
says how tensors lie in storages, ``<prefix>/data/<key>`` are the storages' bytes.

The pickle is interpreted by ``torch_pickle.py`` and never executed.

Source: ``torch/serialization.py`` (``_save``, ``_load``) and ``torch/_utils.py`` (``_rebuild_tensor_v2``).
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
    "bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32, "float64": mx.float64,
    "int8": mx.int8, "int16": mx.int16, "int32": mx.int32, "int64": mx.int64,
    "uint8": mx.uint8, "uint16": mx.uint16, "uint32": mx.uint32, "uint64": mx.uint64, "bool": mx.bool_,
}  # fmt: skip
_ITEM_BYTES = {
    name: 1 if name == "bool" else int(name.lstrip("abfintlou")) // 8 for name in _DTYPES
}
_CARRIERS = {
    1: mx.uint8,
    2: mx.uint16,
    4: mx.uint32,
    8: mx.uint64,
}  # what bytes are read as, by size of an item

_MAX_PICKLE = 64 << 20  # bytes of data.pkl; a 7B model's has some 200 kB
_MAX_DIRECTORY = 16 << 20  # bytes of the zip's central directory; a 7B model's has some 100 kB
_MAX_DIMS = 8
_MAX_SIDE = (1 << 31) - 1  # MLX keeps sizes in 32 bits
_MAX_NAME = 1024

_AGAIN = "download it again"
_RESAVE = "re-save it with a current PyTorch, or download the safetensors form"
_SAFER = "do not load it with PyTorch; use the safetensors form"


def _error(path: Path, problem: str, fix: str = _AGAIN) -> CheckpointError:
    return CheckpointError(f"{path}: {problem}: {fix}")


# ---- public -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in a file. Checked against the file's layout; none of its data has been read.

    ``strides`` and ``storage_offset`` count items, ``file_offset`` and ``storage_bytes`` count bytes.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str  # "bfloat16", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8" or "bool"
    strides: tuple[int, ...]
    storage_offset: int  # from the storage's start to the tensor's first item
    file_offset: int  # from the file's start to the storage
    storage_bytes: int

    @property
    def size(self) -> int:
        """Number of items."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as ``read`` gives it (before float64 becomes float32)."""
        return self.size * _ITEM_BYTES[self.dtype]

    @property
    def contiguous(self) -> bool:
        """Whether the items lie in the file in C order without gaps."""
        expected = 1
        for side, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if side > 1 and stride != expected:
                return False
            expected *= side
        return True

    def read(self) -> mx.array:
        """The tensor: ``shape`` as stored, C-contiguous, exact values.

        A contiguous tensor takes its own size of memory, another one twice that (more if it skips items). float64
        comes back as float32 on every machine, since GPUs of Apple have no float64.

        Raises:
            CheckpointError: the file has gone, cannot be read, or is shorter than when its header was read.
        """
        start = self.file_offset + self.storage_offset * _ITEM_BYTES[self.dtype]
        if self.contiguous or self.size == 0:
            return read_range(self.path, start, self.shape, self.dtype)
        raw = np.empty(_extent(self.shape, self.strides), f"u{_ITEM_BYTES[self.dtype]}")
        _fill(self.path, start, _bytes_of(raw))
        # A side of 1 may have any stride, also one that numpy cannot hold.
        steps = [
            0 if side == 1 else s * raw.itemsize
            for side, s in zip(self.shape, self.strides, strict=True)
        ]
        blank = _blank(self.shape, self.dtype)
        target = np.frombuffer(_bytes_of(blank), raw.dtype).reshape(self.shape)
        np.copyto(target, np.lib.stride_tricks.as_strided(raw, self.shape, steps))
        return _typed(blank, self.dtype)


def read_range(path: Path, offset: int, shape: tuple[int, ...], dtype: str) -> mx.array:
    """Bytes of a file from ``offset`` on, little-endian and in C order, as an array that owns the only copy of them.

    Args:
        offset: bytes from the start of the file.
        shape: of the result; each side below 2^31.
        dtype: of the bytes: those of ``StoredTensor.dtype``, "uint16", "uint32" or "uint64". float64 comes back as
            float32 (GPUs of Apple have no float64), where what float32 cannot hold is infinite.

    Raises:
        CheckpointError: the file has gone, cannot be read, or ends too early.
    """
    blank = _blank(shape, dtype)
    if blank.size:
        _fill(path, offset, _bytes_of(blank))
    return _typed(blank, dtype)


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """What tensors a PyTorch checkpoint holds, by name in the file's order. Reads headers only.

    Raises:
        CheckpointError: missing, unreadable, damaged, cut off, of the old format without a zip, or anything but a
            plain dict of tensors within its own bounds. A pickle that asks for more than tensors need is refused and
            the thing that it asks for is named.
    """
    path = Path(path)
    try:
        # ``stat`` first: opening a pipe would wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise _error(path, "is no file", "name the .bin file itself")
        with _BoundedFile(path) as file:
            spans = _read_directory(path, file)
            prefix = _find_prefix(path, spans)
            if f"{prefix}/byteorder" in spans:  # files from before PyTorch 2.1 do not say
                order = _read_entry(path, file, spans, f"{prefix}/byteorder", 64)
                if order != b"little":
                    raise _error(
                        path, f"its byte order is {order!r}, only b'little' is read", _RESAVE
                    )
            program = _read_entry(path, file, spans, f"{prefix}/data.pkl", _MAX_PICKLE)
    except FileNotFoundError:
        raise _error(path, "is missing", "download the whole model folder") from None
    except OSError as error:
        raise _error(
            path, f"cannot be read ({error.strerror})", "check the disk and its rights"
        ) from None
    content = _read_records(path, program)
    return {name: _locate(path, name, value, prefix, spans) for name, value in content.items()}


# ---- bytes to arrays ----------------------------------------------------------------------------------------------
# On the CPU stream, so that a GPU neither races with the bytes that are written nor sees float64.


def _blank(shape: tuple[int, ...], dtype: str) -> mx.array:
    """Zeros of unsigned integers as wide as dtype: memory that ``memoryview`` opens for writing."""
    blank = mx.zeros(shape, _CARRIERS[_ITEM_BYTES[dtype]], stream=mx.cpu)
    mx.eval(blank)
    return blank


def _typed(blank: mx.array, dtype: str) -> mx.array:
    """The same bytes as dtype, without a copy (float64 and bool apart)."""
    x = (
        blank.view(_DTYPES[dtype], stream=mx.cpu)
        if dtype != "bool"
        else mx.not_equal(blank, 0, stream=mx.cpu)
    )
    if dtype == "float64":
        x = x.astype(mx.float32, stream=mx.cpu)
    mx.eval(x)
    return x


def _bytes_of(array: Any) -> memoryview:
    """The memory of an MLX or numpy array, open for writing."""
    return memoryview(array).cast("B")


def _fill(path: Path, offset: int, target: memoryview) -> None:
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
    """Items from the first to the last one, both counted; 0 if there are none."""
    if 0 in shape:
        return 0
    return 1 + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))


# ---- the zip ------------------------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """Where the bytes of a zip entry lie in the file."""

    start: int
    size: int


class _BoundedFile(io.FileIO):
    """Keeps ``zipfile`` from reading a central directory that is as large as a hostile file likes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_DIRECTORY:
            raise zipfile.BadZipFile("the central directory is too large")
        return super().read(-1 if size is None else size) or b""


_LOCAL_HEADER = struct.Struct(
    "<4s5H3I2H"
)  # signature, version, flags, method, time, date, crc, sizes, lengths


def _read_directory(path: Path, file: _BoundedFile) -> dict[str, _Span]:
    """Every entry of the zip by name, the central directory and the local headers agreeing."""
    head = file.read(64)
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
    try:
        with zipfile.ZipFile(file) as archive:
            infos, end = archive.infolist(), archive.start_dir
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        struct.error,
        ValueError,
        OverflowError,
        IndexError,
        OSError,
    ):
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
    """Read an entry's local header; ``end`` is where entries must have ended."""
    name = quote(info.orig_filename)
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
    # The local sizes are absent where a data descriptor follows (flag 8), and elsewhere where zip64 holds them.
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


# ---- what the pickle says ----------------------------------------------------------------------------------------


def _read_records(path: Path, program: bytes) -> dict[str, TensorRecord]:
    """The dict of tensors that a data.pkl describes."""
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
    """Check that a tensor lies inside its storage, and the storage inside its entry."""
    storage, offset, shape, strides = tensor

    def outside(problem: str) -> CheckpointError:
        return _error(path, f"tensor {quote(name)} {problem}")

    span = spans.get(f"{prefix}/data/{storage.key}")
    if span is None:
        raise outside(f"lies in the storage {quote(storage.key)}, which the file lacks")
    if storage.size * _ITEM_BYTES[storage.dtype] > span.size:
        raise outside(
            f"lies in a storage of {storage.size} {storage.dtype} items, of which the file has {span.size} bytes"
        )
    if len(shape) > _MAX_DIMS or len(shape) != len(strides):
        raise outside(
            f"has {len(shape)} sizes and {len(strides)} strides, of which at most {_MAX_DIMS} each are read"
        )
    # Zeros count as ones here: MLX multiplies the other sides of an empty array too.
    if max(shape, default=0) > _MAX_SIDE or math.prod(max(side, 1) for side in shape) >= 1 << 60:
        raise outside("has a side that is too long for MLX")
    if 0 not in shape and (
        math.prod(shape) > storage.size or offset + _extent(shape, strides) > storage.size
    ):
        raise outside("reaches beyond its storage")
    return StoredTensor(path, shape, storage.dtype, strides, offset, span.start, span.size)
