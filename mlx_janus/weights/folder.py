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
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import psutil

from ..config import FORMAT_VERSION, MODEL_TYPE, READ_VERSIONS, Dtype, read_model_json
from ..errors import CheckpointError, ConfigError, OutputError
from ..memory import weight_stream
from ..processing.tokenizer import TOKENIZER_FILE
from ..version import __version__
from .safetensors_files import read_safetensors_header, weight_files

STAMP = "mlx_janus_format"
_STAMPS = tuple(map(str, READ_VERSIONS))
OUR_FILES = re.compile(
    r"config\.json|tokenizer\.json|(model.*|shard-\d+)\.safetensors"
    r"|model\.safetensors\.index\.json|\.DS_Store"
)
"""File names in a converted folder, complete or partial."""

Progress = Callable[[str, int, int], None]
"""Called with a stage ("hashing", "converting" or "verifying"), finished bytes and all bytes."""


# Reading


def is_converted(folder: Path) -> bool:
    """Return whether a folder is a converted one, by the model type in ``config.json``.

    Raises:
        ConfigError: ``config.json`` is too large, or not a JSON object.
    """
    path = folder / "config.json"
    return path.is_file() and read_model_json(path).get("model_type") == MODEL_TYPE


def open_converted(folder: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Return the lazy arrays of a converted folder, and the stamp of its last weight file.

    A conversion writes one stamp into all its files. Here each must only have a known format.

    Raises:
        CheckpointError: a file is missing or damaged, or lacks the stamp of a known format.
    """
    try:
        files = weight_files(folder)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    arrays: dict[str, mx.array] = {}
    stamp: dict[str, str] = {}
    for path in files:
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path} is no safetensors file: {folder} was not converted by mlx_janus"
            )
        _, stamp = read_safetensors_header(path)
        if stamp.get(STAMP) not in _STAMPS:
            raise CheckpointError(
                f"{path} does not bear mlx_janus's stamp of format {FORMAT_VERSION}: "
                "convert the original folder again"
            )
        # Any thread can evaluate arrays of this stream.
        arrays.update(mx.load(str(path), stream=weight_stream(mx.DeviceType.cpu)))  # type: ignore[arg-type]
    return arrays, stamp


# The stamp


def make_stamp(
    source: str, revision: str, dtype: Dtype | None, hashes: dict[str, str]
) -> dict[str, str]:
    """Make the stamp of a conversion from the name, revision and file hashes of its source."""
    return {
        "format": "mlx",
        STAMP: str(FORMAT_VERSION),
        "mlx_janus_version": __version__,
        "source": source,
        "revision": revision,
        "dtype": dtype or "",  # the option; "" keeps each tensor's own type
        "source_sha256": json.dumps(hashes, sort_keys=True),
    }


def source_hashes(folder: Path, progress: Progress) -> dict[str, str]:
    """Hash the files that a conversion reads: file name to hexadecimal SHA-256."""
    files = [*weight_files(folder), folder / "config.json", folder / TOKENIZER_FILE]
    total = sum(file.stat().st_size for file in files)
    done = 0
    hashes = {}
    block = bytearray(1 << 22)
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(block):
                digest.update(memoryview(block)[:count])
                done += count
                progress("hashing", done, total)
        hashes[file.name] = digest.hexdigest()
    return hashes


def stamped_hashes(converted: Path, stamp: dict[str, str]) -> dict[str, str]:
    """Return the file hashes of the source from a conversion's stamp.

    Raises:
        CheckpointError: the stamp has none.
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

    An empty folder is accepted. Any other must be a conversion, and needs ``overwrite``. Nothing is
    replaced here.

    Raises:
        OutputError: the folder exists and ``overwrite`` is off, the folder is no conversion or also
            holds other files, or its parent folder is missing.
    """
    if not output.resolve().parent.is_dir():
        raise OutputError(f"{output.parent} is not a folder: make it first")
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
    """Return a new hidden path next to ``output`` for an unfinished folder, with this pid in it."""
    return output.parent / f".{output.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial"


@contextlib.contextmanager
def atomic_folder(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary sibling of ``output``, renamed to it on success and removed on failure.

    With ``overwrite``, the rename replaces an existing folder. At first, the partial folders of
    killed conversions to ``output`` are removed; a folder that one moved aside is moved back.

    Raises:
        OutputError: the folder cannot be created or renamed.
    """
    output = output.resolve()
    _remove_stale(output)
    folder = partial_name(output)
    try:
        folder.mkdir()
    except OSError as error:
        raise OutputError(
            f"{output} cannot be made ({error.strerror}): choose another folder"
        ) from None
    try:
        yield folder
        _replace(folder, output, overwrite)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _replace(folder: Path, output: Path, overwrite: bool) -> None:
    """Rename a finished folder to ``output``, and remove the folder that it replaces.

    The replaced folder is first moved aside. If the rename to ``output`` then fails or is
    interrupted, the replaced folder is moved back.

    Raises:
        OutputError: a rename fails.
    """
    old = folder.with_suffix(".old")
    try:
        if overwrite and output.exists():
            output.rename(old)
        # Fails if another process has just written the output; only an empty folder is replaced.
        folder.rename(output)
    except BaseException as error:
        if old.exists() and not output.exists():
            old.rename(output)
        if not isinstance(error, OSError):
            raise
        raise OutputError(
            f"{output} cannot be put in place ({error.strerror}): choose another folder"
        ) from None
    shutil.rmtree(old, ignore_errors=True)


def _remove_stale(output: Path) -> None:
    """Remove the partial folders of killed conversions to ``output``.

    A name holds the pid of its conversion, so running ones are kept. A killed conversion
    may have moved an older folder aside, to a name that ends in .old. This folder is moved back if
    nothing has replaced it.
    """
    for folder in output.parent.glob(f".{glob.escape(output.name)}.*.*.*"):
        pid, _, kind = folder.name.split(".")[-3:]
        if kind not in ("partial", "old") or not pid.isdigit() or psutil.pid_exists(int(pid)):
            continue
        if kind == "old" and not output.exists():
            folder.rename(output)
        else:
            shutil.rmtree(folder, ignore_errors=True)
