"""Bias and penalties: changes of an answer's logits before temperature, filters and noise.

The functions are mlx-lm's. Here they count the tokens that OpenAI and vLLM count: all of the answer
and, for the repetition penalty, of the prompt.
"""

from __future__ import annotations

from .. import open_files  # noqa: F401  before mlx_lm

# isort: split
from collections.abc import Mapping, Sequence

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors

from ..limits import MAX_TOKENS


class LogitChanges:
    """A function that applies bias and penalties to the logits of an answer's next token.

    The order is that of mlx-lm and vLLM: the bias, the repetition penalty, then the others.

    Args:
        logit_bias: numbers to add to the logits of tokens, by id.
        repetition_penalty: divides the logits above 0, and multiplies those below 0, of all tokens
            in the prompt and the answer; 1: no change.
        presence_penalty: subtracted from the logits of all tokens in the answer.
        frequency_penalty: subtracted from a token's logit for each time that it is in the answer.
        prompt_ids: the prompt. Only the repetition penalty uses it.
    """

    def __init__(
        self,
        logit_bias: Mapping[int, float],
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        prompt_ids: Sequence[int],
    ):
        # mlx-lm counts the last tokens only: by default 20, here all, since no text is this long.
        self._whole_text_processors = make_logits_processors(
            logit_bias=dict(logit_bias),
            repetition_penalty=None if repetition_penalty == 1 else repetition_penalty,
            repetition_context_size=MAX_TOKENS,
        )
        self._answer_processors = make_logits_processors(
            presence_penalty=presence_penalty,
            presence_context_size=MAX_TOKENS,
            frequency_penalty=frequency_penalty,
            frequency_context_size=MAX_TOKENS,
        )
        counted_prompt = [] if repetition_penalty == 1 else list(prompt_ids)
        self._prompt_ids = mx.array(counted_prompt, mx.int32)

    def __bool__(self) -> bool:
        """Return whether there is anything to change."""
        return bool(self._whole_text_processors or self._answer_processors)

    def __call__(self, logits: mx.array, answer: mx.array) -> mx.array:
        """Return the changed logits of the next token; the given ones stay as they are.

        Args:
            logits: (1, V).
            answer: (n,) ids, the answer so far.
        """
        changed = mx.array(logits)  # a copy, because mlx-lm's functions write into their argument
        whole_text = mx.concatenate([self._prompt_ids, answer])
        for process in self._whole_text_processors:
            changed = process(whole_text, changed)
        for process in self._answer_processors:
            changed = process(answer, changed)
        return changed

    def each_row(self, logits: mx.array, answer: Sequence[int]) -> mx.array:
        """Return the changed logits of consecutive positions, each after the tokens before it.

        Args:
            logits: (W, V), of the last W positions that follow a token of the answer, or of the
                prompt.
            answer: the answer's ids up to the last position. They may end in draft tokens.
        """
        first = len(answer) - len(logits) + 1  # tokens of the answer before the first position
        tokens = mx.array(list(answer), mx.int32)
        rows = [self(logits[row : row + 1], tokens[: first + row]) for row in range(len(logits))]
        return mx.concatenate(rows)
