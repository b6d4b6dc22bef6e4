"""The weight files of a folder, and reading and writing safetensors files."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from ..config import read_model_json
from ..errors import CheckpointError
from ..files import POINTER_ADVICE, is_git_pointer, open_regular
from .torch_files import read_range
from .weight_names import WEIGHT_FORMS, shards_without_index

MAX_TENSORS = 20_000
"""Most tensors of a file; Janus-Pro-7B has about 1,100."""
_MAX_FILE_NAME = 255  # bytes; file systems refuse longer names with an error of their own
_MAX_SIDE = (1 << 31) - 1  # MLX stores sizes in 32 bits
_MAX_HEADER = 16 << 20  # bytes of a safetensors header; Janus-Pro-7B's has about 150 kB

SAFETENSORS_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}
"""MLX's name of each type of a safetensors file."""

# Beginnings of the names of files that hold no model's weights.
_NO_WEIGHTS = (".", "adapter_model", "training_args", "optimizer", "scheduler")


@dataclass(frozen=True)
class SafetensorsEntry:
    """A tensor of a safetensors file."""

    path: Path
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]
    dtype: str  # MLX's name; the file's own if it is not in ``SAFETENSORS_DTYPES``

    def read(self) -> mx.array:
        """Read the values; float64 becomes float32.

        Raises:
            CheckpointError: MLX has no such type; or the file is missing, unreadable, or was cut
                short after its header was read.
        """
        if self.dtype not in SAFETENSORS_DTYPES.values():
            raise CheckpointError(
                f"{self.path} holds values of the type {self.dtype[:20]!r}, which are not read: "
                "take a form of the model in bfloat16, float16 or float32"
            )
        return read_range(self.path, self.offset, self.shape, self.dtype)


@dataclass(frozen=True)
class WeightSet:
    """The weight files of a folder, and the index that lists them; None if there is no index."""

    files: list[Path]
    index: Path | None


