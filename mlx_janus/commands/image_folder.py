"""A folder with the images of many prompts, which a later run can complete.

Equal prompts count as one prompt with more images: if a prompt occurs twice and each time has four
images, these have the copy numbers 1 to 8. The name and the seed of an image depend only on its
prompt and its copy number, so they stay the same if other prompts are added, removed or moved.
"""

from __future__ import annotations

import hashlib
import os
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ImageError, OptionError, OutputError
from ..limits import MAX_SEED

DEFAULT_TEMPLATE = "{name}"
_TEXT_FIELDS = ("name", "words", "prompt")
_NUMBER_FIELDS = ("copy", "line", "image", "copy0", "line0", "image0", "seed")
_WIDTH = re.compile(r"0[1-9]\d?d?")  # width with leading zeros, such as 05 in {line:05}
_MAX_NAME = 255  # bytes of a file's name, in all common file systems


@dataclass(frozen=True)
class FolderLayout:
    """The folder for the images of many prompts, and the rule for their names and seeds.

    Args:
        folder: the folder.
        template: file name with fields in braces, as ``check_template`` accepts it.
        same_seeds: whether all prompts start from the same seed. Otherwise every prompt has its
            own first seed.
    """

    folder: Path
    template: str = DEFAULT_TEMPLATE
    same_seeds: bool = False


@dataclass(frozen=True)
class PlannedImage:
    """An image of the folder, which may exist already."""

    prompt: str
    seed: int
    path: Path


def plan_images(
    layout: FolderLayout, prompts: Sequence[str], n: int, first_seed: int
) -> list[PlannedImage]:
    """List the images of a folder, ``n`` for every prompt, in the order of the prompts.

    The copy number of an image counts the images of its prompt: from 1, and on where the prompt
    repeats.

    Args:
        layout: the folder, and the rule for names and seeds.
        prompts: the prompts, which may repeat.
        n: images of each prompt.
        first_seed: seed of a prompt's first image with ``layout.same_seeds``. Otherwise a hash of
            the prompt is added to it.

    Raises:
        OutputError: two images have the same name, or a name is too long.
    """
    from ..processing.saved_images import with_suffix

    template = str(with_suffix(Path(layout.template)))
    copies: Counter[str] = Counter()  # images so far, by prompt
    images = []
    for line, prompt in enumerate(prompts, 1):
        offset = 0 if layout.same_seeds else int(_digest(prompt)[:8], 16)
        words = _words(prompt)
        for image in range(1, n + 1):
            copies[prompt] += 1
            copy = copies[prompt]
            seed = (first_seed + offset + copy - 1) % (MAX_SEED + 1)
            name = template.format(
                name=_unique_name(prompt, words, copy),
                words=words,
                prompt=_file_name(prompt),
                copy=copy,
                line=line,
                image=image,
                copy0=copy - 1,
                line0=line - 1,
                image0=image - 1,
                seed=seed,
            )
            images.append(PlannedImage(prompt, seed, layout.folder / name))
    _check_names(images)
    return images


def check_template(template: str) -> None:
    """Check a template of file names, such as "{line:04}-{words}".

    Raises:
        OptionError: the template has an unknown field or a wrong width, names no file, leads out of
            the folder, or ends in a suffix other than .png, .jpg, .jpeg and .webp.
    """
    from ..processing.saved_images import with_suffix

    try:
        parts = list(string.Formatter().parse(template))
    except ValueError:
        raise OptionError("has a brace without its partner: write {name}") from None
    for _, field, width, conversion in parts:
        if field is None:  # the part has only text
            continue
        if field not in _TEXT_FIELDS + _NUMBER_FIELDS:
            known = ", ".join(_TEXT_FIELDS + _NUMBER_FIELDS)
            raise OptionError(f"has no field {{{field}}}: it must be one of {known}")
        is_valid_width = not width or (field in _NUMBER_FIELDS and _WIDTH.fullmatch(width))
        if conversion or not is_valid_width:  # a conversion: {name!r}
            example = "only a number has one, as in {line:05}"
            raise OptionError(f"has a wrong width of {{{field}}}: {example}")
    path = Path(template)
    if template.endswith("/") or not path.name:
        raise OptionError("names no file: end it with a file name, such as {name}")
    if path.is_absolute() or ".." in path.parts:
        raise OptionError("leads out of the folder: give a name in it")
    try:
        with_suffix(path)
    except OutputError as error:
        raise OptionError(str(error)) from None


def check_existing(layout: FolderLayout, images: Sequence[PlannedImage]) -> None:
    """Check that the existing files were drawn from the prompts of their planned images.

    A template with {name} needs no check, because each name identifies its prompt. Other names may
    not: if a line is added at the top of the prompts, the existing file of {line} 2 was drawn from
    the prompt that is now on line 3.

    Args:
        layout: the folder, and the rule for names.
        images: the images whose files exist. Files without a stored prompt are accepted.

    Raises:
        OutputError: a file was drawn from another prompt.
    """
    from ..processing.saved_images import read_metadata, storable

    fields = {field for _, field, _, _ in string.Formatter().parse(layout.template)}
    if "name" in fields:
        return
    for image in images:
        try:
            stored = read_metadata(image.path).get("prompt")
        except ImageError:  # no image, so it stores no prompt
            continue
        if stored is not None and stored != storable(image.prompt):
            raise OutputError(
                f"{image.path} shows another prompt, {stored!r}: "
                "name another folder with --output, or put {name} into --name"
            )


def _check_names(images: Sequence[PlannedImage]) -> None:
    """Check that no two paths are the same file, and that no name in them is too long.

    Paths that differ only in upper and lower case are the same file on macOS.

    Raises:
        OutputError: two paths are the same file, or a name is too long.
    """
    seen = set()
    for image in images:
        path = str(image.path)
        key = unicodedata.normalize("NFC", path).casefold()  # macOS ignores Unicode form and case
        if key in seen:
            raise OutputError(f"--name gives two images the name {path}: add {{name}} to it")
        seen.add(key)
        length = max(len(os.fsencode(part)) for part in image.path.parts)
        if length > _MAX_NAME:
            raise OutputError(
                f"--name gives a name of {length} bytes, and {_MAX_NAME} are possible: use {{name}}"
            )


def _words(prompt: str) -> str:
    """Return a short form of a prompt for file names: "a-red-circle", at most 40 characters.

    Returns "picture" for a prompt without any of a-z and 0-9, such as one in Chinese.
    """
    words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))
    return words[:40].strip("-") or "picture"


def _unique_name(prompt: str, words: str, copy: int) -> str:
    """Return a name that no other prompt or copy has: "a-red-circle", then "a-red-circle-2".

    If the words alone could also be the name of another prompt or copy, a part of the prompt's hash
    follows them.
    """
    _, _, last_word = words.rpartition("-")
    is_exact = prompt == words.replace("-", " ")
    ends_like_suffix = re.fullmatch(r"\d+|[0-9a-f]{10}", last_word)  # like a copy number or a hash
    name = words if is_exact and not ends_like_suffix else f"{words}-{_digest(prompt)[:10]}"
    return name if copy == 1 else f"{name}-{copy}"


def _file_name(prompt: str) -> str:
    """Return a prompt as a file name: slashes, control characters and a leading dot become "_"."""
    return re.sub(r"^\.|[/\x00-\x1f\x7f]", "_", prompt)


def _digest(prompt: str) -> str:
    """Return a hash of a prompt, in hexadecimal."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
