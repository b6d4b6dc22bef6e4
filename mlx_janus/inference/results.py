"""What the pipeline gives: answers, pictures, and the steps towards them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..config import BITS, DTYPES, RECIPES
from ..errors import ImageError, OptionError
from ..limits import MAX_UPSCALE
from ..processing.png import png_bytes, read_text_chunks, save_png


@dataclass(frozen=True)
class TextResult:
    """An answer. Speeds are tokens per second."""

    text: str  # without leading white space
    tokens: tuple[int, ...]  # without the stop token
    finish_reason: (
        str  # "stop": the model's end or a stop string; "length": max_tokens or the context
    )
    prompt_tokens: int  # positions, pictures included
    prompt_tps: float  # of those that were read
    generation_tps: float
    peak_memory: int  # bytes that MLX held at most during the call
    cached_tokens: int = 0  # positions of the prompt that an earlier turn had read
    first_token_seconds: float = (
        0.0  # until the first token was there, pictures and prompt included
    )


@dataclass(frozen=True)
class TextChunk:
    """A piece of an answer, whole characters only; the last one carries the result."""

    text: str
    result: TextResult | None = None


@dataclass(frozen=True, repr=False)
class GeneratedImage:
    """A generated image and the facts with which it can be generated again."""

    image: Image.Image
    tokens: np.ndarray | None  # (image_tokens,) int32, raster order; None: not made of tokens
    seed: int
    prompt: str
    metadata: dict[str, str] = field(repr=False)
    passes: int = 0  # of the language model after the prompt; images of a group share them
    steps: int = 0  # that made it: its image tokens, say

    def __repr__(self) -> str:
        width, height = self.image.size
        return f"<GeneratedImage {self.prompt!r}, seed {self.seed}, {width}x{height}>"

    def _repr_png_(self) -> bytes:
        """Show the image in a notebook."""
        return png_bytes(self.image, self.metadata)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a PNG with ``metadata`` as text chunks; an existing file is kept and a numbered sibling written.

        Returns:
            The path that was written.

        Raises:
            OutputError: the path cannot be written, or does not end in .png.
        """
        return save_png(self.image, Path(path), self.metadata)

    def upscaled(self, factor: int) -> GeneratedImage:
        """The picture ``factor`` times as wide and high, by Lanczos' filter, which the metadata say; 1: as it is.

        Raises:
            OptionError: a factor other than 1 to 4.
        """
        if factor not in range(1, MAX_UPSCALE + 1):
            raise OptionError(
                f"factor must be a whole number from 1 to {MAX_UPSCALE}, got {factor}"
            )
        if factor == 1:
            return self
        width, height = self.image.size
        larger = self.image.resize((width * factor, height * factor), Image.Resampling.LANCZOS)
        return replace(
            self, image=larger, metadata=self.metadata | {"upscale": f"{factor} (Lanczos)"}
        )


@dataclass(frozen=True)
class ImageStep:
    """One step of images under way (a token of each, say), or an image finished.

    A call that does not fit in memory at once is split into groups; ``index`` and ``total`` count through all of them.
    """

    index: int  # steps done so far, 1 to total
    total: int
    images: tuple[GeneratedImage, ...]  # finished with this step, in seed order
    _preview: Callable[[], list[Image.Image]] = field(repr=False)

    def preview(self) -> list[Image.Image]:
        """Decode the images started so far, in seed order; parts that are not drawn yet are grey.

        Costs a decoding of each image; in low memory also reading the codec, then the language model again.
        """
        return self._preview()


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What it takes to draw a saved picture again, from its text chunks.

    Returns:
        prompt, seed, cfg_weight, temperature, top_p, model (its name) and upscale (1: none); of the weights dtype
        (None in a file of a release that did not say), bits and recipe (None: not quantized so).

    Raises:
        ImageError: no picture, or one that does not carry all of these.
    """
    chunks = read_text_chunks(path)
    if not chunks.get("version", "").startswith("mlx_janus "):
        raise ImageError(
            f"{path} carries no settings of a drawing: give a PNG as mlx_janus wrote it"
        )
    upscale = re.fullmatch(rf"(?:([2-{MAX_UPSCALE}]) \(Lanczos\))?", chunks.get("upscale", ""))
    dtype, bits, recipe = (chunks.get(name) for name in ("dtype", "bits", "recipe"))
    try:
        known = (
            dtype in (None, *DTYPES)
            and bits in (None, *map(str, BITS))
            and recipe in (None, *RECIPES)
        )
        if upscale is None or not known or (bits and recipe):
            raise ValueError
        return {
            "prompt": chunks["prompt"],
            "seed": int(chunks["seed"]),
            **{name: float(chunks[name]) for name in ("cfg_weight", "temperature", "top_p")},
            "model": chunks["model"],
            "upscale": int(upscale[1] or 1),
            "dtype": dtype,
            "bits": None if bits is None else int(bits),
            "recipe": recipe,
        }
    except (KeyError, ValueError):
        raise ImageError(
            f"{path} carries settings that were changed or cut: give a PNG as mlx_janus wrote it"
        ) from None
