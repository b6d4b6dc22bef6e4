"""A bounded campaign over every reader, and that the fuzzer finds what it is to find."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from mlx_janus.errors import ConfigError
from tests.fuzz import __main__ as program
from tests.fuzz import campaign, trial
from tests.fuzz.campaign import Findings, run_orders
from tests.fuzz.targets import TARGETS, Target
from tests.fuzz.trial import Failure, Order, Trial

_SECONDS = 0.5  # of CPU time for each reader


def test_every_reader_survives_damaged_input(tmp_path: Path) -> None:
    findings = Findings()
    run_orders([Order(name, "tests", 500, _SECONDS) for name in TARGETS], findings)
    assert findings.save(tmp_path) == []
    assert set(findings.inputs) == set(TARGETS)
    for name, target in TARGETS.items():
        assert findings.inputs[name] >= len(target.seeds()), name
        assert len(findings.ends[name]) >= 2, name  # some inputs are read, and some refused


def test_the_program_names_every_target() -> None:
    assert set(program.TARGET_NAMES) == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_equal_seeds_give_equal_inputs(name: str) -> None:
    target = TARGETS[name]
    corpus = target.seeds()

    def mutants() -> list[bytes]:
        random = Random("x")
        return [target.mutate(random.choice(corpus), random, corpus) for _ in range(30)]

    first = mutants()
    assert mutants() == first
    assert len(set(first)) > 20


# A planted fault is found


class _Panic(BaseException):
    """As pyo3's: it is no Exception."""


def _refuse(data: bytes) -> None:
    raise ConfigError(f"{len(data)} bytes")


def _panic(_: bytes) -> None:
    raise _Panic("called `Option::unwrap()`")


def _recurse(data: bytes) -> None:
    _recurse(data)


def _write(_: bytes) -> None:
    os.write(2, b"a line of a library")


def _compute(_: bytes) -> None:
    while time.process_time() < compute_until[0]:
        pass


def _fill(_: bytes) -> None:
    bytearray(b"x") * (trial.MAX_GROWTH + (64 << 20))


compute_until = [0.0]
FAULTS: dict[str, tuple[Callable[[bytes], None], str]] = {
    "panic": (_panic, "_Panic: called"),
    "recursion": (_recurse, "RecursionError"),
    "output": (_write, "wrote to stderr"),
    "time": (_compute, "it took 0."),
    "memory": (_fill, "MiB"),
}


@pytest.fixture
def try_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[bytes], None]], str | Failure]:
    """Return a function that gives an input to a reader in this process."""

    def run(read: Callable[[bytes], None]) -> str | Failure:
        target = Target(lambda _: read, lambda: [b"x"], lambda data, *_: data)
        monkeypatch.setitem(TARGETS, "planted", target)
        output = tmp_path / "output"
        saved = os.dup(2)
        with output.open("ab") as file:
            os.dup2(file.fileno(), 2)
        try:
            return Trial("planted", tmp_path / "files", output).run(b"x")
        finally:
            os.dup2(saved, 2)
            os.close(saved)

    return run


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(
    name: str,
    try_reader: Callable[[Callable[[bytes], None]], str | Failure],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trial, "MAX_SECONDS", 0.1)
    compute_until[0] = time.process_time() + 0.2
    read, words = FAULTS[name]
    failure = try_reader(read)
    assert isinstance(failure, Failure)
    assert words in failure.problem


def test_a_refusal_is_no_fault(
    try_reader: Callable[[Callable[[bytes], None]], str | Failure],
) -> None:
    assert try_reader(_refuse) == "ConfigError # bytes"


PLANTED = """
import ctypes, sys, types
from tests.fuzz import trial
trial.MAX_WAIT = 0.5
def read(data):
    if data == b"hangs":
        ctypes.PyDLL(None).sleep(60)  # holds the interpreter's lock
    if data == b"dies":
        ctypes.string_at(0)
def target(data):
    return types.SimpleNamespace(
        prepare=lambda _: read, seeds=lambda: [data], mutate=lambda data, *_: data
    )
table = {name: target(name.encode()) for name in ("hangs", "dies", "lives")}
sys.modules["tests.fuzz.targets"] = types.SimpleNamespace(TARGETS=table)
trial.main("orders.json")
"""


def test_an_input_that_ends_the_process_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(campaign, "WORKER", (sys.executable, "-c", PLANTED))
    findings = Findings()
    run_orders([Order(name, "x", 3, 60.0) for name in ("hangs", "dies", "lives")], findings)
    hang, death = findings.failures.values()
    assert (hang[0].target, hang[1]) == ("hangs", b"hangs")
    assert "it hung" in hang[0].problem
    assert (death[0].target, death[1]) == ("dies", b"dies")
    assert "ended with code -11" in death[0].problem
    assert findings.inputs == {"hangs": 1, "dies": 1, "lives": 3}  # the next order is run
    _, command, *_ = findings.save(tmp_path)
    assert Path(command.split()[-1]).read_bytes() == b"hangs"


def test_a_saved_input_is_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "index-1"
    path.write_bytes(b"{}")
    folder = Path.cwd()
    assert program.main(["--target", "index", "--input", str(path)]) == 0
    assert "has no weight_map" in capsys.readouterr().out
    assert Path.cwd() == folder
