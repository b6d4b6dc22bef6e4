"""Convert once: a PyTorch model folder becomes a stamped MLX folder.

One tensor at a time is read, laid out, cast and quantized, and shards are written as they fill, so that memory stays
near the larger of one shard and one tensor whatever the model's size. The folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil

from ..config import DTYPES, FORMAT_VERSION, MODEL_TYPE, Dtype, JanusConfig, LayerBits, read_json
from ..errors import CheckpointError, ConfigError, OptionError, OutputError
from ..memory import format_size
from ..processing.tokenizer import prepare_tokenizer
from ..version import __version__
from .checkpoint import PlannedTensor, read_plan, read_safetensors_header, weight_files
from .published import read_published_config
from .quantize import DEFAULT_GROUP_SIZE, bits_a_weight, plan_quantization, quantize_array

SHARD_BYTES = 1_000_000_000
STAMP = "mlx_janus_format"
OUR_FILES = re.compile(
    r"config\.json|tokenizer\.json|(model.*|shard-\d+)\.safetensors|model\.safetensors\.index\.json|\.DS_Store"
)
"""What a converted folder may hold, whole or on its way."""

Progress = Callable[[str, int, int], None]
"""Called with a stage ("hashing", "converting", "verifying"), bytes done and bytes in all."""

# The codec overflows in half precision and costs little: it keeps the type it was stored in.
_KEEPS_TYPE = "gen_vision_model."


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert: without ``bits`` and ``recipe`` weights stay float, without ``dtype`` in the source's type.

    ``group_size`` goes with ``bits``; a recipe has its own.
    """

    bits: int | None = None
    group_size: int = DEFAULT_GROUP_SIZE
    dtype: Dtype | None = None
    overwrite: bool = False
    recipe: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass(frozen=True)
class Source:
    """A PyTorch model folder, and the name and revision that the stamp records for it."""

    folder: Path
    name: str
    revision: str = ""


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    path: Path
    config: JanusConfig
    size: int  # bytes on disk
    tensors: int


