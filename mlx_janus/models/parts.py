"""The record of the networks that an image pathway adds to a Janus, and of their memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlx import nn

from ..config import JanusConfig


@dataclass(frozen=True)
class GenerationParts:
    """The networks of one image pathway.

    The names of parts are attributes of ``JanusModel``, as in the checkpoint.
    """

    build: Callable[[JanusConfig], dict[str, nn.Module]]
    """Returns the parts of a new model by name, in the order of their attributes."""
    step_parts: tuple[str, ...]
    """Parts that a step computes with, in addition to the body of the language model."""
    pixel_paths: Callable[[JanusConfig], tuple[str, ...]]
    """Returns the paths of the modules that turn a finished image into pixels."""
    keeps_type: tuple[str, ...]
    """Parts that conversion does not cast. They are computed in float32, as float16 overflows."""
    sensitive: tuple[str, ...]
    """Parts that are quantized to more bits, because guidance magnifies their errors."""
    image_bytes: Callable[[JanusConfig, int, int, int], int]
    """Returns the bytes of one image while it is generated.

    Arguments: the config, the number of prompt tokens, the number of batch rows for the image, and
    the bytes of a number in the KV cache.
    """
    pixel_bytes: Callable[[JanusConfig], int]
    """Returns the bytes of the activations while one image is turned into pixels."""
