"""The record of the networks that an image pathway adds to a Janus, and of what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlx import nn

from ..config import JanusConfig


@dataclass(frozen=True)
class GenerationParts:
    """The networks of one image pathway. Names of parts are attributes of ``JanusModel``, as in the checkpoint."""

    build: Callable[[JanusConfig], dict[str, nn.Module]]
    """Makes the parts of a model, by name, in the order of their attributes."""
    step: tuple[str, ...]
    """Parts that a step computes with, besides the body of the language model."""
    pixels: Callable[[JanusConfig], tuple[str, ...]]
    """Paths of the modules that turn a finished image into pixels."""
    keeps_type: tuple[str, ...]
    """Parts that are stored as they were and compute in float32: half precision overflows in them."""
    careful: tuple[str, ...]
    """Parts that are quantized to at least 8 bits: guidance magnifies their errors."""
    image_bytes: Callable[[JanusConfig, int, int, int], int]
    """Bytes of one image under way, from the config, its prompt's tokens, the rows of a batch that it takes, and the
    bytes of a float."""
    pixel_bytes: Callable[[JanusConfig], int]
    """Bytes of activations while one image is turned into pixels."""
