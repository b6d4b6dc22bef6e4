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
    """List the files of ``n`` images of each prompt.

    The first image of the second prompt has a name such as "0002-a-red-circle-1.png", or
    "0002-a-red-circle.png" if ``n`` is 1.
    """
    files = []
    for prompt_number, prompt in enumerate(prompts, 1):
        for index in range(n):
            suffix = f"-{index + 1}" if n > 1 else ""
            path = folder / f"{prompt_number:04d}-{_slug(prompt)}{suffix}.png"
            files.append(ImageFile(prompt, index, path))
    return files


def plan_calls(missing: Sequence[ImageFile], n: int) -> Iterator[DrawCall]:
    """Yield the calls that draw the missing files.

    One call draws the prompts of which all ``n`` images are missing. For the other prompts, there
    is one call per index. It draws image ``index`` of every prompt that lacks this image.

    Args:
        missing: the files to draw; different files of one prompt have different indices.
        n: images of each prompt.
    """
    missing_images = Counter(file.prompt for file in missing)
    whole_prompts = tuple(prompt for prompt, count in missing_images.items() if count == n)
    if whole_prompts:
        yield DrawCall(whole_prompts, 0, n)
    single_files = [file for file in missing if missing_images[file.prompt] < n]
    for index in range(n):
        prompts = tuple(file.prompt for file in single_files if file.index == index)
        if prompts:
            yield DrawCall(prompts, index, 1)


def _slug(prompt: str) -> str:
    """Return a prompt as part of a file name, such as "a-red-circle", of at most 40 characters.

    Returns "picture" for a prompt without any of a-z and 0-9, such as one in Chinese.
    """
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    return "-".join(words)[:40].strip("-") or "picture"
