"""Verifying a converted folder against its source, value by value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from ..config import ROLES, JanusConfig
from ..errors import CheckpointError, OptionError
from ..files import MAX_JSON_FILE, read_bounded
from ..processing.tokenizer import TOKENIZER_FILE
from ..threads import compute, note_mlx_use
from .checkpoint import same_bits
from .convert import ConversionPlan, ConvertOptions, Source, plan_conversion
from .folder import (
    NOT_WEIGHTS,
    Progress,
    hash_files,
    open_converted,
    source_hashes,
    stamped_hashes,
)


def verify_conversion(source: Source, converted: Path, progress: Progress | None = None) -> int:
    """Compare a converted folder with its source, value by value; return the number of arrays.

    Raises:
        CheckpointError: ``converted`` is not a folder or is damaged; the source's hashes differ
            from those that the conversion recorded; the config, the tokenizer or a tensor differs;
            or a tensor is missing or surplus.
        ConfigError, UnsupportedModelError: one of the folders cannot be read.
    """
    note_mlx_use()
    return compute(lambda report: _verify(source, converted, report), progress)


def _verify(source: Source, converted: Path, progress: Progress) -> int:
    """Do the work of ``verify_conversion``, in a thread that may compute with MLX."""
    if not converted.is_dir():
        raise CheckpointError(
            f"{converted} is not a folder: convert the model first, then verify it"
        )
    config = JanusConfig.load(converted / "config.json")
    arrays, stamp = open_converted(converted)
    _check_hashes(source, converted, stamp, progress)
    plan = _plan_again(source, converted, config, stamp)
    # The config's ``dtype`` is not compared, since it depends on an option of the conversion.
    if replace(plan.config, dtype=config.dtype) != config:
        raise CheckpointError(
            f"{converted / 'config.json'} does not say what {source.folder} says: convert again"
        )
    _check_tokenizer(source, converted, plan)
    # The stamp holds the conversion's option ``dtype``; "" means that tensors keep their types.
    plan = replace(plan, config=config, dtype=config.dtype if stamp.get("dtype") else None)
    return _compare_arrays(plan, arrays, source, converted, progress)


def _check_hashes(
    source: Source, converted: Path, stamp: dict[str, str], progress: Progress
) -> None:
    """Check by hashes that the weight files have not changed since the conversion read them.

    A renamed file is accepted. The hashes of the config and the tokenizer are not compared, because
    a conversion in the cache may share the weight files of another conversion. The stamp in these
    files has the hashes of the other conversion's config and tokenizer. ``_verify`` compares the
    content of the config and the tokenizer.

    Raises:
        CheckpointError: a file has changed or is new, or the stamp has no hashes.
    """
    stamped = set(map(str, stamped_hashes(converted, stamp).values()))
    hashes = source_hashes(source.folder, progress)
    hashes |= hash_files(source.other_files, progress)
    for name, digest in hashes.items():
        is_weights = name not in NOT_WEIGHTS
        if is_weights and digest not in stamped:
            file = source.other_files.get(name, source.folder / name)
            raise CheckpointError(f"{file} is not the file that {converted} was made from")


def _check_tokenizer(source: Source, converted: Path, plan: ConversionPlan) -> None:
    """Prepare the source's tokenizer again, and check that the converted folder has the same.

    Raises:
        CheckpointError: the converted tokenizer is missing or differs.
        ConfigError: the source's tokenizer cannot be used.
    """
    path = converted / TOKENIZER_FILE
    prepared = plan.prepare_tokenizer(source).encode()
    if not path.is_file() or read_bounded(path, MAX_JSON_FILE) != prepared:
        raise CheckpointError(f"{path} differs from the source's: convert again")


def _compare_arrays(
    plan: ConversionPlan,
    arrays: dict[str, mx.array],
    source: Source,
    converted: Path,
    progress: Progress,
) -> int:
    """Convert the source again, and compare the results with the stored arrays.

    One tensor at a time is converted. The arrays of the same names are then removed from
    ``arrays``, so any that are left at the end are surplus.

    Returns:
        The number of arrays.

    Raises:
        CheckpointError: an array differs, is missing or is surplus.
    """
    count = 0
    done = 0
    total = plan.source_bytes
    for tensor in plan.tensors:
        for name, array in plan.convert(tensor).items():
            stored = arrays.pop(name, None)
            if stored is None or not same_bits(array, stored):
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


def _plan_again(
    source: Source, converted: Path, config: JanusConfig, stamp: Mapping[str, str]
) -> ConversionPlan:
    """Plan the conversion that led to a converted folder, from its config and its stamp.

    Raises:
        CheckpointError: no conversion gives the config's quantization, or the source cannot be
            used.
        ConfigError, UnsupportedModelError: the source cannot be used.
    """
    try:
        return plan_conversion(source, _options_of(config, stamp))
    except OptionError as error:
        raise CheckpointError(
            f"{converted / 'config.json'} has a quantization that no conversion gives ({error}): "
            "convert again"
        ) from None


def _options_of(config: JanusConfig, stamp: Mapping[str, str]) -> ConvertOptions:
    """Return the options of the conversion that lead to a config's quantization and roles.

    The stamp records the roles that were requested, if any.
    """
    requested = stamp.get("roles")
    roles = requested if requested in ROLES else None
    quantization = config.quantization
    if quantization is None:
        return ConvertOptions(roles=roles)
    if quantization.recipe:
        return ConvertOptions(recipe=quantization.recipe, roles=roles)
    return ConvertOptions(bits=quantization.bits, group_size=quantization.group_size, roles=roles)
