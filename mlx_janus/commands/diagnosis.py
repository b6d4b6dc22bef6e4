"""Checks of this machine and this installation, with advice on faults."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..version import __version__
from .wording import to_flags

if TYPE_CHECKING:
    from ..config import JanusConfig
    from ..weights.cache import ModelEntry

LEAST_DISK = 5_000_000_000  # bytes of the smallest published model, converted
_SYSTEM_SHARE = 4 << 30  # bytes that macOS needs for itself
_LIBRARIES = ("mlx", "mlx-lm", "huggingface_hub", "safetensors", "tokenizers", "numpy", "pillow")


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    about: str  # name of the check
    status: Literal["ok", "warn", "fail"]  # "fail": the package cannot work
    text: str
    advice: str = ""  # one item on each line; "": none


def diagnose() -> list[Finding]:
    """Check versions, package, device, memory, BLAS, disks, and the models and their roles.

    If a check raises an exception, its finding describes the exception, and the others still run.
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
        "roles": _roles,
    }
    findings = []
    for about, check in checks.items():
        try:
            findings.append(check())
        except Exception as error:  # a broken installation can fail in any way
            findings.append(_finding_from_exception(about, error))
    return findings


def describe_machine() -> dict[str, str]:
    """Return the versions, the device and the memory of this machine, for a report."""
    return {finding.about: finding.text for finding in (_versions(), _device(), _memory())}


def _finding_from_exception(about: str, error: Exception) -> Finding:
    """Return the finding of a check that raised an exception.

    If the check is "versions" or "package", the status is "fail", because the package itself does
    not work. For any other check it is "warn", and the text says that the result is not known.

    Args:
        about: name of the check.
        error: the exception.
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if about in ("versions", "package"):
        advice = "install mlx_janus again, into a new environment"
        return Finding(about, "fail", text, advice)
    return Finding(about, "warn", f"not known ({text})")


def _versions() -> Finding:
    """List the versions of the package, Python, the system and the required libraries."""
    system = platform.system()
    if system == "Darwin":
        system = f"macOS {platform.mac_ver()[0]}"
    parts = [
        f"mlx_janus {__version__}",
        f"Python {platform.python_version()}",
        f"{system} {platform.machine()}",
    ]
    parts += [f"{name} {metadata.version(name)}" for name in _LIBRARIES]
    return Finding("versions", "ok", ", ".join(parts))


def _package() -> Finding:
    """Check that the modules for loading can be imported, and that Janus-Tiny can be opened."""
    from .. import pipeline
    from ..config import JanusConfig
    from ..weights.folder import open_converted
    from ..weights.sources import TINY

    JanusConfig.load(TINY / "config.json")  # raises if the file is damaged
    arrays, _ = open_converted(TINY)
    where = Path(pipeline.__file__).parent
    return Finding("package", "ok", f"{where}, with Janus-Tiny in {len(arrays)} arrays")


def _device() -> Finding:
    """Report the GPU's name, or warn that MLX computes on the CPU."""
    import mlx.core as mx

    if mx.default_device().type == mx.DeviceType.gpu:
        name = mx.device_info().get("device_name", "of an unknown name")
        return Finding("device", "ok", f"GPU, {name}")
    advice = "the CPU is slow for the published models: use a Mac with Apple silicon"
    if platform.system() == "Linux":
        advice += '; if this machine has an NVIDIA GPU, install the extra "cuda"'
    return Finding("device", "warn", f"CPU only, {os.cpu_count()} cores", advice)


def _memory() -> Finding:
    """Report the free memory. Warn if a model on this machine needs more.

    On an Apple GPU there is no warning: ``_wired_limit`` compares the needs with the GPU's limit.
    """
    import psutil

    from ..memory import available_memory, format_size

    total = psutil.virtual_memory().total
    free = available_memory()
    text = f"{format_size(total)}, of which {format_size(free)} are free for a model"
    if _on_metal():
        return Finding("memory", "ok", text)
    too_large = _models_too_large(free)
    if not too_large:
        return Finding("memory", "ok", text)
    entry, needed = too_large[0]  # the model with the largest need
    text += f"; {entry.source} needs {format_size(needed)}"
    return Finding("memory", "warn", text, "close other programs, or pass --bits 8 or --bits 4")


