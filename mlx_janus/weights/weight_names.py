"""The file names under which a model folder or a repository holds its weights.

This module does not import MLX, so commands can use it before they check their options.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable

from ..errors import CheckpointError

WEIGHT_FORMS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
"""Names of an index of several files and of a single file. The preferred format is first."""

_SHARD = re.compile(
    r"(?P<stem>[^./][^/]*)-(?P<number>\d{1,6})-of-(?P<count>\d{1,6})\.(?P<suffix>safetensors|bin)"
)


def shards_without_index(names: Iterable[str]) -> list[str]:
    """Return the names of a complete set of shards, such as "model-00001-of-00002.safetensors".

    Shards of one set have equal names except for their numbers. Sets of .safetensors files are
    preferred to sets of .bin files.

    Args:
        names: names of the files in a folder or a repository.

    Returns:
        The names in order; an empty list if no file is a shard.

    Raises:
        CheckpointError: a shard is missing, or there are several complete sets. The message is the
            rest of a sentence about the folder: "lacks ...".
    """
    # By suffix, stem and count of a set: the names of its shards by their numbers.
    sets: defaultdict[tuple[str, str, str], dict[int, str]] = defaultdict(dict)
    for name in sorted(names):
        match = _SHARD.fullmatch(name)
        if match and int(match["number"]) <= int(match["count"]):
            key = (match["suffix"], match["stem"], match["count"])
            sets[key][int(match["number"])] = name
    for suffix in ("safetensors", "bin"):
        complete = [
            list(shards.values())
            for (own_suffix, _, count), shards in sets.items()
            if own_suffix == suffix and _has_all_numbers(shards, int(count))
        ]
        if len(complete) > 1:
            raise CheckpointError(
                f"has no index, and two sets of shards ({complete[0][0]} and {complete[1][0]}): "
                "keep the one that belongs to config.json"
            )
        if complete:
            return complete[0]
    if not sets:
        return []
    # No set is complete. Report the first one.
    (suffix, stem, count), shards = next(iter(sets.items()))
    raise CheckpointError(f"lacks {_first_missing(suffix, stem, count, shards)}")


def _has_all_numbers(numbers: Collection[int], count: int) -> bool:
    """Return whether a set of shards has all its numbers, counted from 0 or from 1."""
    # A name may have a huge count. The first condition keeps the ranges below short.
    if len(numbers) < count or count == 0:
        return False
    present = set(numbers)
    return present >= set(range(1, count + 1)) or present >= set(range(count))


def _first_missing(suffix: str, stem: str, count: str, shards: dict[int, str]) -> str:
    """Return the name of the first missing shard of an incomplete set, counted from 1.

    Args:
        suffix: "safetensors" or "bin".
        stem: the part of the names before the numbers.
        count: the number of shards, with the leading zeros that it has in the names.
        shards: names of the present shards by number.
    """
    candidates = range(1, len(shards) + 2)  # one more than there are shards, so one is missing
    missing = next(number for number in candidates if number not in shards)
    number = str(missing).zfill(len(count))
    return f"{stem}-{number}-of-{count}.{suffix}"
