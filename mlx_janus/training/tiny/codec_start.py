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
        random: for a random rotation of the codes, which spreads the information over all
            components.
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
        taps: positions in the kernel, as row and column. A copy is the mean of the input over them.
        copies: output channel, input channel and sign of each copy.
        noise: factor on the random weights of the output channels, which stay next to the copy.
    """
    weight = np.array(layer.weight)
    for output, source, sign in copies:
        weight[output] *= noise
        for row, column in taps:
            weight[output, row, column, source] += sign / len(taps)
    layer.weight = mx.array(weight)


def _copy_colours_through(encoder: Encoder) -> None:
    """Copy the colours and their negatives through the shortcuts of the encoder."""
    # Channels 0 to 2 copy red, green and blue, and channels 3 to 5 copy their negatives.
    signed = [(k, k % 3, 1.0 if k < 3 else -1.0) for k in range(_COLOUR_CHANNELS)]
    same = [(k, k, 1.0) for k in range(_COLOUR_CHANNELS)]
    centre = [(1, 1)]  # of a 3 x 3 kernel
    square = [(0, 0), (0, 1), (1, 0), (1, 1)]  # the four pixels that become one
    _copy_channels(encoder.conv_in, centre, signed, _NOISE_BESIDE_COLOURS)
    for name, layer in encoder.named_modules():
        if name.endswith("nin_shortcut"):
            _copy_channels(layer, [(0, 0)], same, _NOISE_BESIDE_COLOURS)
        if name.endswith("downsample.conv"):
            _copy_channels(layer, square, same, _NOISE_BESIDE_COLOURS)
    _copy_channels(encoder.conv_out, centre, same, _NOISE_BESIDE_COLOURS)


def _add_constant_channels(model: VQModel) -> None:
    """Give the input of every GroupNorm a channel with the same large value at all pixels.

    A GroupNorm divides by the deviation over the whole image, so that a colour would depend on the
    rest of the image. Next to a large constant, all else is small, and the deviation is nearly the
    same for every image. The norm's weight for this channel is 0, which drops the constant again.
    """
    for part, constant in ((model.encoder, _ENCODER_CONSTANT), (model.decoder, _DECODER_CONSTANT)):
        for name, layer in part.named_modules():
            if name.endswith("conv1"):
                channels = layer.weight.shape[0]
                _make_constant(layer, math.sqrt(channels))  # so that the deviation is about 1
            elif name.endswith(("conv_in", "nin_shortcut", "downsample.conv", "upsample.conv")):
                _make_constant(layer, constant)
            elif isinstance(layer, GroupNorm):
                _undo_normalization(layer)


def _make_constant(layer: nn.Module, value: float) -> None:
    """Make the last output channel of a convolution equal ``value`` at all pixels."""
    layer.weight[-1] = mx.zeros_like(layer.weight[-1])
    layer.bias[-1] = value


def _undo_normalization(norm: nn.Module) -> None:
    """Set a GroupNorm's weights so that a value of 0 stays 0, and the constant becomes 0."""
    channels = norm.weight.shape[0]
    norm.weight = mx.full((channels,), _GAIN)
    # The codec's norms have one group. With one constant c among n channels, and the others near 0,
    # the mean is c / n and the deviation about c / n * sqrt(n - 1). So 0 becomes
    # -1 / sqrt(n - 1), which the bias takes back.
    norm.bias = norm.weight / math.sqrt(channels - 1)
    norm.weight[-1] = 0.0
    norm.bias[-1] = 0.0


