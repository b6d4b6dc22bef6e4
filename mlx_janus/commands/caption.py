"""``mlx-janus caption``: ask one question about many images, and write JSON lines."""

from __future__ import annotations

import glob
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ImageError, JanusError, OutputError
from .arguments import LoadArguments, TextArguments, load_pipeline
from .jsonl import JsonLines, Record, lines_to_stdout
from .options import (
    answering_options,
    complete_files,
    model_options,
    quiet_option,
    refuse_if,
    sampling_options,
    version_option,
)
from .progress import progress_bar
from .runner import Command, note, say

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline

QUESTION = "Describe the picture."

_RULES = (
    refuse_if(lambda values: not values["question"].strip(), "--prompt is empty: ask something."),
    refuse_if(lambda values: "" in values["paths"], "PATH is empty: name an image or a folder."),
)


@click.command(cls=Command, rules=_RULES)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", shell_complete=complete_files)
@click.option(
    "-p",
    "--prompt",
    "question",
    default=QUESTION,
    show_default=True,
    metavar="TEXT",
    help="Question to ask about each image.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File to append the lines to; images already in it are skipped.  [default: stdout]",
)
@sampling_options
@answering_options
@model_options
@quiet_option
@version_option
def main(paths: tuple[str, ...], question: str, output: Path | None, **options: Any) -> None:
    """Ask one question about many images, and write one line of JSON for each answer.

    PATH is an image, a folder (all images in it, sorted by name) or a pattern such as
    'photos/**/*.jpg'. To resume after a stop, run the same command again: it asks only about images
    that FILE lacks. Images that cannot be read are named on stderr, and the exit code is then 1.

    \b
    Examples:
      mlx-janus caption -m models/janus-pro-1b photos -o captions.jsonl
      mlx-janus caption -m janus-pro-1b 'photos/**/*.jpg' -p "What animal is this?" -o animals.jsonl
      mlx-janus caption janus.png
    """
    listed: list[str] = []
    for path in paths:
        listed += _image_files(path)
    images = list(dict.fromkeys(listed))  # each once
    lines = None if output is None else JsonLines(output, "captions", keys=("path", "prompt"))
    done = set() if lines is None else _captioned(lines, question)
    missing = [image for image in images if image not in done]
    there = len(images) - len(missing)
    if there:
        note(f"{there} of {len(images)} images are in {output} already")
    if not missing:
        return
    janus = load_pipeline(LoadArguments.of(options))
    caption = _Captioner(janus, question, TextArguments.of(options))
    failed = _caption_all(missing, caption, lines)
    if failed:
        raise JanusError(f"{failed} of {len(missing)} images could not be read")


def _captioned(lines: JsonLines, question: str) -> set[str]:
    """Return the images that a file already has captions for.

    An incomplete last line is removed from the file.

    Raises:
        OutputError: the file cannot be read or written, has other content than captions, or
            answers another question.
    """

    def check(record: Record) -> None:
        asked = record["prompt"]
        if asked != question:
            raise OutputError(
                f"{lines.path} answers another question, {asked!r}: name another file with --output"
            )

    return {str(record["path"]) for record in lines.resume(check)}


class _Captioner:
    """A function that asks the model one question about an image and returns the record.

    Args:
        janus: the model.
        question: the question, the same for every image.
        arguments: sampling options; without a seed, all images share one random seed.
    """

    def __init__(self, janus: JanusPipeline, question: str, arguments: TextArguments):
        from ..decode.sampling import random_seed

        self._janus = janus
        self._question = question
        self._seed = random_seed() if arguments.seed is None else arguments.seed
        self._arguments = replace(arguments, seed=self._seed).keywords()

    def __call__(self, image: str) -> Record:
        result = self._janus.generate_text(self._question, image, **self._arguments)
        return {
            "path": image,
            "text": result.text,
            "tokens": list(result.tokens),
            "finish_reason": result.finish_reason,
            "prompt": self._question,
            "seed": self._seed,
            "model": self._janus.name,
        }


def _caption_all(images: Sequence[str], caption: _Captioner, lines: JsonLines | None) -> int:
    """Write a line for every image, report unreadable ones on stderr, and return their number."""
    failed = 0
    output = lines_to_stdout() if lines is None else lines.append()
    # The bar is hidden while a line is written: stdout may be the same terminal.
    with output as write, progress_bar("captions", "image", len(images)) as bar:
        for image in images:
            try:
                record = caption(image)
            except ImageError as error:
                failed += 1
                with bar.external_write_mode(file=sys.stderr):
                    say(str(error))
            else:
                with bar.external_write_mode(file=sys.stderr):
                    write(record)
            bar.update(1)
    return failed


def _image_files(path: str) -> list[str]:
    """List the images of a path: a file, a folder or a pattern.

    A name that exists is not a pattern, even with "*" or "[" in it. A file that does not exist is
    listed, and fails when it is read.

    Raises:
        ImageError: a folder has no images, or no file matches the pattern.
    """
    if Path(path).is_dir():
        return _images_in(Path(path))
    if glob.has_magic(path) and not Path(path).exists():
        return _matches(path)
    return [str(Path(path))]


def _images_in(folder: Path) -> list[str]:
    """List the images of a folder, sorted by name, without hidden files and subfolders.

    Raises:
        ImageError: there are none.
    """
    from ..processing.images import SUFFIXES

    files = (file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    found = sorted(str(file) for file in files if file.is_file() and not file.name.startswith("."))
    if not found:
        fix = f"name another folder, or a pattern such as '{folder}/**/*.png'"
        raise ImageError(f"{folder} holds no images: {fix}")
    return found


def _matches(pattern: str) -> list[str]:
    """List the files that match a pattern, in which ``**`` stands for any folders.

    Raises:
        ImageError: there are none.
    """
    names = glob.glob(pattern, recursive=True)  # noqa: PTH207  pathlib's accepts no absolute path
    found = sorted(name for name in names if Path(name).is_file())
    if not found:
        raise ImageError(f"{pattern} matches no file: check the pattern")
    return [str(Path(name)) for name in found]
