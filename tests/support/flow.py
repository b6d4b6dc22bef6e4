"""The tiny JanusFlow of the reference, and what its tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_janus.decode.flow import FlowDrawing
from mlx_janus.weights.convert import ConvertOptions, Source, convert_checkpoint
from mlx_janus.weights.vae_files import VAESource
from tests.support.golden import FIXTURES, golden

NAME = "janusflow"
VAE = FIXTURES / "sdxl-vae"
PROMPT = "A stunning princess from kabul in red, white traditional clothing, blue eyes, brown hair"
OWN_TIME = 3e-5
"""Tolerance of what follows a time embedding of our own: angles near 1000 have few digits."""


def want() -> dict[str, mx.array]:
    return golden(NAME)


def source() -> Source:
    return Source(FIXTURES / NAME, NAME, vae=VAESource(VAE, VAE.name))


def convert_flow(output: Path, **options: Any) -> Path:
    return convert_checkpoint(source(), output, ConvertOptions(**options)).path


def noise() -> np.ndarray:
    """The noise of two images, (2, h, w, 4)."""
    return np.array(want()["flow.noise"]).transpose(0, 2, 3, 1)


def picture(index: int) -> Image.Image:
    return Image.fromarray(np.array(want()[f"image.{index}.rgb"]))


def drawing_at(janus: Any, step: int, steps: int = 4, **choices: Any) -> FlowDrawing:
    """Return the drawing of the reference's two images before one of its steps."""
    ids = janus.pathway.prompt_ids(PROMPT)
    options = janus.pathway.options({"steps": steps, **choices})
    start = mx.array(noise())
    drawing = FlowDrawing(janus.model, [ids[:-1]] * 2, janus.prompts.special.pad, start, options)
    drawing.steps_done = step
    if step:
        drawing.latents = want()[f"flow.step{step}.z"].transpose(0, 2, 3, 1)
    return drawing
