"""``python -m tests.fuzz``: give mutated files and requests to every reader."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .campaign import Findings, run_orders
from .trial import Failure, Order, Trial, yield_input

TARGET_NAMES = (
    *("config", "published", "index", "safetensors", "pickle", "torch-zip", "tokenizer"),
    *("chat", "chat-picture", "png", "image", "json-lines", "http"),
)
_COUNT = 5000  # inputs of an order
_SECONDS = 4.0  # of CPU time for an order


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign, or one saved input; return the exit code, 1 if there is a failure."""
    options = _parse(arguments)
    if options.input:
        return _run_saved(options.target[0], options.input)
    names = options.target or TARGET_NAMES
    seed = options.seed or secrets.token_hex(4)
    print(f"seed {seed}: {', '.join(names)}", flush=True)
    findings = Findings()
    lock = threading.Lock()
    stop = time.monotonic() + options.minutes * 60

    def work(first: int) -> None:
        """Run every ``jobs``-th round until the time is over; a round has all targets."""
        for round_number in itertools.count(first, options.jobs):
            left = stop - time.monotonic()
            if left <= 0:
                return
            seconds = min(_SECONDS, left / len(names))
            found = Findings()
            orders = [Order(name, f"{seed}-{round_number}", _COUNT, seconds) for name in names]
            run_orders(orders, found, functools.partial(_show_progress, found, round_number))
            with lock:
                _merge(found, findings)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(work, range(options.jobs)))
    lines = findings.save(options.save)
    print("\n".join([*lines, f"{findings.inputs.total():,} inputs, {len(lines) // 2} failures"]))
    return int(bool(lines))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="about how long on an idle machine (10)"
    )
    parser.add_argument(
        "--target", action="append", choices=TARGET_NAMES, help="a reader; may be repeated (all)"
    )
    parser.add_argument("--seed", help="text that determines all inputs (random)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (1)")
    parser.add_argument(
        "--save", type=Path, default=Path("fuzz-failures"), help="folder for failing inputs"
    )
    parser.add_argument("--input", type=Path, help="run only this saved input, of one --target")
    options = parser.parse_args(arguments)
    if options.input and len(options.target or ()) != 1:
        parser.error("--input needs one --target")
    return options


def _merge(found: Findings, findings: Findings) -> None:
    """Add the findings of an order to those of the campaign, and print each new failure."""
    for key, (failure, data) in found.failures.items():
        if findings.add(failure, data):
            print(f"FAILURE {failure.target}: {failure.problem} ({failure.place})", flush=True)
        findings.repeats[key] += found.repeats[key] - 1
    findings.inputs.update(found.inputs)
    for name, ends in found.ends.items():
        findings.ends[name].update(ends)


def _show_progress(found: Findings, round_number: int, name: str) -> None:
    """Print a line about a target's part of a round."""
    failures = sum(target == name for target, _ in found.failures)
    counts = f"{found.inputs[name]:,} inputs, {len(found.ends[name])} ways to end"
    now = time.strftime("%H:%M:%S")
    print(f"{now} round {round_number}, {name}: {counts}, {failures} failures", flush=True)


def _run_saved(name: str, path: Path) -> int:
    """Run one saved input in this process, print its end, and return the exit code."""
    data = path.read_bytes()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("output").touch()
        end = yield_input(Trial(name, Path("files"), Path("output").absolute()), data)
    print(f"{end.problem}\n{end.details}" if isinstance(end, Failure) else end)
    return int(isinstance(end, Failure))


if __name__ == "__main__":
    sys.exit(main())
