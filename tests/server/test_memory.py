"""The memory of large requests goes back to the system when they are done."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.programs import ROOT

CODE = """
import sys
import psutil
from mlx_janus.server import run
if sys.argv[1] == "as a server":
    run._return_freed_memory()
del_first = bytearray(20 << 20)
del del_first  # after this, glibc keeps blocks of this size in its heap
blocks = [bytearray(3 << 20) for _ in range(60)]
for block in blocks:
    block[::4096] = b"x" * len(block[::4096])  # takes memory page by page
del blocks[:-1]  # the last block is the heap's top
print(psutil.Process().memory_info().rss // 1_000_000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_freed_blocks_are_returned_though_a_later_one_is_kept() -> None:
    sizes = {}
    for way in ("as a server", "by default"):
        command = [sys.executable, "-c", CODE, way]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.stderr == ""
        sizes[way] = int(done.stdout)
    assert sizes["as a server"] < sizes["by default"] - 100
