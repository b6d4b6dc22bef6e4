"""The codec's sums over flat regions: errors of one sign must not add up."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlx_janus.config import VQConfig
from mlx_janus.models.vq import GroupNorm, VQModel, attend_by_rows, mean_by_rows
from tests.support.golden import TOLERANCE, rms_error

CONFIG = VQConfig("vq", 256, 8, 8, (1, 1, 2, 2, 4), 1, 32, norm_groups=8)


def exact(function: object, *arrays: mx.array) -> np.ndarray:
    """The function's value in float64."""
    return np.array(function(*(array.astype(mx.float64) for array in arrays)))  # type: ignore


@pytest.fixture(scope="module")
def codec() -> VQModel:
    mx.random.seed(0)
    model = VQModel(CONFIG)
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("seed", range(2))
def test_a_picture_of_one_colour_is_encoded_and_decoded_as_in_float64(
    codec: VQModel, seed: int
) -> None:
    """At the published size; sums over whole rows and MLX's attention are off by 2.6e-5."""
    colour = mx.array(np.random.RandomState(seed).rand(3) * 2 - 1, mx.float32)
    pixels = mx.broadcast_to(colour, (1, 384, 384, 3))
    ids = mx.full((1, 24 * 24), 7 * seed, mx.int32)
    latents = codec.encoder(pixels)
    decoded = codec.decode_code(ids)
    mx.eval(latents, decoded)
    weights = codec.parameters()
    codec.update(tree_map(lambda array: array.astype(mx.float64), weights))
    try:
        assert rms_error(latents, exact(codec.encoder, pixels)) < TOLERANCE
        assert rms_error(decoded, np.array(codec.decode_code(ids))) < TOLERANCE
    finally:
        codec.update(weights)


def test_a_norm_of_equal_pixels() -> None:
    pixel = mx.random.normal((32,), key=mx.random.key(1)) * 0.5
    x = mx.broadcast_to(pixel, (1, 384, 384, 32))
    norm = GroupNorm(8, 32, eps=1e-6)
    assert rms_error(norm(x), exact(norm, x)) < 1e-6


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 2, 3), (2, 1, 7, 1, 4), (1, 5, 24, 2, 2), (2, 23, 29, 2, 2), (1, 48, 36, 1, 1)],
)
def test_a_mean_by_rows_is_the_mean_whatever_divides_the_sides(shape: tuple[int, ...]) -> None:
    x = mx.random.normal(shape, key=mx.random.key(2)) + 3
    got = mean_by_rows(x)
    want = np.array(x).mean((1, 2, 4), keepdims=True, dtype=np.float64)
    assert got.shape == want.shape
    assert rms_error(got, want) < 1e-6


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (24, 24)])
def test_attention_by_rows_is_attention(grid: tuple[int, int]) -> None:
    count = math.prod(grid)
    scores = mx.random.normal((2, count, count), key=mx.random.key(3)) * 20
    values = mx.random.normal((2, *grid, 4), key=mx.random.key(4))
    got = attend_by_rows(scores, values)
    want = exact(lambda s, v: mx.softmax(s, axis=-1) @ v.reshape(2, count, 4), scores, values)
    assert rms_error(got, want) < 1e-6


def test_attention_over_equal_pixels_is_their_value() -> None:
    values = mx.broadcast_to(mx.random.normal((512,), key=mx.random.key(5)), (1, 24, 24, 512))
    got = attend_by_rows(mx.full((1, 5, 576), 0.1), values)
    assert rms_error(got, np.array(values)[:, 0, :5]) < 1e-6
