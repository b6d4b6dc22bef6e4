"""The decode loop for images, two rows an image (reference: ``generation_inference.py``).

The conditional row follows the prompt. The unconditional row has pads in place of everything
between the prompt's first and last token, and attends to these pads as to any token. Both rows read
the same chosen tokens. There is no stop token, so the next step reads a token on the device before
the caller does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..errors import OptionError
from ..limits import (
    MAX_CFG_WEIGHT,
    MAX_TEMPERATURE,
    MAX_WINDOW,
    check_int,
    check_number,
    set_checked,
)
from ..memory import weights_wired
from ..models.backbone import Cache, take_rows, trim_cache
from ..models.janus import JanusModel
from ..models.vq_parts import token_config
from .prefill import prefill_all
from .sampling import choose, guide, position_keys

_CLEAR_EVERY = 256
"""Positions between two frees of MLX's buffer cache, as in mlx-lm's loop.

Attention's arrays grow at each position, and the buffer cache would keep the smaller, unused ones.
"""
PREFILL_STEP = 512
"""Positions of a prompt read at once. The memory of attention's scores grows with its square."""


@dataclass(frozen=True)
class DrawOptions:
    """Options of generating images as tokens: guidance, sampling and the width of a pass.

    At ``cfg_weight`` 1 there is no guidance, so no unconditional row is computed. Temperature 0
    takes the most likely token.

    Raises:
        OptionError: an option is out of its range, or ``exact`` has a ``window`` above 1.
    """

    cfg_weight: float = 5.0
    temperature: float = 1.0
    top_p: float = 1.0
    exact: bool = False  # generate each image separately, token by token
    window: int | None = None  # positions read in one pass; None: the fastest, by timing

    def __post_init__(self) -> None:
        if self.window is not None:
            set_checked(self, window=check_int("window", self.window, 1, MAX_WINDOW))
            if self.exact and self.window > 1:
                raise OptionError("exact draws token by token: leave window out")
        set_checked(
            self,
            cfg_weight=check_number("cfg_weight", self.cfg_weight, 0, MAX_CFG_WEIGHT),
            temperature=check_number("temperature", self.temperature, 0, MAX_TEMPERATURE),
            top_p=check_number("top_p", self.top_p, 0, 1, above_low=True),  # 0 is refused
        )

    @property
    def rows(self) -> int:
        """Rows of the batch for one image: 1 without guidance, else 2."""
        return 1 if self.cfg_weight == 1 else 2

    def metadata(self) -> dict[str, str]:
        """Return the guidance and sampling options as text, for an image file's metadata."""
        names = ("cfg_weight", "temperature", "top_p")
        return {name: f"{getattr(self, name):.15g}" for name in names}  # at most 15 digits


def draw_tokens(
    model: JanusModel,
    prompts: Sequence[Sequence[int]],
    unconditional: Sequence[int],
    images: Sequence[tuple[int, int]],
    options: DrawOptions,
    window: int = 1,
) -> Iterator[mx.array]:
    """Generate the tokens of several images at once, in raster order.

    A ``window`` above 1 means Jacobi decoding (arXiv 2410.01699) with fixed noise. A pass reads
    draft tokens of the positions ahead and chooses a token for each of them. Tokens chosen after
    correct drafts are accepted and equal those of window 1, except where rounding decides between
    two almost equal logits. The other tokens become the next drafts.

    Args:
        model: the weights.
        prompts: ids of each prompt, ending with begin-of-image; all of one length.
        unconditional: ids of the unconditional rows, of the same length.
        images: for each image, the index of its prompt and its seed.
        options: guidance and sampling.
        window: positions read in one pass; 1 reads no draft tokens.

    Yields:
        (n, k) accepted tokens of a pass, evaluated. At window 1, the next pass is already running.
    """
    config = token_config(model.config)
    positions = config.tokens
    sample = _make_sampler(options, compiled=mx.default_device().type == mx.DeviceType.gpu)
    keys = position_keys([seed for _, seed in images], positions)
    prompt_indices = [index for index, _ in images]
    cache, hidden = _read_prompts(model, prompts, unconditional, prompt_indices, options)

    def choose_tokens(hidden: mx.array, position: int) -> mx.array:
        """Choose the W tokens from ``position`` on: (rows * n, W, hidden) -> (n, W)."""
        window_keys = keys[:, position : position + hidden.shape[1]]
        return sample(model.image_logits(hidden), window_keys)

    def choose_next(tokens: mx.array, position: int) -> mx.array:
        """Read (n, W) tokens, and choose the token after each: (n, W), from ``position`` on."""
        tokens_of_rows = mx.concatenate([tokens] * options.rows)
        embeddings = model.embed_image_tokens(tokens_of_rows)
        return choose_tokens(model.hidden_states(embeddings, cache), position)

    first = choose_tokens(hidden, 0)
    with weights_wired():
        if window > 1:
            yield from _draw_in_windows(first, positions, window, config.grid, cache, choose_next)
        else:
            yield from _draw_one_by_one(first, positions, choose_next)


