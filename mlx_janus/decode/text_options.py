"""The options of an answer, and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from ..errors import OptionError
from ..limits import (
    ALL_TOKENS,
    MAX_LOGIT_BIAS,
    MAX_LOOKUP,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_TEMPERATURE,
    MAX_TOKENS,
    MAX_TOP_K,
    MAX_TOP_LOGPROBS,
    MIN_REPETITION_PENALTY,
    check_int,
    check_number,
    set_checked,
)


class SamplingArguments(TypedDict, total=False):
    """Keyword arguments of ``generate_text`` about the choice of tokens. All may be left out.

    Logits change in the order of vLLM: bias, repetition penalty, the other penalties,
    ``temperature``, ``min_p``, ``top_k``, ``top_p``. Penalties and bias change the most likely
    token, too; the filters change nothing at temperature 0.
    """

    top_k: int
    """Sample from this number of the most likely tokens; 0 (the default) or -1: from all."""
    min_p: float
    """Sample from the tokens that are at least this share, 0 to 1, as likely as the most likely
    token. The default is 0: from all."""
    frequency_penalty: float
    """Subtracted from a token's logit for each time that the answer has the token, -2 to 2."""
    presence_penalty: float
    """Subtracted from the logits of all tokens of the answer, -2 to 2."""
    repetition_penalty: float
    """Divides the positive logits and multiplies the negative logits of all tokens of the prompt
    and the answer, 0.01 to 100. The default is 1: no penalty."""
    logit_bias: Mapping[int, float] | None
    """Numbers to add to logits, -100 to 100, by token id."""
    logprobs: bool
    """Whether the result has the log-probability of each token. It is that of the model's own
    probability, which no other argument changes."""
    top_logprobs: int
    """Number of the most likely tokens to report for each token, 0 to 20; needs ``logprobs``."""


@dataclass(frozen=True)
class TextOptions:
    """Options of an answer: sampling, length, stop strings, draft tokens and log-probabilities.

    Logits change in the order of vLLM: ``logit_bias``, ``repetition_penalty``,
    ``presence_penalty`` and ``frequency_penalty``, ``temperature``, ``min_p``, ``top_k``,
    ``top_p``.

    Raises:
        OptionError: a number has a wrong type or is out of range, a stop string is empty or not
            text, or ``top_logprobs`` is given without ``logprobs``.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0  # 0: always the likeliest token
    seed: int = 0
    stop: tuple[str, ...] = ()
    lookup: int = 0  # maximum of draft tokens in a pass, copied from earlier tokens; 0: none
    top_k: int = 0  # number of the likeliest tokens to sample from; 0 or -1: all
    min_p: float = 0.0  # least probability, as a share of the likeliest token's
    frequency_penalty: float = 0.0  # for each time that the answer has the token
    presence_penalty: float = 0.0  # if the answer has the token
    repetition_penalty: float = 1.0  # if prompt or answer have the token; 1: none
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # by token id
    logprobs: bool = False  # whether to report log-probabilities
    top_logprobs: int = 0  # number of the likeliest tokens to report with each token

    def __post_init__(self) -> None:
        set_checked(
            self,
            max_tokens=check_int("max_tokens", self.max_tokens, 1, MAX_TOKENS),
            temperature=check_number("temperature", self.temperature, 0, MAX_TEMPERATURE),
            top_p=check_number("top_p", self.top_p, 0, 1),
            seed=check_int("seed", self.seed, 0, MAX_SEED),
            lookup=check_int("lookup", self.lookup, 0, MAX_LOOKUP),
            top_k=max(check_int("top_k", self.top_k, ALL_TOKENS, MAX_TOP_K), 0),
            min_p=check_number("min_p", self.min_p, 0, 1),
            frequency_penalty=_check_penalty("frequency_penalty", self.frequency_penalty),
            presence_penalty=_check_penalty("presence_penalty", self.presence_penalty),
            repetition_penalty=check_number(
                "repetition_penalty",
                self.repetition_penalty,
                MIN_REPETITION_PENALTY,
                MAX_REPETITION_PENALTY,
            ),
            logit_bias=_check_bias(self.logit_bias),
            top_logprobs=check_int("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS),
        )
        if not isinstance(self.logprobs, bool):
            raise OptionError(f"logprobs must be True or False, got {self.logprobs!r}")
        if self.top_logprobs and not self.logprobs:
            raise OptionError("top_logprobs needs logprobs=True: add it, or leave top_logprobs out")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise OptionError(f"stop must be strings that are not empty, got {self.stop!r}")

    def check_vocabulary(self, size: int) -> None:
        """Check that each id of ``logit_bias`` is a token of a model.

        Args:
            size: number of the model's tokens.

        Raises:
            OptionError: an id is beyond the vocabulary.
        """
        for token in self.logit_bias:
            if token >= size:
                raise OptionError(
                    f"logit_bias must have token ids from 0 to {size - 1}, got {token}"
                )


def _check_penalty(name: str, value: Any) -> float:
    """Check a frequency or presence penalty, and return it.

    Raises:
        OptionError: the value is not a number in the range.
    """
    return check_number(name, value, -MAX_PENALTY, MAX_PENALTY)


def _check_bias(bias: Any) -> dict[int, float]:
    """Check the bias of tokens, and return a copy without zeros.

    Raises:
        OptionError: the bias is not a mapping, a key is not an integer of 0 or more, or a value is
            not a number in the range.
    """
    if not isinstance(bias, Mapping):
        raise OptionError(
            f"logit_bias must be a dict of token ids and numbers, got {type(bias).__name__}"
        )
    checked = {}
    for key, value in bias.items():
        token = check_int("a token id of logit_bias", key, 0, MAX_TOKENS)
        number = check_number("a number of logit_bias", value, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        if number:
            checked[token] = number
    return checked
