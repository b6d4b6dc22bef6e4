"""Layers between the networks: a quantized layer with a scale of its own."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_janus.models.layers import ScaledLinear, layer_scale_of
from tests.support.golden import rms_error

DTYPES = (mx.float32, mx.bfloat16, mx.float16)


def linear(weight: mx.array) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = weight
    return layer


def loss(layer: nn.Module, weight: mx.array) -> float:
    """The error of a quantized layer's output."""
    x = mx.random.normal((8, weight.shape[1]), key=mx.random.key(0)).astype(weight.dtype)
    want = x.astype(mx.float32) @ weight.astype(mx.float32).T
    return rms_error(layer(x).astype(mx.float32), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", [20.0, 0.15, 0.02, 0.004, 0.002, 1e-4])
def test_nvfp4_with_a_scale_loses_as_little_as_affine_whatever_the_size_of_the_weights(
    std: float, dtype: mx.Dtype
) -> None:
    weight = (mx.random.normal((64, 512), key=mx.random.key(1)) * std).astype(dtype)
    affine = nn.QuantizedLinear.from_linear(linear(weight), 64, 4)
    scaled = ScaledLinear.from_linear(linear(weight), 16, 4, "nvfp4")
    assert scaled(mx.zeros((1, 512), dtype)).dtype == dtype
    assert loss(scaled, weight) < 1.15 * loss(affine, weight)


def test_rows_of_very_different_sizes_keep_their_precision() -> None:
    sizes = mx.array(np.geomspace(1e-3, 1, 64), mx.float32)[:, None]
    weight = mx.random.normal((64, 512), key=mx.random.key(2)) * 0.02 * sizes
    x = mx.random.normal((8, 512), key=mx.random.key(0))
    got = ScaledLinear.from_linear(linear(weight), 16, 4, "nvfp4")(x)
    assert rms_error(got / sizes.T, x @ weight.T / sizes.T) < 0.12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1.0, 0.7, -3.0, 6e4, float("inf"), float("nan")])
def test_the_scale_is_a_power_of_two_that_every_float_type_has(
    value: float, dtype: mx.Dtype
) -> None:
    weight = mx.zeros((2, 32), dtype)
    weight[1, 3] = value
    scale = layer_scale_of(weight)
    assert scale.dtype == dtype
    assert scale.shape == (1,)
    mantissa, _ = np.frexp(scale.astype(mx.float32).item())
    assert mantissa == 0.5
    assert scale.astype(mx.float16).astype(dtype).item() == scale.item()
    if 1e-4 < abs(value) < 1e30:
        assert 64 <= abs(value) / scale.item() < 128.5
