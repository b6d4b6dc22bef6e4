"""Running the parts of the self-check, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import mlx.core as mx

from ..threads import note_mlx_use
from ..weights.names import TINY
from .branches import check_branches
from .findings import Check, devices_here, failed, on_device
from .model import check_model
from .numbers import check_numbers
from .quantization import check_quantization
from .reference import Precision, load_at
from .speed import forecasts, measure, speed_checks
from .tokens import check_tokens

PARTS = ("numbers", "quantization", "branches", "tokens", "speed")


def run_parts(
    parts: Sequence[str] = PARTS,
    model: str | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Iterator[Check]:
    """Yield the checks of parts of the self-check, on every device of this machine.

    Without a GPU, the first check is a warning. A check changes the default device of the calling
    thread, and restores it at its end.

    Args:
        parts: the parts to run, each one of ``PARTS``.
        model: name, as for ``load``, of a model that is checked too; None for no such model.
        report: called with the name of each part before it starts.
    """
    note_mlx_use()
    devices = devices_here()
    if "gpu" not in devices:
        yield Check("devices", "GPU", "", "", "warn", "no GPU: skipped")
    checkers: dict[str, Callable[[str], Iterator[Check]]] = {
        "numbers": check_numbers,
        "quantization": check_quantization,
        "branches": check_branches,
        "tokens": check_tokens,
        "speed": check_speed,
    }
    if model is not None:
        checkers["model"] = partial(check_model, model)
    for part, checker in checkers.items():
        if part not in parts and part != "model":
            continue
        for device in devices:
            if part in ("speed", "model") and device != devices[-1]:
                continue  # only the device that models run on
            report(f"{part} on the {device.upper()}")
            yield from _guarded(part, device, checker)


def _guarded(part: str, device: str, checker: Callable[[str], Iterator[Check]]) -> Iterator[Check]:
    """Yield the checks of a part on a device; an exception becomes a failed check."""
    try:
        yield from checker(device)
    except Exception as error:  # a broken installation can fail in any way
        yield failed(part, part, device, "", error)
    mx.clear_cache()


def check_speed(device: str) -> Iterator[Check]:
    """Yield measured speeds of Janus-Tiny on a device, and forecasts of the published models."""
    with on_device(device):
        precision = Precision("float32" if device == "cpu" else "bfloat16")
        model = load_at(TINY, precision)
        speed = measure(model, device)
    yield from speed_checks(speed, "Janus-Tiny")
    yield from forecasts(speed, model.config.language.num_hidden_layers)
