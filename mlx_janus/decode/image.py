"""The decode loop for images, two rows an image (reference: ``generation_inference.py``).

The conditional row follows the prompt. The unconditional row has pads in place of everything
between the prompt's first and last token. It attends to the pads like any token. Both rows read the
one token that is chosen. There is no stop token, so a token never has to leave the device: it feeds
the next step while the caller looks at the previous one.
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

Attention's arrays grow, and the cache would keep the smaller ones.
"""
PREFILL_STEP = 512
"""Positions of a prompt read at once: attention's scores grow with their square."""


@dataclass(frozen=True)
class DrawOptions:
    """Guidance and sampling of image tokens.

    Without guidance, at ``cfg_weight`` 1, no unconditional row is computed. Temperature 0 takes the
    most likely token.

    Raises:
        OptionError: an option is out of its range, or ``window`` is above 1 although ``exact``.
    """

    cfg_weight: float = 5.0
    temperature: float = 1.0
    top_p: float = 1.0
    exact: bool = False  # generate each image separately, token by token
    window: int | None = None  # positions read in one pass; None: the fastest by a timing

    def __post_init__(self) -> None:
        if self.window is not None:
            set_checked(self, window=check_int("window", self.window, 1, MAX_WINDOW))
            if self.exact and self.window > 1:
                raise OptionError("exact draws token by token: leave window out")
        set_checked(
            self,
            cfg_weight=check_number("cfg_weight", self.cfg_weight, 0, MAX_CFG_WEIGHT),
            temperature=check_number("temperature", self.temperature, 0, MAX_TEMPERATURE),
            top_p=check_number("top_p", self.top_p, 0, 1, above_low=True),
        )

    @property
    def rows(self) -> int:
        """Rows of the batch for one image."""
        return 1 if self.cfg_weight == 1 else 2

    def metadata(self) -> dict[str, str]:
        """Return the options as an image file records them, with all the digits that were typed."""
        names = ("cfg_weight", "temperature", "top_p")
        return {name: f"{getattr(self, name):.15g}" for name in names}


def draw_tokens(
    model: JanusModel,
    prompts: Sequence[Sequence[int]],
    unconditional: Sequence[int],
    images: Sequence[tuple[int, int]],
    options: DrawOptions,
    window: int = 1,
) -> Iterator[mx.array]:
    """Generate the image tokens of several images at once, in raster order.

    With a ``window`` above 1, a pass reads draft tokens of the positions ahead and chooses a token
    for each of them. The noise of a position is fixed, so its token depends only on the tokens
    before it. Tokens chosen after correct drafts equal the plain loop's and are accepted, the rest
    become the next draft: Jacobi decoding, as in arXiv 2410.01699, but of a deterministic map.
    Wider passes round differently, which matters where two logits are almost equal.

    Args:
        model: the weights.
        prompts: ids of each prompt, ending with begin-of-image; all of one length.
        unconditional: ids of the unconditional rows, of the same length.
        images: for each image the index of its prompt, and its seed.
        options: guidance and sampling.
        window: positions read in one pass; 1 for the plain loop.

    Yields:
        (n, k) accepted tokens of a pass, evaluated. At window 1, the next pass is already running.
    """
    own = token_config(model.config)  # the model's number of image tokens and its grid
    pick = _picker(options, compiled=mx.default_device().type == mx.DeviceType.gpu)
    keys = position_keys([seed for _, seed in images], own.tokens)
    owners = [prompt for prompt, _ in images]
    cache, hidden = _read_prompts(model, prompts, unconditional, owners, options)

    def choices(hidden: mx.array, position: int) -> mx.array:
        """Choose the W tokens from ``position`` on: (rows * n, W, hidden) -> (n, W)."""
        ahead = keys[:, position : position + hidden.shape[1]]
        return pick(model.image_logits(hidden), ahead)

    def choose_next(tokens: mx.array, position: int) -> mx.array:
        """Read (n, W) tokens, and choose the token after each: (n, W), from ``position`` on."""
        every_row = mx.concatenate([tokens] * options.rows)
        embeddings = model.embed_image_tokens(every_row)
        return choices(model.hidden_states(embeddings, cache), position)

    first = choices(hidden, 0)
    with weights_wired():
        if window > 1:
            yield from _in_windows(first, own.tokens, window, own.grid, cache, choose_next)
        else:
            yield from _one_by_one(first, own.tokens, choose_next)


