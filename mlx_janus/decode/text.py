"""Answering: mlx-lm's generation loop over prepared embeddings, with keyed sampling and stop strings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import generate_step

from ..errors import OptionError
from ..limits import (
    MAX_LOOKUP,
    MAX_SEED,
    MAX_TEMPERATURE,
    MAX_TOKENS,
    check_int,
    check_number,
    set_checked,
)
from ..memory import weights_wired
from ..models.backbone import Cache, trim_cache
from ..models.janus import JanusModel
from .prefill import prefill_all
from .sampling import choose

_LONGEST, _SHORTEST = 4, 2  # tokens that must have stood before what is copied
PREFILL_STEP = 2048  # positions of a prompt that are read at once, as in mlx-lm


@dataclass(frozen=True)
class TextOptions:
    """How an answer is chosen and where it ends, apart from the model's own end."""

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    lookup: int = (
        0  # tokens guessed ahead in a pass by copying from the prompt and the answer; 0: none
    )

    def __post_init__(self) -> None:
        set_checked(
            self,
            max_tokens=check_int("max_tokens", self.max_tokens, 1, MAX_TOKENS),
            temperature=check_number("temperature", self.temperature, 0, MAX_TEMPERATURE),
            top_p=check_number("top_p", self.top_p, 0, 1, above_low=True),
            seed=check_int("seed", self.seed, 0, MAX_SEED),
            lookup=check_int("lookup", self.lookup, 0, MAX_LOOKUP),
        )
        if not all(isinstance(s, str) and s for s in self.stop):
            raise OptionError(f"stop must be strings that are not empty, got {self.stop!r}")


class _LanguageModel:
    """The language model as ``generate_step`` calls it, with float32 logits."""

    def __init__(self, model: JanusModel):
        self.model = model
        self.layers = model.language_model.layers

    def make_cache(self) -> Cache:
        return self.model.make_cache()

    def __call__(
        self, inputs: mx.array, cache: Cache | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        embeddings = self.model.embed_text(inputs) if input_embeddings is None else input_embeddings
        return self.model.text_logits(self.model.hidden_states(embeddings, cache))


def answer_tokens(
    model: JanusModel,
    embeddings: mx.array,
    options: TextOptions,
    cache: Cache | None = None,
    *,
    ids: Sequence[int] = (),
    **loop: Any,
) -> Iterator[int]:
    """Token ids of an answer, stop tokens included, at most ``options.max_tokens``; closing stops within a step.

    Args:
        model: the weights.
        embeddings: (L, hidden), the prompt with its pictures in place.
        options: choice and length. With ``lookup`` the tokens are the same, but for rounding, in fewer passes.
        cache: what the language model has read before, if anything; it grows.
        ids: of the prompt, to copy from.
        loop: further arguments of mlx-lm's ``generate_step``, which makes the plain loop.
    """
    with weights_wired():
        if options.lookup:
            yield from _answer_in_windows(model, embeddings, options, cache, list(ids))
        else:
            yield from _answer_one_by_one(model, embeddings, options, cache, **loop)


def _answer_one_by_one(
    model: JanusModel, embeddings: mx.array, options: TextOptions, cache: Cache | None, **loop: Any
) -> Iterator[int]:
    """mlx-lm's loop, with our choice of tokens."""
    key = mx.random.key(options.seed)

    def sampler(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, drawn = mx.random.split(key)
        return choose(logprobs, drawn[None], options.temperature, options.top_p)

    steps = generate_step(
        mx.array([], dtype=mx.int32),
        _LanguageModel(model),
        max_tokens=options.max_tokens,
        sampler=sampler,
        prompt_cache=cache,
        input_embeddings=embeddings,
        **loop,
    )
    for token, _ in steps:
        yield int(token)


def _answer_in_windows(
    model: JanusModel,
    embeddings: mx.array,
    options: TextOptions,
    cache: Cache | None,
    known: list[int],
) -> Iterator[int]:
    """The loop with guesses (prompt lookup decoding): a pass reads the last token and what followed its like before.

    The noise of a position is fixed, as in drawing, so that what is chosen after guesses that came true is what the
    plain loop chooses. ``known`` is the prompt's ids, and grows by the answer's.
    """
    cache = cache or model.make_cache()
    keys = [mx.random.key(options.seed)]  # the last one is split on

    def choices(hidden: mx.array, position: int) -> list[int]:
        """(W, hidden) -> the W tokens from ``position`` on."""
        while len(keys) <= position + len(hidden):
            following, drawn = mx.random.split(keys.pop())
            keys.extend((drawn, following))
        logits = model.text_logits(hidden)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        ahead = mx.stack(keys[position : position + len(hidden)])
        return cast(list[int], choose(logprobs, ahead, options.temperature, options.top_p).tolist())

    found = choices(prefill_all(model, embeddings[None], cache, PREFILL_STEP), 0)
    done = 0
    while True:
        for token in found:
            known.append(token)
            done += 1
            yield token
            if done == options.max_tokens:
                return
        guesses = guess(known, min(options.lookup, options.max_tokens - done - 1))
        read = model.embed_text(mx.array([known[-1:] + guesses]))
        chosen = choices(model.hidden_states(read, cache)[0], done)
        wrong = next(
            (
                i
                for i, (one, other) in enumerate(zip(guesses, chosen, strict=False))
                if one != other
            ),
            None,
        )
        found = chosen if wrong is None else chosen[: wrong + 1]
        trim_cache(cache, len(chosen) - len(found))


def guess(known: Sequence[int], most: int) -> list[int]:
    """What followed when the last few tokens stood in this order before, at most so many; [] if they never did."""
    for length in range(_LONGEST, _SHORTEST - 1, -1):
        if len(known) <= length:
            continue
        end = list(known[-length:])
        for at in range(len(known) - length - 1, -1, -1):
            if list(known[at : at + length]) == end:
                return list(known[at + length : at + length + most])
    return []


class StopStrings:
    """Cuts a stream of text at the first of some strings, holding back what may yet become one."""

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """The text that is safe to show, and whether a stop string was met."""
        self._held += text
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = self._unsafe()
        shown, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return shown, False

    def finish(self) -> str:
        """What was held back, once nothing follows."""
        shown, self._held = self._held, ""
        return shown

    def _unsafe(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self._stop):
                return length
        return 0
