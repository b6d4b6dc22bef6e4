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
from benchmarks import (
    answers_batch,
    bench,
    best_of,
    flow,
    grammar,
    house,
    machine,
    memory_table,
    peers,
    serving,
    stages,
    windows,
)
from benchmarks.parts import Setup
from benchmarks.published_shapes import MODELS
from benchmarks.random_model import config
from mlx_janus.decode.flow import FlowDrawing
from mlx_janus.weights.footprint import task_memory
from mlx_janus.weights.sources import TINY
from tests.support.golden import rms_error
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


def test_a_flow_is_converted_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(command: list[str], **_: object) -> SimpleNamespace:
        return SimpleNamespace(stdout=call(flow.main, *command[2:]).stdout)

    monkeypatch.setattr(stages, "subprocess", SimpleNamespace(run=here, PIPE=subprocess.PIPE))
    outcome = call(flow.main, "--model", "tiny", "--work", tmp_path, "--steps", 1)
    assert outcome.code == 0, outcome.stderr
    rows = [line.split(" | ")[0] for line in outcome.stdout.splitlines() if " | " in line]
    for row in ("| checkpoint", "| convert", "| decode", "| draw-short", "| draw-long", "| kept"):
        assert row in rows
    again = call(flow.main, "--work", tmp_path, "--table")
    assert again.stdout == outcome.stdout


def test_both_ways_to_a_velocity_are_one(flow_folder: Path) -> None:
    """The benchmark's loop without a kept prompt computes what the loop with one does."""
    janus = mlx_janus.load(flow_folder, dtype="float32")
    ids = janus.pathway.prompt_ids(flow.PROMPTS["short"])[:-1]
    pad = janus.prompts.special.pad
    noise = mx.random.normal((1, 8, 8, 4), key=mx.random.key(0))
    drawing = FlowDrawing(janus.model, [ids], pad, noise, janus.pathway.options({"steps": 4}))
    whole = flow._velocity_of_whole(drawing, ids, pad)
    drawing.step()
    assert rms_error(whole, drawing.predicted - noise) < 1e-5


def test_the_memory_table_has_janusflow() -> None:
    outcome = call(memory_table.main)
    assert outcome.code == 0, outcome.stderr
    (row,) = [line for line in outcome.stdout.splitlines() if line.startswith("| JanusFlow-1.3B")]
    parameters, download, *forms = row.strip("| ").split(" | ")[1:]
    assert (parameters, download) == ("2.08 billion", "4.4 GB")
    sizes = [float(form.removesuffix(" GB")) for form in forms]
    assert sizes == sorted(sizes, reverse=True)
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert " | ".join([parameters, download, *forms]) in page


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


def test_best_of_compares_each_choice_with_chance_and_the_judge() -> None:
    right = (False, True, False, False, True, False, False, False)
    scores = {name: tuple(map(float, right)) for name in best_of.WORDINGS}
    scores["show"] = tuple(-value for value in scores["show"])  # always wrong, where it can be
    prompts = [best_of.JudgedPrompt(task, right, scores) for task in best_of.TASKS]
    shares = [best_of.share_right(prompts[0], n, "see") for n in (1, 2, 4, 8)]
    assert shares == [0.25, 0.5, 1.0, 1.0]
    assert [best_of.share_right(prompts[0], n, "judge") for n in (1, 2, 4, 8)] == shares
    assert best_of.share_right(prompts[0], 8, "show") == 0
    assert {best_of.share_right(prompts[0], n, "chance") for n in (1, 2, 4, 8)} == {0.25}
    assert best_of.overall(prompts, 8, "see") == (1.0, 0.0)
    lines = best_of.table(prompts, ["see", "show"])
    assert lines[2].startswith("| chance | 25.0% ± 0.0% |")
    assert lines[3].endswith("| 25.0% ± 0.0% | 50.0% ± 0.0% | 100.0% ± 0.0% | 100.0% ± 0.0% |")


def test_best_of_prints_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(best_of, "NUMBERS", (1, 2))
    monkeypatch.setattr(best_of, "_DRAWN", 2)
    monkeypatch.setattr(best_of, "TASKS", best_of.TASKS[:2])
    outcome = call(best_of.main, "--prompts", 1, "-w", "see")
    assert outcome.code == 0, outcome.stderr
    assert "| chosen by | N = 1 | N = 2 |" in outcome.stdout
    assert "`What do you see?`, the prompt as the answer (the default)" in outcome.stdout


def test_the_cost_of_a_schema_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    grammar.measure_masks(600)
    grammar.measure_answers("tiny", 3)
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert rows[2:5] == ["| mask", "| end in reach", "| add a token"]
    assert rows[-2:] == ["| words", "| schema"]


def test_answers_at_once_are_compared_with_answers_in_a_row() -> None:
    sizes = ("--answers", 3, "--tokens", 4, "--prefix", 5, "--repeats", 2)
    outcome = call(answers_batch.main, *sizes)
    assert outcome.code == 0, outcome.stderr
    rows = [line for line in outcome.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 2
    assert all(row.endswith("| 3 of 3 |") for row in rows)
