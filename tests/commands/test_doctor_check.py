"""``doctor --check``: right numbers pass, a planted fault of each kind fails, and the reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_janus.__main__ import main as group
from mlx_janus.commands import doctor
from mlx_janus.config import JanusConfig
from mlx_janus.models import convolution
from mlx_janus.models.janus import JanusModel
from mlx_janus.selfcheck import reference, run
from mlx_janus.selfcheck.numbers import check_numbers
from mlx_janus.selfcheck.quantization import check_quantization
from mlx_janus.selfcheck.reference import Precision
from tests.support.programs import call

Facts = list[dict[str, Any]]
FLOAT32 = Precision("float32")
HALF = Precision("bfloat16")
FOUR_BITS = Precision("float32", 4)


@pytest.fixture(autouse=True)
def _few_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check on the CPU, in as many precisions as the faults need."""
    monkeypatch.setattr(run, "devices_here", lambda: ["cpu"])
    few = (FLOAT32, HALF, FOUR_BITS)
    monkeypatch.setattr(run, "check_numbers", partial(check_numbers, precisions=few))
    quantized = (FOUR_BITS,)
    monkeypatch.setattr(
        run, "check_quantization", partial(check_quantization, precisions=quantized)
    )


def check(*parts: str) -> tuple[int, Facts]:
    """Return the exit code and the facts of ``doctor --check --json`` on the CPU."""
    options = [word for part in parts for word in ("--part", part)]
    done = call(group, "doctor", "--check", "--json", *options)
    return done.code, json.loads(done.stdout)


def failures(facts: Facts) -> set[tuple[str, str]]:
    """Return the check and the precision of each failure."""
    return {(fact["about"], fact["precision"]) for fact in facts if fact["status"] == "fail"}


def change_models(monkeypatch: pytest.MonkeyPatch, change: Callable[[JanusModel], None]) -> None:
    """Change each model that the self-check loads."""
    read_model = reference.read_model

    def read_changed(folder: Path, config: JanusConfig) -> JanusModel:
        model = read_model(folder, config)
        change(model)
        return model

    monkeypatch.setattr(reference, "read_model", read_changed)


@pytest.mark.check
def test_the_package_passes() -> None:
    code, facts = check("numbers", "quantization")
    assert (code, failures(facts)) == (0, set())
    compared = [fact for fact in facts if fact["deviation"] is not None]
    assert len(compared) == 1 + 3 * 8 + 1
    assert all(fact["deviation"] <= fact["bound"] and fact["reason"] for fact in compared)
    assert (facts[0]["text"], facts[0]["status"]) == ("no GPU: skipped", "warn")


def test_a_wrong_eps_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(model: JanusModel) -> None:
        for module in model.modules():
            if hasattr(module, "eps"):
                module.eps = 1e-5

    change_models(monkeypatch, change)
    code, facts = check("numbers")
    assert code == 1
    stages = {"vision encoder", "vision adaptor", "language model", "guided image logits"}
    codec = {"codec decoder", "codec encoder"}
    wrong = {stage for stage, precision in failures(facts) if precision == "float32"}
    assert wrong >= stages | codec


def test_a_wrong_quantization_group_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = reference.plan_quantization
    monkeypatch.setattr(reference, "plan_quantization", lambda *args: plan(*args, 32))
    code, facts = check("quantization")
    assert code == 1
    assert failures(facts) == {("groups of the model 'tiny'", "4 bits")}


def test_scales_of_another_group_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that reads the scales of the next group."""
    multiply = mx.quantized_matmul

    def wrong(x: mx.array, w: mx.array, scales: mx.array, *rest: Any, **options: Any) -> mx.array:
        return multiply(x, w, mx.roll(scales, 1, axis=-1), *rest, **options)

    monkeypatch.setattr(mx, "quantized_matmul", wrong)
    code, facts = check("quantization")
    assert code == 1
    assert failures(facts) == {("products", "4 bits, float32")}


def test_image_logits_that_are_no_numbers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text logits, which are compared first, are right."""
    image_logits = JanusModel.image_logits

    def broken(model: JanusModel, hidden: mx.array) -> mx.array:
        return image_logits(model, hidden) * mx.nan

    monkeypatch.setattr(JanusModel, "image_logits", broken)
    _, facts = check("quantization")
    assert failures(facts) == {("products", "4 bits, float32")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_wrong_type_is_found(monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    read_model = reference.read_model
    monkeypatch.setattr(
        reference,
        "read_model",
        lambda folder, config: read_model(folder, replace(config, dtype=dtype)),
    )
    code, facts = check("numbers")
    assert code == 1
    assert {("types", "float32"), ("language model", "float32")} <= failures(facts)
    assert (("types", "bfloat16") in failures(facts)) == (dtype == "float16")


def test_a_codec_in_half_precision_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    change_models(monkeypatch, lambda model: model.gen_vision_model.set_dtype(mx.bfloat16))
    _, facts = check("numbers")
    assert {("codec decoder", "float32"), ("types", "bfloat16")} <= failures(facts)


def test_a_computation_that_raises_is_one_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> mx.array:
        raise RuntimeError("[metal::Device] Unable to\nbuild a library")

    monkeypatch.setattr(convolution.Conv2d, "__call__", broken)
    code, facts = check("numbers")
    assert code == 1
    text = next(fact["text"] for fact in facts if fact["about"] == "codec encoder")
    assert text == "RuntimeError: [metal::Device] Unable to build a library"
    assert ("language model", "float32") not in failures(facts)


def test_lines_a_table_and_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def few(device: str) -> Iterator[Any]:
        return check_numbers(device, (FLOAT32,))

    monkeypatch.setattr(run, "check_numbers", few)
    report = tmp_path / "report.md"
    done = call(group, "doctor", "--check", "--part", "numbers", "--report", str(report))
    assert done.code == 0
    assert "Checking numbers on the CPU ..." in done.stderr
    assert f"Wrote {report}." in done.stderr
    lines, table = done.stdout.split("\n\n")
    assert "ok    numbers: codec decoder (CPU, float32): deviation " in lines
    assert table.splitlines()[0].split() == ["part", "device", "ok", "warn", "fail"]
    text = report.read_text(encoding="utf-8")
    assert "| ok | numbers | codec decoder | CPU | float32 | deviation" in text
    assert "- versions: mlx_janus" in text


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["-m", "tiny"], "--model"),
        (["--report", "x.md"], "--report"),
        (["--part", "speed"], "--part"),
    ],
)
def test_options_of_the_check_need_it(words: list[str], flag: str) -> None:
    done = call(group, "doctor", *words)
    assert done.code == 2
    assert f"{flag} needs --check" in done.stderr


def test_a_report_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    done = call(group, "doctor", "--check", "--report", str(tmp_path / "missing" / "report.md"))
    assert done.code == 1
    assert "make it first, or name another with --report" in done.stderr
    assert done.stdout == ""


def test_every_part_can_be_chosen() -> None:
    [choice] = [option.type for option in doctor.main.params if option.name == "parts"]
    assert tuple(choice.choices) == run.PARTS
