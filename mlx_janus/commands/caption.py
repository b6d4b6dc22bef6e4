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
    STDIN,
    STDOUT,
    answering_options,
    check_image_sources,
    complete_files,
    model_options,
    quiet_option,
    refuse_if,
    sampling_options,
    version_option,
)
from .outputs import output_file
from .progress import progress_bar
from .runner import Command, note, say
from .schema_option import json_value, schema_digest, schema_option

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline

DEFAULT_QUESTION = "Describe the picture."

_RULES = (
    refuse_if(lambda values: not values["question"].strip(), "--prompt is empty: ask something."),
    refuse_if(lambda values: "" in values["paths"], "PATH is empty: name an image or a folder."),
)


@click.command(cls=Command, rules=_RULES)
@click.argument(
    "paths",
    nargs=-1,
    required=True,
    metavar="PATH...",
    callback=check_image_sources,
    shell_complete=complete_files,
)
@click.option(
    "-p",
    "--prompt",
    "question",
    default=DEFAULT_QUESTION,
    show_default=True,
    metavar="TEXT",
    help="Question to ask about each image. {image} in it is the place of the image.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    metavar="FILE",
    help="File to append the lines to (- for stdout); images already in it are skipped.  "
    "[default: stdout]",
)
@sampling_options
@answering_options
@schema_option
@model_options
@quiet_option
@version_option
def main(paths: tuple[str, ...], question: str, output: str | None, **options: Any) -> None:
    """Ask one question about many images, and write one line of JSON for each answer.

    PATH is an image, a folder (all images in it, sorted by name), a pattern such as
    'photos/**/*.jpg', an https address, or - for an image on stdin. To resume after a stop, run the
    same command again: it asks only about images that FILE lacks. Images that cannot be read are
    named on stderr, and the exit code is then 1. With --schema a line has the answer's value as
    "json" in place of "text", and the schema's SHA-256.

    \b
    Examples:
      mlx-janus caption -m models/janus-pro-1b photos -o captions.jsonl
      mlx-janus caption -m janus-pro-1b 'photos/**/*.jpg' -p "What animal is this?" -o animals.jsonl
      mlx-janus caption janus.png
      mlx-janus caption -m janus-pro-1b photos -p "Describe the picture." --schema fields.json
      curl https://example.org/photo.jpg | mlx-janus caption -
    """
    from ..processing.prompts import marked_question

    marked_question(question, 1)  # refuses a second mark before minutes are spent on the model
    listed: list[str] = []
    for path in paths:
        listed += _image_sources(path)
    images = list(dict.fromkeys(listed))  # without duplicates
    captions = None
    captioned: set[str] = set()
    if output is not None and output != STDOUT:
        file = output_file(output, "captions.jsonl")
        captions = JsonLines(file, "captions", keys=("path", "prompt"))
        captioned = _captioned_images(captions, question, options["schema"])
    # Every image on stdin has the path "-", so an earlier caption may be of another image.
    missing = [image for image in images if image == STDIN or image not in captioned]
    skipped = len(images) - len(missing)
    if skipped:
        note(f"{skipped} of {len(images)} images are in {output} already")
    if not missing:
        return
    janus = load_pipeline(LoadArguments.from_options(options))
    captioner = _Captioner(janus, question, TextArguments.from_options(options))
    failed = _caption_all(missing, captioner, captions)
    if failed:
        raise JanusError(f"{failed} of {len(missing)} images could not be read")


def _captioned_images(
    captions: JsonLines, question: str, schema: dict[str, Any] | str | None
) -> set[str]:
    """Return the paths of the images that already have a caption in the file ``captions``.

    An incomplete last line is removed from the file. Captions of earlier releases do not record
    their schema, so they count as captions of any schema.

    Args:
        captions: the file.
        question: the question of the captions.
        schema: the value of --schema; None: the captions are in words.

    Raises:
        OutputError: the file cannot be read or written, contains anything other than captions, or
            its captions answer another question, or by another schema.
    """
    as_json = schema is not None
    digest = None if schema is None else schema_digest(schema)

    def check_question(caption: Record) -> None:
        """Refuse a caption that answers another question, or in another form."""
        asked = caption["prompt"]
        file = captions.path
        if ("json" in caption) != as_json:
            form = "in words, not in JSON" if as_json else "in JSON, not in words"
            raise OutputError(f"{file} has answers {form}: name another file with --output")
        if asked != question:
            raise OutputError(
                f"{file} answers another question, {asked!r}: name another file with --output"
            )
        if caption.get("schema", digest) != digest:
            raise OutputError(
                f"{file} has answers by another --schema: name another file with --output"
            )

    return {str(caption["path"]) for caption in captions.resume(check_question)}


