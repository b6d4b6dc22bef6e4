"""The result of one check, and how a status follows from a deviation and its bounds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Bound:
    """The limits of a deviation, and the reason for them."""

    ok: float  # up to this deviation, the result is right
    fail: float  # above this deviation, the result is wrong; in between, it is worth a warning
    reason: str


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    part: str  # the part of the self-check: "numbers", "branches", "tokens", ...
    about: str  # name of the check
    device: str  # "cpu" or "gpu"; "": none in particular
    precision: str  # such as "float32" or "4 bits"; "": none in particular
    status: Status
    text: str  # the result as words
    deviation: float | None = None  # relative rms; None: the check compares no numbers
    bound: float | None = None  # largest deviation that is right; None: there is no deviation
    reason: str = ""  # the reason for the bound


def judge(
    part: str, about: str, device: str, precision: str, deviation: float, bound: Bound
) -> Check:
    """Return the check of a deviation. NaN fails."""
    status: Status = "fail"
    if deviation <= bound.fail:  # never true for NaN
        status = "ok" if deviation <= bound.ok else "warn"
    text = f"deviation {deviation:.1e}, bound {bound.ok:.1e}"
    return Check(
        part, about, device, precision, status, text, deviation, bound.ok, reason=bound.reason
    )


def failed(part: str, about: str, device: str, precision: str, error: Exception) -> Check:
    """Return the check of a computation that raised an exception."""
    message = " ".join(str(error).split())[:300]
    text = f"{type(error).__name__}: {message}"
    return Check(part, about, device, precision, "fail", text)


def devices_here() -> list[str]:
    """Return the names of the devices that MLX can compute on: "cpu", and "gpu" if there is one."""
    return ["cpu", "gpu"] if mx.is_available(mx.gpu) else ["cpu"]


@contextmanager
def on_device(name: str) -> Iterator[None]:
    """Compute on "cpu" or "gpu" during a block.

    On the CPU, ``mx.compile`` is off, because it would start a C++ compiler, which a Mac may lack.
    """
    before: Any = mx.default_device()
    mx.set_default_device(mx.Device(mx.gpu if name == "gpu" else mx.cpu))
    if name == "cpu":
        mx.disable_compile()
    try:
        yield
    finally:
        mx.synchronize()
        # Compilation stays off if the user has turned it off by MLX's own variable.
        if name == "cpu" and "MLX_DISABLE_COMPILE" not in os.environ:
            mx.enable_compile()
        mx.set_default_device(before)