def _wired_limit() -> Finding:
    """Compare the wired limit with the needs of the models on this machine.

    The wired limit is the amount of memory that macOS lets the GPU use.
    """
    import psutil

    from ..memory import device_memory, format_size

    if not _on_metal():
        return Finding("wired limit", "ok", "none: only Apple silicon has one")
    limit = device_memory()
    total = psutil.virtual_memory().total
    setting = f"iogpu.wired_limit_mb={_wired_limit_setting()}"
    text = f"the GPU may hold {format_size(limit)} of {format_size(total)} ({setting})"
    too_large = _models_too_large(limit)
    if not too_large:
        return Finding("wired limit", "ok", text)
    entry, needed = too_large[0]  # the model with the largest need
    advice = f"for {entry.source}, pass --bits 8 or --bits 4"
    highest = total - _SYSTEM_SHARE  # the highest limit that leaves macOS its own memory
    if needed <= highest:
        mebibytes = highest >> 20
        advice += f", or until the next restart: sudo sysctl iogpu.wired_limit_mb={mebibytes}"
    text += f"; {entry.source} needs {format_size(needed)}"
    return Finding("wired limit", "warn", text, advice)


def _on_metal() -> bool:
    """Return whether MLX computes on an Apple GPU."""
    import mlx.core as mx

    return mx.default_device().type == mx.DeviceType.gpu and mx.metal.is_available()


