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
from .torch_files import read_range

WEIGHT_FORMS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
"""Names of an index of several files and of a single file. The preferred format is first."""

SAFETENSORS_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}
"""MLX's name of each type of a safetensors file."""


@dataclass(frozen=True)
class SafetensorsEntry:
    """A tensor of a safetensors file."""

    path: Path
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]
    dtype: str  # MLX's name; the file's own if it is not in ``SAFETENSORS_DTYPES``

    def read(self) -> mx.array:
        """Read the values; float64 becomes float32."""
        return read_range(self.path, self.offset, self.shape, self.dtype)


def weight_files(folder: Path) -> list[Path]:
    """List the weight files of a folder.

    Safetensors files are preferred to ``.bin`` files, and the files of an index to a single file.

    Raises:
        CheckpointError: there are no weights, or the index has no ``weight_map`` or names a file
            that is missing or outside the folder.
        ConfigError: the index is too large, or not a JSON object.
    """
    for index, single in WEIGHT_FORMS:
        if (folder / index).exists():
            return [folder / name for name in sorted(set(read_index(folder / index).values()))]
        if (folder / single).exists():
            return [folder / single]
    raise CheckpointError(
        f"{folder} holds no weights: model.safetensors or pytorch_model.bin, "
        "or an index of either, is expected"
    )


def read_index(path: Path) -> dict[str, str]:
    """Read the ``weight_map`` of an index: tensor name to file name.

    Raises:
        CheckpointError: the index has no ``weight_map``, or names a missing file or one outside
            the folder.
        ConfigError: the index is too large, or not a JSON object.
    """
    weight_map = read_model_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map: download it again")
    for file in set(map(str, weight_map.values())):
        # The pattern has no slash, so the index cannot name a file outside its folder.
        if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", file):
            raise CheckpointError(
                f"{path} points to {file[:80]!r}, which is no file of its own folder: refused"
            )
        if not (path.parent / file).is_file():
            raise CheckpointError(
                f"{path.parent / file} is missing, but {path.name} lists it: download it again"
            )
    return {str(name): str(file) for name, file in weight_map.items()}


def read_safetensors_header(path: Path) -> tuple[dict[str, SafetensorsEntry], dict[str, str]]:
    """Read the header of a safetensors file; return its entries by tensor name, and its metadata.

    The safetensors library checks the header against the file size, but does not give offsets. So
    the header is parsed a second time here.

    Raises:
        CheckpointError: the file is missing, unreadable, truncated, or has a wrong header.
    """
    try:
        with safe_open(str(path), framework="numpy") as checked:
            names = set(checked.keys())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
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
    for name in sorted(names):
        entry = header[name]
        # A file is the header's length in 8 bytes, the header, and then the data. Offsets in the
        # header count from the beginning of the data.
        offset = 8 + length + entry["data_offsets"][0]
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"])
        entries[name] = SafetensorsEntry(path, offset, tuple(entry["shape"]), dtype)
    return entries, metadata


def write_safetensors(path: Path, arrays: Mapping[str, mx.array], metadata: dict[str, str]) -> None:
    """Write a safetensors file. Its name must end in ``.safetensors``, else MLX adds this suffix.

    Raises:
        OSError: the disk is full, which MLX does not always report.
        RuntimeError: MLX cannot write the file.
    """
    mx.save_safetensors(str(path), dict(arrays), metadata)
    if path.stat().st_size < sum(array.nbytes for array in arrays.values()):
        raise OSError(errno.ENOSPC, "the disk is full")
