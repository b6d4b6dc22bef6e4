"""The adaptors and heads that stand between the encoders and the language model.

What is unusual: GELU is the exact, error-function one everywhere in Janus, and the index gap in ``layers`` (0, 2, ...)
keeps the checkpoint's names, where the activations take a place of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx import nn

from ..config import GenHeadConfig, MLPConfig


class MLPProjector(nn.Module):
    """``depth`` linear layers with GELU between them (reference: ``janus/models/projector.py``, ``mlp_gelu``)."""

    def __init__(self, config: MLPConfig):
        super().__init__()
        self.layers = [nn.Linear(config.input_dim, config.output_dim)]
        for _ in range(config.depth - 1):
            self.layers += [nn.GELU(), nn.Linear(config.output_dim, config.output_dim)]

    def __call__(self, x: mx.array) -> mx.array:
        """(..., input_dim) -> (..., output_dim)."""
        for layer in self.layers:
            x = layer(x)
        return x


class GenHead(nn.Module):
    """Hidden state to logits over image tokens (reference: ``vision_head`` in ``janus/models/modeling_vlm.py``)."""

    def __init__(self, config: GenHeadConfig):
        super().__init__()
        self.output_mlp_projector = nn.Linear(config.input_dim, config.hidden_dim)
        self.vision_head = nn.Linear(config.hidden_dim, config.output_dim)

    def __call__(self, x: mx.array) -> mx.array:
        """(..., input_dim) -> (..., output_dim)."""
        return self.vision_head(nn.gelu(self.output_mlp_projector(x)))


ADAPTORS: dict[str, Callable[[Any], nn.Module]] = {"mlp_gelu": MLPProjector}
"""Networks between an encoder or an embedding and the language model, by the kind in the config."""
