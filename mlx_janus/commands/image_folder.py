"""A folder of numbered images of many prompts, which a later run can complete."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ImageFile:
    """One image to draw, and its file."""

    prompt: str
    index: int  # number among the prompt's images, from 0; its seed is the first seed plus this
    path: Path


@dataclass(frozen=True)
class DrawCall:
    """One call of the library: images ``index`` to ``index + n - 1`` of each prompt."""

    prompts: tuple[str, ...]
    index: int
    n: int


def image_files(folder: Path, prompts: Sequence[str], n: int) -> list[ImageFile]:
    """List the files of ``n`` images of each prompt, such as "0002-a-red-circle-1.png"."""
    files = []
    for number, prompt in enumerate(prompts, 1):
        for index in range(n):
            suffix = f"-{index + 1}" if n > 1 else ""
            path = folder / f"{number:04d}-{_slug(prompt)}{suffix}.png"
            files.append(ImageFile(prompt, index, path))
    return files


def plan_calls(missing: Sequence[ImageFile], n: int) -> Iterator[DrawCall]:
    """Yield the calls that draw the missing files.

    Prompts whose ``n`` images are all missing share one call. The others share a call for each
    index, which draws image ``index`` of the prompts that lack it.

    Args:
        missing: the files to draw; different files of one prompt have different indices.
        n: images of each prompt.
    """
    count = Counter(file.prompt for file in missing)
    all_missing = tuple(prompt for prompt in count if count[prompt] == n)
    if all_missing:
        yield DrawCall(all_missing, 0, n)
    some_missing = [file for file in missing if count[file.prompt] < n]
    for index in range(n):
        prompts = tuple(file.prompt for file in some_missing if file.index == index)
        if prompts:
            yield DrawCall(prompts, index, 1)


def _slug(prompt: str) -> str:
    """Return a prompt as part of a file name, such as "a-red-circle", of at most 40 characters.

    Returns "picture" for a prompt without any of a-z and 0-9, such as one in Chinese.
    """
    return "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:40].strip("-") or "picture"