def _wired_limit_setting() -> str:
    """Return macOS's setting of the wired limit as text.

    It is a number of MiB, "0" if macOS chooses the limit, or "?" if the setting cannot be read.
    """
    command = ["/usr/sbin/sysctl", "-n", "iogpu.wired_limit_mb"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
        return done.stdout.strip()
    return "?"


def _blas() -> Finding:
    """Check that MLX uses a fast BLAS library.

    On macOS this is Accelerate. On Linux it is OpenBLAS, which this package loads when it is
    imported. That must be before MLX is imported.
    """
    if platform.system() != "Linux":
        return Finding("BLAS", "ok", "Accelerate")
    try:
        ctypes.CDLL("libopenblas.so.0")  # only to see whether it is installed
    except OSError:
        advice = "sudo apt-get install libopenblas0"
        return Finding("BLAS", "warn", "reference BLAS, which is slow", advice)
    if _mlx_imported_first():
        text = "reference BLAS, which is slow: MLX was imported before OpenBLAS was loaded"
        return Finding("BLAS", "warn", text, "import mlx_janus before mlx and mlx_lm")
    return Finding("BLAS", "ok", "OpenBLAS, loaded before MLX")


def _mlx_imported_first() -> bool:
    """Return whether MLX was imported before this package.

    Importing this package loads OpenBLAS. If MLX is imported before that, it uses the slow
    reference BLAS.
    """
    modules = list(sys.modules)  # in the order of their import
    return "mlx.core" in modules and modules.index("mlx.core") < modules.index("mlx_janus")


def _disk() -> Finding:
    """Check the free disk space for the cache of conversions and for the Hub's download cache.

    Each must have room for the smallest published model.
    """
    from huggingface_hub import constants

    from ..memory import format_size
    from ..weights.sources import cache_folder

    free: dict[Path, int] = {}  # bytes by cache folder
    for folder in (cache_folder(), Path(constants.HF_HUB_CACHE)):
        # A cache that does not exist yet will be made on the disk of its nearest existing parent.
        existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        free[folder] = shutil.disk_usage(existing).free
    text = ", ".join(f"{format_size(size)} free for {folder}" for folder, size in free.items())
    if min(free.values()) >= LEAST_DISK:
        return Finding("disk", "ok", text)
    advice = "remove models that `mlx-janus models` lists, or move the caches to another disk with "
    advice += "MLX_JANUS_CACHE and HF_HOME"
    return Finding("disk", "warn", text, advice)


def _models() -> Finding:
    """Count the models on this machine by state, and give advice.

    The advice has a line for each model that cannot be used, and a line about old conversions that
    can be removed.
    """
    from ..memory import format_size
    from ..weights.cache import freed_bytes, list_models

    entries = list_models()
    counts = Counter(entry.state for entry in entries)
    text = ", ".join(f"{count} {state}" for state, count in counts.items())
    advice = []
    old = [entry for entry in entries if entry.state in ("left over", "superseded")]
    if old:
        size = format_size(freed_bytes(old))
        advice.append(f"mlx-janus models prune removes {len(old)} old conversions ({size})")
    converted = {entry.source for entry in entries if entry.state == "converted"}
    for entry in entries:
        # A converted model does not need the weights of its download, only the config.
        may_be_partial = entry.state == "partly downloaded" and entry.source in converted
        if may_be_partial or entry in old:
            continue
        fault = _fault_of(entry)
        if fault:
            advice.append(fault)
    return Finding("models", "warn" if advice else "ok", text, "\n".join(advice))


def _fault_of(entry: ModelEntry) -> str:
    """Return why a model cannot be used, and the fix if there is one; "" if it can be used."""
    from ..weights.checkup import find_faults

    faults = find_faults(entry.path, headers=True)
    if not faults:
        return ""
    text = f"{entry.source} ({entry.id}) cannot be used: {'; '.join(faults)}"
    if entry.place == "cache":
        return f"{text}: mlx-janus models remove {entry.id}"
    if entry.state == "partly downloaded":
        return f"{text}; mlx-janus models add {entry.source} downloads it"
    return text


def _roles() -> Finding:
    """List the models on this machine by the roles in their prompts.

    Warn about a model whose files leave a doubt about its roles.
    """
    from ..errors import JanusError
    from ..weights.cache import list_models
    from ..weights.folder import is_converted
    from ..weights.published import read_published

    models: dict[str, list[str]] = {}  # names of models by roles, such as "User and Assistant"
    notes = []
    for entry in list_models():
        if entry.config is None or entry.state == "partly downloaded":
            continue
        prompt = entry.config.prompt
        if entry.state == "downloaded" and not is_converted(entry.path):
            try:
                published = read_published(entry.path)
            except JanusError:  # the model cannot be converted
                continue
            prompt = published.config.prompt
            notes += [f"{entry.source}: {to_flags(note)}" for note in published.roles.notes()]
        names = models.setdefault(f"{prompt.user} and {prompt.assistant}", [])
        if entry.source not in names:
            names.append(entry.source)
    text = "; ".join(f"{pair} for {', '.join(names)}" for pair, names in models.items())
    return Finding("roles", "warn" if notes else "ok", text, "; ".join(notes))


def _models_too_large(limit: int) -> list[tuple[ModelEntry, int]]:
    """Return the models on this machine that need more memory than ``limit`` bytes.

    Returns:
        Pairs of a model and the bytes that it needs, the largest need first. Models with equal
        configurations need the same memory, so only one of them is listed.
    """
    from ..weights.cache import list_models
    from ..weights.footprint import required_memory
    from ..weights.load import choose_dtype

    needs: dict[JanusConfig, tuple[ModelEntry, int]] = {}
    for entry in list_models():
        if entry.config is None:  # its configuration cannot be read
            continue
        dtype = choose_dtype(entry.config, None)
        # Drawing and answering need different amounts: take the larger.
        needed = max(required_memory(entry.config, dtype).values())
        needs[entry.config] = (entry, needed)
    too_large = [(entry, needed) for entry, needed in needs.values() if needed > limit]
    return sorted(too_large, key=lambda pair: -pair[1])
