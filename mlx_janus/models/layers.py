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
