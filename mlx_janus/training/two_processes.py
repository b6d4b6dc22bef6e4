"""Training in two processes on one CPU: each computes half of every step.

One process of MLX keeps little more than one CPU core busy. Two threads in it would slow each other
down, and two processes do not (docs/lab-notes.md). The gradients travel between the processes over
the loopback interface, through the ring of ``mlx.core.distributed``.
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

_PROCESS_COUNT = 2  # processes that share a step
_GRACE = 5.0  # seconds for one process to end by itself after the other has failed


def two_are_faster() -> bool:
    """Return whether training is faster in two processes than in this one.

    True if MLX uses the CPU, the CPU has two cores or more, and this process is not already one of
    the two.
    """
    cores = os.cpu_count() or 1  # None if unknown
    return (
        mx.default_device() == mx.cpu
        and cores >= _PROCESS_COUNT
        and mx.distributed.init().size() == 1
    )


def run_side_by_side(command: Sequence[str]) -> None:
    """Run a command in two processes that find each other through ``mx.distributed.init()``.

    The command should call ``end_with_parent``, so that it ends when this process ends. The first
    process shares the stdout and stderr of this one. The output of the second is hidden; if only
    the second fails, the last line of its output becomes the error message.

    Raises:
        JanusError: only the second process failed.
        SystemExit: the first process failed. The code is its exit code, or 128 + its signal.
    """
    with tempfile.TemporaryDirectory() as folder:
        hosts_file = Path(folder) / "hosts.json"
        # MLX's ring reads this file: for each process, a list of its addresses.
        hosts_file.write_text(json.dumps([[address] for address in _free_addresses()]))
        hidden_output = Path(folder) / "second"
        with hidden_output.open("wb") as hidden:
            first = _start(command, 0, hosts_file, None)
            second = _start(command, 1, hosts_file, hidden)
        processes = [first, second]
        try:
            first_code, second_code = _wait(processes)
        finally:
            for process in processes:  # if one has failed, the other may wait for it forever
                process.terminate()
            for process in processes:
                process.wait()
        if first_code:
            # -n: signal n ended the process; shells report this as 128 + n.
            raise SystemExit(first_code if first_code > 0 else 128 - first_code)
        if second_code:
            output = hidden_output.read_text(errors="replace")
            lines = output.strip().splitlines() or ["it was killed"]
            raise JanusError(lines[-1].removeprefix("error: "))


def end_with_parent() -> None:
    """Start a thread that ends this process, with code 1, as soon as its parent ends.

    The standard input must be a pipe that closes when the parent ends; ``run_side_by_side`` gives
    its processes one.
    """

    def watch() -> None:
        """Wait for the end of the parent, then end this process."""
        standard_input = 0
        # Nobody writes to it, so the read returns, or fails, only when the parent has ended.
        with contextlib.suppress(OSError, ValueError):
            os.read(standard_input, 1)
        os._exit(1)  # unlike sys.exit, it ends the process from any thread, at once

    threading.Thread(target=watch, daemon=True).start()


def sum_over_processes(values: mx.array) -> mx.array:
    """Add up one array from each process. All processes must make these calls in the same order."""
    return mx.distributed.all_sum(values, stream=mx.cpu)


def _start(
    command: Sequence[str], rank: int, hosts_file: Path, output: BinaryIO | None
) -> subprocess.Popen[bytes]:
    """Start a child process.

    The child's standard input is a pipe that closes when the parent, which calls this function,
    ends.

    Args:
        command: the program and its arguments.
        rank: the child's number in MLX's ring, 0 or 1.
        hosts_file: file with the addresses of all processes.
        output: file for the child's stdout and stderr; None to share the parent's.
    """
    ring = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts_file)}
    # One thread for NumPy, unless the user has set another number.
    environment = {"OPENBLAS_NUM_THREADS": "1", **os.environ, **ring}
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output
    )


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """Wait until all processes have ended, and return their exit codes.

    If one fails, wait ``_GRACE`` seconds at most for the other. Its code is None if it is still
    running then.
    """
    deadline = float("inf")
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes:
            break
        if any(codes):  # one has failed: its code is neither 0 nor None
            deadline = min(deadline, time.monotonic() + _GRACE)
        time.sleep(0.1)
    return codes


def _free_addresses() -> list[str]:
    """Return a free loopback address, as "host:port", for each process.

    All sockets stay open until each has its port, so that no two get the same port.
    """
    with contextlib.ExitStack() as stack:
        addresses = []
        for _ in range(_PROCESS_COUNT):
            free = stack.enter_context(socket.socket())
            free.bind(("127.0.0.1", 0))  # 0: any free port
            host, port = free.getsockname()
            addresses.append(f"{host}:{port}")
        return addresses
