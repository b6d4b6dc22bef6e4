"""Memory: how much is available, and how weights are read into it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import mlx.core as mx
import psutil

_READ_AHEAD = 256_000_000  # bytes of weights that are read and cast together
_READING = threading.Lock()  # held while a batch of weights is read


def device_memory() -> int:
    """Return the bytes that MLX can use: a GPU's recommended working set, or a CPU's memory."""
    if mx.default_device().type == mx.DeviceType.gpu:
        info = mx.device_info()
        # The names of the entries depend on the platform.
        size = (
            info.get("max_recommended_working_set_size")
            or info.get("total_memory")
            or info.get("memory_size")
        )
        if size:
            return int(size)
    return int(psutil.virtual_memory().total)


def available_memory() -> int:
    """Return the bytes that are free for new arrays.

    On a GPU this is ``device_memory`` minus the memory that MLX uses. macOS frees memory on demand,
    so macOS's own figure of free memory would refuse models that fit. On a CPU this is the system's
    free memory plus MLX's cache.
    """
    if mx.default_device().type == mx.DeviceType.gpu:
        return max(device_memory() - mx.get_active_memory(), 0)
    return int(psutil.virtual_memory().available) + mx.get_cache_memory()


def materialize(arrays: Iterable[mx.array], check: Callable[[], None] = lambda: None) -> None:
    """Read and cast weights in small batches, so that few are in memory in both types.

    Weights are lazy on a stream that all threads share (``weight_stream``). A lock lets only one
    thread at a time evaluate them.

    Args:
        arrays: the weights.
        check: called before each batch. An error of ``check`` stops the reading.
    """
    batch: list[mx.array] = []
    for array in arrays:
        batch.append(array)
        if sum(map(_peak_bytes, batch)) > _READ_AHEAD:
            _read(batch, check)
            batch = []
    _read(batch, check)  # the last batch is smaller, and may be empty


def _peak_bytes(array: mx.array) -> int:
    """Return the most bytes that reading a weight can take."""
    # Packed weights may be quantized while they are read, from floats up to eight times as large.
    return array.nbytes * (8 if array.dtype == mx.uint32 else 1)


def _read(batch: list[mx.array], check: Callable[[], None]) -> None:
    """Call ``check``, then evaluate a batch, while no other thread reads weights."""
    with _READING:
        check()  # inside the lock: to wait for the lock may take long
        mx.eval(batch)


@lru_cache
def weight_stream(device: mx.DeviceType) -> mx.Stream:
    """Return the stream of lazy weights, which any thread can evaluate.

    On an ordinary stream, only the thread that created a lazy array can evaluate it.
    """
    return mx.new_thread_unsafe_stream(device)


def _is_metal() -> bool:
    return mx.default_device().type == mx.DeviceType.gpu and mx.metal.is_available()


_WIRED = threading.Lock()  # guards ``_wired`` and MLX's limit of wired memory
_wired: list[int] = []  # the original limit, once per caller inside ``weights_wired``


@contextlib.contextmanager
def weights_wired() -> Iterator[None]:
    """Wire MLX's memory on Apple silicon, up to the recommended working set. Elsewhere, do nothing.

    macOS does not page out wired memory. Without this, a model near the size of the memory is read
    from the disk again and again. Callers may overlap and leave in any order, as generators do.
    """
    if not _is_metal():
        yield
        return
    with _WIRED:
        # The first caller raises the limit and stores the original, which ``set_wired_limit``
        # returns. Later callers store it too, so whoever leaves last can restore it.
        _wired.append(_wired[0] if _wired else mx.set_wired_limit(device_memory()))
    try:
        yield
    finally:
        with _WIRED:
            before = _wired.pop()
            if not _wired:
                mx.synchronize()  # the limit must not change during a computation
                mx.set_wired_limit(before)


def format_size(size: float) -> str:
    """Format bytes for people: "14.8 GB", "310 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
