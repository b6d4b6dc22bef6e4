"""Verifying a converted folder against its source, value by value."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from ..config import JanusConfig
from ..errors import CheckpointError
from ..processing.tokenizer import TOKENIZER_FILE, prepare_tokenizer
from .convert import ConversionPlan, ConvertOptions, Source, plan_conversion
from .folder import Progress, open_converted, source_hashes, stamped_hashes


def verify_conversion(source: Source, converted: Path, progress: Progress | None = None) -> int:
    """Compare a converted folder with its source, value by value; return the number of arrays.

    Raises:
        CheckpointError: ``converted`` is not a folder or is damaged; the source's hashes differ
            from those that the conversion recorded; the config, the tokenizer or a tensor differs;
            or a tensor is missing or surplus.
        ConfigError, UnsupportedModelError: one of the folders cannot be read.
    """
    progress = progress or (lambda *_: None)
    if not converted.is_dir():
        raise CheckpointError(
            f"{converted} is not a folder: convert the model first, then verify it"
        )
    config = JanusConfig.load(converted / "config.json")
    arrays, stamp = open_converted(converted)
    _check_hashes(source, converted, stamp, progress)
    plan = plan_conversion(source, _options_of(config))
    # The source does not determine ``dtype``, which is an option of the conversion.
    if replace(plan.config, dtype=config.dtype) != config:
        raise CheckpointError(
            f"{converted / 'config.json'} does not say what {source.folder} says: convert again"
        )
    _check_tokenizer(source, converted, config)
    # The stamp records ``dtype`` if it was given; else every tensor keeps its own type.
    plan = replace(plan, config=config, dtype=config.dtype if stamp.get("dtype") else None)
    return _compare(plan, arrays, source, converted, progress)


def _check_hashes(
    source: Source, converted: Path, stamp: dict[str, str], progress: Progress
) -> None:
    """Check that the source's files are those that the conversion read, by their hashes.

    Raises:
        CheckpointError: a file is another.
    """
    stamped = stamped_hashes(converted, stamp)
    for name, digest in source_hashes(source.folder, progress).items():
        if stamped.get(name) != digest:
            raise CheckpointError(
                f"{source.folder / name} is not the file that {converted} was made from"
            )


def _check_tokenizer(source: Source, converted: Path, config: JanusConfig) -> None:
    """Check that preparing the source's tokenizer again gives the converted one.

    Raises:
        CheckpointError: the converted tokenizer is missing or differs.
    """
    path = converted / TOKENIZER_FILE
    prepared = prepare_tokenizer(source.folder / TOKENIZER_FILE, config.prompt).encode()
    if not path.is_file() or path.read_bytes() != prepared:
        raise CheckpointError(f"{path} differs from the source's: convert again")


def _compare(
    plan: ConversionPlan,
    arrays: dict[str, mx.array],
    source: Source,
    converted: Path,
    progress: Progress,
) -> int:
    """Convert one tensor at a time and compare it with ``arrays``; return the number of arrays.

    Each compared array is removed from ``arrays``, so the rest at the end is surplus.

    Raises:
        CheckpointError: an array differs, is missing or is surplus.
    """
    count = 0
    done = 0
    total = plan.source_bytes
    for tensor in plan.tensors:
        for name, array in plan.convert(tensor).items():
            stored = arrays.pop(name, None)
            if stored is None or not _same_bits(array, stored):
                raise CheckpointError(
                    f"{converted}: {name} differs from what {source.folder} gives: convert again"
                )
            count += 1
        mx.clear_cache()
        done += tensor.source_bytes
        progress("verifying", done, total)
    if arrays:
        raise CheckpointError(f"{converted}: {min(arrays)} is not of the source: convert again")
    return count


def _options_of(config: JanusConfig) -> ConvertOptions:
    """Return the options that a converted folder was quantized with."""
    quantization = config.quantization
    if quantization is None:
        return ConvertOptions()
    if quantization.recipe:
        return ConvertOptions(recipe=quantization.recipe)
    return ConvertOptions(bits=quantization.bits, group_size=quantization.group_size)


def _same_bits(a: mx.array, b: mx.array) -> bool:
    """Return whether two arrays have the same shape, type and bits, so that NaNs are equal too."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[a.dtype.size]
    return bool(mx.array_equal(a.view(integer), b.view(integer)).item())
