"""The format of a converted folder: its files, their stamp, and atomic writing.

``config.json`` holds a ``JanusConfig``, ``tokenizer.json`` the tokenizer, and one or several
safetensors files the weights. The header of each weight file holds the stamp: the format version
and the origin of the weights.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import mlx.core as mx
import psutil

from ..config import CONVERTED_MODEL_TYPE, FORMAT_VERSION, READABLE_VERSIONS, Dtype, read_model_json
from ..errors import CheckpointError, ConfigError, OutputError
from ..memory import weight_stream
from ..processing.tokenizer import TOKENIZER_FILE
from ..version import __version__
from .safetensors_files import read_safetensors_header, weight_files

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
        CheckpointError: a file is missing or damaged, lacks the stamp of a format that can be read,
            or has another stamp than the first file; or two files have an array of the same name.
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
        # Any thread can evaluate lazy arrays of this stream.
        arrays.update(mx.load(str(path), stream=weight_stream(mx.DeviceType.cpu)))  # type: ignore[arg-type]
    return arrays, first_stamp or {}


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
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(block):
                digest.update(memoryview(block)[:count])
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
        hashes = json.loads(stamp.get("source_sha256", ""))
    except (ValueError, RecursionError):
        hashes = None
    if not isinstance(hashes, dict):
        raise CheckpointError(
            f"{converted} has a stamp without the hashes of its source: convert again"
        )
    return hashes


# Writing


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that cannot be written or must not be replaced.

    A folder that does not exist or is empty is accepted. Any other needs ``overwrite``, and must
    hold a converted model and no further files. This function only checks, and replaces nothing.

    Raises:
        OutputError: the folder is not accepted, or its parent folder is missing.
        ConfigError: the folder's ``config.json`` is too large, or not a JSON object.
    """
    if not output.resolve().parent.is_dir():
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


def partial_name(output: Path) -> Path:
    """Return a new hidden path next to ``output``, for a folder being written or removed.

    The name holds this process's pid, so another process can tell whether this one has ended.
    """
    return output.parent / f".{output.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial"


@contextlib.contextmanager
def atomic_folder(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder next to ``output``; rename it on success, remove it on failure.

    With ``overwrite``, the renamed folder replaces an existing one. If an earlier conversion to
    ``output`` was killed, the folders that it left behind are cleaned up first.

    Raises:
        OutputError: the temporary folder cannot be created or renamed.
    """
    output = output.resolve()
    _clean_up_leftovers(output)
    folder = partial_name(output)
    try:
        folder.mkdir()
    except OSError as error:
        raise OutputError(
            f"{output} cannot be made ({error.strerror}): choose another folder"
        ) from None
    try:
        yield folder
        _put_in_place(folder, output, overwrite)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _put_in_place(folder: Path, output: Path, overwrite: bool) -> None:
    """Rename a finished folder to ``output``. With ``overwrite``, replace an existing folder.

    The existing folder is first moved aside, and removed at the end. If renaming the
    finished folder fails or is interrupted, the existing folder is moved back.

    Raises:
        OutputError: a rename fails.
    """
    old = folder.with_suffix(".old")
    try:
        if overwrite and output.exists():
            output.rename(old)
        # A rename never replaces a folder with files. It fails if another process has just written
        # the output.
        folder.rename(output)
    except BaseException as error:  # KeyboardInterrupt too
        if old.exists() and not output.exists():
            old.rename(output)
        if not isinstance(error, OSError):
            raise
        raise OutputError(
            f"{output} cannot be put in place ({error.strerror}): choose another folder"
        ) from None
    shutil.rmtree(old, ignore_errors=True)


def _clean_up_leftovers(output: Path) -> None:
    """Remove the folders next to ``output`` that are left over from a killed conversion to it.

    A folder that ends in .old is an earlier output, moved aside to be replaced. If ``output`` is
    missing, this folder is moved back instead.
    """
    # The names are .<output>.<pid>.<random digits>.<suffix>.
    for folder in output.parent.glob(f".{glob.escape(output.name)}.*.*.*"):
        pid, _, suffix = folder.name.split(".")[-3:]
        if suffix not in ("partial", "old") or not pid.isdigit():
            continue  # another program's folder
        if psutil.pid_exists(int(pid)):
            continue  # the conversion is still running
        if suffix == "old" and not output.exists():
            folder.rename(output)
        else:
            shutil.rmtree(folder, ignore_errors=True)
