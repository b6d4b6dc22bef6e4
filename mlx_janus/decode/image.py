"""The decode loop for images, two or three rows an image.

The conditional row follows the prompt. The unconditional row has pads in place of everything
between the prompt's first and last token, and attends to these pads as to any token. To change
images, there are two conditional rows: one with the images' tokens, and one without. All rows read
the same chosen tokens. There is no stop token, so the next step reads a token on the device before
the caller does.

Sources: ``generation_inference.py`` of Janus; the README of ShareGPT-4o-Image for Janus-4o.
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

    def guided(self, rows: Sequence[mx.array]) -> mx.array:
        """Apply guidance: the logits of each row, all (n, W, V) -> (n, W, V)."""
        conditional, *unconditional = rows
        if not unconditional:
            return conditional
        return guide(conditional, unconditional[0], self.cfg_weight)

    def metadata(self) -> dict[str, str]:
        """Return the guidance and sampling options as text, for an image file's metadata."""
        names = ("cfg_weight", "temperature", "top_p")
        return {name: f"{getattr(self, name):.15g}" for name in names}  # at most 15 digits


@dataclass(frozen=True)
class EditOptions(DrawOptions):
    """Options of changing images, with a second weight of guidance.

    The conditional logits are ``(full + w2 * part) / (1 + w2)``: ``full`` are those of the row with
    the images' tokens, and ``part`` those of the row without. So the result is freer from the
    images the higher ``w2`` is.
    """

    cfg_weight2: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        weight = check_number("cfg_weight2", self.cfg_weight2, 0, MAX_CFG_WEIGHT)
        set_checked(self, cfg_weight2=weight)

    @property
    def rows(self) -> int:
        """Rows of the batch for one image: full, part if ``cfg_weight2`` is not 0, unconditional.

        There is no unconditional row at ``cfg_weight`` 1.
        """
        return super().rows + (self.cfg_weight2 != 0)

    def guided(self, rows: Sequence[mx.array]) -> mx.array:
        """Mix the conditional rows, and apply guidance: all (n, W, V) -> (n, W, V)."""
        if self.cfg_weight2 == 0:
            return super().guided(rows)
        full, part, *unconditional = rows
        conditional = (full + self.cfg_weight2 * part) / (1 + self.cfg_weight2)
        return super().guided([conditional, *unconditional])

    def metadata(self) -> dict[str, str]:
        """Return the guidance and sampling options as text, for an image file's metadata."""
        return super().metadata() | {"cfg_weight2": f"{self.cfg_weight2:.15g}"}


@dataclass(frozen=True)
class TextRow:
    """A row of token ids that the model reads before it generates an image."""

    ids: tuple[int, ...]

    def embed(self, model: JanusModel) -> mx.array:
        """Return the row's embeddings, (L, hidden)."""
        return model.embed_text(mx.array(self.ids))


@dataclass(frozen=True, eq=False)
class EmbeddedRow:
    """A row of embeddings, (L, hidden). It equals itself only."""

    embeddings: mx.array

    def embed(self, _model: JanusModel) -> mx.array:
        """Return the row's embeddings, (L, hidden)."""
        return self.embeddings


Row = TextRow | EmbeddedRow


def text_rows(
    conditional: Sequence[int], unconditional: Sequence[int], options: DrawOptions
) -> list[Row]:
    """Return the rows of a prompt without images, from their token ids."""
    rows: list[Row] = [TextRow(tuple(conditional)), TextRow(tuple(unconditional))]
    return rows[: options.rows]


def draw_tokens(
    model: JanusModel,
    prompts: Sequence[Sequence[Row]],
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
        prompts: the ``options.rows`` rows of each prompt, which end with begin-of-image; all of one
            length.
        images: for each image, the index of its prompt and its seed.
        options: guidance and sampling.
        window: positions read in one pass; 1 reads no draft tokens.

    Yields:
        (n, k) accepted tokens of a pass, evaluated. At window 1, the next pass is already running.
    """
    config = token_config(model.config)
    positions = config.tokens
    sample = make_sampler(options, compiled=mx.default_device().type == mx.DeviceType.gpu)
    keys = position_keys([seed for _, seed in images], positions)
    prompt_indices = [index for index, _ in images]
    cache, hidden = _read_prompts(model, prompts, prompt_indices)

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
    prompts: Sequence[Sequence[Row]],
    prompt_indices: Sequence[int],
) -> tuple[Cache, mx.array]:
    """Read each row once, even if several images or prompts share it.

    Args:
        model: the weights.
        prompts: the rows of each prompt; all have one length, and all prompts as many rows.
        prompt_indices: the index of each image's prompt.

    Returns:
        cache: a KV cache that has the first rows of all images first, then their second rows, and
            so on.
        hidden: the hidden states of each row's last position, (rows, 1, hidden).
    """
    row_count = len(prompts[0])
    rows = [prompts[index][r] for r in range(row_count) for index in prompt_indices]
    distinct = list(dict.fromkeys(rows))
    embeddings = mx.stack([row.embed(model) for row in distinct])
    cache = model.make_cache(embeddings.shape[1] + token_config(model.config).tokens)
    hidden = prefill_all(model, embeddings, cache, PREFILL_STEP)[:, None]
    if rows != distinct:
        indices = [distinct.index(row) for row in rows]
        cache = take_rows(cache, indices)
        hidden = hidden[mx.array(indices)]
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
def make_sampler(
    options: DrawOptions, *, compiled: bool
) -> Callable[[mx.array, mx.array], mx.array]:
    """Return a function that applies guidance and chooses tokens.

    The function maps (rows * n, W, codebook size) logits and (n, W, 2) keys to (n, W) tokens. On a
    GPU, compiling it saves kernel launches. On a CPU, compiling would run a C++ compiler for
    seconds.
    """

    def sample(logits: mx.array, keys: mx.array) -> mx.array:
        # The first rows of all images, then their second rows, and so on.
        logits = options.guided(list(mx.split(logits, options.rows)))
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
