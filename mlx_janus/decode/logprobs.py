"""Log-probabilities of an answer's tokens, and of the likeliest tokens in their places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import mlx.core as mx


@dataclass(frozen=True)
class AnswerToken:
    """A token of an answer; if they were asked for, with log-probabilities.

    A log-probability is the logarithm of the model's own probability, before bias, penalties,
    temperature and filters. Its base is e.
    """

    id: int
    logprob: float | None = None  # None: not asked for
    top: tuple[tuple[int, float], ...] = ()
    """The ids and log-probabilities of the likeliest tokens in its place, the likeliest first."""


class TokenScores:
    """The log-probabilities of chosen tokens, which are computed while the program goes on.

    Args:
        logprobs: (n, V) log-probabilities of all tokens at n positions.
        tokens: (n,) ids of the chosen tokens.
        top: number of the likeliest tokens to report for each position; at most V are.
    """

    def __init__(self, logprobs: mx.array, tokens: mx.array, top: int):
        self._tokens = tokens
        self._chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]  # (n,)
        # (n, top): ids of the likeliest tokens, in no order
        self._top_ids = _likeliest(logprobs, min(top, logprobs.shape[-1]))
        self._top = mx.take_along_axis(logprobs, self._top_ids, axis=-1)  # (n, top)
        mx.async_eval(self._chosen, self._top_ids, self._top)

    def read(self) -> list[AnswerToken]:
        """Wait for the numbers, and return the n tokens with them."""
        tokens = cast(list[int], self._tokens.tolist())
        chosen = cast(list[float], self._chosen.tolist())
        top_ids = cast(list[list[int]], self._top_ids.tolist())
        top = cast(list[list[float]], self._top.tolist())
        scored = []
        for row, token in enumerate(tokens):
            pairs = zip(top_ids[row], top[row], strict=True)
            # Of tokens that are equally likely, the lowest id comes first.
            likeliest_first = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
            scored.append(AnswerToken(token, chosen[row], tuple(likeliest_first)))
        return scored


def _likeliest(logprobs: mx.array, top: int) -> mx.array:
    """Return the ids of the ``top`` likeliest tokens of each row, in no order: (n, top)."""
    if top == 0:
        return mx.zeros((len(logprobs), 0), mx.uint32)
    return mx.argpartition(-logprobs, kth=top - 1, axis=-1)[:, :top]
