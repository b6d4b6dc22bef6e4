"""The results of the pipeline: answers, images, and the items of their streams."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..config import BITS, DTYPES, RECIPES, ROLES
from ..errors import ImageError
from ..limits import MAX_UPSCALE, check_int
from ..processing.saved_images import encode_image, read_metadata, save_image


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token of an answer, and of the likeliest tokens in its place.

    The probability is the model's own: the softmax of its logits, before bias, penalties,
    temperature and filters change them.
    """

    id: int
    text: str  # with U+FFFD for bytes that are no complete character
    utf8: bytes | None  # the token's bytes; None: a control token, or an id without a token
    logprob: float  # natural logarithm, at most 0
    top: tuple[TokenLogprob, ...] = ()  # the likeliest tokens, likeliest first, themselves without


@dataclass(frozen=True)
class TextResult:
    """An answer. Speeds are tokens per second."""

    text: str  # without leading white space, unless it continues an answer
    tokens: tuple[int, ...]  # without the stop token
    finish_reason: str
    """"stop": the model or a stop string ended it; "length": ``max_tokens`` or the context did."""
    prompt_tokens: int  # positions, images included
    prompt_tps: float  # without the cached tokens
    generation_tps: float
    peak_memory: int  # bytes of MLX's arrays at the peak of the call
    cached_tokens: int = 0  # positions of the prompt that were in the prefix cache
    first_token_seconds: float = 0.0  # time to first token, images and prompt included
    logprobs: tuple[TokenLogprob, ...] | None = None  # one for each of ``tokens``; None: not asked


@dataclass(frozen=True)
class TextChunk:
    """A piece of an answer, in complete characters; the last piece has the result."""

    text: str  # may be empty if ``logprobs`` is not
    result: TextResult | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """With ``logprobs=True``, of the tokens after those of the piece before; each is in one piece.

    Characters may be held back, so a token's text may be part of a later piece.
    """


@dataclass(frozen=True, repr=False)
class GeneratedImage:
    """A generated image, with the settings needed to generate it again."""

    image: Image.Image
    tokens: np.ndarray | None  # (image_tokens,) int32, raster order; None: the model uses no tokens
    seed: int
    prompt: str
    metadata: dict[str, str] = field(repr=False)
    passes: int = 0  # passes of the language model after the prompt; a group of images shares them
    steps: int = 0  # generation steps, for example one for each image token

    def __repr__(self) -> str:
        width, height = self.image.size
        return f"<GeneratedImage {self.prompt!r}, seed {self.seed}, {width}x{height}>"

    def _repr_png_(self) -> bytes:
        """Show the image in a notebook."""
        return encode_image(self.image, self.metadata)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save as a PNG, JPEG or WebP that carries ``metadata``.

        An existing file is never replaced: the new file's name gets a number instead.

        Args:
            path: a path that ends in .png, .jpg, .jpeg or .webp; without a suffix it gets .png.
                JPEG and WebP are lossy, at quality 95.

        Returns:
            The path of the new file.

        Raises:
            OutputError: the file cannot be written, or the path has another suffix.
        """
        return save_image(self.image, path, self.metadata)

    def upscaled(self, factor: int) -> GeneratedImage:
        """Return the image ``factor`` times as wide and high, by a Lanczos filter.

        The metadata record the factor.

        Args:
            factor: 1 to 4; 1 returns the same object.

        Raises:
            OptionError: the factor is not an integer from 1 to 4.
        """
        factor = check_int("factor", factor, 1, MAX_UPSCALE)
        if factor == 1:
            return self
        width, height = self.image.size
        larger = self.image.resize((width * factor, height * factor), Image.Resampling.LANCZOS)
        metadata = self.metadata | {"upscale": f"{factor} (Lanczos)"}
        return replace(self, image=larger, metadata=metadata)


@dataclass(frozen=True)
class ImageStep:
    """A step of image generation, for example one token of each image, or a finished image.

    A request that does not fit in memory is split into groups of images, generated one after the
    other; ``index`` and ``total`` count the steps of all groups.
    """

    index: int  # steps done, 1 to total
    total: int
    images: tuple[GeneratedImage, ...]  # finished at this step, in seed order
    _preview: Callable[[], list[Image.Image]] = field(repr=False)

    def preview(self) -> list[Image.Image]:
        """Return the images finished so far, and those in progress with their missing parts grey.

        Each image in progress is decoded now. In low-memory mode this loads the image decoder's
        weights, and the next step loads the language model's again.
        """
        return self._preview()


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the settings of a saved image from its metadata, to generate it again.

    Returns:
        prompt, seed, cfg_weight, temperature, top_p, model (its name) and upscale (1: not
        enlarged); also dtype of the weights (None in files of early releases), bits or recipe if
        the weights were quantized, and roles if others than the model's own were requested (None
        otherwise).

    Raises:
        ImageError: the file is not an image, or its settings are missing or not valid.
    """
    chunks = read_metadata(path)
    if not chunks.get("version", "").startswith("mlx_janus "):
        raise ImageError(
            f"{path} carries no settings of a drawing: give a file as mlx_janus wrote it"
        )
    # The group is the factor. A file without this chunk was not upscaled: the pattern matches "",
    # and the group is None.
    upscale = re.fullmatch(rf"(?:([2-{MAX_UPSCALE}]) \(Lanczos\))?", chunks.get("upscale", ""))
    dtype = chunks.get("dtype")
    bits = chunks.get("bits")
    recipe = chunks.get("recipe")
    roles = chunks.get("roles")
    try:
        supported = (
            dtype in (None, *DTYPES)
            and bits in (None, *map(str, BITS))
            and recipe in (None, *RECIPES)
            and roles in (None, *ROLES)
        )
        if upscale is None or not supported or (bits and recipe):  # never both
            raise ValueError
        return {
            "prompt": chunks["prompt"],
            "seed": int(chunks["seed"]),
            "cfg_weight": float(chunks["cfg_weight"]),
            "temperature": float(chunks["temperature"]),
            "top_p": float(chunks["top_p"]),
            "model": chunks["model"],
            "upscale": int(upscale[1] or 1),
            "dtype": dtype,
            "bits": None if bits is None else int(bits),
            "recipe": recipe,
            "roles": roles,
        }
    except (KeyError, ValueError):
        raise ImageError(
            f"{path} carries settings that were changed or cut: give a file as mlx_janus wrote it"
        ) from None
