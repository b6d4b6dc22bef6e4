"""The format of a converted folder: its files and their stamp.

``config.json`` holds a ``JanusConfig``, ``tokenizer.json`` the tokenizer, and one or several
safetensors files the weights. The header of each weight file holds the stamp: the format version
and the origin of the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx

from ..config import CONVERTED_MODEL_TYPE, FORMAT_VERSION, READABLE_VERSIONS, Dtype, read_model_json
from ..errors import CheckpointError, ConfigError, OutputError
from ..files import open_regular, parse_json
from ..memory import weight_stream
from ..processing.tokenizer import TOKENIZER_FILE
from ..version import __version__
from .safetensors_files import read_safetensors_header, weight_files
from .torch_files import ChecksumReader

_FORMAT_KEY = "mlx_janus_format"
_READABLE_FORMATS = tuple(map(str, READABLE_VERSIONS))
OUR_FILES = re.compile(
    r"config\.json|tokenizer\.json|(model.*|shard-\d+)\.safetensors"
    r"|model\.safetensors\.index\.json|source-[0-9a-f]{16}\.json|\.mlx_janus-\w+\.tmp|\.DS_Store"
)
"""Pattern of the file names that a complete or unfinished converted folder may hold."""
RECORD_NAME = re.compile(r"source-[0-9a-f]{16}\.json")
"""Pattern of the file names of records, which tell the sources of a conversion in the cache."""

Progress = Callable[[str, int, int], None]
"""Called with a stage ("hashing", "converting" or "verifying"), finished bytes and all bytes."""


# Reading


def is_converted(folder: Path) -> bool:
    """Return whether a folder holds a converted model, by the model type in ``config.json``.

    Raises:
        ConfigError: ``config.json`` is too large, or not a JSON object.
    """
    path = folder / "config.json"
    return path.is_file() and read_model_json(path).get("model_type") == CONVERTED_MODEL_TYPE


def open_converted(folder: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Return the lazy arrays of a converted folder, and its stamp.

    A conversion writes the same stamp, as metadata, into all its weight files.

    Raises:
        CheckpointError: a file is missing or damaged, has no stamp or that of an unknown format, or
            has another stamp than the first file; or two files have an array of the same name.
    """
    try:
        files = weight_files(folder)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    arrays: dict[str, mx.array] = {}
    first_stamp: dict[str, str] | None = None
    for path in files:
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path} is no safetensors file: {folder} was not converted by mlx_janus"
            )
        entries, stamp = read_safetensors_header(path)
        _check_stamp(path, stamp, files[0], first_stamp)
        first_stamp = stamp  # equal in all files, by the check
        if repeated := sorted(arrays.keys() & entries.keys()):
            raise CheckpointError(
                f"{path} holds {repeated[0][:80]!r}, which another file of its folder holds too: "
                "convert the original folder again"
            )
        arrays.update(_load_lazily(path))
    return arrays, first_stamp or {}


def _load_lazily(path: Path) -> dict[str, mx.array]:
    """Return the lazy arrays of a safetensors file, whose header was checked.

    Raises:
        CheckpointError: MLX does not read the file, for example because of a type such as float64.
    """
    try:
        # Any thread can evaluate lazy arrays of this stream.
        arrays = mx.load(str(path), stream=weight_stream(mx.DeviceType.cpu))
    except RuntimeError as error:
        reason = str(error)[:80]
        raise CheckpointError(
            f"{path} cannot be read by MLX ({reason}): convert the original folder again"
        ) from None
    assert isinstance(arrays, dict)  # of a safetensors file
    return arrays


def _check_stamp(
    path: Path, stamp: dict[str, str], first_file: Path, first_stamp: dict[str, str] | None
) -> None:
    """Check the stamp of a weight file.

    Args:
        path: the weight file.
        stamp: its metadata.
        first_file: the first weight file of the folder.
        first_stamp: the metadata of the first file; None if ``path`` is that file.

    Raises:
        CheckpointError: the stamp is missing, is of a format that cannot be read, or differs from
            the first file's.
    """
    if stamp.get(_FORMAT_KEY) not in _READABLE_FORMATS:
        raise CheckpointError(
            f"{path} does not bear mlx_janus's stamp of format {' or '.join(_READABLE_FORMATS)}: "
            "convert the original folder again"
        )
    if first_stamp is not None and stamp != first_stamp:
        raise CheckpointError(
            f"{path} and {first_file.name} are of two conversions: "
            "convert the original folder again"
        )


