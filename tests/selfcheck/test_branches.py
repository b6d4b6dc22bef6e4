"""The code that only a GPU runs, run here on the CPU by choosing the branch, and its faults."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_janus import memory
from mlx_janus.config import JanusConfig
from mlx_janus.decode import image as draw_module
from mlx_janus.models.convolution import Conv2d
from mlx_janus.models.vq_parts import VQ_PARTS
from mlx_janus.selfcheck import branches, findings, run
from mlx_janus.selfcheck.findings import Check
from mlx_janus.selfcheck.numbers import PRECISIONS, check_numbers
from mlx_janus.selfcheck.reference import FOLDER
from mlx_janus.weights import load as load_module

GPU_BYTES = 9_000_000_000


class FakeGPU:
    """A Mac's GPU for this package's choices; MLX itself still computes on the CPU."""

    def __init__(self) -> None:
        self.wired_limit = 7
        self.wired_limits: list[int] = []
        self.plain_convolutions = 0

    def set_wired_limit(self, limit: int) -> int:
        """Set the limit, and return the former one, as ``mx.set_wired_limit`` does."""
        self.wired_limits.append(limit)
        former = self.wired_limit
        self.wired_limit = limit
        return former


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    """Let this package believe that the default device is a Mac's GPU."""
    fake = FakeGPU()
    convolve = nn.Conv2d.__call__

    def counted(layer: nn.Conv2d, x: mx.array) -> mx.array:
        fake.plain_convolutions += 1
        return convolve(layer, x)

    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "set_default_device", lambda _: None)
    monkeypatch.setattr(mx, "is_available", lambda _: True)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    sizes = {"max_recommended_working_set_size": GPU_BYTES}
    monkeypatch.setattr(mx, "device_info", lambda *_: sizes)
    monkeypatch.setattr(mx, "set_wired_limit", fake.set_wired_limit)
    stream = memory.weight_stream(mx.cpu)
    monkeypatch.setattr(load_module, "weight_stream", lambda _: stream)
    monkeypatch.setattr(nn.Conv2d, "__call__", counted)
    # A CPU would start a C++ compiler; test_laws.py compiles the choice.
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")  # ``on_device`` leaves it off
    mx.disable_compile()
    yield fake
    mx.enable_compile()


def by_name(checks: Iterator[Check]) -> dict[str, Check]:
    """Return checks by their names."""
    return {check.about: check for check in checks}


@pytest.mark.check
def test_every_branch_of_a_gpu_passes(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    make = draw_module.make_sampler

    def make_sampler(options: Any, *, compiled: bool) -> Any:
        asked.append(compiled)
        return make(options, compiled=compiled)

    monkeypatch.setattr(branches, "make_sampler", make_sampler)
    checks = by_name(branches.check_branches("gpu"))
    assert {check.text for check in checks.values() if check.status == "fail"} == set()
    assert asked.count(True) == asked.count(False) == 3
    assert gpu.plain_convolutions > 10  # the codec's layers too
    assert checks["wired limit"].text == "9.0 GB inside, 0 MB after"
    assert gpu.wired_limits.count(GPU_BYTES) >= 2  # once by the check, once by the image
    assert gpu.wired_limit == 7
    assert "of 9.0 GB" in checks["memory limits"].text


def test_the_numbers_pass_through_the_branches_of_a_gpu(
    gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = PRECISIONS[0], PRECISIONS[-1]
    monkeypatch.setattr(run, "check_numbers", partial(check_numbers, precisions=few))
    checks = list(run.run_parts(("numbers",)))
    on_gpu = [check for check in checks if check.device == "gpu"]
    assert {check.precision for check in on_gpu} == {each.name for each in few}
    assert [check.text for check in on_gpu if check.status != "ok"] == []
    assert not any("no GPU" in check.text for check in checks)


def test_a_gpu_loads_the_models_own_type_and_estimates_its_decoder(
    gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = JanusConfig.load(FOLDER / "config.json")
    assert load_module.choose_dtype(config, None) == config.dtype
    on_gpu = VQ_PARTS.pixel_bytes(config)
    monkeypatch.undo()
    assert on_gpu * 13 == VQ_PARTS.pixel_bytes(config) * 12


def test_a_compiled_choice_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    make = draw_module.make_sampler

    def make_sampler(options: Any, *, compiled: bool) -> Any:
        plain = make(options, compiled=False)
        return (lambda logits, keys: plain(logits, keys + 1)) if compiled else plain

    monkeypatch.setattr(branches, "make_sampler", make_sampler)
    assert branches.check_compiled_choice("gpu", compiled=False).status == "ok"
    assert branches.check_compiled_choice("gpu", compiled=True).status == "fail"


def test_both_convolutions_are_right_and_a_shifted_one_is_found() -> None:
    assert branches.check_convolution("cpu").status == "ok"
    assert branches.check_convolution("gpu", nn.Conv2d.__call__).status == "ok"

    def shifted(layer: Conv2d, x: mx.array) -> mx.array:
        return nn.Conv2d.__call__(layer, mx.roll(x, 1, axis=1))

    assert branches.check_convolution("gpu", shifted).status == "fail"


def test_a_wired_limit_that_is_not_restored_is_found(
    gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(limit: int) -> int:
        gpu.set_wired_limit(limit)
        return limit  # not the former limit

    assert branches.check_wired_limit("gpu").status == "ok"
    monkeypatch.setattr(mx, "set_wired_limit", forgetful)
    assert branches.check_wired_limit("gpu").status == "fail"


def test_a_peak_above_the_estimate_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "task_memory", lambda *_: {"draw": 1_000_000})
    check = branches.check_drawing_memory("cpu")
    assert check.status == "warn"
    assert check.text.endswith("estimated 1.0 MB")


def test_the_cpu_is_not_compiled_and_the_device_comes_back() -> None:
    before = mx.default_device()
    with pytest.raises(RuntimeError, match="stop"), findings.on_device("cpu"):
        raise RuntimeError("stop")
    assert mx.default_device() == before
    assert findings.judge("", "", "", "", float(np.nan), findings.Bound(1, 2, "")).status == "fail"
