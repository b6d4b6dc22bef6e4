"""The part "branches": code that only a GPU runs, against the code that the CPU runs.

Each function takes the branch's device, so that the tests can run it on a CPU, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from .. import memory
from ..config import JanusConfig
from ..decode.image import DrawOptions, make_sampler
from ..decode.sampling import position_keys
from ..models.convolution import Conv2d
from ..weights.footprint import task_memory
from ..weights.load import choose_dtype
from ..weights.names import TINY
from .findings import Check, Status, failed, judge, on_device
from .numbers import float_bound
from .reference import FOLDER, Precision, load_at, reference_numbers, relative_rms

PART = "branches"
_OPTIONS = (
    DrawOptions(),
    DrawOptions(temperature=0),
    DrawOptions(cfg_weight=1, temperature=0.7, top_p=0.9),
)
_MEMORY_MARGIN = 1.25  # a peak of more than this times the estimate is worth a warning


def check_branches(device: str) -> Iterator[Check]:
    """Yield a check of each branch on a device."""
    checks: dict[str, Callable[[str], Check]] = {
        "compiled choice": check_compiled_choice,
        "convolution": check_convolution,
        "wired limit": check_wired_limit,
        "memory limits": check_memory_limits,
        "memory of image tokens": check_drawing_memory,
        "memory of decoding": check_decoding_memory,
    }
    for about, check in checks.items():
        try:
            with on_device(device):
                yield check(device)
        except Exception as error:  # a broken installation can fail in any way
            yield failed(PART, about, device, "", error)


def check_compiled_choice(device: str, *, compiled: bool | None = None) -> Check:
    """Compare the tokens of the compiled sampler with those of the plain one.

    Args:
        device: the device's name in the result. It does not choose the device.
        compiled: whether to compile; None: only on a GPU, as ``draw_tokens`` does.
    """
    if compiled is None:
        compiled = mx.default_device().type == mx.DeviceType.gpu
    random = np.random.default_rng(0)
    keys = position_keys([1, 2], 8)  # of two images with the seeds 1 and 2, at 8 positions
    equal = 0
    total = 0
    for options in _OPTIONS:
        shape = (2 * options.rows, 8, 128)  # batch rows of two images, positions, vocabulary
        logits = mx.array(random.normal(size=shape).astype(np.float32))
        expected = make_sampler(options, compiled=False)(logits, keys)
        found = make_sampler(options, compiled=compiled)(logits, keys)
        equal += int((found == expected).sum())
        total += expected.size
    status: Status = "ok" if equal == total else "fail"
    text = f"{equal} of {total} tokens equal the plain choice's"
    return Check(PART, "compiled choice", device, "", status, text)


def check_convolution(device: str, convolve: Callable[..., mx.array] | None = None) -> Check:
    """Compare the codec's three kinds of convolution with a computation in numpy.

    Args:
        device: the device's name in the result. It does not choose the device.
        convolve: called with a layer and its input; None: the codec's ``Conv2d.__call__``. On a
            GPU, the codec's method only calls ``nn.Conv2d.__call__``. So a test on a CPU passes
            ``nn.Conv2d.__call__``, to check what a GPU would run.
    """
    run = convolve or Conv2d.__call__
    random = np.random.default_rng(0)
    deviations = []
    for kernel_side, stride, padding in ((3, 1, 1), (3, 2, 0), (1, 1, 0)):
        layer = Conv2d(16, 24, kernel_side, stride=stride, padding=padding)
        x = random.normal(size=(1, 13, 17, 16)).astype(np.float32)
        weight = random.normal(size=(24, kernel_side, kernel_side, 16)).astype(np.float32)
        layer.weight = mx.array(weight)
        layer.bias = mx.arange(24, dtype=mx.float32)
        found = run(layer, mx.array(x))
        expected = _convolve_in_numpy(x, weight, stride, padding)
        deviations.append(relative_rms(found, expected))
    bound = float_bound("float32", device)
    return judge(PART, "convolution", device, "float32", float(np.max(deviations)), bound)


def _convolve_in_numpy(x: np.ndarray, weight: np.ndarray, stride: int, padding: int) -> np.ndarray:
    """Convolve in float64, and add the channel's index as the bias: (1, H, W, C) -> (1, h, w, O).

    The weight has the shape (O, size, size, C).
    """
    size = weight.shape[1]
    border = (padding, padding)
    padded = np.pad(x[0].astype(np.float64), (border, border, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(0, 1))
    windows = windows[::stride, ::stride]  # (h, w, C, size, size)
    out = np.einsum("hwcij,oijc->hwo", windows, weight.astype(np.float64))
    return (out + np.arange(len(weight)))[None]


def check_wired_limit(device: str) -> Check:
    """Check that overlapping ``weights_wired`` blocks raise MLX's wired limit.

    The limit must be the device's memory inside the blocks, and be restored after the last one.
    """
    about = "wired limit"
    if not memory.is_metal():
        with memory.weights_wired():
            pass
        return Check(PART, about, device, "", "ok", "none: only Apple silicon has one")
    right_inside = memory.device_memory()
    right_after = _wired_limit()
    first = memory.weights_wired()
    first.__enter__()  # no ``with``, because this block ends before the one that begins after it
    with memory.weights_wired():
        first.__exit__(None, None, None)
        inside = _wired_limit()
    after = _wired_limit()
    right = inside == right_inside and after == right_after
    text = f"{memory.format_size(inside)} inside, {memory.format_size(after)} after"
    if not right:
        right_sizes = (memory.format_size(right_inside), memory.format_size(right_after))
        text += f": {' and '.join(right_sizes)} are right"
    return Check(PART, about, device, "", "ok" if right else "fail", text)


def _wired_limit() -> int:
    """Return MLX's wired limit in bytes, and leave it unchanged."""
    limit = int(mx.set_wired_limit(0))  # MLX tells the limit only when another is set
    mx.set_wired_limit(limit)
    return limit