def _read_prompts(
    model: JanusModel,
    prompts: Sequence[Sequence[int]],
    unconditional: Sequence[int],
    owners: Sequence[int],
    options: DrawOptions,
) -> tuple[Cache, mx.array]:
    """Read each prompt once, even if several images share it.

    Args:
        model: the weights.
        prompts: ids of each prompt, all of one length.
        unconditional: ids of the unconditional rows, of the same length.
        owners: the index of each image's prompt.
        options: tell whether there are unconditional rows.

    Returns:
        A cache with ``options.rows`` rows for each image, the conditional ones first, and the
        hidden states of the prompts' last position, (rows, 1, hidden), in the same order.
    """
    read_once = [list(ids) for ids in prompts]
    rows = list(owners)
    if options.rows == 2:
        # The unconditional prompt is appended below, so its index is the present length.
        rows += [len(read_once)] * len(owners)
        read_once.append(list(unconditional))
    cache = model.make_cache(len(unconditional) + token_config(model.config).tokens)
    embeddings = model.embed_text(mx.array(read_once))
    hidden = prefill_all(model, embeddings, cache, PREFILL_STEP)[:, None]
    if rows != list(range(len(read_once))):  # else each prompt has one image: nothing to copy
        cache = take_rows(cache, rows)
        hidden = hidden[mx.array(rows)]
    return cache, hidden


def _one_by_one(
    tokens: mx.array, positions: int, choose_next: Callable[[mx.array, int], mx.array]
) -> Iterator[mx.array]:
    """Run the plain loop, from (n, 1) tokens of position 0.

    Each pass is queued before the tokens of the previous one are read.
    """
    mx.async_eval(tokens)
    for position in range(1, positions):
        following = choose_next(tokens, position)
        mx.async_eval(following)
        mx.eval(tokens)
        yield tokens
        tokens = following
        if position % _CLEAR_EVERY == 0:
            mx.clear_cache()
    mx.eval(tokens)
    yield tokens


@lru_cache(16)
def _picker(options: DrawOptions, *, compiled: bool) -> Callable[[mx.array, mx.array], mx.array]:
    """Return guidance and sampling as one function.

    The function maps (rows * n, W, codes) logits and (n, W, 2) keys to (n, W) tokens. Compiling it
    makes a GPU launch fewer kernels. On a CPU, compiling would run a C++ compiler for seconds.
    """

    def pick(logits: mx.array, keys: mx.array) -> mx.array:
        if options.rows == 2:  # the conditional rows of all images, then the unconditional ones
            half = len(logits) // 2
            logits = guide(logits[:half], logits[half:], options.cfg_weight)
        return choose(logits, keys, options.temperature, options.top_p)

    return mx.compile(pick) if compiled else pick


def _in_windows(
    first: mx.array,
    positions: int,
    window: int,
    columns: int,
    cache: Cache,
    choose_next: Callable[[mx.array, int], mx.array],
) -> Iterator[mx.array]:
    """Run the loop with draft tokens. A batch advances by the tokens accepted in all its images.

    Args:
        first: (n, 1) tokens of position 0.
        positions: tokens of an image.
        window: positions read in one pass.
        columns: tokens in a row of an image; the first draft of a token is the one above it.
        cache: holds the prompt.
        choose_next: reads (n, W) tokens into the cache, the first of them accepted, and chooses the
            token after each.
    """
    mx.eval(first)
    yield first
    tokens = np.zeros((len(first), positions), np.int32)  # accepted up to ``done``, then draft
    tokens[:, 0] = np.array(first)[:, 0]
    done = 1
    drafted = 1  # positions with an accepted or a draft token
    while done < positions:
        end = min(done + window, positions)  # this pass chooses tokens from done to end - 1
        for position in range(drafted, end - 1):  # positions that no earlier pass chose for
            back = columns if position >= columns else 1
            tokens[:, position] = tokens[:, position - back]
        read = mx.array(tokens[:, done - 1 : end - 1])
        found = np.array(choose_next(read, done))
        accepted = _count_accepted(found, tokens[:, done : end - 1])
        tokens[:, done:end] = found  # accepted tokens, then the next draft
        trim_cache(cache, end - done - accepted)  # the draft tokens from the first wrong one on
        yield mx.array(found[:, :accepted])
        done += accepted
        drafted = end


def _count_accepted(chosen: np.ndarray, draft: np.ndarray) -> int:
    """Count the positions whose chosen tokens follow only correct drafts, in every image.

    Args:
        chosen: (n, W) tokens that the pass chose.
        draft: (n, W - 1) tokens that the pass read, at the same positions except the last.
    """
    correct = (chosen[:, :-1] == draft).all(axis=0)
    if correct.all():
        return chosen.shape[1]
    # argmin finds the first wrong draft. The token chosen in its place follows only correct ones.
    return int(correct.argmin()) + 1