# The stamp


def make_stamp(
    source: str,
    revision: str,
    dtype: Dtype | None,
    hashes: Mapping[str, str],
    roles: str | None = None,
) -> dict[str, str]:
    """Return the stamp of a conversion: metadata for the header of each weight file.

    Args:
        source: name of the model's origin, such as a Hub id.
        revision: the origin's commit on the Hub; "" if it has none.
        dtype: type that the weights are cast to; None: each tensor keeps its own.
        hashes: SHA-256 of the origin's files, by file name.
        roles: the requested roles, which replace the origin's own; None: no request.
    """
    stamp = {
        "format": "mlx",
        _FORMAT_KEY: str(FORMAT_VERSION),
        "mlx_janus_version": __version__,
        "source": source.encode(errors="replace").decode(),  # a folder's name may not be valid text
        "revision": revision,
        "dtype": dtype or "",
        "source_sha256": json.dumps(dict(hashes), sort_keys=True),
    }
    return stamp | ({"roles": roles} if roles else {})


def source_hashes(folder: Path, progress: Progress) -> dict[str, str]:
    """Hash the weights, config and tokenizer of a PyTorch model folder.

    Returns:
        The hexadecimal SHA-256 of each file, by file name.
    """
    files = [*weight_files(folder), folder / "config.json", folder / TOKENIZER_FILE]
    total_bytes = sum(file.stat().st_size for file in files)
    done_bytes = 0
    hashes = {}
    block = bytearray(1 << 22)  # 4 MiB
    for file in files:
        digest = hashlib.sha256()
        checksums = ChecksumReader(file) if file.suffix == ".bin" else None
        with open_regular(file) as stream:
            while count := stream.readinto(block):
                part = memoryview(block)[:count]
                digest.update(part)
                if checksums:
                    checksums.update(part)
                done_bytes += count
                progress("hashing", done_bytes, total_bytes)
        hashes[file.name] = digest.hexdigest()
    return hashes


def stamped_hashes(converted: Path, stamp: dict[str, str]) -> dict[str, str]:
    """Return the SHA-256 of the files of a conversion's source, by file name, from its stamp.

    Args:
        converted: the converted folder, for the message.
        stamp: its stamp.

    Raises:
        CheckpointError: the stamp records no hashes.
    """
    try:
        hashes = parse_json(stamp.get("source_sha256", ""))
    except ValueError:
        hashes = None
    if not isinstance(hashes, dict):
        raise CheckpointError(
            f"{converted} has a stamp without the hashes of its source: convert again"
        )
    return hashes


# Writing


def resolve_output(output: Path) -> Path:
    """Return the absolute path of an output folder, without links.

    Raises:
        OutputError: a link in the path leads to itself.
    """
    try:
        return output.resolve()
    except RuntimeError:  # of Python 3.11 and 3.12
        raise OutputError(f"{output} is in a loop of links: choose another folder") from None


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that cannot be written or must not be replaced.

    A folder that does not exist or is empty is accepted. Any other needs ``overwrite``, and must
    hold a converted model and no further files. This function only checks, and replaces nothing.

    Raises:
        OutputError: the folder is not accepted, its parent folder is missing, or its path is a loop
            of links.
        ConfigError: the folder's ``config.json`` is too large, or not a JSON object.
    """
    if not resolve_output(output).parent.is_dir():
        raise OutputError(f"{output.parent} is not a folder: make it first")
    # ``lexists`` also finds a link to a missing folder, which must not be replaced.
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise OutputError(
            f"{output} exists already: pass overwrite=True to replace it, or choose another folder"
        )
    if not output.is_dir() or not is_converted(output):
        raise OutputError(
            f"{output} is not a converted model, so it is not replaced: choose another folder"
        )
    if foreign := sorted(p.name for p in output.iterdir() if not OUR_FILES.fullmatch(p.name)):
        raise OutputError(
            f"{output} also holds {foreign[0]}, so it is not replaced: "
            "move it, or choose another folder"
        )