class _Captioner:
    """A callable that asks the model the same question about each image.

    Args:
        janus: the model.
        question: the question.
        arguments: sampling options. If they have no seed, one random seed is chosen for all images.
    """

    def __init__(self, janus: JanusPipeline, question: str, arguments: TextArguments):
        from ..decode.sampling import random_seed

        self._janus = janus
        self._question = question
        self._seed = random_seed() if arguments.seed is None else arguments.seed
        self._arguments = replace(arguments, seed=self._seed).keywords()

    def __call__(self, source: str) -> Record:
        """Ask about the image of a file, of an https address, or of stdin ("-").

        Returns:
            A record for the file of captions: the answer, the source, the question and settings.

        Raises:
            ImageError: the image cannot be fetched or read.
        """
        from .inputs import is_file, read_image

        # ``generate_text`` opens files itself.
        image = source if is_file(source) else read_image(source)
        result = self._janus.generate_text(self._question, image, **self._arguments)
        return {
            "path": source,
            **self._answer(result.text),
            "tokens": list(result.tokens),
            "finish_reason": result.finish_reason,
            "prompt": self._question,
            "seed": self._seed,
            "model": self._janus.name,
        }

    def _answer(self, text: str) -> Record:
        """Return the fields of an answer: its text or, with --schema, its JSON value.

        The digest of the schema follows the value. If the JSON was cut, the value is None, and the
        text is added.
        """
        if "schema" not in self._arguments:
            return {"text": text}
        value = json_value(text)
        is_cut = value is None and text != "null"  # null is a complete value
        cut_text = {"text": text} if is_cut else {}
        return {"json": value, **cut_text, "schema": schema_digest(self._arguments["schema"])}


def _caption_all(images: Sequence[str], captioner: _Captioner, captions: JsonLines | None) -> int:
    """Write a caption of each image. For an image that cannot be read, print an error to stderr.

    Args:
        images: files, https addresses, and "-" for stdin.
        captioner: makes a caption.
        captions: the file to append the captions to; None: print them to stdout.

    Returns:
        The number of images that cannot be read.
    """
    failed = 0
    output = lines_to_stdout() if captions is None else captions.append()
    # The bar is on stderr. It is hidden while a line is written, because stdout and stderr may be
    # the same terminal.
    with output as write, progress_bar("captions", "image", len(images)) as bar:
        for image in images:
            try:
                caption = captioner(image)
            except ImageError as error:
                failed += 1
                with bar.external_write_mode(file=sys.stderr):
                    say(str(error))
            else:
                with bar.external_write_mode(file=sys.stderr):
                    write(caption)
            bar.update(1)
    return failed


def _image_sources(path: str) -> list[str]:
    """List the images of ``path``: a file, a folder, a pattern, an https address, or "-" for stdin.

    An existing file is not a pattern, even with "*" or "[" in its name. A file that does not exist
    is listed too, and fails when it is read.

    Raises:
        ImageError: a folder has no images, no file matches the pattern, or a file:// address names
            no file of this machine.
    """
    from ..processing.file_names import local_path
    from .inputs import is_file

    if not is_file(path):  # an https address, or "-" for stdin
        return [path]
    path = local_path(path)
    if Path(path).is_dir():
        return _images_in(Path(path))
    if glob.has_magic(path) and not Path(path).exists():
        return _files_matching(path)
    # ``Path`` turns "./a.png" into "a.png", so that the same image has one name.
    return [str(Path(path))]


def _images_in(folder: Path) -> list[str]:
    """List the images of a folder, sorted by name, without hidden files and subfolders.

    Raises:
        ImageError: the folder has no images.
    """
    from ..processing.images import SUFFIXES

    files = (file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    found = sorted(str(file) for file in files if file.is_file() and not file.name.startswith("."))
    if not found:
        fix = f"name another folder, or a pattern such as '{folder}/**/*.png'"
        raise ImageError(f"{folder} holds no images: {fix}")
    return found


def _files_matching(pattern: str) -> list[str]:
    """List the files that match a pattern, in which ``**`` matches any number of folders.

    Raises:
        ImageError: no file matches.
    """
    # pathlib's glob accepts no absolute pattern.
    names = glob.glob(pattern, recursive=True)  # noqa: PTH207
    found = sorted(name for name in names if Path(name).is_file())
    if not found:
        raise ImageError(f"{pattern} matches no file: check the pattern")
    return [str(Path(name)) for name in found]
