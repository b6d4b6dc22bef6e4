"""Drawing: hidden states to image tokens, two rows a picture (reference: ``generation_inference.py``).

Row one follows the prompt; row two the same ids with everything between the first and the last replaced by pads, which
are attended to like any token. Both take the one token that is chosen. There is no stop token, so a token never has to
leave the device: it feeds the next step while the caller looks at the one before.
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

_CLEAR_EVERY = (
    256  # positions, as in mlx-lm's loop: attention's arrays grow, and outgrown ones would be kept
)
PREFILL_STEP = 512  # positions of a long prompt that are read at once: attention's scores grow with their square


@dataclass(frozen=True)
class DrawOptions:
    """How tokens are chosen; ``cfg_weight`` 1 computes no unconditional row, ``temperature`` 0 takes the likeliest."""

    cfg_weight: float = 5.0
    temperature: float = 1.0
    top_p: float = 1.0
    exact: bool = False  # each image alone, token by token
    window: int | None = None  # positions read in one pass; None: the quickest by a timing

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
        """Rows of the batch for one picture."""
        return 1 if self.cfg_weight == 1 else 2

    def metadata(self) -> dict[str, str]:
        """Return the options as an image file records them, with all the digits that were typed."""
        names = ("cfg_weight", "temperature", "top_p")
        return {name: f"{getattr(self, name):.15g}" for name in names}


def draw_tokens(
    model: JanusModel,
    prompts: Sequence[Sequence[int]],
    unconditional: Sequence[int],
    pictures: Sequence[tuple[int, int]],
    options: DrawOptions,
    window: int = 1,
) -> Iterator[mx.array]:
    """Generate the image tokens of several images at once, in raster order. Closing stops.

    With a ``window`` above 1, a pass reads draft tokens of the positions ahead and chooses a token for each of them.
    The noise of a position is fixed, so its token depends only on the tokens before it. Tokens chosen after correct
    drafts equal those of the plain loop and are accepted; the rest become the next draft (Jacobi decoding, as in arXiv
    2410.01699, but of a deterministic map). Wider passes round differently, which matters where two logits are almost
    equal.

    Args:
        model: the weights.
        prompts: ids of each, ending with begin-of-image; all of one length.
        unconditional: ids of the unconditional rows, of the same length.
        pictures: for each image the index of its prompt, and its seed.
        options: guidance and sampling.
        window: positions read in one pass.

    Yields:
        (n, k) tokens of the next k positions, evaluated: those accepted from one pass. At window 1, k is 1, and the
        next pass is already running.
    """
    positions = token_config(model.config).tokens
    pick = _picker(options, compiled=mx.default_device().type == mx.DeviceType.gpu)
    keys = position_keys([seed for _, seed in pictures], positions)
    cache, hidden = _read_prompts(
        model, prompts, unconditional, [prompt for prompt, _ in pictures], options
    )

    def choices(hidden: mx.array, position: int) -> mx.array:
        """(rows * n, W, hidden) -> (n, W): the tokens of ``position`` and those after it."""
        return pick(model.image_logits(hidden), keys[:, position : position + hidden.shape[1]])

    def following(tokens: mx.array, position: int) -> mx.array:
        """Read (n, W) tokens, and choose what comes after each, from ``position`` on."""
        embedded = model.embed_image_tokens(mx.concatenate([tokens] * options.rows))
        return choices(model.hidden_states(embedded, cache), position)

    first = choices(hidden, 0)
    with weights_wired():
        if window > 1:
            yield from _in_windows(
                first, positions, window, token_config(model.config).grid, cache, following
            )
        else:
            yield from _one_by_one(first, positions, following)


def _read_prompts(
    model: JanusModel,
    prompts: Sequence[Sequence[int]],
    unconditional: Sequence[int],
    owners: Sequence[int],
    options: DrawOptions,
) -> tuple[Cache, mx.array]:
    """Read each prompt once, however many images it has.

    Args:
        model: the weights.
        prompts: ids of each, all of one length.
        unconditional: the ids of the unconditional rows, of the same length.
        owners: the prompt of each image.
        options: whether there are unconditional rows.

    Returns:
        A cache with ``options.rows`` rows for each image, the conditional ones first, and the hidden states of the last
        position, (rows, 1, hidden).
    """
    guided = options.rows == 2
    read_once = [list(ids) for ids in prompts]
    if guided:
        read_once.append(list(unconditional))
    cache = model.make_cache(len(unconditional) + token_config(model.config).tokens)
    hidden = prefill_all(model, model.embed_text(mx.array(read_once)), cache, PREFILL_STEP)[:, None]
    rows = [*owners, *[len(prompts)] * (len(owners) if guided else 0)]
    if rows != list(range(len(read_once))):
        cache = take_rows(cache, rows)
        hidden = hidden[mx.array(rows)]
    return cache, hidden


def _one_by_one(
    tokens: mx.array, positions: int, chosen: Callable[[mx.array, int], mx.array]
) -> Iterator[mx.array]:
    """The plain loop, from (n, 1) tokens of position 0: each pass is under way before the one before is looked at."""
    mx.async_eval(tokens)
    for position in range(1, positions):
        following = chosen(tokens, position)
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
    """Guidance, noise and choice: (rows * n, W, codes) logits and (n, W, 2) keys -> (n, W) tokens.

    Compiled it is a few kernels, which spares a GPU launches. A CPU would call a C++ compiler first, for seconds.
    """

    def pick(logits: mx.array, keys: mx.array) -> mx.array:
        if options.rows == 2:
            logits = guide(
                logits[: len(logits) // 2], logits[len(logits) // 2 :], options.cfg_weight
            )
        return choose(logits, keys, options.temperature, options.top_p)

    return mx.compile(pick) if compiled else pick


def _in_windows(
    first: mx.array,
    positions: int,
    window: int,
    columns: int,
    cache: Cache,
    chosen: Callable[[mx.array, int], mx.array],
) -> Iterator[mx.array]:
    """The loop with guesses. Pictures of a batch advance together, by what is settled for all of them.

    Args:
        first: (n, 1) tokens of position 0.
        positions: of a picture.
        window: positions read in one pass.
        columns: of a picture; a token without a guess is guessed to be as the one above it.
        cache: holds the prompt.
        chosen: reads (n, W) tokens into the cache, the first of them settled, and chooses what follows each.
    """
    mx.eval(first)
    yield first
    tokens = np.zeros(
        (len(first), positions), np.int32
    )  # settled up to ``done``, guesses after that
    tokens[:, 0] = np.array(first)[:, 0]
    done = guessed = 1
    while done < positions:
        end = min(done + window, positions)  # of the positions that this pass chooses for
        for position in range(guessed, end - 1):
            tokens[:, position] = tokens[:, position - (columns if position >= columns else 1)]
        found = np.array(chosen(mx.array(tokens[:, done - 1 : end - 1]), done))
        settled = _settled(found, tokens[:, done : end - 1])
        tokens[:, done:end] = found
        trim_cache(cache, end - done - settled)
        yield mx.array(found[:, :settled])
        done, guessed = done + settled, end


def _settled(chosen: np.ndarray, guesses: np.ndarray) -> int:
    """How many of the (n, W) chosen tokens follow only guesses, (n, W - 1), that came true in every picture."""
    came_true = (chosen[:, :-1] == guesses).all(axis=0)
    return chosen.shape[1] if came_true.all() else int(came_true.argmin()) + 1
