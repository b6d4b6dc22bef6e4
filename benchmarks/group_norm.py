"""Compare the codec's GroupNorm with MLX's, error and time: ``python benchmarks/group_norm.py``.

The error is measured against the reference's values for an image with flat regions, which the tests
keep.
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

from mlx_janus.models.vq import GroupNorm
from mlx_janus.weights.convert import Source, convert_checkpoint
from mlx_janus.weights.load import load_model

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(1, 24, 24, 512), (1, 192, 192, 256), (1, 384, 384, 128)]  # of Janus-Pro-1B's decoder


class MLXGroupNorm(GroupNorm):
    """GroupNorm as ``mlx.nn`` computes it."""

    def __call__(self, x: mx.array) -> mx.array:
        x = self._pytorch_compatible_group_norm(x)
        return self.weight * x + self.bias


def encoder_error(norm: type[GroupNorm]) -> float:
    """Return the relative rms error of the encoder's output with every norm replaced."""
    folder = ROOT / "tests" / "fixtures" / "deepseek-pro-bin"
    golden = mx.load(f"{folder}.golden.safetensors")
    with TemporaryDirectory() as work:
        convert_checkpoint(Source(folder, folder.name), Path(work) / "model")
        model = load_model(Path(work) / "model", dtype="float32")
        for _, module in model.gen_vision_model.named_modules():
            if isinstance(module, GroupNorm):
                module.__class__ = norm
        pixels = golden["vq.enc_in"].transpose(0, 2, 3, 1)
        out = model.gen_vision_model.encoder(pixels).transpose(0, 3, 1, 2)
        want = golden["vq.enc_out"]
        return float(mx.sqrt(mx.mean((out - want) ** 2) / mx.mean(want**2)))


def seconds(norm: nn.Module, x: mx.array) -> float:
    """Time one call of a norm."""
    started = time.perf_counter()
    mx.eval(norm(x))
    return time.perf_counter() - started


def main() -> None:
    """Print the errors of both norms, and their times at each shape."""
    for name, norm in (("nn.GroupNorm", MLXGroupNorm), ("rows first", GroupNorm)):
        print(f"{name}: relative rms error of the encoder's output {encoder_error(norm):.1e}")
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
