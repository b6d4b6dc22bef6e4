"""Initial weights of the image codec, from images.

The codec's codes are unit vectors, and random weights make nearly all of them point the same way.
So here the codec starts as a linear one that reproduces the mean colour of each patch. It learns
the rest as corrections (docs/lab-notes.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from mlx import nn

from ...models.convolution import Conv2d, unfold_rows
from ...models.vq import Decoder, Encoder, GroupNorm, VQModel, normalize

_COLOUR_CHANNELS = 6  # of the encoder: red, green, blue and their negatives
_NOISE_BESIDE_COLOURS = 0.3  # scale of an encoder's random weights next to a copied colour
_NOISE_BESIDE_CODES = 0.1  # scale of a decoder's random weights next to a copied code
_CONSTANT = 3.0  # the constant component of a code; the others have variance 1
_ENCODER_CONSTANT = 4.0  # value of the constant channel; colours are in [-1, 1]
_DECODER_CONSTANT = 2.5  # value of the constant channel; codes are unit vectors
_GAIN = 2.0  # weight of every GroupNorm
_PATTERN_WEIGHT = 3.0  # weight of a patch with more than one colour
_PLAIN = 0.05  # largest difference of values (-1 to 1) in a patch of one colour
_RIDGE = 1e-5  # ridge regression's penalty, as a share of the mean eigenvalue


def start_from_images(
    model: VQModel,
    batches: Sequence[mx.array],
    random: np.random.Generator,
) -> None:
    """Replace a codec's random weights by weights that reproduce colours.

    Args:
        model: all its weights but the codebook are changed.
        batches: images, (B, S, S, 3) each, in [-1, 1].
        random: for the rotation of the codes, after which each component tells of everything.
    """
    _silence_residual_branches(model)
    _copy_colours_through(model.encoder)
    _add_constant_channels(model)
    _fit_codes(model, batches, random)
    _copy_codes_through(model)
    _add_constant_channels(model)  # again, as copying changed the decoder
    _fit_colours(model, batches)
    mx.eval(model.parameters())


def _silence_residual_branches(model: VQModel) -> None:
    """Zero the last layer of every residual branch, so that the shortcuts alone count."""
    for name, layer in model.named_modules():
        if name.endswith(("conv2", "proj_out")):
            layer.weight = mx.zeros_like(layer.weight)


def _copy_channels(
    layer: nn.Module,
    taps: Sequence[tuple[int, int]],
    copies: Sequence[tuple[int, int, float]],
    noise: float,
) -> None:
    """Make channels of a convolution copy channels of its input.

    Args:
        layer: a convolution.
        taps: rows and columns of its kernel; the copy is the mean over these pixels.
        copies: output channel, input channel and sign of each copy.
        noise: scale of the random weights that the copying channels keep.
    """
    weight = np.array(layer.weight)
    for output, source, sign in copies:
        weight[output] *= noise
        for row, column in taps:
            weight[output, row, column, source] += sign / len(taps)
    layer.weight = mx.array(weight)


def _copy_colours_through(encoder: Encoder) -> None:
    """Copy the colours and their negatives through the shortcuts of the encoder."""
    signed = [(k, k % 3, 1.0 if k < 3 else -1.0) for k in range(_COLOUR_CHANNELS)]
    same = [(k, k, 1.0) for k in range(_COLOUR_CHANNELS)]
    centre = [(1, 1)]
    square = [(0, 0), (0, 1), (1, 0), (1, 1)]  # of the pixels that become one
    _copy_channels(encoder.conv_in, centre, signed, _NOISE_BESIDE_COLOURS)
    for name, layer in encoder.named_modules():
        if name.endswith("nin_shortcut"):
            _copy_channels(layer, [(0, 0)], same, _NOISE_BESIDE_COLOURS)
        if name.endswith("downsample.conv"):
            _copy_channels(layer, square, same, _NOISE_BESIDE_COLOURS)
    _copy_channels(encoder.conv_out, centre, same, _NOISE_BESIDE_COLOURS)


def _add_constant_channels(model: VQModel) -> None:
    """Give the input of every GroupNorm a channel with one large value.

    A GroupNorm divides by the deviation over the whole image, so that a colour would depend on the
    rest of the image. Next to a large constant, all else is small, and the deviation is nearly the
    same for every image. The norm's weight drops the constant again.
    """
    for part, constant in ((model.encoder, _ENCODER_CONSTANT), (model.decoder, _DECODER_CONSTANT)):
        for name, layer in part.named_modules():
            if name.endswith("conv1"):
                _make_constant(layer, math.sqrt(layer.weight.shape[0]))
            elif name.endswith(("conv_in", "nin_shortcut", "downsample.conv", "upsample.conv")):
                _make_constant(layer, constant)
            elif isinstance(layer, GroupNorm):
                _undo_normalization(layer)


def _make_constant(layer: nn.Module, value: float) -> None:
    """Make the last channel of a convolution this value."""
    layer.weight[-1] = mx.zeros_like(layer.weight[-1])
    layer.bias[-1] = value


def _undo_normalization(norm: nn.Module) -> None:
    """Set a GroupNorm's weights so that a value of 0 stays 0, and the constant becomes 0."""
    channels = norm.weight.shape[0]
    norm.weight = mx.full((channels,), _GAIN)
    # One constant c among n channels, the others near 0: the mean is c / n, the deviation about
    # c / n * sqrt(n - 1). So 0 becomes -1 / sqrt(n - 1), which the bias takes back.
    norm.bias = norm.weight / math.sqrt(channels - 1)
    norm.weight[-1] = 0.0
    norm.bias[-1] = 0.0


