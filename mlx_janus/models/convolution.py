"""Convolutions of the image codec: MLX's own on a GPU, matrix products on a CPU.

MLX's CPU convolution unfolds all windows of its input at once, which takes nine times the input's
memory, and on small images it is many times slower than the matrix product of the same size. Here
windows are unfolded for one kernel row at a time, on large images also in bands of rows, and
multiplied by BLAS. The input's gradient is also such a product: windows of the output's gradient
with the rotated kernel. So nothing is scattered.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

_BAND = 48_000_000  # bytes of windows unfolded at once


def unfold(x: mx.array) -> mx.array:
    """Put three neighbours of a row side by side: (B, H + 2, W + 2, C) -> (B, H + 2, W, 3 * C)."""
    W = x.shape[2] - 2
    neighbours = [x[:, :, j : j + W] for j in range(3)]
    return mx.concatenate(neighbours, axis=-1)


def _rows(windows: mx.array, i: int) -> mx.array:
    """Select the unfolded rows for kernel row ``i``: (B, H + 2, W, 3 * C) -> (B * H * W, 3 * C)."""
    H = windows.shape[1] - 2
    width = windows.shape[-1]
    rows = windows[:, i : H + i]
    return rows.reshape(-1, width)


def _padded(x: mx.array) -> mx.array:
    """Add a border of one zero pixel: (B, H, W, C) -> (B, H + 2, W + 2, C)."""
    widths = [
        (0, 0),
        (1, 1),
        (1, 1),
        (0, 0),
    ]
    return mx.pad(x, widths)


def _product(padded: mx.array, weight: mx.array) -> mx.array:
    """Convolve without padding: (B, H + 2, W + 2, C), (O, 3, 3, C) -> (B, H, W, O)."""
    B = padded.shape[0]
    H = padded.shape[1] - 2
    W = padded.shape[2] - 2
    outputs = weight.shape[0]
    windows = unfold(padded)
    kernel = weight.reshape(outputs, 3, -1)
    out = _rows(windows, 0) @ kernel[:, 0].T
    for i in (1, 2):
        rows = _rows(windows, i)
        kernel_row = kernel[:, i].T
        out = mx.addmm(out, rows, kernel_row)
    return out.reshape(B, H, W, outputs)


def _in_bands(x: mx.array, weight: mx.array) -> mx.array:
    """Convolve with one pixel of zero padding, in bands of rows if the image is large.

    A band bounds the memory of the windows that are unfolded at once.
    """
    B, H, W, C = x.shape
    padded = _padded(x)
    row_bytes = B * W * 3 * C * x.itemsize
    height = max(_BAND // row_bytes, 1)
    if height >= H:
        return _product(padded, weight)
    bands = []
    for top in range(0, H, height):
        bottom = top + height + 2  # in padded rows: a window reaches one row above and one below
        band = padded[:, top:bottom]
        bands.append(_product(band, weight))
    return mx.concatenate(bands, axis=1)


@mx.custom_function
def _convolve(x: mx.array, weight: mx.array) -> mx.array:
    """Convolve with one pixel of zero padding: (B, H, W, C), (O, 3, 3, C) -> (B, H, W, O)."""
    return _in_bands(x, weight)


@_convolve.vjp
def _convolve_vjp(
    primals: tuple[mx.array, mx.array],
    cotangent: mx.array,
    _: mx.array,
) -> tuple[mx.array, mx.array]:
    """Return the gradients of the input and the kernel, from ``cotangent``, the output's."""
    x, weight = primals

    rotated = weight[:, ::-1, ::-1]  # by 180 degrees
    rotated = rotated.transpose(3, 1, 2, 0)  # inputs and outputs change places
    x_gradient = _in_bands(cotangent, rotated)

    outputs = weight.shape[0]
    columns = cotangent.reshape(-1, outputs).T
    windows = unfold(_padded(x))
    gradients = []
    for i in range(3):  # the rows of the kernel
        gradient = columns @ _rows(windows, i)
        gradients.append(gradient)
    weight_gradient = mx.stack(gradients, axis=1)
    return x_gradient, weight_gradient.reshape(weight.shape)


class Conv2d(nn.Conv2d):
    """An ``nn.Conv2d`` with bias, fast on a CPU too.

    Its kernel is 1, 3 with padding 1, or 3 with stride 2 and no padding.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Convolve: (B, H, W, C) -> (B, H', W', O)."""
        if mx.default_device().type == mx.DeviceType.gpu:
            return super().__call__(x)
        outputs, size, _, _ = self.weight.shape  # (O, k, k, C)
        if size == 3 and self.padding == (1, 1):
            return _convolve(x, self.weight) + self.bias
        windows = x if size == 1 else _strided_windows(x)
        kernel = self.weight.reshape(outputs, -1)
        return windows @ kernel.T + self.bias


def _strided_windows(x: mx.array) -> mx.array:
    """Unfold the 3 x 3 windows of stride 2, without padding: (B, H, W, C) -> (B, h, w, 9 * C)."""
    _, H, W, _ = x.shape
    # Twice the number of windows in each direction, as every second pixel begins a window.
    height = (H - 1) // 2 * 2
    width = (W - 1) // 2 * 2
    windows = []
    for i in range(3):
        rows = x[:, i : i + height : 2]
        for j in range(3):
            window = rows[:, :, j : j + width : 2]
            windows.append(window)
    return mx.concatenate(windows, axis=-1)
