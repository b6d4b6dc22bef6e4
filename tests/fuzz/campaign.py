"""A campaign: orders to worker processes, and the failures that these report or die of."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .trial import MAX_WAIT, Failure, Order

_HUNG = "Timeout ("  # in what faulthandler writes
ROOT = Path(__file__).parents[2]
WORKER = (sys.executable, "-m", "tests.fuzz.trial")


@dataclass
class Findings:
    """The failures of a campaign, one input for each place, and counts."""

    # By target and place.
    failures: dict[tuple[str, str], tuple[Failure, bytes]] = field(default_factory=dict)
    repeats: Counter[tuple[str, str]] = field(default_factory=Counter)
    inputs: Counter[str] = field(default_factory=Counter)  # by target
    ends: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def add(self, failure: Failure, data: bytes) -> bool:
        """Add a failure, and return whether its place is new. The shortest input is kept."""
        key = failure.target, failure.place
        self.repeats[key] += 1
        known = self.failures.get(key)
        if known is None or len(data) < len(known[1]):
            self.failures[key] = failure, data
        return known is None

    def save(self, folder: Path) -> list[str]:
        """Write the inputs, with their tracebacks; return lines about them for people."""
        lines = []
        for key, (failure, data) in self.failures.items():
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{failure.target}-{hashlib.sha256(failure.place.encode()).hexdigest()[:8]}"
            path = folder / name
            path.write_bytes(data)
            path.with_suffix(".txt").write_text(f"{failure.problem}\n\n{failure.details}")
            times = f", {self.repeats[key]} times" if self.repeats[key] > 1 else ""
            lines.append(f"{failure.target}: {failure.problem} ({failure.place}{times})")
            lines.append(f"  python -m tests.fuzz --target {failure.target} --input {path}")
        return lines


def run_orders(
    orders: Sequence[Order], findings: Findings, done: Callable[[str], None] = lambda _: None
) -> None:
    """Run orders in one worker process. The order that kills it ends; the next ones go on.

    Args:
        orders: the orders.
        findings: gets the failures and counts.
        done: called with the target of each ended order.
    """
    left = list(orders)
    while left:
        left = left[_run_worker(left, findings, done) :]


def _run_worker(orders: Sequence[Order], findings: Findings, done: Callable[[str], None]) -> int:
    """Start a worker, add what it reports to the findings, and count the ended orders."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        Path(folder, "orders.json").write_text(json.dumps([asdict(order) for order in orders]))
        worker = subprocess.Popen(
            [*WORKER, "orders.json"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        ended = 0
        with worker:
            assert worker.stdout is not None
            assert worker.stderr is not None
            for line in worker.stdout:
                if _take_report(json.loads(line), findings):
                    done(orders[ended].target)
                    ended += 1
            start_error = worker.stderr.read()
        if worker.returncode == 0:
            return ended
        order = orders[min(ended, len(orders) - 1)]
        data = Path(folder, "input")
        output = Path(folder, "output")
        log = output.read_text(errors="replace") if output.exists() else ""
        if not data.exists() or (worker.returncode == 1 and _HUNG not in log):
            raise RuntimeError(f"the worker failed: {start_error.decode()}{log}")
        findings.add(_death(order.target, worker.returncode, log), data.read_bytes())
        findings.inputs[order.target] += 1
        done(order.target)
        return ended + 1


def _take_report(report: dict[str, Any], findings: Findings) -> bool:
    """Add a line of a worker to the findings, and return whether it ends an order."""
    kind = report.pop("kind")
    if kind == "failure":
        data = bytes.fromhex(report.pop("input"))
        findings.add(Failure(**report), data)
    if kind == "done":
        findings.inputs[report["target"]] += report["count"]
        findings.ends[report["target"]].update(report["ends"])
    return bool(kind == "done")


def _death(target: str, code: int, log: str) -> Failure:
    """Return the failure of an input that ended the worker process or made it hang."""
    hung = _HUNG in log
    problem = f"it hung for {MAX_WAIT:g} s" if hung else f"the process ended with code {code}"
    frames = [line.strip() for line in log.splitlines() if "mlx_janus/" in line]
    place = frames[0].partition("mlx_janus/")[2] if frames else problem
    return Failure(target, problem, f"{'hang' if hung else 'death'}: {place}", log[-20_000:])