def _fit_codes(
    model: VQModel,
    batches: Sequence[mx.array],
    random: np.random.Generator,
) -> None:
    """Fit the layer that makes codes, by reduced-rank regression from features to pixels.

    The components of a code are the features' combinations that tell most about a patch's pixels,
    scaled to variance 1. One component is constant: without it, a light and a dark shade of a
    colour would be the same unit vector.
    """
    features = _rows([model.encoder(pixels) for pixels in batches])
    patches = np.concatenate([_patches(np.array(pixels), model) for pixels in batches])
    colours = patches.reshape(len(patches), -1, 3)
    differences = np.ptp(colours, axis=1)
    has_pattern = differences.max(-1) > _PLAIN
    weights = np.where(has_pattern, _PATTERN_WEIGHT, 1.0)[:, None]
    total = weights.sum()

    centre = (features * weights).sum(0) / total
    mean_patch = (patches * weights).sum(0) / total
    x = (features - centre) * np.sqrt(weights)
    y = (patches - mean_patch) * np.sqrt(weights)
    to_patches = _least_squares(x.T @ x, x.T @ y)
    _, scales, directions = np.linalg.svd(x @ to_patches, full_matrices=False)

    width = model.quant_conv.weight.shape[0]
    kept = width - 1  # and the constant
    components = to_patches @ directions[:kept].T / scales[:kept] * np.sqrt(total)
    matrix = np.zeros((width, features.shape[1]))
    matrix[:-1] = components.T
    bias = -matrix @ centre
    bias[-1] = _CONSTANT
    rotation, _ = np.linalg.qr(random.standard_normal((width, width)))
    model.quant_conv.weight = _array(rotation @ matrix)[:, None, None]
    model.quant_conv.bias = _array(rotation @ bias)


def _copy_codes_through(model: VQModel) -> None:
    """Copy each code through the first channels of every level of the decoder."""
    width = model.quant_conv.weight.shape[0]
    same = [(k, k, 1.0) for k in range(width)]
    _copy_channels(model.post_quant_conv, [(0, 0)], same, 0.0)
    _copy_all_channels(model.decoder.conv_in)
    for name, layer in model.decoder.named_modules():
        if name.endswith(("nin_shortcut", "upsample.conv")):
            _copy_all_channels(layer)


def _copy_all_channels(layer: Conv2d) -> None:
    """Make every channel of a convolution copy the channel of the same number, if there is one."""
    outputs, size, _, inputs = layer.weight.shape
    layer.weight = layer.weight * _NOISE_BESIDE_CODES
    middle = size // 2
    same = [(k, k, 1.0) for k in range(min(outputs, inputs))]
    _copy_channels(layer, [(middle, middle)], same, 1.0)


def _fit_colours(model: VQModel, batches: Sequence[mx.array]) -> None:
    """Fit the decoder's last convolution to the pixels, by least squares."""
    layer = model.decoder.conv_out
    inputs = layer.weight[0].size + 1  # and the bias
    products = np.zeros((inputs, inputs))
    targets = np.zeros((inputs, 3))
    for pixels in batches:
        features = model.encoder(pixels)
        z = normalize(model.quant_conv(features))
        decoded = model.post_quant_conv(z)
        windows = _rows([_last_windows(model.decoder, decoded)])
        ones = np.ones((len(windows), 1))
        windows = np.concatenate([windows, ones], axis=1)
        products += windows.T @ windows
        targets += windows.T @ _rows([pixels])
    fitted = _least_squares(products, targets)
    layer.weight = _array(fitted[:-1].T).reshape(layer.weight.shape)
    layer.bias = _array(fitted[-1])


def _last_windows(decoder: Decoder, z: mx.array) -> mx.array:
    """Return the inputs of ``conv_out`` at each pixel: (B, h, w, C) -> (B, H, W, 9 * channels)."""
    x = decoder.conv_in(z)
    for block in (*decoder.mid, *decoder.conv_blocks):
        x = block(x)
    x = nn.silu(decoder.norm_out(x))
    height = x.shape[1]
    padded = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    unfolded = unfold_rows(padded)
    rows = [unfolded[:, i : i + height] for i in range(3)]
    return mx.concatenate(rows, axis=-1)


def _least_squares(products: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Solve ridge regression, from X'X and X'Y -> the coefficients (inputs, outputs)."""
    size = len(products)
    penalty = _RIDGE * np.trace(products) / size
    solution: np.ndarray = np.linalg.solve(products + penalty * np.eye(size), targets)
    return solution


def _patches(pixels: np.ndarray, model: VQModel) -> np.ndarray:
    """Return the pixels of each token: (B, S, S, 3) -> (B * h * w, cell * cell * 3)."""
    doublings = len(model.encoder.conv_blocks) - 1
    cell = 2**doublings  # pixels per side of a token
    B, S, _, _ = pixels.shape
    grid = S // cell
    cells = pixels.reshape(B, grid, cell, grid, cell, 3)
    cells = cells.transpose(0, 1, 3, 2, 4, 5)  # (B, h, w, cell, cell, 3)
    return cells.reshape(-1, cell * cell * 3).astype(np.float64)


def _rows(arrays: Sequence[mx.array]) -> np.ndarray:
    """Join arrays (..., C) as rows -> (rows, C), in float64."""
    flat = [np.array(x).reshape(-1, x.shape[-1]) for x in arrays]
    return np.concatenate(flat).astype(np.float64)


def _array(x: np.ndarray) -> mx.array:
    """Convert to MLX's float32."""
    return mx.array(x.astype(np.float32))
