"""Convolutions of the image codec: MLX's own on a GPU, matrix products on a CPU.

MLX's CPU convolution unfolds all windows of its input at once, which takes nine times the input's
memory, and on small images it is many times slower than the matrix product of the same size. Here
windows are unfolded for one kernel row at a time, on large images also in bands of rows, and
multiplied by BLAS. The input's gradient is the output's gradient, convolved with the rotated
kernel. So it is computed in the same way, without a scatter.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

_BAND_BYTES = 48_000_000  # bytes of unfolded rows in memory at once


def unfold_rows(x: mx.array) -> mx.array:
    """Concatenate the channels of each pixel and of the next two in its row.

    Shapes: (B, H + 2, W + 2, C) -> (B, H + 2, W, 3 * C).
    """
    W = x.shape[2] - 2
    shifted = [x[:, :, j : j + W] for j in range(3)]
    return mx.concatenate(shifted, axis=-1)


def _rows_for_kernel_row(unfolded: mx.array, i: int) -> mx.array:
    """Return the pixels under kernel row ``i``, in all its positions, as the rows of a matrix.

    ``unfolded`` is from ``unfold_rows``. Shapes: (B, H + 2, W, 3 * C) -> (B * H * W, 3 * C).
    """
    H = unfolded.shape[1] - 2
    channels = unfolded.shape[-1]  # 3 * C
    rows = unfolded[:, i : H + i]
    return rows.reshape(-1, channels)


def _pad_border(x: mx.array) -> mx.array:
    """Add a border of one zero pixel: (B, H, W, C) -> (B, H + 2, W + 2, C)."""
    border = [
        (0, 0),
        (1, 1),
        (1, 1),
        (0, 0),
    ]
    return mx.pad(x, border)


def _convolve_padded(padded: mx.array, weight: mx.array) -> mx.array:
    """Convolve padded images: (B, H + 2, W + 2, C), (O, 3, 3, C) -> (B, H, W, O)."""
    B = padded.shape[0]
    H = padded.shape[1] - 2
    W = padded.shape[2] - 2
    channels_out = weight.shape[0]
    unfolded = unfold_rows(padded)
    kernel = weight.reshape(channels_out, 3, -1)  # (O, kernel rows, 3 * C)
    out = _rows_for_kernel_row(unfolded, 0) @ kernel[:, 0].T
    for i in (1, 2):
        rows = _rows_for_kernel_row(unfolded, i)
        kernel_row = kernel[:, i].T
        out = mx.addmm(out, rows, kernel_row)  # out + rows @ kernel_row
    return out.reshape(B, H, W, channels_out)


def _convolve_in_bands(x: mx.array, weight: mx.array) -> mx.array:
    """Convolve with one pixel of zero padding: (B, H, W, C), (O, 3, 3, C) -> (B, H, W, O).

    A large image is convolved in bands of rows, to limit the memory of unfolded rows.
    """
    B, H, W, C = x.shape
    padded = _pad_border(x)
    unfolded_row_bytes = B * W * 3 * C * x.itemsize
    band_height = max(_BAND_BYTES // unfolded_row_bytes, 1)
    if band_height >= H:
        return _convolve_padded(padded, weight)
    bands = []
    for top in range(0, H, band_height):
        bottom = top + band_height + 2  # 2: the neighbour rows above and below the band
        band = padded[:, top:bottom]
        bands.append(_convolve_padded(band, weight))
    return mx.concatenate(bands, axis=1)


@mx.custom_function
def _convolve(x: mx.array, weight: mx.array) -> mx.array:
    """Convolve with one pixel of zero padding; ``_convolve_vjp`` returns the gradients."""
    return _convolve_in_bands(x, weight)


@_convolve.vjp
def _convolve_vjp(
    primals: tuple[mx.array, mx.array],
    cotangent: mx.array,
    _output: mx.array,
) -> tuple[mx.array, mx.array]:
    """Return the gradients of the input and of the kernel; ``cotangent`` is the output's gradient.

    Shapes: input (B, H, W, C), kernel (O, 3, 3, C), output (B, H, W, O).
    """
    x, weight = primals

    # The input's gradient is the output's gradient, convolved with the rotated kernel.
    rotated = weight[:, ::-1, ::-1]  # by 180 degrees
    rotated = rotated.transpose(3, 1, 2, 0)  # swap input and output channels: (C, 3, 3, O)
    x_gradient = _convolve_in_bands(cotangent, rotated)

    channels_out = weight.shape[0]
    output_gradient = cotangent.reshape(-1, channels_out).T  # (O, B * H * W)
    unfolded = unfold_rows(_pad_border(x))
    row_gradients = []
    for i in range(3):  # the rows of the kernel
        row_gradient = output_gradient @ _rows_for_kernel_row(unfolded, i)  # (O, 3 * C)
        row_gradients.append(row_gradient)
    weight_gradient = mx.stack(row_gradients, axis=1)  # (O, kernel rows, 3 * C)
    return x_gradient, weight_gradient.reshape(weight.shape)


class Conv2d(nn.Conv2d):
    """An ``nn.Conv2d`` with bias, fast on a CPU too.

    Three kinds are supported: 1 x 1; 3 x 3 with stride 1 and padding 1; 3 x 3 with stride 2 and no
    padding.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Convolve: (B, H, W, C) -> (B, h, w, O). h and w are the output's height and width."""
        if mx.default_device().type == mx.DeviceType.gpu:
            return super().__call__(x)
        channels_out, size, _, _ = self.weight.shape  # (O, size, size, C)
        if size == 3 and self.padding == (1, 1):
            return _convolve(x, self.weight) + self.bias
        windows = x if size == 1 else _strided_windows(x)  # a 1 x 1 window is the pixel itself
        kernel = self.weight.reshape(channels_out, -1)
        return windows @ kernel.T + self.bias


def _strided_windows(x: mx.array) -> mx.array:
    """Unfold the 3 x 3 windows of stride 2, without padding: (B, H, W, C) -> (B, h, w, 9 * C)."""
    _, H, W, _ = x.shape
    h = (H - 1) // 2  # windows in a column
    w = (W - 1) // 2  # windows in a row
    pixels = []  # nine arrays (B, h, w, C): pixel (i, j) of every window
    for i in range(3):
        rows = x[:, i : i + 2 * h : 2]  # row i of every window
        for j in range(3):
            pixels.append(rows[:, :, j : j + 2 * w : 2])
    return mx.concatenate(pixels, axis=-1)
