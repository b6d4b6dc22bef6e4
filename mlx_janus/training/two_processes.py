"""Training in two processes on one machine's CPU, which then share each step (``mlx.core.distributed``).

MLX computes on one CPU core for the most part, and two of its threads hinder each other where two processes do not
(docs/lab-notes.md). The gradients travel through MLX's ring over the loopback interface.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from ..errors import JanusError

COUNT = 2  # halves of a step
_GRACE = 5.0  # seconds in which one process may end by itself after the other failed


def pays() -> bool:
    """Whether two processes are quicker here than one: on a CPU with two cores, and in no such process already."""
    return mx.default_device() == mx.cpu and (os.cpu_count() or 1) >= COUNT and mx.distributed.init().size() == 1


def run_side_by_side(command: Sequence[str]) -> None:
    """Run a command in two processes that find each other through ``mx.distributed.init()``.

    They end with this process, however it ends, if they call ``end_with_parent`` first. The first one has its stdout
    and stderr; the second one's words are shown only where it alone failed.

    Raises:
        JanusError: the second process failed, and why.
        SystemExit: the first one failed, with its code.
    """
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[address] for address in _free_addresses()]))
        said = Path(folder) / "second"
        with said.open("wb") as second:
            processes = [
                subprocess.Popen(
                    command,
                    env={"OPENBLAS_NUM_THREADS": "1", **os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
                    stdin=subprocess.PIPE,
                    stdout=second if rank else None,
                    stderr=second if rank else None,
                )
                for rank in range(COUNT)
            ]
        try:
            codes = _wait(processes)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
        if codes[0]:
            raise SystemExit(codes[0] if codes[0] > 0 else 128 - codes[0])
        if codes[1]:
            words = said.read_text(errors="replace").strip().splitlines() or ["it was killed"]
            raise JanusError(words[-1].removeprefix("error: "))


def end_with_parent() -> None:
    """Have this process end as soon as the one that started it has: its standard input then comes to an end."""

    def watch() -> None:
        with contextlib.suppress(OSError, ValueError):
            os.read(0, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def wait_for_all() -> None:
    """Return as soon as every process has come here."""
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """The exit codes: None for a process that would not end after the other had failed."""
    until = float("inf")
    while time.monotonic() < until:
        codes = [process.poll() for process in processes]
        if None not in codes:
            break
        if any(codes):
            until = min(until, time.monotonic() + _GRACE)
        time.sleep(0.1)
    return codes


def _free_addresses() -> list[str]:
    """One of this machine for each process."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(COUNT)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
