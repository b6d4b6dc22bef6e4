"""The commands, each in a process of its own or called in this one, which is 20 times faster."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import click

ROOT = Path(__file__).parents[2]
_STAND_INS = Path(__file__).parent / "stand_ins"

# Shells start background jobs, perhaps these tests, with SIGINT ignored; children inherit that.
INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def environment(*first: Path, transformers: bool = False, **more: str) -> dict[str, str]:
    """Return the environment of a process that imports this package.

    Args:
        first: folders in which Python looks for modules before this package.
        transformers: whether mlx_lm imports the real transformers, as for a user. That takes a
            second, and mlx_lm uses it only in functions that this package does not call.
        more: further variables.
    """
    folders = [*first, ROOT] if transformers else [*first, _STAND_INS, ROOT]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))} | more


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and what it wrote."""

    code: int
    stdout: str
    stderr: str


def call(command: click.Command, *arguments: object, stdin: str | bytes = "") -> Outcome:
    """Run a command in this process; it can read what is below text if ``stdin`` is bytes."""
    out, err = io.StringIO(), io.StringIO()
    source = (
        io.StringIO(stdin)
        if isinstance(stdin, str)
        else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    )
    handler = signal.getsignal(signal.SIGTERM)
    code: object = None
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "stdin", source),
        ):
            command.main([str(argument) for argument in arguments], prog_name="program")
    except SystemExit as end:
        code = end.code
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert isinstance(code, int)  # a command always says how it ended
    return Outcome(code, out.getvalue(), err.getvalue())


def start(program: str, *arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    """A process that runs a Python script, given as text, with arguments."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def finish(process: subprocess.Popen[str]) -> Outcome:
    """What a started process wrote since, and its exit code."""
    with process:
        try:
            out, err = process.communicate(timeout=60)
        except BaseException:
            process.kill()
            raise
    return Outcome(process.returncode, out, err)


def run(*arguments: object, cwd: Path | None = None, transformers: bool = False) -> Outcome:
    """Run ``python`` with these arguments to its end; see ``environment`` for ``transformers``."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(transformers=transformers),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


_TOGETHER = """
import contextlib, io, json, runpy, sys
for line in sys.stdin:
    start, *arguments = json.loads(line)
    sys.argv = ["program", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if " " in start:
                exec(start, {"__name__": "__main__"})
            else:
                runpy.run_module(start, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code or 0
    print(json.dumps([code, out.getvalue(), err.getvalue(), list(sys.modules)]))
    for name in [name for name in sys.modules if name.partition(".")[0] == "mlx_janus"]:
        del sys.modules[name]
"""


def run_together(lines: Sequence[Sequence[str]]) -> dict[tuple[str, ...], tuple[Outcome, set[str]]]:
    """Run command lines one after the other in one process, which imports mlx_janus for each anew.

    Args:
        lines: each a module, as after ``python -m``, or a program's text, and its arguments.

    Returns:
        of each line how it ended, and the names of all modules that were imported by then.
    """
    done = subprocess.run(
        [sys.executable, "-c", _TOGETHER],
        env=environment(),
        input="".join(f"{json.dumps(line)}\n" for line in lines),
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=True,
    )
    found: dict[tuple[str, ...], tuple[Outcome, set[str]]] = {}
    for line, result in zip(lines, done.stdout.splitlines(), strict=True):
        code, out, err, modules = json.loads(result)
        found[tuple(line)] = (Outcome(code, out, err), set(modules))
    return found


def error_line(outcome: Outcome) -> str:
    """The one line that a failed command leaves on stderr, below its progress bars; exit code 1."""
    assert outcome.code == 1, outcome
    assert "Traceback" not in outcome.stderr
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1, outcome.stderr
    assert outcome.stderr.endswith(f"{lines[0]}\n")
    return lines[0]
