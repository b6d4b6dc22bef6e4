"""One input at a time under limits, and many of them in a process that may die of one.

Run as a program by ``campaign.py``: it reads its orders from a JSON file, and writes a line of JSON
for each failure and each finished order.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import mlx_janus
from mlx_janus.errors import JanusError

MAX_SECONDS = 2.0  # of CPU time for one input
MAX_WAIT = 40.0  # seconds by the clock, after which an input hangs
MAX_GROWTH = 256 << 20  # bytes by which one input may raise the process's peak of memory
_MAX_KEPT = 1 << 16  # bytes of an input that joins the corpus
_PACKAGE = str(Path(mlx_janus.__file__).parent)
_DETAILS = re.compile(r"'[^']*'|\"[^\"]*\"|/\S+|[\d.,]+")  # parts of a message


@dataclass(frozen=True)
class Failure:
    """An input that a reader did not survive."""

    target: str
    problem: str  # one line
    place: str  # where in the code; the same for all inputs of one fault
    details: str  # a traceback, or the output


@dataclass(frozen=True)
class Order:
    """Inputs to try: at most ``count`` mutants of a target's corpus, made from one seed."""

    target: str
    seed: str
    count: int
    seconds: float  # of CPU time, after which the order ends


def forget_peak() -> None:
    """Let the peak of memory begin again at the present size, where the system can do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the most bytes of memory that this process has had since ``forget_peak``."""
    if sys.platform == "linux":  # ru_maxrss would count the parent's memory too
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Trial:
    """A reader of one target, with the limits around it.

    Args:
        name: the target's.
        folder: for the reader's files; made here.
        output: file that stdout and stderr of this process go to.
    """

    def __init__(self, name: str, folder: Path, output: Path):
        from .targets import TARGETS

        self.name = name
        self.target = TARGETS[name]
        self._output = output
        folder.mkdir()
        self._read = self.target.prepare(folder)

    def run(self, data: bytes) -> str | Failure:
        """Give an input to the reader; return the kind of the end, or the failure."""
        written = self._output.stat().st_size
        forget_peak()
        before = peak_memory()
        started = time.process_time()
        try:
            self._read(data)
            end = "read"
        except JanusError as error:
            end = _DETAILS.sub("#", f"{type(error).__name__} {error}")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of a Rust library is no Exception
            return self._failure(error)
        seconds = time.process_time() - started
        growth = peak_memory() - before
        sys.stdout.flush()
        text = self._output.read_bytes()[written:].decode(errors="replace")
        if text and not self.target.may_write(data):
            return Failure(self.name, "it wrote to stderr or stdout", text[:200], text)
        if growth > MAX_GROWTH:
            problem = f"it took {growth >> 20} MiB"
            return Failure(self.name, problem, f"memory: {end}", "")
        if seconds > MAX_SECONDS:
            return Failure(self.name, f"it took {seconds:.1f} s", f"slow: {end}", "")
        return end

    def _failure(self, error: BaseException) -> Failure:
        """Return the failure of an exception; its place is the last frame of the package."""
        frames = traceback.extract_tb(error.__traceback__)
        package = [
            f for f in frames if "mlx_janus" in f.filename and "site-packages" not in f.filename
        ]
        frame = (package or frames)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno} {type(error).__name__}"
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        details = "".join(traceback.format_exception(error))
        return Failure(self.name, problem, place, details[-20_000:])


def mutants(trial: Trial, order: Order) -> Iterator[tuple[bytes, str | Failure]]:
    """Yield inputs with their ends: the seed corpus, and then mutants of it.

    An input that ends in a new way joins the corpus, so later inputs may go further from there.
    """
    stop = time.process_time() + order.seconds
    random = Random(order.seed)
    corpus = trial.target.seeds()
    ends = set()
    first = list(corpus)
    for _ in range(order.count):
        if time.process_time() > stop:
            return
        # Every other parent is a recent one.
        recent = corpus[-20:] if random.random() < 0.5 else corpus
        data = first.pop() if first else trial.target.mutate(random.choice(recent), random, corpus)
        end = yield_input(trial, data)
        if isinstance(end, str) and end not in ends:
            ends.add(end)
            if len(data) <= _MAX_KEPT:
                corpus.append(data)
        yield data, end


def yield_input(trial: Trial, data: bytes) -> str | Failure:
    """Run one input, which is in the file ``input`` until the next one, with a limit of time."""
    Path("input").write_bytes(data)
    faulthandler.dump_traceback_later(MAX_WAIT, exit=True, file=sys.__stderr__)
    try:
        return trial.run(data)
    finally:
        faulthandler.cancel_dump_traceback_later()


def main(orders_file: str) -> None:
    """Run the orders of a file. The present folder is empty, and only this process uses it."""
    orders = [Order(**order) for order in json.loads(Path(orders_file).read_text())]
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    output = Path("output")
    with output.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    faulthandler.enable()

    def report(kind: str, values: dict[str, Any]) -> None:
        reports.write(json.dumps({"kind": kind, **values}) + "\n")

    for number, order in enumerate(orders):
        report("order", asdict(order))
        trial = Trial(order.target, Path(f"{order.target}-{number}"), output.absolute())
        count = 0
        ends = set()
        for data, end in mutants(trial, order):
            count += 1
            if isinstance(end, Failure):
                report("failure", asdict(end) | {"input": data.hex()})
            else:
                ends.add(end)
        report("done", {"target": order.target, "count": count, "ends": sorted(ends)})


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(sys.argv[1])
