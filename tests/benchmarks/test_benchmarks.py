"""The benchmarks run, at the smallest size, and say what they could not measure."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

import mlx_janus
from benchmarks import bench, house, machine, memory_table, peers, serving, windows
from benchmarks.parts import Setup
from benchmarks.published_shapes import MODELS
from benchmarks.random_model import config
from mlx_janus.weights.footprint import task_memory
from mlx_janus.weights.sources import TINY
from tests.support.programs import ROOT, call

OURS = ("drawing", "answering", "batch", "first-token", "bytes", "memory", "vq-decode", "passes")


@pytest.mark.parametrize("bits", [(), ("--bits", "4")])
def test_bench_prints_one_table(bits: tuple[str, ...]) -> None:
    only = [word for name in OURS for word in ("--only", name)]
    outcome = call(bench.main, "--model", "tiny", "--steps", 2, "--repeats", 1, *bits, *only)
    assert outcome.code == 0, outcome.stderr
    assert "Not measured" not in outcome.stdout
    machine, shape, *table = outcome.stdout.strip().split("\n\n")
    assert machine.startswith("Machine: ")
    assert "shape tiny" in shape
    rows = [line.strip("| ").split(" | ") for line in table[0].splitlines()]
    assert rows[0] == ["measured", "ours over the other", "ours", "the other"]
    ratios = {row[0]: float(row[1]) for row in rows[2:] if row[1]}
    assert all(ratio > 0 for ratio in ratios.values())
    for what in (
        "drawing step",
        "answering step",
        "step of four",
        "first token.*image",
        "bandwidth",
        "pass of 8",
    ):
        assert any(re.match(what, name) for name in ratios), what


def test_a_part_that_fails_or_lacks_its_peer_is_named_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_: Setup) -> list[bench.Row]:
        raise ValueError("no luck")

    monkeypatch.setitem(bench.PARTS, "batch", broken)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: None)
    only = ("--only", "batch", "--only", "transformers", "--only", "mlx-vlm", "--only", "vq-decode")
    outcome = call(bench.main, "--model", "tiny", "--steps", 1, "--repeats", 1, *only)
    assert outcome.code == 0
    assert "- batch: failed, ValueError: no luck\n" in outcome.stdout
    assert (
        "- transformers: torch is not installed: pip install torch==2.13.0 transformers\n"
        in outcome.stdout
    )
    assert "- mlx-vlm: mlx_vlm is not installed: pip install mlx-vlm\n" in outcome.stdout
    assert "| decoding one image's tokens, 64 x 64 |" in outcome.stdout


def test_bench_writes_a_report_with_the_machine_in_it(tmp_path: Path) -> None:
    target = tmp_path / "mac.md"
    words = ("--model", "tiny", "--steps", 1, "--repeats", 1, "--only", "batch", "--bits", 4)
    outcome = call(bench.main, *words, "--report", target)
    assert outcome.code == 0, outcome.stderr
    title, facts, command, *result = target.read_text(encoding="utf-8").strip().split("\n\n")
    assert title == f"## {machine.chip()}"
    rows = dict(line.strip("| ").split(" | ") for line in facts.splitlines()[2:])
    assert list(rows)[:6] == ["chip", "cores", "memory", "system", "GPU", "BLAS"]
    assert rows["memory"].endswith(" GiB")
    assert rows["Python"] == platform.python_version()
    assert rows["mlx"] == version("mlx")
    assert rows["mlx_janus"].startswith(mlx_janus.__version__)
    shown = "python benchmarks/bench.py --model tiny --steps 1 --repeats 1 --bits 4 --only batch"
    assert command == f"```bash\n{shown}\n```"
    assert "\n\n".join(result) in outcome.stdout
    assert "| step of four images |" in result[1]


def test_a_report_never_replaces_a_file(tmp_path: Path) -> None:
    target = tmp_path / "mac.md"
    target.write_text("an hour of measuring")
    for path, reason in ((target, "exists"), (tmp_path / "no" / "mac.md", "does not exist")):
        outcome = call(bench.main, "--model", "tiny", "--only", "batch", "--report", path)
        assert outcome.code == 2
        assert reason in outcome.stderr.splitlines()[-1]
    assert target.read_text() == "an hour of measuring"


def test_a_report_has_no_names_of_the_host_and_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "alices-mac.local")
    monkeypatch.setenv("HOME", "/Users/alice")
    monkeypatch.setenv("USER", "alice")
    text = bench.report("- batch: failed, OSError: /Users/alice/models/1b", "python bench.py")
    assert "alice" not in text
    assert "OSError: ~/models/1b" in text


def test_a_mac_is_named_by_its_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "machdep.cpu.brand_string": "Apple M3 Max",
        "hw.perflevel0.logicalcpu": "10",
        "hw.perflevel1.logicalcpu": "4",
    }

    def sysctl(command: list[str], **_: object) -> SimpleNamespace:
        return SimpleNamespace(stdout=f"{values[command[-1]]}\n" if command[1] == "-n" else "abc\n")

    monkeypatch.setattr(machine.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(machine.platform, "mac_ver", lambda: ("15.4", ("", "", ""), "arm64"))
    monkeypatch.setattr(machine.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda: 14)
    monkeypatch.setattr(machine.subprocess, "run", sysctl)
    facts = machine.facts()
    assert facts["chip"] == "Apple M3 Max"
    assert facts["cores"] == "14: 10 for performance, 4 for efficiency"
    assert facts["system"] == "macOS 15.4, arm64"
    assert facts["BLAS"] == "Accelerate"
    assert machine.machine().startswith("Apple M3 Max, 14 cores, ")


def test_make_bench_passes_the_report_on() -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    command = [make, "-n", "bench", "PYTHON=python", "REPORT=my mac.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'python benchmarks/bench.py --report "my mac.md"'


def test_the_results_have_a_section_for_each_machine() -> None:
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    _, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    assert len(sections) >= 2
    for section in sections:
        assert re.search(r"\bmlx\b.* 0\.\d+\.\d+", section), section[:40]
        assert re.search(r"\d GiB", section), section[:40]


def test_windows_are_measured_against_window_one() -> None:
    first, *others = windows.measure(mlx_janus.load(TINY), ["a red circle"], rounds=1)
    assert (first.width, first.passes, first.speedup, first.unlike) == (1, 64, 1, 0)
    assert all(wide.passes < 64 and wide.unlike == 0 for wide in others)


def test_memory_is_measured_beside_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(command: list[str], **_: object) -> SimpleNamespace:
        mx.clear_cache()
        return SimpleNamespace(stdout=str(memory_table.peak(command[-1]) - mx.get_active_memory()))

    monkeypatch.setattr(memory_table, "subprocess", SimpleNamespace(run=here, PIPE=subprocess.PIPE))
    outcome = call(memory_table.main, "--measure", "--model", "tiny")
    assert outcome.code == 0, outcome.stderr
    rows = [line for line in outcome.stdout.splitlines() if line.startswith(("| tiny", "| 7b"))]
    assert [row.split(" | ")[1] for row in rows] == ["float32", "8 bits", "4 bits"] * 2
    assert "| 7b | 4 bits | - / " in rows[-1]


def test_the_measured_peak_grows_with_the_pictures_as_computed() -> None:
    before = mx.get_active_memory()
    one, four = (memory_table.peak(f"tiny float32 float draw {n}") - before for n in (1, 4))
    sizes = config(MODELS["tiny"].sizes)
    cache = (
        task_memory(sizes, "float32", pictures=4)["draw"] - task_memory(sizes, "float32")["draw"]
    )
    assert four - one == pytest.approx(cache, rel=0.5)


def test_many_clients_of_a_server_each_get_what_is_theirs() -> None:
    outcome = call(serving.main, "--clients", 8, "--seconds", 3, "--rounds", 1)
    assert outcome.code == 0, outcome.stderr
    assert "| lost, mixed up, failed | none |" in outcome.stdout
    answers, images = re.search(r"answers, images \| (\d+), (\d+)", outcome.stdout).groups()  # type: ignore[union-attr]
    assert min(int(answers), int(images)) > 0
    assert re.search(r"8 images in a row .* times as fast", outcome.stdout)
    assert re.search(
        r"while 8 images are generated, which takes [\d.]+ s \| [\d.]+ \|", outcome.stdout
    )


def test_sampled_functions_come_with_their_class(tmp_path: Path) -> None:
    (tmp_path / "boats.py").write_text(
        '''"""Boats and their crews.

More about boats.
"""


class Boat:
    """A boat with a sail."""

    length: float  # metres
    sail: str

    def short(self):
        return 1

    def rename(self, name):
        """Give the boat a name."""
        if name:
            self.name = name
        return self
'''
    )
    assert "".join(house.sample(tmp_path, 1, seed=0)).splitlines() == [
        f"# {tmp_path.name}.boats: Boats and their crews.",
        "class Boat:",
        '    """A boat with a sail."""',
        "",
        "    length: float  # metres",
        "    sail: str",
        "    ...",
        "    def rename(self, name):",
        '        """Give the boat a name."""',
        "        if name:",
        "            self.name = name",
        "        return self",
    ]
