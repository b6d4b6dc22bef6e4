"""Describe this machine, without the names of its host and its user.

:func:`machine` returns one line for a table's caption, :func:`facts` the rows of a report.
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import psutil

_CPUINFO = Path("/proc/cpuinfo")  # Linux only
_CLONE = Path(__file__).resolve().parent.parent
_LIBRARIES = ("mlx", "mlx-lm")  # their versions matter for speed


def machine() -> str:
    """Return the chip, cores, memory, system and versions in one line."""
    versions = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    return (
        f"{chip()}, {_logical_cores()} cores, {_memory()}, {platform.system()} "
        f"{platform.machine()}, Python {platform.python_version()}, {versions}"
    )


def facts() -> dict[str, str]:
    """Return the rows of a report: names of facts, and their values as text."""
    return {
        "chip": chip(),
        "cores": _cores(),
        "memory": _memory(),
        "system": f"{_system()}, {platform.machine()}",
        "GPU": gpu(),
        "BLAS": _blas(),
        "Python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
        "mlx_janus": _our_version(),
    }


def chip() -> str:
    """Return the name of the chip or processor, such as "Apple M3 Max" or "AMD EPYC"."""
    if platform.system() == "Darwin":
        name = _sysctl("machdep.cpu.brand_string")
    else:
        lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
        names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        name = next(names, platform.processor())
    return name or f"unknown {platform.machine()} processor"


def gpu() -> str:
    """Return the name of the GPU that MLX computes on; "none" if it computes on the CPU."""
    import mlx.core as mx

    if mx.default_device().type == mx.DeviceType.cpu:
        return "none"
    return str(mx.device_info().get("device_name", "of an unknown name"))


def _logical_cores() -> int:
    """Return the number of cores; a core with two hyperthreads counts as two."""
    return psutil.cpu_count() or 1


def _cores() -> str:
    """Return the number of cores, on Apple silicon also how many of each kind."""
    count = str(_logical_cores())
    fast = _sysctl("hw.perflevel0.logicalcpu")
    slow = _sysctl("hw.perflevel1.logicalcpu")
    return f"{count}: {fast} for performance, {slow} for efficiency" if fast and slow else count


def _memory() -> str:
    """Return the size of the memory."""
    return f"{psutil.virtual_memory().total / 2**30:.0f} GiB"


def _system() -> str:
    """Return the name and version of macOS or of the Linux distribution."""
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    with suppress(OSError):  # the file with the name is missing
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    return platform.system()


def _blas() -> str:
    """Return the name and version of the BLAS library that MLX uses on the CPU."""
    if platform.system() == "Darwin":
        return "Accelerate"
    try:
        describe = ctypes.CDLL("libopenblas.so.0").openblas_get_config
    except (OSError, AttributeError):
        return "reference BLAS"
    describe.restype = ctypes.c_char_p
    return " ".join(describe().decode().split()[:2])  # the rest lists build options


def _our_version() -> str:
    """Return this package's version, and the clone's commit if git knows it."""
    from mlx_janus import __version__

    command = ["git", "-C", str(_CLONE), "rev-parse", "--short", "HEAD"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
        return f"{__version__}, commit {done.stdout.strip()}"
    return __version__


def _sysctl(name: str) -> str:
    """Return a value of macOS's kernel; "" elsewhere, or if it is not set."""
    if platform.system() != "Darwin":
        return ""
    command = ["/usr/sbin/sysctl", "-n", name]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
        return done.stdout.strip()
    return ""