def find_weights(folder: Path) -> WeightSet:
    """Find the weight files of a folder.

    Safetensors files are preferred to ``.bin`` files. The files that an index lists are preferred
    to a single file, unless a listed file is missing. Shards without an index are the last choice.

    Raises:
        CheckpointError: there are no weights, a shard is missing, there are two sets of shards
            without an index, or the index has no ``weight_map`` or names a file outside the folder.
        ConfigError: the index is too large, or not a JSON object.
    """
    for index, single in WEIGHT_FORMS:
        if (folder / index).exists():
            names = sorted(set(read_index(folder / index).values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if not missing:
                return WeightSet([folder / name for name in names], folder / index)
            if not (folder / single).exists():
                raise CheckpointError(
                    f"{folder / missing[0]} is missing, but {index} lists it: download it again"
                )
        if (folder / single).exists():
            return WeightSet([folder / single], None)
    try:
        shards = shards_without_index(_names_in(folder))
    except CheckpointError as error:
        raise CheckpointError(f"{folder} {error}") from None
    if not shards:
        raise CheckpointError(f"{folder} {_why_no_weights(folder)}")
    return WeightSet([folder / name for name in shards], None)


def weight_files(folder: Path) -> list[Path]:
    """List the weight files of a folder, as ``find_weights`` finds them.

    Raises:
        CheckpointError, ConfigError: as for ``find_weights``.
    """
    return find_weights(folder).files


def _names_in(folder: Path) -> list[str]:
    """Return the names of the files in a folder; an empty list if it cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError:
        return []


def _why_no_weights(folder: Path) -> str:
    """Return the end of an error message: why a folder has no weights, and a likely fix."""
    problem = (
        "holds no weights: model.safetensors or pytorch_model.bin, or an index of either, "
        "is expected"
    )
    others = [name for name in _names_in(folder) if not name.startswith(_NO_WEIGHTS)]
    for name in others:
        if name.endswith((".safetensors", ".bin")):
            is_bin = name.endswith(".bin")
            expected = "pytorch_model.bin" if is_bin else "model.safetensors"
            return f"{problem}; if {name[:80]} holds all of them, rename it to {expected}"
    for name in others:
        if name.endswith((".gguf", ".pth", ".pt", ".ckpt")):
            return f"{problem}, and {name[:80]} is of a form that is not read"
    return problem


def read_index(path: Path) -> dict[str, str]:
    """Read the ``weight_map`` of an index: file name by tensor name. The files may be missing.

    Raises:
        CheckpointError: the index has no ``weight_map``, or names a file outside its folder.
        ConfigError: the index is too large, or not a JSON object.
    """
    weight_map = read_model_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map: download it again")
    for file in set(map(str, weight_map.values())):
        # The pattern has no slash, so the index cannot name a file outside its folder.
        is_name = re.fullmatch(r"[\w.-]+\.(safetensors|bin)", file) is not None
        if not is_name or len(file.encode()) > _MAX_FILE_NAME:
            raise CheckpointError(
                f"{path} points to {file[:80]!r}, which is no file of its own folder: refused"
            )
    return {str(name): str(file) for name, file in weight_map.items()}


def read_safetensors_header(path: Path) -> tuple[dict[str, SafetensorsEntry], dict[str, str]]:
    """Read the header of a safetensors file; return its entries by tensor name, and its metadata.

    The safetensors library checks the header against the file size, but does not give offsets. So
    the header is parsed a second time here.

    Raises:
        CheckpointError: the file is missing, unreadable, truncated, a Git LFS pointer, or has a
            wrong header.
    """
    _refuse_pointer(path)
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            content = file.read(min(length, _MAX_HEADER))
        if length > _MAX_HEADER:
            raise ValueError(f"its header has {length} bytes, more than {_MAX_HEADER}")
        with safe_open(str(path), framework="numpy") as checked:
            names = set(checked.keys())
        if len(names) > MAX_TENSORS:
            raise ValueError(f"it has {len(names)} tensors, more than {MAX_TENSORS}")
        header = json.loads(content)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError, MemoryError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is no whole safetensors file ({reason}): download it again"
        ) from None
    metadata = header.pop("__metadata__", None) or {}
    entries = {}
    # Only an empty tensor can have a long side, since the data would be larger than the file.
    too_long = [name for name in names if max(header[name]["shape"], default=0) > _MAX_SIDE]
    if too_long:
        raise CheckpointError(
            f"{path}: {min(too_long)[:80]!r} has a side that is too long for MLX: download it again"
        )
    for name in sorted(names):
        entry = header[name]
        # A file is the header's length in 8 bytes, the header, and then the data. Offsets in the
        # header count from the beginning of the data.
        offset = 8 + length + entry["data_offsets"][0]
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"])
        entries[name] = SafetensorsEntry(path, offset, tuple(entry["shape"]), dtype)
    return entries, metadata


def _refuse_pointer(path: Path) -> None:
    """Refuse a Git LFS pointer in place of a weight file.

    Raises:
        CheckpointError: the file is one.
    """
    try:
        with open_regular(path) as file:
            head = file.read(64)
    except OSError:  # the caller reports it
        return
    if is_git_pointer(head):
        raise CheckpointError(f"{path} is a Git LFS pointer and not the weights: {POINTER_ADVICE}")


def write_safetensors(path: Path, arrays: Mapping[str, mx.array], metadata: dict[str, str]) -> None:
    """Write a safetensors file. Its name must end in ``.safetensors``, else MLX adds this suffix.

    Raises:
        OSError: the disk is full, which MLX does not always report.
        RuntimeError: MLX cannot write the file.
    """
    mx.save_safetensors(str(path), dict(arrays), metadata)
    if path.stat().st_size < sum(array.nbytes for array in arrays.values()):
        raise OSError(errno.ENOSPC, "the disk is full")
