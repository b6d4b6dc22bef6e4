"""Conversion of a PyTorch model folder to a stamped MLX folder.

Tensors are read, transposed, cast and quantized one at a time, and each full shard is written
before the next begins. Memory therefore holds about one shard or one tensor, whichever is larger,
for a model of any size. The folder appears complete or not at all.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import DTYPES, Dtype, JanusConfig, LayerBits, check_roles
from ..errors import CheckpointError, OptionError, OutputError
from ..memory import format_size
from ..models.janus import keeps_type
from ..processing.tokenizer import TOKENIZER_FILE, prepare_tokenizer
from ..threads import compute, computing, note_mlx_use
from .atomic_folder import atomic_folder
from .checkpoint import PlannedTensor, read_plan
from .folder import (
    Progress,
    check_output,
    hash_files,
    is_converted,
    make_stamp,
    resolve_output,
    source_hashes,
)
from .published import Published, read_published
from .published_flow import VAE_ADVICE
from .quantize import DEFAULT_GROUP_SIZE, bits_per_weight, plan_quantization, quantize_array
from .safetensors_files import write_safetensors
from .vae_files import VAE_PREFIX, VAESource, vae_tensors

SHARD_BYTES = 1_000_000_000  # bytes per file of weights, unless one tensor is larger


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion.

    Without ``bits`` and ``recipe``, no weights are quantized. Without ``dtype``, float weights keep
    the source's types. ``group_size`` applies to ``bits`` only; a recipe has its own.

    Raises:
        OptionError: ``dtype`` is not one of ``DTYPES``, or ``roles`` not one of ``ROLES``.
    """

    bits: int | None = None
    group_size: int = DEFAULT_GROUP_SIZE
    dtype: Dtype | None = None
    overwrite: bool = False
    recipe: str | None = None
    roles: str | None = None  # one of ``ROLES``; None: those that the source's files tell

    def __post_init__(self) -> None:
        check_roles(self.roles)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass(frozen=True)
