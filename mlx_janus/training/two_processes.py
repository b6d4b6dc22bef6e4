"""Training in two processes on one CPU, which share every step (``mlx.core.distributed``).

MLX computes mostly on one CPU core. Two of its threads slow each other down where two processes do
not (docs/lab-notes.md). The gradients travel through MLX's ring over the loopback interface.
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
from typing import BinaryIO

import mlx.core as mx

from ..errors import JanusError

COUNT = 2  # processes, each of which computes one half of a step
_GRACE = 5.0  # seconds that one process gets to end by itself after the other failed


def two_are_faster() -> bool:
    """Return whether training is faster in two processes than in this one.

    True if MLX uses a CPU with two cores or more, unless this process is already one of two.
    """
    return (
        mx.default_device() == mx.cpu
        and (os.cpu_count() or 1) >= COUNT
        and mx.distributed.init().size() == 1
    )


def run_side_by_side(command: Sequence[str]) -> None:
    """Run a command in two processes that find each other through ``mx.distributed.init()``.

    They end when this process ends, for whatever reason, if they call ``end_with_parent`` first.
    The first process shares this one's stdout and stderr. The second one's output is hidden; if
    only the second fails, its last line becomes the error.

    Raises:
        JanusError: the second process failed.
        SystemExit: the first process failed. The code is its exit code, or 128 + its signal.
    """
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        # MLX's ring reads this file: for each process, a list of its addresses.
        hosts.write_text(json.dumps([[address] for address in _free_addresses()]))
        output = Path(folder) / "second"
        with output.open("wb") as second:
            processes = [
                _start(command, rank, hosts, second if rank else None) for rank in range(COUNT)
            ]
        try:
            codes = _wait(processes)
        finally:
            for process in processes:  # after a failure, the other may wait forever
                process.terminate()
            for process in processes:
                process.wait()
        if codes[0]:
            # -n: signal n ended the process; shells report this as 128 + n.
            raise SystemExit(codes[0] if codes[0] > 0 else 128 - codes[0])
        if codes[1]:
            lines = output.read_text(errors="replace").strip().splitlines() or ["it was killed"]
            raise JanusError(lines[-1].removeprefix("error: "))


def end_with_parent() -> None:
    """Start a thread that ends this process, with code 1, as soon as its parent ends.

    The standard input must be a pipe that closes when the parent ends; ``run_side_by_side`` gives
    its processes one.
    """

    def watch() -> None:
        # Nobody writes to the input: the read returns, or fails, only when the parent has ended.
        with contextlib.suppress(OSError, ValueError):
            os.read(0, 1)
        os._exit(1)  # at once, from any thread, even if the main thread waits in MLX

    threading.Thread(target=watch, daemon=True).start()


def sum_over_processes(values: mx.array) -> mx.array:
    """Return the sum of every process's array. All processes must call this in the same order."""
    return mx.distributed.all_sum(values, stream=mx.cpu)


def wait_for_all() -> None:
    """Return as soon as every process has called this."""
    mx.eval(sum_over_processes(mx.array(1.0)))


def _start(
    command: Sequence[str], rank: int, hosts: Path, output: BinaryIO | None
) -> subprocess.Popen[bytes]:
    """Start one process, with its output in a file, or with this process's stdout and stderr.

    Its standard input is a pipe that closes when this process ends; ``end_with_parent`` waits for
    that.
    """
    ring = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
    environment = {"OPENBLAS_NUM_THREADS": "1", **os.environ, **ring}
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output
    )


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """Wait until all processes have ended, and return their exit codes.

    After a failure (a code other than 0) the other process gets ``_GRACE`` seconds; its code is
    None if it is still running then.
    """
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
    """Return a free loopback address, as "host:port", for each process.

    All sockets stay open until each has its port, so that no two get the same one.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(COUNT)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
