"""Stages of a long benchmark: each in a process of its own, with a line in a log."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import click

Facts = dict[str, Any]


def run_stages(
    names: Sequence[str], command: Sequence[str], log: Path, only: Collection[str] = ()
) -> dict[str, Facts]:
    """Run the stages that a log lacks, each in a child process; return the results of all.

    Args:
        names: all stages, in order.
        command: the arguments of a child, to which ``--stage NAME`` is added. The child calls
            ``report_stage``.
        log: a file of JSON lines, one a stage. It is created and extended.
        only: the stages to run, even if the log has them; empty: all that it lacks.

    Raises:
        click.UsageError: a stage of ``only`` does not exist.
    """
    if unknown := set(only) - set(names):
        raise click.UsageError(
            f"no stage {', '.join(sorted(unknown))}: there are {', '.join(names)}."
        )
    results = read_results(log)
    for name in names:
        if name in only or (not only and name not in results):
            click.echo(f"{name} ...", err=True)
            child = [sys.executable, *command, "--stage", name]
            done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
            results[name] = json.loads(done.stdout.splitlines()[-1])
            with log.open("a") as file:
                file.write(json.dumps(results[name]) + "\n")
            click.echo(json.dumps(results[name]), err=True)
    return results


def read_results(log: Path) -> dict[str, Facts]:
    """Return the last result of each stage in a log; without a log, none."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return {facts["stage"]: facts for facts in lines}


def report_stage(name: str, stage: Callable[[], Facts]) -> None:
    """Run a stage in this process, and print its facts with its wall time and peak memory."""
    started = time.perf_counter()
    facts = stage()
    seconds = time.perf_counter() - started
    print(json.dumps({"stage": name, "wall_s": seconds, "peak_rss": peak_rss(), **facts}))


def peak_rss() -> int:
    """Return the peak of this process's resident memory, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
