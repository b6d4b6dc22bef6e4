"""The adaptors and heads between the encoders and the language model.

Unusual: GELU is the exact one (error function) everywhere in Janus. The gaps in the indices of
``layers`` (0, 2, ...) keep the checkpoint's names, where the activations have indices too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx import nn

from ..config import GenHeadConfig, MLPConfig


class MLPProjector(nn.Module):
    """Linear layers with GELU between them.

    Reference: ``janus/models/projector.py``, ``mlp_gelu``.
    """

    def __init__(self, config: MLPConfig):
        super().__init__()
        self.layers = [nn.Linear(config.input_dim, config.output_dim)]
        for _ in range(config.depth - 1):
            self.layers.append(nn.GELU())
            self.layers.append(nn.Linear(config.output_dim, config.output_dim))

    def __call__(self, x: mx.array) -> mx.array:
        """Project features: (..., input_dim) -> (..., output_dim)."""
        for layer in self.layers:
            x = layer(x)
        return x


class GenHead(nn.Module):
    """The head that gives the logits of image tokens.

    Reference: ``vision_head`` in ``janus/models/modeling_vlm.py``.
    """

    def __init__(self, config: GenHeadConfig):
        super().__init__()
        self.output_mlp_projector = nn.Linear(config.input_dim, config.hidden_dim)
        self.vision_head = nn.Linear(config.hidden_dim, config.output_dim)

    def __call__(self, x: mx.array) -> mx.array:
        """Return logits of hidden states: (..., input_dim) -> (..., output_dim)."""
        hidden = self.output_mlp_projector(x)
        return self.vision_head(nn.gelu(hidden))


ADAPTORS: dict[str, Callable[[Any], nn.Module]] = {"mlp_gelu": MLPProjector}
"""Networks between an encoder or an embedding and the language model, by the config's kind."""


_TOP_EXPONENT = 6  # stored weights are below 2 ** 7, and the largest is at least 2 ** 6


class ScaledLinear(nn.QuantizedLinear):
    """A quantized linear layer with one more scale, ``layer_scale``, that applies to all weights.

    The scales of nvfp4's groups are floats of 8 bits, 2 ** -9 or more: groups of small weights
    would lose precision, or become zero. So the stored weights are the real ones divided by a
    power of two, which brings the group scales into the range where they have all their bits.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply: (..., input width) -> (..., output width)."""
        return super().__call__(x * self.layer_scale)

    @classmethod
    def from_linear(
        cls, linear_layer: nn.Linear, group_size: int, bits: int, mode: str
    ) -> ScaledLinear:
        """Return a linear layer in quantized form; its arrays are lazy."""
        layer = super().from_linear(linear_layer, group_size, bits, mode=mode)
        scale = layer_scale_of(linear_layer.weight)
        layer.weight, layer.scales, *_ = mx.quantize(
            linear_layer.weight / scale, group_size=group_size, bits=bits, mode=mode
        )
        layer.layer_scale = scale
        return layer


def layer_scale_of(weight: mx.array) -> mx.array:
    """Return the power of two by which ``ScaledLinear`` divides a float weight: (1,).

    It depends only on the largest weight, and is exact, so it is the same on every device.
    """
    largest = mx.maximum(weight.max(), -weight.min()).reshape(1).astype(mx.float32)
    # A float32 has its exponent, plus 127, in bits 23 to 30. The sign bit is 0 here.
    exponent = (largest.view(mx.int32) >> 23) - 127
    exponent = mx.clip(exponent - _TOP_EXPONENT, -24, 15)  # powers of two that float16 has
    scale = ((exponent + 127) << 23).view(mx.float32)
    return scale.astype(weight.dtype)