def check_memory_limits(device: str) -> Check:
    """Check that the total and the free memory of the device are plausible."""
    import psutil

    total = memory.device_memory()
    free = memory.available_memory()
    text = f"{memory.format_size(free)} free of {memory.format_size(total)}"
    has_own_memory = device == "gpu" and not memory.is_metal()  # not the system's memory
    total_fits = has_own_memory or total <= psutil.virtual_memory().total
    right = 0 < free <= total and total_fits
    return Check(PART, "memory limits", device, "", "ok" if right else "fail", text)


def check_drawing_memory(device: str) -> Check:
    """Compare the estimated memory of generating image tokens with MLX's peak, in Janus-Tiny."""
    from ..decode.image import draw_tokens, text_rows

    config = JanusConfig.load(TINY / "config.json")
    dtype = choose_dtype(config, None)
    estimate = task_memory(config, dtype)["draw"]
    model = load_at(TINY, Precision(dtype))
    # The weights of all tasks are in memory, but the estimate has only those of this task.
    held = _start_measuring()
    weights = sum(array.nbytes for array in model.drawing_arrays().values())
    ids = list(range(1, 33))
    options = DrawOptions()
    prompt = text_rows(ids, ids, options)
    image = (0, 0)  # index of its prompt, and its seed
    for _ in draw_tokens(model, [prompt], [image], options):
        pass
    peak = weights + (mx.get_peak_memory() - held)
    return _compare_memory("memory of image tokens", device, peak, estimate)


def check_decoding_memory(device: str) -> Check:
    """Compare the estimated memory of the codec's decoder with MLX's peak."""
    config = JanusConfig.load(FOLDER / "config.json")
    estimate = task_memory(config, "float32")["decode"]
    model = load_at(FOLDER, Precision("float32"))
    # The weights of all tasks are in memory, but the estimate has only those of this task.
    held = _start_measuring()
    weights = sum(array.nbytes for array in model.decoding_arrays().values())
    mx.eval(model.decode_image_tokens(mx.array(reference_numbers()["vq.codes"])))
    peak = weights + (mx.get_peak_memory() - held)
    return _compare_memory("memory of decoding", device, peak, estimate)


def _start_measuring() -> int:
    """Reset MLX's peak of memory, and return the bytes that MLX's arrays hold now."""
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    return int(mx.get_active_memory())


def _compare_memory(about: str, device: str, peak: int, estimate: int) -> Check:
    """Return the check of a measured peak of memory, in bytes, against its estimate.

    The check warns if the peak is above ``_MEMORY_MARGIN`` times the estimate.
    """
    status: Status = "ok" if peak <= _MEMORY_MARGIN * estimate else "warn"
    text = f"peak {peak / 1e6:.1f} MB, estimated {estimate / 1e6:.1f} MB"
    return Check(PART, about, device, "", status, text)
