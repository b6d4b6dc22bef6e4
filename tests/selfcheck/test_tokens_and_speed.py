"""Tokens on two devices, speeds and forecasts, and the known tokens of Janus-Pro-1B."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

import mlx_janus
from mlx_janus.decode.image import TextRow
from mlx_janus.selfcheck import model as model_part
from mlx_janus.selfcheck import run, speed, tokens
from mlx_janus.selfcheck.findings import Check
from mlx_janus.selfcheck.report import facts, markdown, summary
from mlx_janus.selfcheck.speed import PUBLISHED, Speed
from mlx_janus.selfcheck.tokens import Generated

FAST = Speed("gpu", 273e9, 0.01, 0, {1: 0.01}, 1.0)


def test_the_tokens_of_janus_tiny_agree() -> None:
    checks = list(tokens.check_tokens("cpu"))
    assert [check.status for check in checks] == ["ok"] * 3
    assert checks[0].text == "all 64 equal the CPU's"


@pytest.mark.parametrize(
    ("image", "choices", "statuses"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], ["ok", "ok", "ok"]),
        ([1, 2, 9, 9], [1, 2, 3, 4], ["warn", "ok", "ok"]),
        ([1, 2, 9, 9], [1, 9, 9, 9], ["warn", "ok", "fail"]),
    ],
)
def test_rounding_is_a_warning_and_other_choices_a_failure(
    monkeypatch: pytest.MonkeyPatch, image: list[int], choices: list[int], statuses: list[str]
) -> None:
    made = iter([Generated([1, 2, 3, 4], [5], []), Generated(image, [5], choices)])
    monkeypatch.setattr(tokens, "generate", lambda *_, **__: next(made))
    assert [check.status for check in tokens.check_tokens("gpu")] == statuses


def test_a_forecast_is_at_least_the_reading_of_the_weights() -> None:
    """The floors are computed by hand: 2.55 GB a step and the KV cache at 273 GB/s."""
    _, small, large = PUBLISHED
    no_overhead = replace(FAST, step=0.0)
    assert speed.image_seconds(small, 16, no_overhead, 5) == pytest.approx(5.4 + 0.27, abs=0.15)
    assert speed.image_seconds(large, 16, no_overhead, 5) == pytest.approx(26 + 0.7, abs=0.5)
    quantized = speed.image_seconds(large, 4.5, no_overhead, 5)
    assert quantized < speed.image_seconds(large, 8.5, no_overhead, 5) / 1.5
    slower = speed.image_seconds(small, 16, FAST, 24)
    assert slower == pytest.approx(5.67 + 576 * 0.01, abs=0.15)


@pytest.mark.parametrize(
    ("bits", "sizes"), [(16, (4.4, 4.4, 15.3)), (8.5, (3.3, 3.3, 9.5)), (4.5, (2.6, 2.6, 6.4))]
)
def test_the_memory_of_published_models_is_the_documented_one(
    bits: float, sizes: tuple[float, ...]
) -> None:
    for published, documented in zip(PUBLISHED, sizes, strict=True):
        assert speed.needed_memory(published, bits) / 1e9 == pytest.approx(documented, rel=0.12)


def test_a_model_too_large_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "available_memory", lambda: 6_000_000_000)
    cpu = replace(FAST, device="cpu")
    by_name = {check.about: check for check in speed.forecasts(cpu, 5)}
    assert by_name["Janus-Pro-7B"].status == "warn"
    assert by_name["Janus-Pro-7B"].text.endswith("and 6.0 GB are free")


def test_speeds_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_CPU_LARGEST", 1 << 24)
    checks = [*run.run_parts(("speed",))] if not mx.is_available(mx.gpu) else []
    assert {check.status for check in checks} <= {"ok", "warn"}
    names = [check.about for check in checks if check.part == "speed"]
    assert names == [] or names == ["bandwidth", "image step", "image pass", "tokens a pass"]


def test_a_model_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_part, "measure", lambda *_: FAST)
    checks = {check.about: check for check in model_part.check_model("tiny", "cpu")}
    assert {check.status for check in checks.values()} == {"ok"}
    assert checks["smoke test"].text == "skipped: only Janus-Pro-1B has known tokens"


def test_a_models_networks_are_compared_with_the_cpus(
    monkeypatch: pytest.MonkeyPatch, pro: mlx_janus.JanusPipeline
) -> None:
    """A device whose encoder is wrong, played by the CPU."""
    checks = {check.about: check for check in model_part.compare_with_cpu(pro, "cpu", "float32")}
    assert [check.deviation for check in checks.values()] == [0.0] * 3
    understand = pro.model.understand
    scales = iter([1.1, 1.0])
    monkeypatch.setattr(pro.model, "understand", lambda x: next(scales) * understand(x))
    wrong = next(model_part.compare_with_cpu(pro, "cpu", "float32"))
    assert (wrong.status, wrong.about) == ("fail", "vision encoder and the CPU's")


def test_a_model_that_is_missing_is_one_failure() -> None:
    *_, check = run.run_parts((), model="/no/such/folder")
    assert (check.status, check.part) == ("fail", "model")
    assert "/no/such/folder" in check.text


@pytest.mark.parametrize(("found", "status"), [(8, "ok"), (3, "warn"), (0, "fail")])
def test_the_known_tokens_of_pro_1b(
    monkeypatch: pytest.MonkeyPatch, pro: mlx_janus.JanusPipeline, found: int, status: str
) -> None:
    rows: list[TextRow] = []

    def draw(_: Any, prompts: Any, *__: Any) -> Iterator[mx.array]:
        rows.extend(prompts[0])
        for i, token in enumerate(model_part.SMOKE_TOKENS):
            yield mx.array([[token if i < found else 0]])

    monkeypatch.setattr(model_part, "draw_tokens", draw)
    text = pro.tokenizer.encode(model_part.SMOKE_PROMPT, add_special_tokens=False).ids
    monkeypatch.setattr(model_part, "SMOKE_IDS", len(text) + 2)
    check = model_part.check_smoke(pro, "cpu", "float32")
    assert check.status == status
    ids, unconditional = [list(row.ids) for row in rows]
    assert ids == [pro.prompts.drawing("a")[0], *text, pro.prompts.drawing("a")[-1]]
    assert (unconditional[0], unconditional[-1]) == (ids[0], ids[-1])


def test_another_tokenizer_is_found(pro: mlx_janus.JanusPipeline) -> None:
    check = model_part.check_smoke(pro, "cpu", "float32")
    assert check.status == "fail"
    assert "not 17" in check.text


def test_a_report_shows_faults_first_and_escapes_bars() -> None:
    checks = [
        Check("numbers", "a", "cpu", "", "ok", "fine"),
        Check("numbers", "b", "cpu", "", "fail", "x | y", float("nan"), 1.0),
    ]
    rows = [row for row in markdown(checks, {}).splitlines() if row.startswith("| ")]
    assert rows[1].startswith("| fail |")
    assert "x \\| y" in rows[1]
    assert facts(checks[1])["deviation"] is None
    assert summary(checks).splitlines()[1].split() == ["numbers", "CPU", "1", "0", "1"]