def _read_prompts(
    model: JanusModel,
    prompts: Sequence[Sequence[int]],
    unconditional: Sequence[int],
    prompt_indices: Sequence[int],
    options: DrawOptions,
) -> tuple[Cache, mx.array]:
    """Read each prompt once, even if several images share it.

    Args:
        model: the weights.
        prompts: ids of each prompt, all of one length.
        unconditional: ids of the unconditional rows, of the same length.
        prompt_indices: the index of each image's prompt.
        options: ``rows`` is 2 if there are unconditional rows.

    Returns:
        cache: a KV cache with ``options.rows`` rows for each image, the conditional rows of all
            images first.
        hidden: the hidden states of each row's last position, (rows, 1, hidden).
    """
    distinct_prompts = [list(ids) for ids in prompts]
    prompt_of_row = list(prompt_indices)
    if options.rows == 2:
        # The unconditional prompt is appended next, so its index is the present length.
        prompt_of_row += [len(distinct_prompts)] * len(prompt_indices)
        distinct_prompts.append(list(unconditional))
    cache = model.make_cache(len(unconditional) + token_config(model.config).tokens)
    embeddings = model.embed_text(mx.array(distinct_prompts))
    hidden = prefill_all(model, embeddings, cache, PREFILL_STEP)[:, None]
    one_row_per_prompt = prompt_of_row == list(range(len(distinct_prompts)))
    if not one_row_per_prompt:
        cache = take_rows(cache, prompt_of_row)
        hidden = hidden[mx.array(prompt_of_row)]
    return cache, hidden


def _draw_one_by_one(
    tokens: mx.array, positions: int, choose_next: Callable[[mx.array, int], mx.array]
) -> Iterator[mx.array]:
    """Yield the (n, 1) tokens of each position.

    Each pass is queued before the tokens of the previous one are evaluated.

    Args:
        tokens: (n, 1) tokens of position 0.
        positions: number of tokens of an image.
        choose_next: reads (n, 1) tokens into the cache, and chooses the tokens at the position that
            is its second argument.
    """
    mx.async_eval(tokens)
    for position in range(1, positions):
        next_tokens = choose_next(tokens, position)
        mx.async_eval(next_tokens)
        mx.eval(tokens)
        yield tokens
        tokens = next_tokens
        if position % _CLEAR_EVERY == 0:
            mx.clear_cache()
    mx.eval(tokens)
    yield tokens


@lru_cache(16)
def _make_sampler(
    options: DrawOptions, *, compiled: bool
) -> Callable[[mx.array, mx.array], mx.array]:
    """Return a function that applies guidance and chooses tokens.

    The function maps (rows * n, W, codebook size) logits and (n, W, 2) keys to (n, W) tokens. On a
    GPU, compiling it saves kernel launches. On a CPU, compiling would run a C++ compiler for
    seconds.
    """

    def sample(logits: mx.array, keys: mx.array) -> mx.array:
        if options.rows == 2:  # the conditional rows of all images, then the unconditional ones
            half = len(logits) // 2
            logits = guide(logits[:half], logits[half:], options.cfg_weight)
        return choose(logits, keys, options.temperature, options.top_p)

    return mx.compile(sample) if compiled else sample


def _draw_in_windows(
    first: mx.array,
    positions: int,
    window: int,
    columns: int,
    cache: Cache,
    choose_next: Callable[[mx.array, int], mx.array],
) -> Iterator[mx.array]:
    """Yield the accepted tokens of each pass, (n, k). Passes read draft tokens.

    All images advance together, by the positions that are accepted in every image.

    Args:
        first: (n, 1) tokens of position 0.
        positions: number of tokens of an image.
        window: positions read in one pass.
        columns: tokens in a row of an image.
        cache: the KV cache, which holds the prompt and grows.
        choose_next: reads (n, W) tokens into the cache, and chooses the token after each. Its
            second argument is the position of the first token that it chooses.
    """
    mx.eval(first)
    yield first
    # Each image's accepted tokens, then draft tokens, then zeros that are not read.
    tokens = np.zeros((len(first), positions), np.int32)
    tokens[:, 0] = np.array(first)[:, 0]
    done = 1  # positions with an accepted token
    drafted = 1  # positions with an accepted or a draft token
    while done < positions:
        end = min(done + window, positions)  # this pass chooses tokens from done to end - 1
        for position in range(drafted, end - 1):  # positions without a draft token
            # Copy the token above, or in the first row the token to the left.
            back = columns if position >= columns else 1
            tokens[:, position] = tokens[:, position - back]
        newest_and_drafts = mx.array(tokens[:, done - 1 : end - 1])
        chosen = np.array(choose_next(newest_and_drafts, done))
        accepted = _count_accepted(chosen, tokens[:, done : end - 1])
        tokens[:, done:end] = chosen  # accepted tokens, then the next drafts
        trim_cache(cache, end - done - accepted)  # remove the first wrong draft and those after it
        yield mx.array(chosen[:, :accepted])
        done += accepted
        drafted = end


def _count_accepted(chosen: np.ndarray, draft: np.ndarray) -> int:
    """Count the accepted positions: those that come after only correct drafts in every image.

    The first token was chosen after an accepted token, so the count is at least 1.

    Args:
        chosen: (n, W) tokens that the pass chose.
        draft: (n, W - 1) drafts that the pass read, for the same positions except the last.
    """
    correct = (chosen[:, :-1] == draft).all(axis=0)
    if correct.all():
        return chosen.shape[1]
    first_wrong = int(correct.argmin())  # argmin of booleans: the first False
    return first_wrong + 1  # the token chosen at this position still follows only correct drafts
