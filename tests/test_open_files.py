"""Importing the package leaves the limit of open files as it is, or raises it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.programs import ROOT

CODE = """
import json, resource, sys
before = tuple(json.loads(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_NOFILE, before)
def refuse(kind, limits):
    if limits[1] > before[1]:
        raise ValueError("not allowed to raise maximum limit")
    real(kind, limits)
real = resource.setrlimit
resource.setrlimit = refuse  # as for a user who is not root
import mlx_janus.pipeline
print(json.dumps(resource.getrlimit(resource.RLIMIT_NOFILE)))
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [((256, 1024), (1024, 1024)), ((256, 4000), (2048, 4000)), ((3000, 3000), (3000, 3000))],
)
def test_a_low_limit_is_no_error_and_a_high_one_is_kept(
    before: tuple[int, int], after: tuple[int, int]
) -> None:
    command = [sys.executable, "-c", CODE, json.dumps(before)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert tuple(json.loads(done.stdout)) == after
