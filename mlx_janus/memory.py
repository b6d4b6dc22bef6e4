"""Memory: how much is available, and how weights are read into it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import mlx.core as mx
import psutil

_BATCH_BYTES = 256_000_000  # bytes of weights that are read and cast together
_READ_LOCK = threading.Lock()  # held while a batch of weights is read


def device_memory() -> int:
    """Return the bytes that MLX can use: a GPU's recommended working set, or a CPU's memory."""
    if mx.default_device().type == mx.DeviceType.gpu:
        info = mx.device_info()
        # The platform decides which of these entries exists.
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

    On a GPU this is ``device_memory`` minus the memory of MLX's arrays. macOS's own figure of free
    memory is not used, because it is too low: macOS frees memory only on demand. On a CPU this is
    the system's free memory plus MLX's cache, which MLX reuses for new arrays.
    """
    if mx.default_device().type == mx.DeviceType.gpu:
        return max(device_memory() - mx.get_active_memory(), 0)
    return int(psutil.virtual_memory().available) + mx.get_cache_memory()


def materialize(arrays: Iterable[mx.array], check: Callable[[], None] = lambda: None) -> None:
    """Read lazy weights from disk into memory, and cast them.

    Weights are read in small batches, so that few are in memory twice: as stored and as cast.
    Only one thread at a time reads a batch, because all threads use one MLX stream for weights.

    Args:
        arrays: the weights.
        check: called before each batch. If it raises an error, no more batches are read.
    """
    batch: list[mx.array] = []
    for array in arrays:
        batch.append(array)
        if sum(map(_peak_bytes, batch)) > _BATCH_BYTES:
            _read_batch(batch, check)
            batch = []
    # The last batch may be small or empty.
    _read_batch(batch, check)


def _peak_bytes(array: mx.array) -> int:
    """Return the largest number of bytes that reading a weight can take."""
    # A uint32 array has quantized weights. They may be floats on disk, which are quantized as they
    # are read. The floats take up to eight times the bytes.
    return array.nbytes * (8 if array.dtype == mx.uint32 else 1)


def _read_batch(batch: list[mx.array], check: Callable[[], None]) -> None:
    """Call ``check``, then evaluate a batch, while no other thread reads weights."""
    with _READ_LOCK:
        check()  # after the wait for the lock, since an earlier check could be outdated by now
        mx.eval(batch)


@lru_cache
def weight_stream(device: mx.DeviceType) -> mx.Stream:
    """Return a device's stream for lazy weights, always the same one.

    Any thread can evaluate a lazy array of this stream. On an ordinary stream, only the thread that
    created an array can evaluate it.
    """
    return mx.new_thread_unsafe_stream(device)


def is_metal() -> bool:
    """Return whether MLX computes on the GPU of Apple silicon."""
    return mx.default_device().type == mx.DeviceType.gpu and mx.metal.is_available()


def is_cuda() -> bool:
    """Return whether MLX computes on a GPU of NVIDIA."""
    return mx.default_device().type == mx.DeviceType.gpu and not mx.metal.is_available()


_WIRED_LIMIT_LOCK = threading.Lock()  # guards ``_original_limits`` and MLX's wired limit
_original_limits: list[int] = []  # MLX's original wired limit, once per open ``weights_wired``


@contextlib.contextmanager
def weights_wired() -> Iterator[None]:
    """Let MLX wire memory during a block, up to the recommended working set, on Apple silicon.

    macOS does not page out wired memory. Without wiring, a model almost as large as the memory is
    read from the disk again and again. On other platforms, nothing is done. Blocks may overlap and
    end in any order, as those in generators do.
    """
    if not is_metal():
        yield
        return
    with _WIRED_LIMIT_LOCK:
        # Only the first open block raises the limit; ``set_wired_limit`` returns the former limit.
        original = _original_limits[0] if _original_limits else mx.set_wired_limit(device_memory())
        _original_limits.append(original)
    try:
        yield
    finally:
        with _WIRED_LIMIT_LOCK:
            _original_limits.pop()
            if not _original_limits:  # this was the last open block
                mx.synchronize()  # the limit must not change during a computation
                mx.set_wired_limit(original)


def format_size(size: float) -> str:
    """Format bytes for people: "14.8 GB", "310 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