def _fit_codes(
    model: VQModel,
    batches: Sequence[mx.array],
    random: np.random.Generator,
) -> None:
    """Fit the layer that makes codes, by reduced-rank regression from features to pixels.

    The components of a code are the linear combinations of features that predict a patch's pixels
    best, scaled to variance 1. One component is constant: codes are normalised, and without it, a
    light and a dark shade of a colour would be the same unit vector.
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
    kept = width - 1  # the last component is the constant
    components = to_patches @ directions[:kept].T / scales[:kept] * np.sqrt(total)
    matrix = np.zeros((width, features.shape[1]))
    matrix[:-1] = components.T
    bias = -matrix @ centre
    bias[-1] = _CONSTANT
    rotation, _ = np.linalg.qr(random.standard_normal((width, width)))
    model.quant_conv.weight = _array(rotation @ matrix)[:, None, None]
    model.quant_conv.bias = _array(rotation @ bias)


def _copy_codes_through(model: VQModel) -> None:
    """Copy the components of a code through the first channels of every level of the decoder."""
    width = model.quant_conv.weight.shape[0]
    same = [(k, k, 1.0) for k in range(width)]
    _copy_channels(model.post_quant_conv, [(0, 0)], same, 0.0)
    _copy_all_channels(model.decoder.conv_in)
    for name, layer in model.decoder.named_modules():
        if name.endswith(("nin_shortcut", "upsample.conv")):
            _copy_all_channels(layer)


def _copy_all_channels(layer: Conv2d) -> None:
    """Make each output channel copy the input channel of the same number, if there is one."""
    outputs, size, _, inputs = layer.weight.shape
    layer.weight = layer.weight * _NOISE_BESIDE_CODES
    middle = size // 2
    same = [(k, k, 1.0) for k in range(min(outputs, inputs))]
    _copy_channels(layer, [(middle, middle)], same, 1.0)  # 1: the noise is already scaled


def _fit_colours(model: VQModel, batches: Sequence[mx.array]) -> None:
    """Fit the decoder's last convolution to the pixels, by least squares."""
    layer = model.decoder.conv_out
    # Least squares of the pixels Y on the windows X, which get a column of ones for the bias.
    inputs = layer.weight[0].size + 1
    xx = np.zeros((inputs, inputs))  # X'X
    xy = np.zeros((inputs, 3))  # X'Y
    for pixels in batches:
        features = model.encoder(pixels)
        z = normalize(model.quant_conv(features))
        decoded = model.post_quant_conv(z)
        windows = _rows([_last_windows(model.decoder, decoded)])
        ones = np.ones((len(windows), 1))
        windows = np.concatenate([windows, ones], axis=1)
        xx += windows.T @ windows
        xy += windows.T @ _rows([pixels])
    fitted = _least_squares(xx, xy)
    layer.weight = _array(fitted[:-1].T).reshape(layer.weight.shape)
    layer.bias = _array(fitted[-1])


def _last_windows(decoder: Decoder, z: mx.array) -> mx.array:
    """Return the 3 x 3 windows that the decoder's last convolution reads, one for each pixel.

    (B, h, w, C) -> (B, H, W, 9 * channels).
    """
    x = decoder.conv_in(z)
    for block in (*decoder.mid, *decoder.conv_blocks):
        x = block(x)
    x = nn.silu(decoder.norm_out(x))
    height = x.shape[1]
    padded = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    unfolded = unfold_rows(padded)
    rows = [unfolded[:, i : i + height] for i in range(3)]
    return mx.concatenate(rows, axis=-1)


def _least_squares(xx: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Return the coefficients of a ridge regression of Y on X: (inputs, outputs).

    Args:
        xx: X'X, (inputs, inputs).
        xy: X'Y, (inputs, outputs).
    """
    size = len(xx)
    penalty = _RIDGE * np.trace(xx) / size
    solution: np.ndarray = np.linalg.solve(xx + penalty * np.eye(size), xy)
    return solution


def _patches(pixels: np.ndarray, model: VQModel) -> np.ndarray:
    """Return the pixels of each token's patch: (B, S, S, 3) -> (B * h * w, cell * cell * 3)."""
    halvings = len(model.encoder.conv_blocks) - 1
    cell = 2**halvings  # pixels per side of a patch
    B, S, _, _ = pixels.shape
    grid = S // cell
    cells = pixels.reshape(B, grid, cell, grid, cell, 3)
    cells = cells.transpose(0, 1, 3, 2, 4, 5)  # (B, h, w, cell, cell, 3)
    return cells.reshape(-1, cell * cell * 3).astype(np.float64)


def _rows(arrays: Sequence[mx.array]) -> np.ndarray:
    """Flatten arrays (..., C) to rows, and join them in float64: (rows, C)."""
    flat = [np.array(x).reshape(-1, x.shape[-1]) for x in arrays]
    return np.concatenate(flat).astype(np.float64)


def _array(x: np.ndarray) -> mx.array:
    """Convert to MLX's float32."""
    return mx.array(x.astype(np.float32))
