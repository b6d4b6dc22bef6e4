"""The part "tokens": Janus-Tiny generates an image and answers, on the CPU and on this device.

Rounding may decide between two almost equal logits, and all later tokens then differ. So the
tokens that a device chooses are also compared one by one: each step reads the CPU's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from PIL import Image

from ..decode.sampling import guide
from ..models.vq_parts import token_config
from ..pipeline import JanusPipeline
from ..processing.prompts import Prompts
from ..weights.names import TINY
from .findings import Check, Status, failed, on_device
from .reference import Precision, load_at

PART = "tokens"
_PROMPT = "a red circle"
_QUESTION = "What is in this image?"
_AGREEMENT = 0.95  # smallest share of equal tokens; almost equal logits explain the others


@dataclass(frozen=True)
class Generated:
    """The generated tokens of an image and of an answer, and the result of ``forced_choices``."""

    image: list[int]
    answer: list[int]
    choices: list[int]


def check_tokens(device: str) -> Iterator[Check]:
    """Yield checks of an image and an answer on a device, against those on the CPU.

    If the device is the CPU itself, the CPU generates both a second time: the image with a longer
    window, and the answer with prompt lookup. Neither should change a token.
    """
    try:
        expected = generate("cpu")
        found = generate(device, expected.image, window=8 if device == "cpu" else 1)
    except Exception as error:  # a broken installation can fail in any way
        yield failed(PART, "generation", device, "float32", error)
        return
    yield _compare("tokens of an image", device, found.image, expected.image)
    yield _compare("tokens of an answer", device, found.answer, expected.answer)
    agreement = float(np.mean(np.array(found.choices) == np.array(expected.image)))
    status: Status = "ok" if agreement >= _AGREEMENT else "fail"
    text = f"{agreement:.0%} of the choices are the CPU's, bound {_AGREEMENT:.0%}"
    yield Check(PART, "choices after the CPU's tokens", device, "float32", status, text)


def generate(device: str, reference: list[int] | None = None, window: int = 1) -> Generated:
    """Generate an image and an answer of Janus-Tiny in float32, always the likeliest token.

    Args:
        device: "cpu" or "gpu".
        reference: image tokens for ``forced_choices``; None: those generated here.
        window: positions of the image that are read in one pass. If it is above 1, the answer is
            generated with prompt lookup.
    """
    with on_device(device):
        model = load_at(TINY, Precision("float32"))
        tokens = model.config.understanding.tokens
        prompts = Prompts.load(TINY, model.config.prompt, image_tokens=tokens)
        with JanusPipeline(model, prompts, name="janus-tiny") as janus:
            drawn = janus.generate_images(_PROMPT, temperature=0, window=window)[0]
            side = model.config.understanding.image_size
            image = Image.new("RGB", (side, side), "navy")
            lookup = 4 if window > 1 else 0  # draft tokens of prompt lookup
            answer = janus.generate_text(_QUESTION, image, max_tokens=16, lookup=lookup)
            image_tokens = np.array(drawn.tokens).tolist()
            choices = forced_choices(janus, reference or image_tokens)
    return Generated(image_tokens, list(answer.tokens), choices)


def forced_choices(janus: JanusPipeline, tokens: list[int]) -> list[int]:
    """Return the likeliest token at each position of an image whose earlier tokens are given.

    The earlier tokens are those of ``tokens``, so a choice has no effect on later ones.
    """
    model = janus.model
    ids = janus.prompts.drawing(_PROMPT)
    rows = mx.array([ids, janus.prompts.unconditional(ids)])
    image = model.embed_image_tokens(mx.array([tokens[:-1]] * 2))  # the same in both rows
    embeddings = mx.concatenate([model.embed_text(rows), image], axis=1)
    # The prompt's last position gives the first image token.
    hidden = model.hidden_states(embeddings)[:, len(ids) - 1 :]
    logits = model.image_logits(hidden)
    weight = token_config(model.config).cfg_weight
    guided = guide(logits[0], logits[1], weight)
    choices: list[int] = np.array(mx.argmax(guided, axis=-1)).tolist()
    return choices


def _compare(about: str, device: str, found: list[int], expected: list[int]) -> Check:
    """Return the check of generated tokens. The check warns if they differ from the expected."""
    if found == expected:
        text = f"all {len(found)} equal the CPU's"
        return Check(PART, about, device, "float32", "ok", text)
    pairs = zip(found, expected, strict=False)  # one answer may be shorter
    # The number of tokens before the first difference. Without one, the shorter list has ended.
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected)))
    text = f"the first {shared} of {len(expected)} equal the CPU's, then rounding decides"
    return Check(PART, about, device, "float32", "warn", text)