class Source:
    """A PyTorch model folder, with its name and revision for the stamp."""

    folder: Path
    name: str
    revision: str = ""  # commit on the Hub; "": a local folder
    vae: VAESource | None = None  # the autoencoder of another folder, for a model that needs one

    @property
    def other_files(self) -> dict[str, Path]:
        """The files of other folders that a conversion reads, by their names in the stamp."""
        if self.vae is None:
            return {}
        return {f"vae/{file.name}": file for file in self.vae.files}


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion."""

    path: Path
    config: JanusConfig
    size: int  # bytes on disk
    tensors: int  # arrays in the weight files: two or three for a quantized parameter
    roles: str  # the roles, and the sign in the source's files that decided, as text
    notes: tuple[str, ...]  # for the user: doubts, and options of the source that are not followed


def convert_checkpoint(
    source: Source,
    output: Path,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
    hashes: Mapping[str, str] | None = None,
) -> Conversion:
    """Convert a PyTorch model folder to ``output``, a folder that ``load`` reads.

    After an error, nothing of the output is left behind. ``progress`` is called in the caller's
    thread, and an error that it raises ends the conversion. ``hashes`` has the hashes of the
    source's files, as ``source_hashes`` and ``hash_files`` return them; None: compute them here.

    Raises:
        ConfigError, UnsupportedModelError, CheckpointError: the source cannot be used.
        OptionError: bits, group size or recipe is invalid, or both bits and recipe are set.
        OutputError: the output exists already or cannot be written.
    """
    note_mlx_use()
    chosen = options or ConvertOptions()
    return compute(lambda report: _convert(source, output, chosen, report, hashes), progress)


def _convert(
    source: Source,
    output: Path,
    options: ConvertOptions,
    progress: Progress,
    hashes: Mapping[str, str] | None,
) -> Conversion:
    """Do the work of ``convert_checkpoint``, in a thread that may compute with MLX."""
    _refuse_converted(source.folder)
    _refuse_source_in_output(source.folder, output)
    check_output(output, overwrite=options.overwrite)
    plan = plan_conversion(source, options)
    tokenizer = plan.prepare_tokenizer(source)
    _check_space(output, sum(map(plan.converted_bytes, plan.tensors)))
    with atomic_folder(output, overwrite=options.overwrite) as folder:
        if hashes is None:
            hashes = source_hashes(source.folder, progress)
            hashes |= hash_files(source.other_files, progress)
        stamp = make_stamp(source.name, source.revision, options.dtype, hashes, options.roles)
        if source.vae is not None:
            stamp["vae"] = source.vae.shown
        try:
            array_count = _write_shards(folder, plan, stamp, progress)
            (folder / TOKENIZER_FILE).write_text(tokenizer, encoding="utf-8")
            plan.config.dump(folder / "config.json")
        except (OSError, RuntimeError) as error:  # RuntimeError: MLX cannot write a file
            reason = getattr(error, "strerror", None) or error
            raise OutputError(
                f"{output} cannot be written ({reason}): free some space or choose another folder"
            ) from None
    size = sum(file.stat().st_size for file in output.iterdir())
    published = plan.published
    return Conversion(
        path=output,
        config=plan.config,
        size=size,
        tensors=array_count,
        roles=published.roles.text,
        notes=published.notes,
    )


def _refuse_converted(folder: Path) -> None:
    """Refuse a source that is a converted folder.

    Raises:
        CheckpointError: the source is a converted folder.
        ConfigError: ``config.json`` is too large, or not a JSON object.
    """
    if is_converted(folder):
        raise CheckpointError(
            f"{folder} is converted already: load it as it is, or convert the original folder"
        )


def _refuse_source_in_output(source: Path, output: Path) -> None:
    """Refuse an output that is the source or a folder above it.

    Replacing such a folder would delete the source.

    Raises:
        OutputError: the output is such a folder, or in a loop of links.
    """
    resolved = resolve_output(output)
    if resolved == source.resolve() or resolved in source.resolve().parents:
        raise OutputError(f"{output} holds the source itself: choose another output folder")


@dataclass(frozen=True)
class ConversionPlan:
    """The tensors of a source, with their types and bits in the converted folder.

    ``dtype`` is the option of the conversion; None keeps each tensor's own type.
    """

    published: Published  # the source's own config, roles and notes
    config: JanusConfig
    tensors: Sequence[PlannedTensor]
    dtype: Dtype | None

    @property
    def source_bytes(self) -> int:
        """Bytes of all source tensors."""
        return sum(tensor.source_bytes for tensor in self.tensors)

    def prepare_tokenizer(self, source: Source) -> str:
        """Return the content of ``tokenizer.json`` for the converted folder.

        Raises:
            ConfigError: the source's file cannot be used.
        """
        path = source.folder / TOKENIZER_FILE
        return prepare_tokenizer(path, self.config.prompt, self.published.added_tokens)

    @cached_property
    def _quantized_layers(self) -> Mapping[str, LayerBits]:
        """The quantized layers by their paths in the model; empty for a float conversion."""
        quantization = self.config.quantization
        return {layer.path: layer for layer in quantization.layers} if quantization else {}

    def convert(self, tensor: PlannedTensor) -> dict[str, mx.array]:
        """Read a parameter and convert it; return its arrays by name.

        A float parameter has one array. A quantized one has those of ``quantize_array``.
        """
        array = tensor.read()
        if self.dtype is not None and not keeps_type(self.config, tensor.name):
            array = array.astype(getattr(mx, self.dtype))
            mx.eval(array)
        path, _, leaf = tensor.name.rpartition(".")
        layer = self._quantized_layers.get(path)
        if leaf != "weight" or layer is None:  # a quantized layer's own bias stays float
            return {tensor.name: array}
        parts = quantize_array(array, layer)
        # Evaluate now: lazy parts would keep the float weight in memory.
        mx.eval(list(parts.values()))
        return {f"{path}.{part}": value for part, value in parts.items()}

    def converted_bytes(self, tensor: PlannedTensor) -> int:
        """Return the bytes of the arrays into which ``convert`` turns a parameter."""
        dtype: str = self.dtype or tensor.dtype
        if keeps_type(self.config, tensor.name):  # not cast to ``self.dtype``
            dtype = tensor.dtype
        float_bits = 32 if dtype == "float32" else 16  # bfloat16 or float16
        layer = self._quantized_layers.get(tensor.name.removesuffix(".weight"))
        bits = bits_per_weight(layer, float_bits) if layer else float_bits
        scale_bits = float_bits if layer and layer.scaled else 0  # one scale for the layer
        return int((math.prod(tensor.shape) * bits + scale_bits) / 8)


@computing
def plan_conversion(
    source: Source, options: ConvertOptions, *, alone: bool = False
) -> ConversionPlan:
    """Pair every parameter with its source tensors, and choose its type and bits.

    Reads the headers of the source's files, but no weights. With ``alone``, an autoencoder that the
    source lacks is left out of the plan.

    Raises:
        ConfigError, UnsupportedModelError, CheckpointError: the source cannot be used.
        OptionError: bits, group size or recipe is invalid, or both bits and recipe are set.
    """
    vae = source.vae.folder if source.vae else None
    published = read_published(source.folder, options.roles, vae=vae)
    config = published.config
    quantization = plan_quantization(
        config, options.bits, options.group_size, recipe=options.recipe
    )
    if published.layout == "janusflow" and vae is None and not alone:
        raise CheckpointError(f"{source.folder} has its autoencoder elsewhere: {VAE_ADVICE}")
    others = vae_tensors(vae) if vae else {}
    left_out = "" if vae else VAE_PREFIX  # no other model has parameters with this prefix
    tensors = read_plan(source.folder, config, published.layout, others, left_out)
    # The config records one type for all float weights. Without ``options.dtype``, each weight
    # keeps its own type, and the config records that of the language model's last norm.
    norm = next(tensor for tensor in tensors if tensor.name == "language_model.model.norm.weight")
    dtype: Any = options.dtype or norm.dtype
    return ConversionPlan(
        published=published,
        config=replace(config, dtype=dtype, quantization=quantization),
        tensors=tensors,
        dtype=options.dtype,
    )


def _write_shards(
    folder: Path, plan: ConversionPlan, stamp: dict[str, str], progress: Progress
) -> int:
    """Convert all tensors and write them in shards.

    A shard has at most ``SHARD_BYTES``, unless one tensor is larger.

    Returns:
        The number of arrays in all shards.
    """
    shards: list[list[str]] = []  # names of the arrays in each shard
    pending: dict[str, mx.array] = {}  # arrays of the next shard
    pending_bytes = 0
    written_bytes = 0  # all shards so far

    def write_pending() -> None:
        """Write ``pending`` as the next shard, and free its memory."""
        nonlocal pending_bytes, written_bytes
        # A temporary name, since the final names contain the number of shards.
        write_safetensors(folder / f"shard-{len(shards)}.safetensors", pending, stamp)
        written_bytes += sum(array.nbytes for array in pending.values())
        shards.append(list(pending))
        pending.clear()
        pending_bytes = 0
        mx.clear_cache()

    done_bytes = 0  # source tensors so far
    total_bytes = plan.source_bytes
    progress("converting", 0, total_bytes)
    for tensor in plan.tensors:
        new_bytes = plan.converted_bytes(tensor)
        # Write before reading the tensor, so that memory never holds a full shard and the tensor.
        if pending and pending_bytes + new_bytes > SHARD_BYTES:
            write_pending()
        pending.update(plan.convert(tensor))
        pending_bytes += new_bytes
        done_bytes += tensor.source_bytes
        progress("converting", done_bytes, total_bytes)
    write_pending()
    _name_shards(folder, shards, written_bytes)
    return sum(map(len, shards))


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Rename the files ``shard-<i>`` to their final names; write an index if there are several.

    Args:
        folder: the folder of the files.
        shards: names of the arrays in each file.
        total_bytes: bytes of all arrays.
    """
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    weight_map: dict[str, str] = {}  # array name to file name
    for i, (name, array_names) in enumerate(zip(names, shards, strict=True)):
        (folder / f"shard-{i}.safetensors").rename(folder / name)
        weight_map |= dict.fromkeys(array_names, name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    text = json.dumps(index, indent=1) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _check_space(output: Path, needed: int) -> None:
    """Refuse a conversion that does not fit on the disk of ``output``. ``needed`` is in bytes.

    Raises:
        OutputError: the free space is too small.
    """
    free = shutil.disk_usage(output.resolve().parent).free
    if needed > free:
        raise OutputError(
            f"{output} needs {format_size(needed)} of disk and {format_size(free)} are free: "
            "make room, or take fewer bits=..."
        )
