"""A folder of numbered images of many prompts, which a stopped run goes on with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ImageFile:
    """One image to draw, and the file it goes to."""

    prompt: str
    index: int  # among the prompt's images; its seed is the first seed plus this
    path: Path


@dataclass(frozen=True)
class DrawCall:
    """One call of the library: ``n`` images of each prompt, from an index on."""

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

    Prompts that lack all their ``n`` images share one call. The others have a call for each index.
    """
    count = Counter(file.prompt for file in missing)
    whole = tuple(prompt for prompt in count if count[prompt] == n)
    if whole:
        yield DrawCall(whole, 0, n)
    for index in range(n):
        prompts = tuple(
            file.prompt for file in missing if file.index == index and count[file.prompt] < n
        )
        if prompts:
            yield DrawCall(prompts, index, 1)


def _slug(prompt: str) -> str:
    """Return a prompt as part of a file name: "a-red-circle"."""
    return "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:40].strip("-") or "picture"
