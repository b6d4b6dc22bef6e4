"""Convolutions as matrix products, forward and backward, for training on a CPU.

MLX's CPU convolution is many times slower than the matrix product of the same size, which BLAS computes. Here the
windows of the input are laid out as rows (``unfold``) and multiplied. The gradient towards the input is itself such a
product, of the output's windows with the kernel turned around, so nothing is scattered.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten


def unfold(x: mx.array) -> mx.array:
    """(B, H, W, C) -> (B, H + 2, W, 3 * C): three neighbours of a row side by side, with zeros around the picture."""
    W = x.shape[2]
    x = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    return mx.concatenate([x[:, :, j : j + W] for j in range(3)], axis=-1)


def _rows(windows: mx.array, i: int, height: int) -> mx.array:
    """(B * height * W, 3 * C): the unfolded rows that the kernel's row ``i`` meets."""
    return windows[:, i : i + height].reshape(-1, windows.shape[-1])


def _product(x: mx.array, weight: mx.array) -> mx.array:
    """(B, H, W, C), (O, 3, 3, C) -> (B, H, W, O)."""
    B, H, W, _ = x.shape
    windows, kernel = unfold(x), weight.reshape(weight.shape[0], 3, -1)
    out = _rows(windows, 0, H) @ kernel[:, 0].T
    for i in (1, 2):
        out = mx.addmm(out, _rows(windows, i, H), kernel[:, i].T)
    return out.reshape(B, H, W, -1)


@mx.custom_function
def _convolve(x: mx.array, weight: mx.array) -> mx.array:
    """(B, H, W, C), (O, 3, 3, C) -> (B, H, W, O), with one pixel of zeros around."""
    return _product(x, weight)


@_convolve.vjp
def _convolve_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    x, weight = primals
    H, rows = x.shape[1], cotangent.reshape(-1, weight.shape[0])
    windows = unfold(x)
    towards_weight = mx.stack([rows.T @ _rows(windows, i, H) for i in range(3)], axis=1).reshape(weight.shape)
    return _product(cotangent, weight[:, ::-1, ::-1].transpose(3, 1, 2, 0)), towards_weight


class MatrixConv2d(nn.Module):
    """An ``nn.Conv2d`` of kernel 1, 3 (padding 1) or 3 with stride 2 (no padding), with the same parameters."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight = conv.weight
        self.bias = conv.bias
        shape = (conv.weight.shape[1], conv.stride[0], conv.padding[0])
        if shape not in ((1, 1, 0), (3, 1, 1), (3, 2, 0)):
            raise ValueError(f"kernel, stride and padding must be those of the image codec, got {shape}")
        self._stride = conv.stride[0]

    def __call__(self, x: mx.array) -> mx.array:
        O, size = self.weight.shape[:2]
        if size == 1:
            return x @ self.weight.reshape(O, -1).T + self.bias
        if self._stride == 1:
            return _convolve(x, self.weight) + self.bias
        h, w = ((n - 1) // 2 for n in x.shape[1:3])
        windows = [x[:, i : i + 2 * h : 2, j : j + 2 * w : 2] for i in range(3) for j in range(3)]
        return mx.concatenate(windows, axis=-1) @ self.weight.reshape(O, -1).T + self.bias


def use_matrix_products(model: nn.Module) -> None:
    """Replace every convolution of a module by a ``MatrixConv2d`` with the same parameters under the same names."""
    convs = [(name, MatrixConv2d(m)) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    model.update_modules(tree_unflatten(convs))
