"""Compare ways to sum in the codec, error and time: ``python benchmarks/group_norm.py``.

The errors are those of the reference's values for an image with flat regions, which the tests keep,
and of float64 for images of one colour, at the published size with random weights.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import mlx_janus  # noqa: F401  # OpenBLAS before MLX

# isort: split
import mlx.core as mx
from mlx import nn
from mlx.utils import tree_map

from mlx_janus.config import VQConfig
from mlx_janus.models import vq
from mlx_janus.models.vq import GroupNorm, VQModel
from mlx_janus.weights.convert import Source, convert_checkpoint
from mlx_janus.weights.load import load_model

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = VQConfig("vq", 16384, 8, 128, (1, 1, 2, 2, 4), 2, 256)
COLOURS = [(-0.17, 0.44, -1.0), (-0.4, -0.71, -0.82)]  # RGB from -1 to 1
SHAPES = [(1, 24, 24, 512), (1, 192, 192, 256), (1, 384, 384, 128)]  # of Janus-Pro-1B's decoder


class MLXGroupNorm(GroupNorm):
    """GroupNorm as ``mlx.nn`` computes it."""

    def __call__(self, x: mx.array) -> mx.array:
        x = self._pytorch_compatible_group_norm(x)
        return self.weight * x + self.bias


class RowsGroupNorm(GroupNorm):
    """GroupNorm with means of entire rows, and then of these means."""

    def __call__(self, x: mx.array) -> mx.array:
        shape = x.shape
        x = x.reshape(*shape[:3], self.num_groups, -1)  # (B, H, W, groups, channels of a group)
        x = x - mean_of_rows(x)
        x = x * mx.rsqrt(mean_of_rows(x * x) + self.eps)
        return x.reshape(shape) * self.weight + self.bias


def mean_of_rows(x: mx.array) -> mx.array:
    """Average each row, then the rows' means, then the channels of a group."""
    return x.mean(2, keepdims=True).mean(1, keepdims=True).mean(4, keepdims=True)


def attend_at_once(scores: mx.array, values: mx.array) -> mx.array:
    """Attention with sums over all pixels at once, in place of ``vq.attend_by_rows``."""
    return mx.softmax(scores, axis=-1) @ values.flatten(1, 2)


def replace_norms(model: nn.Module, norm: type[GroupNorm]) -> None:
    """Replace every norm of a model."""
    for _, module in model.named_modules():
        if isinstance(module, GroupNorm):
            module.__class__ = norm


def rms_error(ours: mx.array, reference: mx.array) -> float:
    """Return rms(ours - reference) / rms(reference)."""
    difference = ours.astype(reference.dtype) - reference
    return float(mx.sqrt(mx.mean(difference**2) / mx.mean(reference**2)))


def flat_errors(model: VQModel, colour: tuple[float, ...], token: int) -> dict[str, list[float]]:
    """Return the errors of encoding one colour and decoding one token, for each way to sum."""
    pixels = mx.broadcast_to(mx.array(colour), (1, 384, 384, 3))
    ids = mx.full((1, 24 * 24), token, mx.int32)
    weights = model.parameters()
    model.update(tree_map(lambda array: array.astype(mx.float64), weights))
    exact = [model.encoder(pixels.astype(mx.float64)), model.decode_code(ids)]
    mx.eval(exact)
    model.update(weights)
    found = {}
    by_rows = vq.attend_by_rows
    for name, norm, attend in (
        ("nn.GroupNorm", MLXGroupNorm, attend_at_once),
        ("means of rows", RowsGroupNorm, attend_at_once),
        ("means in pieces", GroupNorm, attend_at_once),
        ("means in pieces, attention by rows", GroupNorm, by_rows),
    ):
        replace_norms(model, norm)
        vq.attend_by_rows = attend
        found[name] = [
            rms_error(model.encoder(pixels), exact[0]),
            rms_error(model.decode_code(ids), exact[1]),
        ]
    return found


def encoder_error(norm: type[GroupNorm]) -> float:
    """Return the relative rms error of the encoder's output with every norm replaced."""
    folder = ROOT / "tests" / "fixtures" / "deepseek-pro-bin"
    golden = mx.load(f"{folder}.golden.safetensors")
    with TemporaryDirectory() as work:
        convert_checkpoint(Source(folder, folder.name), Path(work) / "model")
        model = load_model(Path(work) / "model", dtype="float32")
        replace_norms(model.gen_vision_model, norm)
        pixels = golden["vq.enc_in"].transpose(0, 2, 3, 1)
        out = model.gen_vision_model.encoder(pixels).transpose(0, 3, 1, 2)
        return rms_error(out, golden["vq.enc_out"])


def seconds(norm: nn.Module, x: mx.array) -> float:
    """Time one call of a norm."""
    started = time.perf_counter()
    mx.eval(norm(x))
    return time.perf_counter() - started


def main() -> None:
    """Print the errors of all ways to sum, and the times of norms at each shape."""
    for norm in (MLXGroupNorm, RowsGroupNorm, GroupNorm):
        print(f"{norm.__name__}, an image with flat regions: {encoder_error(norm):.1e}")
    mx.random.seed(0)
    model = VQModel(PUBLISHED)
    for i, colour in enumerate(COLOURS):
        for name, (encoding, decoding) in flat_errors(model, colour, 77 + i).items():
            print(f"{name}, one colour: encoder {encoding:.1e}, decoder {decoding:.1e}")
    for shape in SHAPES:
        x = mx.random.normal(shape, key=mx.random.key(0))
        mx.eval(x)
        theirs = MLXGroupNorm(32, shape[-1], eps=1e-6)
        ours = GroupNorm(32, shape[-1], eps=1e-6)
        pairs = [(seconds(theirs, x), seconds(ours, x)) for _ in range(8)][1:]
        ratio = median(a / b for a, b in pairs)
        milliseconds = 1e3 * median(b for _, b in pairs)
        print(f"{shape}: nn.GroupNorm takes {ratio:.1f} times as long, {milliseconds:.1f} ms ours")


if __name__ == "__main__":
    main()
