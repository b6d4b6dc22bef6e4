"""Files of JSON lines that a later run can complete.

Every record is written as one line, without buffering. An incomplete last line is the trace of a
killed run and is removed. A file with any other content is refused and left unchanged.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..errors import OutputError
from ..files import MAX_RECORDS_FILE, parse_json, read_bounded
from .outputs import check_writable

Record = dict[str, Any]
Write = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class JsonLines:
    """A file of records, one JSON object a line.

    Args:
        path: the file, which need not exist.
        kind: a name for the records in messages, such as "captions".
        keys: the keys of every record. Each line begins with the first key.
    """

    path: Path
    kind: str
    keys: tuple[str, ...]

    def resume(self, check: Callable[[Record], None] = lambda _: None) -> list[Record]:
        """Return the records of an earlier run, if any, and remove an incomplete last line.

        Args:
            check: called with each record; raises an error to refuse the file.

        Raises:
            OutputError: the file cannot be read or written, or contains anything other than
                records with these keys.
        """
        if self.path.is_dir():
            raise OutputError(
                f"{self.path} is a folder: give the name of a file in it, such as {self.kind}.jsonl"
            )
        check_writable(self.path)
        if not self.path.exists():
            return []
        with self._as_output_errors("read"):
            data = read_bounded(self.path, MAX_RECORDS_FILE)
        # ``incomplete`` is empty if the file ends with a newline.
        *lines, incomplete = data.split(b"\n")
        beginning = f'{{"{self.keys[0]}": '.encode()  # of every line
        # The incomplete line may be shorter than ``beginning``.
        if not (incomplete.startswith(beginning) or beginning.startswith(incomplete)):
            raise self._wrong_content()
        records = []
        for line in lines:
            if line.strip():
                record = self._parse(line)
                check(record)
                records.append(record)
        if incomplete:  # cut it last, so that a refused file stays unchanged
            with self._as_output_errors():
                os.truncate(self.path, len(data) - len(incomplete))
        return records

    @contextlib.contextmanager
    def append(self) -> Iterator[Write]:
        """Open the file, yield a function that appends a record to it, and close the file.

        Raises:
            OutputError: the file cannot be written. The function raises this too.
        """
        with self._as_output_errors():
            file = self.path.open("ab", buffering=0)

        def write(record: Mapping[str, Any]) -> None:
            line = _encode(record)
            with self._as_output_errors():
                while line:  # an almost full disk writes only a part at first, and then fails
                    count = file.write(line)  # bytes written
                    line = line[count:]

        with file:
            yield write

    def _parse(self, line: bytes) -> Record:
        """Return the record of a line.

        Raises:
            OutputError: the line is not a JSON object with all of ``keys``.
        """
        try:
            record = parse_json(line, surrogates=True)
        except ValueError:
            raise self._wrong_content() from None
        if not isinstance(record, dict) or not all(key in record for key in self.keys):
            raise self._wrong_content()
        return record

    def _wrong_content(self) -> OutputError:
        return OutputError(f"{self.path} is not a file of {self.kind}: name another with --output")

    @contextlib.contextmanager
    def _as_output_errors(self, failed: str = "written") -> Iterator[None]:
        """Turn an OSError inside the context into an OutputError that names the file.

        Args:
            failed: what failed, for the message: "written" gives "cannot be written".
        """
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be {failed} ({error.strerror}): name another with --output"
            ) from None


@contextlib.contextmanager
def lines_to_stdout() -> Iterator[Write]:
    """Yield a function that prints a record to stdout as a line of JSON."""
    yield lambda record: click.echo(_encode(record).decode(), nl=False)


def _encode(record: Mapping[str, Any]) -> bytes:
    """Return a record as one line of JSON in UTF-8.

    If the record has a file name that is not valid Unicode, the line is in ASCII with escapes.
    """
    try:
        line = json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        line = json.dumps(record).encode()
    return line + b"\n"
