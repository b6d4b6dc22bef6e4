"""Drawing: hidden states to image tokens, two rows a picture (reference: ``generation_inference.py``).

Row one follows the prompt; row two the same ids with everything between the first and the last replaced by pads, which
are attended to like any token. Both take the one token that is chosen. There is no stop token, so a token never has to
leave the device: it feeds the next step while the caller looks at the one before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..models.backbone import cache_arrays, repeat_cache
from ..models.janus import JanusModel
from .sampling import check_number, choose, guide, position_keys

PREFILL_STEP = 512  # positions of a long prompt that are read at once: attention's scores grow with their square


@dataclass(frozen=True)
class DrawOptions:
    """How tokens are chosen; ``cfg_weight`` 1 computes no unconditional row, ``temperature`` 0 takes the likeliest."""

    cfg_weight: float = 5.0
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_number("cfg_weight", self.cfg_weight, 0, 1000)
        check_number("temperature", self.temperature, 0, 1000)
        check_number("top_p", self.top_p, 0, 1, above_low=True)

    @property
    def rows(self) -> int:
        """Rows of the batch for one picture."""
        return 1 if self.cfg_weight == 1 else 2


def draw_tokens(
    model: JanusModel,
    conditional: Sequence[int],
    unconditional: Sequence[int],
    seeds: Sequence[int],
    options: DrawOptions,
) -> Iterator[mx.array]:
    """Image tokens, position by position in raster order, one picture a seed.

    Args:
        model: the weights.
        conditional: ids of the prompt, ending with begin-of-image.
        unconditional: as many ids, the prompt padded out.
        seeds: one a picture; pictures differ in their noise alone.
        options: guidance and choice.

    Yields:
        (n,) tokens of one position, evaluated; the next position is under way meanwhile. Closing stops.
    """
    n, positions = len(seeds), model.config.image_tokens
    prompts = [list(conditional), list(unconditional)][: options.rows]
    keys = position_keys(seeds, positions)

    cache = model.make_cache()
    embeddings = model.embed_text(mx.array(prompts))
    for start in range(0, embeddings.shape[1], PREFILL_STEP):  # the only prefill, for any n
        hidden = model.hidden_states(embeddings[:, start : start + PREFILL_STEP], cache)[:, -1:]
        mx.eval(hidden, cache_arrays(cache))
    if n > 1:
        cache, hidden = repeat_cache(cache, n), mx.repeat(hidden, n, axis=0)

    def step(hidden: mx.array, position: int) -> mx.array:
        logits = model.image_logits(hidden[:, -1])
        if options.rows == 2:
            logits = guide(logits, options.cfg_weight)
        return choose(logits, keys[:, position], options.temperature, options.top_p)

    tokens = step(hidden, 0)
    mx.async_eval(tokens)
    for position in range(1, positions):
        ids = mx.concatenate([tokens] * options.rows)[:, None]
        following = step(model.hidden_states(model.embed_image_tokens(ids), cache), position)
        mx.async_eval(following)
        mx.eval(tokens)
        yield tokens
        tokens = following
    mx.eval(tokens)
    yield tokens
