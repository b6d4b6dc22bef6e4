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
    sets: defaultdict[tuple[str, ...], dict[int, str]] = defaultdict(dict)  # shards by number
    for name in sorted(names):
        match = _SHARD.fullmatch(name)
        if match and int(match["number"]) <= int(match["count"]):
            key = (match["suffix"], match["stem"], match["count"])
            sets[key][int(match["number"])] = name
    for suffix in ("safetensors", "bin"):
        of_suffix = {key: shards for key, shards in sets.items() if key[0] == suffix}
        complete = [
            list(shards.values())
            for key, shards in of_suffix.items()
            if _has_all_numbers(shards, int(key[2]))
        ]
        if len(complete) > 1:
            raise CheckpointError(
                f"has no index, and two sets of shards ({complete[0][0]} and {complete[1][0]}): "
                "keep the one that belongs to config.json"
            )
        if complete:
            return complete[0]
    for (suffix, stem, count), shards in sets.items():
        raise CheckpointError(f"lacks {_first_missing(suffix, stem, count, shards)}")
    return []


def _has_all_numbers(numbers: Collection[int], count: int) -> bool:
    """Return whether a set of shards is complete: its numbers begin with 0 or 1."""
    if len(numbers) < count or count == 0:  # also keeps the ranges below short
        return False
    present = set(numbers)
    return present >= set(range(1, count + 1)) or present >= set(range(count))


def _first_missing(suffix: str, stem: str, count: str, shards: dict[int, str]) -> str:
    """Return the name of the first missing shard of a set, with its number's digits as in others.

    Args:
        suffix: "safetensors" or "bin".
        stem: the part of the names before the numbers.
        count: the number of shards, as in the names.
        shards: names of the present shards by number.
    """
    missing = next(number for number in range(1, len(shards) + 2) if number not in shards)
    return f"{stem}-{missing:0{len(count)}d}-of-{count}.{suffix}"
