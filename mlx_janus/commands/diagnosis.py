"""Checks of this machine and installation, with advice on what is wrong."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..version import __version__

if TYPE_CHECKING:
    from ..weights.cache import ModelEntry

LEAST_DISK = 5_000_000_000  # bytes: of the smallest published model, converted
_SYSTEM_SHARE = 4 << 30  # bytes that macOS needs for itself
_LIBRARIES = ("mlx", "mlx-lm", "huggingface_hub", "safetensors", "tokenizers", "numpy", "pillow")


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis. "fail": the package cannot work so."""

    about: str
    status: Literal["ok", "warn", "fail"]
    text: str
    advice: str = ""


def diagnose() -> list[Finding]:
    """Check versions, package, device, memory, BLAS, disks and the models on this machine.

    Raises nothing: a check that fails is a finding.
    """
    checks: dict[str, Callable[[], Finding]] = {
        "versions": _versions,
        "package": _package,
        "device": _device,
        "memory": _memory,
        "wired limit": _wired_limit,
        "BLAS": _blas,
        "disk": _disk,
        "models": _models,
    }
    findings = []
    for about, check in checks.items():
        try:
            findings.append(check())
        except (
            Exception
        ) as error:  # a broken installation can fail in any way, and that is what is asked
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if about in ("versions", "package"):
                findings.append(
                    Finding(about, "fail", text, "install mlx_janus anew, into a fresh environment")
                )
            else:
                findings.append(Finding(about, "warn", f"not known ({text})"))
    return findings


def _versions() -> Finding:
    system = (
        f"macOS {platform.mac_ver()[0]}" if platform.system() == "Darwin" else platform.system()
    )
    parts = [f"mlx_janus {__version__}", f"Python {platform.python_version()}"]
    parts += [
        f"{system} {platform.machine()}",
        *(f"{name} {metadata.version(name)}" for name in _LIBRARIES),
    ]
    return Finding("versions", "ok", ", ".join(parts))


def _package() -> Finding:
    """Import all that loading needs, and read the headers of the model in the package."""
    from .. import pipeline
    from ..config import JanusConfig
    from ..weights.folder import open_converted
    from ..weights.sources import TINY

    JanusConfig.load(TINY / "config.json")
    arrays, _ = open_converted(TINY)
    where = Path(pipeline.__file__).parent
    return Finding("package", "ok", f"{where}, with Janus-Tiny in {len(arrays)} arrays")


def _device() -> Finding:
    import mlx.core as mx

    if mx.default_device().type == mx.DeviceType.gpu:
        return Finding(
            "device", "ok", f"GPU, {mx.device_info().get('device_name', 'of an unknown name')}"
        )
    advice = "MLX computes on the CPU, which is slow for the published models: use a Mac with Apple silicon"
    if platform.system() == "Linux":
        advice += ', or with an NVIDIA GPU the extra "cuda"'
    return Finding("device", "warn", f"CPU only, {os.cpu_count()} cores", advice)


def _memory() -> Finding:
    import psutil

    from ..memory import available_memory, format_size

    total, free = psutil.virtual_memory().total, available_memory()
    text = f"{format_size(total)}, of which {format_size(free)} are free for a model"
    if _on_metal() or not (large := _too_large(free)):  # there the wired limit decides
        return Finding("memory", "ok", text)
    text += f"; {large[0][0].source} needs {format_size(large[0][1])}"
    return Finding("memory", "warn", text, "close other programs, or pass --bits 8 or --bits 4")


def _wired_limit() -> Finding:
    """Compare the memory that macOS lets the GPU hold with the needs of the models here."""
    import psutil

    from ..memory import device_memory, format_size

    if not _on_metal():
        return Finding("wired limit", "ok", "none: there is one on Apple silicon alone")
    limit, total = device_memory(), psutil.virtual_memory().total
    text = f"the GPU may hold {format_size(limit)} of {format_size(total)} (iogpu.wired_limit_mb={_sysctl()})"
    if not (large := _too_large(limit)):
        return Finding("wired limit", "ok", text)
    entry, needed = large[0]
    advice = f"for {entry.source}, pass --bits 8 or --bits 4"
    if needed <= total - _SYSTEM_SHARE:
        most = (total - _SYSTEM_SHARE) >> 20
        advice += f", or until the next restart: sudo sysctl iogpu.wired_limit_mb={most}"
    return Finding(
        "wired limit", "warn", f"{text}; {entry.source} needs {format_size(needed)}", advice
    )


def _on_metal() -> bool:
    import mlx.core as mx

    return mx.default_device().type == mx.DeviceType.gpu and mx.metal.is_available()


def _sysctl() -> str:
    """Return the limit that is set, in MiB; "0" is macOS's own choice."""
    command = ["/usr/sbin/sysctl", "-n", "iogpu.wired_limit_mb"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=5
        ).stdout.strip()
    return "?"


def _blas() -> Finding:
    if platform.system() != "Linux":
        return Finding("BLAS", "ok", "Accelerate")
    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        return Finding(
            "BLAS", "warn", "reference BLAS, which is slow", "sudo apt-get install libopenblas0"
        )
    if _mlx_came_first():
        text = (
            "reference BLAS, which is slow: MLX was imported before mlx_janus could load OpenBLAS"
        )
        return Finding("BLAS", "warn", text, "import mlx_janus before mlx and mlx_lm")
    return Finding("BLAS", "ok", "OpenBLAS, loaded before MLX")


def _mlx_came_first() -> bool:
    """Return whether MLX was imported before this package: it keeps the BLAS of that time."""
    order = list(sys.modules)
    return "mlx.core" in order and order.index("mlx.core") < order.index("mlx_janus")


def _disk() -> Finding:
    from huggingface_hub import constants

    from ..memory import format_size
    from ..weights.sources import cache_folder

    free: dict[Path, int] = {}
    for folder in (cache_folder(), Path(constants.HF_HUB_CACHE)):
        there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        free[folder] = shutil.disk_usage(there).free
    text = ", ".join(f"{format_size(size)} free for {folder}" for folder, size in free.items())
    if min(free.values()) >= LEAST_DISK:
        return Finding("disk", "ok", text)
    advice = "`mlx-janus models` lists what could go; MLX_JANUS_CACHE and HF_HOME move the caches to another disk"
    return Finding("disk", "warn", text, advice)


def _models() -> Finding:
    from ..memory import format_size
    from ..weights.cache import freed_bytes, list_models

    entries = list_models()
    text = ", ".join(
        f"{sum(entry.state == state for entry in entries)} {state}"
        for state in dict.fromkeys(entry.state for entry in entries)
    )
    useless = [entry for entry in entries if entry.state in ("left over", "unreadable")]
    if not useless:
        return Finding("models", "ok", text)
    advice = f"mlx-janus models remove {useless[0].id} (of {len(useless)}; {format_size(freed_bytes(useless))} in all)"
    return Finding("models", "warn", text, advice)


def _too_large(limit: int) -> list[tuple[ModelEntry, int]]:
    """Return models that need more bytes than the limit, with their needs, the largest first."""
    from ..weights.cache import list_models
    from ..weights.footprint import required_memory
    from ..weights.load import choose_dtype

    needs = {
        entry.config: (
            entry,
            max(required_memory(entry.config, choose_dtype(entry.config, None)).values()),
        )
        for entry in list_models()
        if entry.config
    }
    return sorted((need for need in needs.values() if need[1] > limit), key=lambda need: -need[1])
