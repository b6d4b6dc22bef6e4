"""The results of the pipeline: answers, images, and the items of their streams."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image

from ..config import BITS, DTYPES, RECIPES, ROLES
from ..errors import ImageError, OptionError
from ..limits import MAX_REFLECT, MAX_UPSCALE, check_int
from ..processing.saved_images import encode_image, read_metadata, save_image
from .input_records import lacks_inputs, read_edit

Stage: TypeAlias = Literal["plan", "draw", "judge"]
"""Stages of an image: the model writes a plan, draws, and judges the drawing."""


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
    top: tuple[TokenLogprob, ...] = ()  # the likeliest tokens, likeliest first; their ``top`` is ()


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
    stop: str | None = None  # the stop string that ended the answer; None: none did


@dataclass(frozen=True)
class TextChunk:
    """A piece of an answer, in complete characters; the last piece has the result."""

    text: str  # may be empty if ``logprobs`` is not
    result: TextResult | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """With ``logprobs=True``, one for each token that was generated since the previous piece.

    Characters may be held back, so a token's text may be part of a later piece.
    """


@dataclass(frozen=True)
class DrawingRound:
    """A drawing of an image that the model judges, and draws again if it does not match."""

    image: Image.Image
    matches: bool | None  # the model's verdict; None: the last drawing is not judged
    words: str = ""  # the judgement, which begins with Yes or No; "": not judged
    probability: float | None = None  # of Yes against No; None: not judged


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
    rounds: tuple[DrawingRound, ...] = ()  # with ``reflect``, all drawings; the last is ``image``
    # With ``best_of``:
    score: float | None = None  # log-likelihood of the prompt as the model's words for the image
    rank: int | None = None  # 1: the best of its prompt's images
    latents: np.ndarray | None = None  # of a flow: (side / 8, side / 8, 4) float32; else None

    @property
    def plan(self) -> str | None:
        """The plan by which the image was drawn, as the model wrote it; None: there was none."""
        return self.metadata.get("plan")

    def __repr__(self) -> str:
        width, height = self.image.size
        return f"<GeneratedImage {self.prompt!r}, seed {self.seed}, {width}x{height}>"

    def _repr_png_(self) -> bytes:
        """Return the image as a PNG with its metadata, for a notebook to show."""
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


def rounds_metadata(rounds: Sequence[DrawingRound], reflect: int) -> dict[str, str]:
    """Return the entries of an image's metadata about its rounds.

    Args:
        rounds: the rounds, whose judgements become a JSON list.
        reflect: how often the image was to be judged and drawn again, at most.
    """
    judgements = [{"matches": one.matches, "words": one.words} for one in rounds]
    return {"reflect": str(reflect), "rounds": json.dumps(judgements)}


@dataclass(frozen=True)
class ImageStep:
    """A step of image generation, for example one token of each image, or a finished image.

    A request that does not fit in memory is split into groups of images, generated one after the
    other; ``index`` and ``total`` count the steps of all groups.
    """

    index: int  # steps done, 0 to total; it stays while a plan or a judgement is written
    total: int  # it never falls; it grows when an image is drawn again
    images: tuple[GeneratedImage, ...]  # finished at this step, in seed order
    _preview: Callable[[], list[Image.Image]] = field(repr=False)
    stage: Stage = "draw"
    text: str = ""  # the next piece of a plan or a judgement

    def preview(self) -> list[Image.Image]:
        """Return the images finished so far, and those in progress as far as they are made.

        Missing image tokens are grey; a rectified flow gives a blurred image. Each image in
        progress is decoded now. In low-memory mode this loads the image decoder's weights, and the
        next step loads the language model's again.
        """
        return self._preview()


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the settings of a saved image from its metadata, to generate it again.

    Returns:
        prompt, seed, cfg_weight, temperature, top_p, steps, model (its name) and upscale (1: not
        enlarged). For a rectified flow, temperature and top_p are None; for image tokens, steps is
        None. Also plan (None: none) and reflect (0: none); dtype of the weights (None in files of
        early releases), bits or recipe if the weights were quantized, and roles if others than the
        model's own were requested (None otherwise). Also the entries of ``input_records.read_edit``
        about a changed image.

    Raises:
        ImageError: the file is not an image, its settings are missing or not valid, or the image
            began from given latents or other images, which the file does not name.
    """
    chunks = _drawing_chunks(path)
    # Group 1 is the factor. A file without this chunk was not upscaled: then the pattern matches
    # "", and group 1 is None.
    upscale = re.fullmatch(rf"(?:([2-{MAX_UPSCALE}]) \(Lanczos\))?", chunks.get("upscale", ""))
    try:
        if upscale is None:
            raise ValueError
        return {
            "prompt": chunks["prompt"],
            "seed": int(chunks["seed"]),
            "cfg_weight": float(chunks["cfg_weight"]),
            **_sampling_settings(chunks),
            "model": chunks["model"],
            "upscale": int(upscale[1] or 1),
            "plan": chunks.get("plan"),
            "reflect": check_int("reflect", int(chunks.get("reflect", 0)), 0, MAX_REFLECT),
            **_read_load_settings(chunks),
            **read_edit(chunks),
        }
    except (KeyError, TypeError, ValueError, OptionError):
        raise ImageError(
            f"{path} carries settings that were changed or cut: give a file as mlx_janus wrote it"
        ) from None


def _drawing_chunks(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata of a saved image that can be generated again.

    Raises:
        ImageError: the file is not an image, has no settings, or began from given latents or from
            images that are not recorded.
    """
    chunks = read_metadata(path)
    if not chunks.get("version", "").startswith("mlx_janus "):
        raise ImageError(
            f"{path} carries no settings of a drawing: give a file as mlx_janus wrote it"
        )
    if "latents" in chunks:
        raise ImageError(
            f"{path} was drawn from given latents, which it does not hold: draw it by the library, "
            "with the same latents"
        )
    if lacks_inputs(chunks):
        raise ImageError(
            f"{path} was made from other images, which its settings do not name: change those "
            "images again, with its prompt and seed"
        )
    return chunks


def _sampling_settings(chunks: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of drawing that differ between image tokens and a rectified flow.

    Raises:
        KeyError, ValueError: a setting is missing or not a number.
    """
    if "steps" in chunks:
        return {"temperature": None, "top_p": None, "steps": int(chunks["steps"])}
    temperature = float(chunks["temperature"])
    return {"temperature": temperature, "top_p": float(chunks["top_p"]), "steps": None}


def _read_load_settings(chunks: Mapping[str, str]) -> dict[str, Any]:
    """Return dtype, bits, recipe and roles of an image's metadata, each None if it is missing.

    Raises:
        ValueError: a value is none of the supported ones, or there are both bits and a recipe.
    """
    dtype = chunks.get("dtype")
    bits = chunks.get("bits")
    recipe = chunks.get("recipe")
    roles = chunks.get("roles")
    supported = (
        dtype in (None, *DTYPES)
        and bits in (None, *map(str, BITS))
        and recipe in (None, *RECIPES)
        and roles in (None, *ROLES)
    )
    if not supported or (bits and recipe):
        raise ValueError
    return {
        "dtype": dtype,
        "bits": None if bits is None else int(bits),
        "recipe": recipe,
        "roles": roles,
    }
