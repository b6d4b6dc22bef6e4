"""The options of ``generate`` to keep the best of several images, and the names of their files."""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..limits import MAX_BEST_OF
from .options import flag_needs, refuse_if, stack
from .runner import Rule

if TYPE_CHECKING:
    from ..inference.results import ImageStep
    from .image_folder import PlannedImage

best_of_options = stack(
    click.option(
        "--best-of",
        type=click.IntRange(1, MAX_BEST_OF),
        metavar="N",
        help="Draw N images of each prompt, and keep the --n best, numbered from the best. The "
        "score is how likely the model itself finds the prompt as words for the image.",
    ),
    click.option(
        "--keep-all",
        is_flag=True,
        help="Keep all images of --best-of, numbered from the best.",
    ),
)


def _has_seed(template: str | None) -> bool:
    """Return whether a template of --name has the field {seed}."""
    return "seed" in {field for _, field, _, _ in string.Formatter().parse(template or "")}


def _keeps_more_than_drawn(values: Mapping[str, Any]) -> bool:
    """Return whether --n is above --best-of."""
    return values["best_of"] is not None and (values["n"] or 1) > values["best_of"]


BEST_OF_RULES: tuple[Rule, ...] = (
    flag_needs("--keep-all", "--best-of", "say how many to draw"),
    refuse_if(
        lambda values: values["keep_all"] and values["n"] is not None,
        "--keep-all keeps every image of --best-of: leave --n out.",
    ),
    refuse_if(_keeps_more_than_drawn, "--n is more than --best-of draws: take a smaller --n."),
    refuse_if(
        lambda values: values["best_of"] is not None and bool(values["images"]),
        "--best-of compares images with their prompt: leave --image out.",
    ),
    refuse_if(
        lambda values: values["best_of"] is not None and _has_seed(values["name"]),
        "--name cannot have {seed} with --best-of: the best image's seed is not known before.",
    ),
)
"""The rules of these options, for ``generate``."""


def files_by_rank(
    images: Sequence[PlannedImage], drawn: int, kept: int
) -> list[list[PlannedImage]]:
    """Return the first ``kept`` planned images of each line of prompts.

    They give the kept images their files: the best image of a line gets the first one.

    Args:
        images: the planned images of a folder, ``drawn`` for each line. The seed of a line's first
            image is the seed from which its images are drawn.
        drawn: number of images to draw of each line.
        kept: number of images to keep of each line.
    """
    return [list(images[start : start + kept]) for start in range(0, len(images), drawn)]


def incomplete(lines: Sequence[list[PlannedImage]]) -> list[list[PlannedImage]]:
    """Return the lines of which a file is missing."""
    return [line for line in lines if not all(image.path.exists() for image in line)]


def without_existing(
    steps: Iterable[ImageStep],
    lines: Sequence[Sequence[PlannedImage]],
    paths: dict[tuple[str, int], Path],
) -> Iterator[ImageStep]:
    """Yield the steps without the images whose files exist; store the files of the others.

    Args:
        steps: the steps of ``best_of``, with the kept images of each line in the order of ranks.
        lines: the files of each line, in the order of ranks.
        paths: filled with the file of each image, by its prompt and seed.
    """
    files = iter([image.path for line in lines for image in line])
    for step in steps:
        missing = []
        for image in step.images:
            path = next(files)
            if not path.exists():
                paths[image.prompt, image.seed] = path
                missing.append(image)
        yield replace(step, images=tuple(missing))
