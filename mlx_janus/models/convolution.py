"""Convolutions of the image codec: MLX's own on a GPU, matrix products on a CPU.

MLX's CPU convolution lays all windows of its input out at once, nine times the input's memory, and for small pictures
is many times slower than the matrix product of the same size. Here windows are laid out a row of the kernel at a time,
for large pictures in bands of rows, and multiplied by BLAS. The gradient towards the input is itself such a product,
of the output's windows with the kernel turned around, so nothing is scattered.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

_BAND = 48_000_000  # bytes of windows laid out at once


def unfold(x: mx.array) -> mx.array:
    """(B, H + 2, W + 2, C) -> (B, H + 2, W, 3 * C): three neighbours of a row side by side."""
    W = x.shape[2] - 2
    return mx.concatenate([x[:, :, j : j + W] for j in range(3)], axis=-1)


def _rows(windows: mx.array, i: int) -> mx.array:
    """(B * H * W, 3 * C): the unfolded rows that the kernel's row ``i`` meets."""
    return windows[:, i : windows.shape[1] - 2 + i].reshape(-1, windows.shape[-1])


def _padded(x: mx.array) -> mx.array:
    return mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])


def _product(padded: mx.array, weight: mx.array) -> mx.array:
    """(B, H + 2, W + 2, C), (O, 3, 3, C) -> (B, H, W, O)."""
    B, H, W = padded.shape[0], padded.shape[1] - 2, padded.shape[2] - 2
    windows, kernel = unfold(padded), weight.reshape(weight.shape[0], 3, -1)
    out = _rows(windows, 0) @ kernel[:, 0].T
    for i in (1, 2):
        out = mx.addmm(out, _rows(windows, i), kernel[:, i].T)
    return out.reshape(B, H, W, -1)


def _in_bands(x: mx.array, weight: mx.array) -> mx.array:
    """``_product`` over a few rows of the picture at a time, where all at once would take much memory."""
    B, H, W, C = x.shape
    padded = _padded(x)
    height = max(_BAND // (B * W * 3 * C * x.itemsize), 1)
    if height >= H:
        return _product(padded, weight)
    bands = [_product(padded[:, top : top + height + 2], weight) for top in range(0, H, height)]
    return mx.concatenate(bands, axis=1)


@mx.custom_function
def _convolve(x: mx.array, weight: mx.array) -> mx.array:
    """(B, H, W, C), (O, 3, 3, C) -> (B, H, W, O), with one pixel of zeros around."""
    return _in_bands(x, weight)


@_convolve.vjp
def _convolve_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    x, weight = primals
    rows = cotangent.reshape(-1, weight.shape[0])
    windows = unfold(_padded(x))
    towards_weight = mx.stack([rows.T @ _rows(windows, i) for i in range(3)], axis=1).reshape(
        weight.shape
    )
    return _in_bands(cotangent, weight[:, ::-1, ::-1].transpose(3, 1, 2, 0)), towards_weight


class Conv2d(nn.Conv2d):
    """An ``nn.Conv2d`` of kernel 1, 3 (padding 1) or 3 with stride 2 (no padding)."""

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) -> (B, H', W', O)."""
        if mx.default_device().type == mx.DeviceType.gpu:
            return super().__call__(x)
        outputs, size = self.weight.shape[:2]
        if size == 1:
            return x @ self.weight.reshape(outputs, -1).T + self.bias
        if self.padding == (1, 1):
            return _convolve(x, self.weight) + self.bias
        h, w = ((n - 1) // 2 for n in x.shape[1:3])
        windows = [x[:, i : i + 2 * h : 2, j : j + 2 * w : 2] for i in range(3) for j in range(3)]
        return mx.concatenate(windows, axis=-1) @ self.weight.reshape(outputs, -1).T + self.bias