def convert_checkpoint(
    source: Source, output: Path, options: ConvertOptions | None = None, progress: Progress | None = None
) -> Conversion:
    """Write ``output``, a folder that ``load`` takes, from a PyTorch model folder.

    Raises:
        ConfigError, UnsupportedModelError, CheckpointError: the source cannot be used; see the message.
        OptionError: bits, group size, recipe or dtype out of range, or bits and a recipe at once.
        OutputError: the output is there already, or cannot be written. Nothing is left behind.
    """
    options = options or ConvertOptions()
    progress = progress or (lambda *_: None)
    _refuse_converted(source.folder)
    _check_apart(source.folder, output)
    check_output(output, overwrite=options.overwrite)
    config, planned = _plan(source, options)
    tokenizer = prepare_tokenizer(source.folder / "tokenizer.json", config.prompt)
    _check_space(output, sum(_converted_bytes(tensor, config, options.dtype) for tensor in planned))
    with whole_folder(output, overwrite=options.overwrite) as folder:
        metadata = make_stamp(source.name, source.revision, options.dtype, _hashes(source.folder, progress))
        try:
            total = _write_shards(folder, planned, config, options.dtype, metadata, progress)
            (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
            config.dump(folder / "config.json")
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(
                f"{output} cannot be written ({reason}): free some space or choose another folder"
            ) from None
    size = sum(file.stat().st_size for file in output.iterdir())
    return Conversion(output, config, size, total)


def verify_conversion(source: Source, converted: Path, progress: Progress | None = None) -> int:
    """Check a converted folder against its source, value by value; the number of tensors compared.

    Raises:
        CheckpointError: the source's files are not those that the stamp names, or a tensor differs.
        ConfigError, UnsupportedModelError: either folder cannot be read.
    """
    progress = progress or (lambda *_: None)
    if not converted.is_dir():
        raise CheckpointError(f"{converted} is no folder: convert the model first, then verify it")
    config = JanusConfig.load(converted / "config.json")
    arrays, metadata = open_converted(converted)
    stamped, hashes = _stamped_hashes(converted, metadata), _hashes(source.folder, progress)
    for name, digest in hashes.items():
        if stamped.get(name) != digest:
            raise CheckpointError(f"{source.folder / name} is not the file that {converted} was made from")
    fresh, planned = _plan(source, _options_of(config))
    dtype = config.dtype if metadata.get("dtype") else None
    if replace(fresh, dtype=config.dtype) != config:
        raise CheckpointError(f"{converted / 'config.json'} does not say what {source.folder} says: convert again")
    tokenizer = converted / "tokenizer.json"
    prepared = prepare_tokenizer(source.folder / "tokenizer.json", config.prompt).encode()
    if not tokenizer.is_file() or tokenizer.read_bytes() != prepared:
        raise CheckpointError(f"{converted / 'tokenizer.json'} differs from the source's: convert again")
    count = 0
    done, total = 0, sum(tensor.source_bytes for tensor in planned)
    for tensor in planned:
        for name, array in _convert_tensor(tensor, config, dtype).items():
            stored = arrays.pop(name, None)
            if stored is None or not _same_bits(array, stored):
                raise CheckpointError(f"{converted}: {name} differs from what {source.folder} gives: convert again")
            count += 1
        mx.clear_cache()
        done += tensor.source_bytes
        progress("verifying", done, total)
    if arrays:
        raise CheckpointError(f"{converted}: {min(arrays)} is not of the source: convert again")
    return count


def _options_of(config: JanusConfig) -> ConvertOptions:
    """The options that a converted folder was quantized with."""
    quantization = config.quantization
    if quantization is None:
        return ConvertOptions()
    if quantization.recipe:
        return ConvertOptions(recipe=quantization.recipe)
    return ConvertOptions(bits=quantization.bits, group_size=quantization.group_size)


def _stamped_hashes(converted: Path, metadata: dict[str, str]) -> dict[str, str]:
    try:
        hashes = json.loads(metadata.get("source_sha256", ""))
    except (ValueError, RecursionError):
        hashes = None
    if not isinstance(hashes, dict):
        raise CheckpointError(f"{converted} has a stamp without the hashes of its source: convert again")
    return hashes


def open_converted(folder: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays of a converted folder, unread, and the stamp of its files.

    Raises:
        CheckpointError: a file is missing, damaged, or not stamped as ours in this format.
    """
    try:
        files = weight_files(folder)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    arrays: dict[str, mx.array] = {}
    stamp: dict[str, str] = {}
    for path in files:
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is no safetensors file: {folder} was not converted by mlx_janus")
        _, stamp = read_safetensors_header(path)
        if stamp.get(STAMP) != str(FORMAT_VERSION):
            raise CheckpointError(
                f"{path} does not bear mlx_janus's stamp of format {FORMAT_VERSION}: convert the original folder again"
            )
        arrays.update(mx.load(str(path)))  # type: ignore[arg-type]
    return arrays, stamp


def is_converted(folder: Path) -> bool:
    """Whether a folder's config says that it is one of ours."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") == MODEL_TYPE


def _refuse_converted(folder: Path) -> None:
    if is_converted(folder):
        raise CheckpointError(f"{folder} is converted already: load it as it is, or convert the original folder")


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that cannot be written or must not be replaced.

    Raises:
        OutputError: with the reason and the fix.
    """
    if not output.resolve().parent.is_dir():
        raise OutputError(f"{output.parent} is no folder: make it first")
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise OutputError(f"{output} exists already: pass --overwrite to replace it, or choose another folder")
    if not output.is_dir() or not is_converted(output):
        raise OutputError(f"{output} is not a converted model, so it is not replaced: choose another folder")
    if foreign := sorted(p.name for p in output.iterdir() if not OUR_FILES.fullmatch(p.name)):
        raise OutputError(f"{output} also holds {foreign[0]}, so it is not replaced: move it, or choose another folder")


def _check_apart(source: Path, output: Path) -> None:
    resolved = output.resolve()
    if resolved == source.resolve() or resolved in source.resolve().parents:
        raise OutputError(f"{output} holds the source itself: choose another output folder")


def _plan(source: Source, options: ConvertOptions) -> tuple[JanusConfig, list[PlannedTensor]]:
    config, layout = read_published_config(source.folder)
    quantization = plan_quantization(config, options.bits, options.group_size, recipe=options.recipe)
    planned = read_plan(source.folder, config, layout)
    stored = next(t.dtype for t in planned if t.name == "language_model.model.norm.weight")
    dtype: Any = options.dtype or stored
    return replace(config, dtype=dtype, quantization=quantization), planned


def _quantized(config: JanusConfig) -> dict[str, LayerBits]:
    return {layer.path: layer for layer in config.quantization.layers} if config.quantization else {}


def _convert_tensor(tensor: PlannedTensor, config: JanusConfig, dtype: Dtype | None) -> dict[str, mx.array]:
    """A parameter as it is stored: one array, or two or three once quantized."""
    array = tensor.read()
    if dtype is not None and not tensor.name.startswith(_KEEPS_TYPE):
        array = array.astype(getattr(mx, dtype))
        mx.eval(array)
    path, _, leaf = tensor.name.rpartition(".")
    layer = _quantized(config).get(path)
    if leaf != "weight" or layer is None:
        return {tensor.name: array}
    parts = quantize_array(array, layer)
    mx.eval(list(parts.values()))
    return {f"{path}.{part}": value for part, value in parts.items()}


def _converted_bytes(tensor: PlannedTensor, config: JanusConfig, dtype: Dtype | None) -> int:
    """What ``_convert_tensor`` will give, in bytes."""
    own = tensor.dtype if dtype is None or tensor.name.startswith(_KEEPS_TYPE) else dtype
    width = 32 if own == "float32" else 16
    layer = _quantized(config).get(tensor.name.removesuffix(".weight"))
    return int(math.prod(tensor.shape) * (bits_a_weight(layer, width) if layer else width) / 8)


def _same_bits(a: mx.array, b: mx.array) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[a.dtype.size]
    return bool(mx.array_equal(a.view(integer), b.view(integer)).item())


def _write_shards(
    folder: Path,
    planned: Sequence[PlannedTensor],
    config: JanusConfig,
    dtype: Dtype | None,
    metadata: dict[str, str],
    progress: Progress,
) -> int:
    """Convert and write, a shard of at most ``SHARD_BYTES`` or of one tensor at a time; the number of tensors."""
    shards: list[list[str]] = []
    pending: dict[str, mx.array] = {}
    size = written = 0

    def flush() -> None:
        nonlocal written
        path = folder / f"shard-{len(shards)}.safetensors"
        mx.save_safetensors(str(path), pending, metadata)
        held = sum(array.nbytes for array in pending.values())
        if path.stat().st_size < held:
            raise OSError("the disk is full")
        written += held
        shards.append(list(pending))
        pending.clear()
        mx.clear_cache()

    done, total = 0, sum(tensor.source_bytes for tensor in planned)
    progress("converting", 0, total)
    for tensor in planned:
        coming = _converted_bytes(tensor, config, dtype)
        if pending and size + coming > SHARD_BYTES:  # before the next is read, so that the two are not held together
            flush()
            size = 0
        pending.update(_convert_tensor(tensor, config, dtype))
        size += coming
        done += tensor.source_bytes
        progress("converting", done, total)
    flush()
    _name_shards(folder, shards, written)
    return sum(map(len, shards))


def _name_shards(folder: Path, shards: list[list[str]], size: int) -> None:
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (folder / f"shard-{i}.safetensors").rename(folder / name)
    index = {
        "metadata": {"total_size": size},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def make_stamp(source: str, revision: str, dtype: Dtype | None, hashes: dict[str, str]) -> dict[str, str]:
    """What the header of every shard says of where it came from; ``hashes`` are of the source's files."""
    return {
        "format": "mlx",
        STAMP: str(FORMAT_VERSION),
        "mlx_janus_version": __version__,
        "source": source,
        "revision": revision,
        "dtype": dtype or "",  # as asked for; "" keeps each tensor's own
        "source_sha256": json.dumps(hashes, sort_keys=True),
    }


def _hashes(folder: Path, progress: Progress) -> dict[str, str]:
    files = [*weight_files(folder), folder / "config.json", folder / "tokenizer.json"]
    total, done = sum(file.stat().st_size for file in files), 0
    hashes = {}
    for file in files:
        digest, block = hashlib.sha256(), bytearray(1 << 22)
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(block):
                digest.update(memoryview(block)[:count])
                done += count
                progress("hashing", done, total)
        hashes[file.name] = digest.hexdigest()
    return hashes


def _check_space(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output.resolve().parent).free
    if needed > free:
        raise OutputError(
            f"{output} needs {format_size(needed)} of disk and {format_size(free)} are free: "
            "make room, or take fewer --bits"
        )


def partial_name(output: Path) -> Path:
    """A new hidden name beside ``output`` for a folder that is not whole; once its process has ended it is cleared."""
    return output.parent / f".{output.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial"


@contextlib.contextmanager
def whole_folder(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of ``output`` that takes its name when the block ends well, and is removed if it does not."""
    output = output.resolve()
    _remove_stale(output)
    folder = partial_name(output)
    try:
        folder.mkdir()
    except OSError as error:
        raise OutputError(f"{output} cannot be made ({error.strerror}): choose another folder") from None
    try:
        yield folder
        _replace(folder, output, overwrite)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _replace(folder: Path, output: Path, overwrite: bool) -> None:
    old = folder.with_suffix(".old")
    try:
        if overwrite and output.exists():
            output.rename(old)
        folder.rename(output)  # fails if another process made the output meanwhile, unless it is empty
    except BaseException as error:
        if old.exists() and not output.exists():
            old.rename(output)
        if not isinstance(error, OSError):
            raise
        raise OutputError(f"{output} cannot be put in place ({error.strerror}): choose another folder") from None
    shutil.rmtree(old, ignore_errors=True)


def _remove_stale(output: Path) -> None:
    """Clear up what a killed conversion to the same place left; a running one is told by its process.

    What it had moved away to make room comes back if nothing took its place.
    """
    for folder in output.parent.glob(f".{glob.escape(output.name)}.*.*.*"):
        pid, _, kind = folder.name.split(".")[-3:]
        if kind not in ("partial", "old") or not pid.isdigit() or psutil.pid_exists(int(pid)):
            continue
        if kind == "old" and not output.exists():
            folder.rename(output)
        else:
            shutil.rmtree(folder, ignore_errors=True)
