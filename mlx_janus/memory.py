"""How much memory there is for a model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import mlx.core as mx
import psutil

_READ_AHEAD = 256_000_000  # bytes of weights that are cast at once
_READING = threading.Lock()


def device_memory() -> int:
    """Bytes that MLX can hold at once: the GPU's recommended working set, or all of main memory on a CPU."""
    if mx.default_device().type == mx.DeviceType.gpu:
        info = mx.device_info()
        size = (
            info.get("max_recommended_working_set_size")
            or info.get("total_memory")
            or info.get("memory_size")
        )
        if size:
            return int(size)
    return int(psutil.virtual_memory().total)


def available_memory() -> int:
    """Bytes free for new arrays now.

    On Apple silicon this is the recommended working set less what MLX holds: macOS makes room by itself, and its own
    figure of free memory would refuse models that fit. Elsewhere it is what the system says, and what MLX could
    give back from its cache.
    """
    if mx.default_device().type == mx.DeviceType.gpu:
        return max(device_memory() - mx.get_active_memory(), 0)
    return int(psutil.virtual_memory().available) + mx.get_cache_memory()


def materialize(arrays: Iterable[mx.array], check: Callable[[], None] = lambda: None) -> None:
    """Read and cast weights a few at a time, so that stored and cast values are never all held together.

    Weights are lazy on streams that all threads share (``weight_stream``), so one thread at a time evaluates there.

    Args:
        arrays: the weights.
        check: called before each part; raises to stop.
    """
    batch: list[mx.array] = []
    for array in arrays:
        batch.append(array)
        # Packed weights may yet have to be made, of up to eight times as much.
        if sum(a.nbytes * (8 if a.dtype == mx.uint32 else 1) for a in batch) > _READ_AHEAD:
            _read(batch, check)
            batch = []
    _read(batch, check)


def _read(batch: list[mx.array], check: Callable[[], None]) -> None:
    with _READING:
        check()
        mx.eval(batch)


@lru_cache
def weight_stream(device: mx.DeviceType) -> mx.Stream:
    """Return the stream on which weights stay lazy until any thread evaluates them.

    Lazy arrays on an ordinary stream can be evaluated only in the thread that made them.
    """
    return mx.new_thread_unsafe_stream(device)


def _is_metal() -> bool:
    return mx.default_device().type == mx.DeviceType.gpu and mx.metal.is_available()


_WIRED = threading.Lock()
_wired: list[int] = []  # the limit before, once for each that is inside


@contextlib.contextmanager
def weights_wired() -> Iterator[None]:
    """On Apple silicon, let MLX keep as much as is recommended in memory that macOS does not page out meanwhile.

    Without it a model near the size of the memory is read from the disk again and again. Elsewhere nothing happens.
    Several may be inside, and leave in any order: generators are closed as they please.
    """
    if not _is_metal():
        yield
        return
    with _WIRED:
        _wired.append(_wired[0] if _wired else mx.set_wired_limit(device_memory()))
    try:
        yield
    finally:
        with _WIRED:
            before = _wired.pop()
            if not _wired:
                mx.synchronize()  # the limit must not change under what is still being computed
                mx.set_wired_limit(before)


def format_size(size: float) -> str:
    """Bytes as people read them: "14.8 GB", "310 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
