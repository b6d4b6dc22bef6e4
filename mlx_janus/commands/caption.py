"""``mlx-janus caption``: one question about many pictures, answered in JSON lines."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ImageError, JanusError, OutputError
from .arguments import LoadArguments, TextArguments, load_pipeline
from .options import (
    answering_options,
    complete_files,
    model_options,
    quiet_option,
    sampling_options,
    version_option,
)
from .outputs import check_writable
from .progress import progress_bar
from .runner import Command, note, say

if TYPE_CHECKING:
    from ..pipeline import JanusPipeline

QUESTION = "Describe the picture."
_BEGINNING = b'{"path": '  # of every line


@click.command(cls=Command)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", shell_complete=complete_files)
@click.option(
    "-p",
    "--prompt",
    "question",
    default=QUESTION,
    show_default=True,
    metavar="TEXT",
    help="What to ask about each picture.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the lines here; pictures that are in it already are skipped.  [default: stdout]",
)
@sampling_options
@answering_options
@model_options
@quiet_option
@version_option
def main(paths: tuple[str, ...], question: str, output: Path | None, **options: Any) -> None:
    """Ask one question about many pictures: a line of JSON for each, as soon as it is answered.

    PATH is a picture, a folder (its pictures, by name) or a pattern such as 'photos/**/*.jpg'. Run the same command
    again after a stop: it goes on with what FILE lacks. Pictures that cannot be read are named on stderr, and the exit
    code is 1.

    \b
    Examples:
      mlx-janus caption -m models/janus-pro-1b photos -o captions.jsonl
      mlx-janus caption -m models/janus-pro-1b 'photos/**/*.jpg' -p "What animal is this?" -o animals.jsonl
      mlx-janus caption janus.png
    """
    if not question.strip():
        raise click.UsageError("--prompt is empty: ask something.")
    if "" in paths:  # an unset variable of a shell is not the folder here
        raise click.UsageError("PATH is empty: name a picture or a folder.")
    pictures = list(dict.fromkeys(picture for path in paths for picture in _pictures(path)))
    done = _resume(output, question) if output else set()
    missing = [picture for picture in pictures if picture not in done]
    if there := len(pictures) - len(missing):
        note(f"{there} of {len(pictures)} pictures are there already")
    if not missing:
        return
    failed = 0
    janus = load_pipeline(LoadArguments.of(options))
    answer = _Answer(janus, question, options)
    with _writer(output) as write, progress_bar("captions", "picture", len(missing)) as bar:
        for picture in missing:
            try:
                facts = answer(picture)
            except ImageError as error:
                failed += 1
                with bar.external_write_mode(file=sys.stderr):
                    say(str(error))
            else:
                with bar.external_write_mode(file=sys.stderr):
                    write(_line(facts))
            bar.update(1)
    if failed:
        raise JanusError(f"{failed} of {len(missing)} pictures could not be read")


class _Answer:
    """The one question, asked about a picture."""

    def __init__(self, janus: JanusPipeline, question: str, options: dict[str, Any]):
        from ..decode.sampling import random_seed

        self.janus, self.question = janus, question
        self.seed = random_seed() if options["seed"] is None else options["seed"]
        self.choice = TextArguments.of(options | {"seed": self.seed}).explicit()

    def __call__(self, picture: str) -> dict[str, Any]:
        result = self.janus.generate_text(self.question, picture, **self.choice)
        return {
            "path": picture,
            "text": result.text,
            "tokens": list(result.tokens),
            "finish_reason": result.finish_reason,
            "prompt": self.question,
            "seed": self.seed,
            "model": self.janus.name,
        }


def _pictures(path: str) -> list[str]:
    """The pictures that a file, a folder or a pattern stands for, as paths; a file that is not there stands for itself.

    Raises:
        ImageError: a folder without pictures, or a pattern that nothing fits.
    """
    from ..processing.images import SUFFIXES

    if Path(path).is_dir():
        files = (file for file in Path(path).iterdir() if file.suffix.lower() in SUFFIXES)
        if found := sorted(str(file) for file in files if file.is_file() and not file.name.startswith(".")):
            return found
        raise ImageError(f"{path} holds no pictures: name another folder, or a pattern such as '{path}/**/*.png'")
    if glob.has_magic(path) and not Path(path).exists():
        if found := sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file()):  # noqa: PTH207
            return [str(Path(file)) for file in found]
        raise ImageError(f"{path} fits no file: check the pattern")
    return [str(Path(path))]


def _line(facts: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(facts, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a file name that is no text
        text = json.dumps(facts).encode()
    return text + b"\n"


# The output


def _resume(path: Path, question: str) -> set[str]:
    """The pictures that a file of captions has; a last line that a kill cut short is taken off it.

    Raises:
        OutputError: it cannot be read or written, is something else, or answers another question.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder: give the name of a file in it, such as captions.jsonl")
    check_writable(path)
    if not path.exists():
        return set()
    foreign = OutputError(f"{path} is no file of captions: name another with --output")
    with _as_output_errors(path):
        data = path.read_bytes()
    *lines, rest = data.split(b"\n")
    if not (rest.startswith(_BEGINNING) or _BEGINNING.startswith(rest)):
        raise foreign
    done = set()
    for line in filter(bytes.strip, lines):
        try:
            facts = json.loads(line)
            done.add(str(facts["path"]))
            asked = facts["prompt"]
        except (ValueError, TypeError, KeyError):
            raise foreign from None
        if asked != question:
            raise OutputError(f"{path} answers another question, {asked!r}: name another file with --output")
    if rest:
        with _as_output_errors(path):
            os.truncate(path, len(data) - len(rest))
    return done


@contextlib.contextmanager
def _writer(path: Path | None) -> Iterator[Callable[[bytes], None]]:
    """Writes a whole line at once, to a file's end or to stdout."""
    if path is None:
        yield lambda line: click.echo(line.decode(), nl=False)
        return
    with _as_output_errors(path):
        file = path.open("ab", buffering=0)

    def write(line: bytes) -> None:
        with _as_output_errors(path):
            while line:  # a disk that fills up takes a part, then refuses
                line = line[file.write(line) :]

    with file:
        yield write


@contextlib.contextmanager
def _as_output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}): name another with --output") from None
