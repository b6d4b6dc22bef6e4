"""The decode loop for text: mlx-lm's loop over embeddings, with keyed sampling and stop strings."""

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

_LONGEST = 4  # tokens of the n-gram that a draft continues, at most
_SHORTEST = 2  # tokens of that n-gram, at least
PREFILL_STEP = 2048  # positions of a prompt read at once, as in mlx-lm


@dataclass(frozen=True)
class TextOptions:
    """Options of an answer: its sampling, and where it ends at the latest.

    Raises:
        OptionError: a number has a wrong type or is out of range, or a stop string is empty or not
            text.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    lookup: int = 0  # most draft tokens of a pass, copied from the prompt and the answer; 0: none

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
        """Return the logits after each position of the embeddings; if None, of the ids."""
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
    """Yield ``options.max_tokens`` token ids of an answer.

    The loop ignores end tokens and ``options.stop``: to end it within a step, close the generator.

    Args:
        model: the weights.
        embeddings: (L, hidden), the prompt with its images in place.
        options: sampling and length. ``lookup`` gives the same tokens, except for rounding, in
            fewer passes.
        cache: the KV cache of everything before ``embeddings``, if anything; it grows.
        ids: the prompt's ids, to copy drafts from; used only if ``options.lookup``.
        loop: further arguments of mlx-lm's ``generate_step``; used only without ``options.lookup``.
    """
    with weights_wired():
        if options.lookup:
            yield from _answer_in_windows(model, embeddings, options, cache, list(ids))
        else:
            yield from _answer_one_by_one(model, embeddings, options, cache, **loop)


def _answer_one_by_one(
    model: JanusModel, embeddings: mx.array, options: TextOptions, cache: Cache | None, **loop: Any
) -> Iterator[int]:
    """Run mlx-lm's loop with a sampler whose noise depends only on the seed and the position."""
    key = mx.random.key(options.seed)

    def sampler(logprobs: mx.array) -> mx.array:
        """Choose the next token. One key a token, so ``lookup`` gives the same tokens."""
        nonlocal key
        key, step_key = mx.random.split(key)
        return choose(logprobs, step_key[None], options.temperature, options.top_p)

    steps = generate_step(
        mx.array([], dtype=mx.int32),  # no ids: the prompt is ``input_embeddings``
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
    """Run the loop with draft tokens (prompt lookup decoding).

    A pass reads the last token and the draft. The noise of a position is fixed, as for images, so
    tokens chosen after correct drafts equal those of the plain loop and are accepted. ``known``
    holds the prompt's ids, and grows by the answer's.
    """
    cache = cache or model.make_cache()
    keys = [mx.random.key(options.seed)]  # one a position; the last is split for the next position

    def choices(hidden: mx.array, position: int) -> list[int]:
        """Choose the tokens at ``position`` and after it, one for each row of (W, hidden)."""
        end = position + len(hidden)
        while len(keys) <= end:
            following, step_key = mx.random.split(keys.pop())
            keys.append(step_key)
            keys.append(following)
        logits = model.text_logits(hidden)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        ahead = mx.stack(keys[position:end])
        chosen = choose(logprobs, ahead, options.temperature, options.top_p)
        return cast(list[int], chosen.tolist())

    found = choices(prefill_all(model, embeddings[None], cache, PREFILL_STEP), 0)
    done = 0
    while True:
        for token in found:
            known.append(token)
            done += 1
            yield token
            if done == options.max_tokens:
                return
        draft = draft_tokens(known, min(options.lookup, options.max_tokens - done - 1))
        read = model.embed_text(mx.array([[known[-1], *draft]]))
        chosen = choices(model.hidden_states(read, cache)[0], done)
        accepted = _count_accepted(chosen, draft)
        found = chosen[:accepted]
        trim_cache(cache, len(chosen) - accepted)  # remove the wrong draft tokens


def _count_accepted(chosen: Sequence[int], draft: Sequence[int]) -> int:
    """Return how many chosen tokens follow only correct draft tokens, at least 1.

    The first follows an accepted token, so there is one chosen token more than in the draft.
    """
    for index, token in enumerate(draft):
        if token != chosen[index]:
            return index + 1
    return len(chosen)


def draft_tokens(known: Sequence[int], most: int) -> list[int]:
    """Copy up to ``most`` tokens that followed the last earlier occurrence of the final n-gram.

    The longest n-gram that occurred before is used; if none did, the draft is empty.
    """
    for length in range(_LONGEST, _SHORTEST - 1, -1):
        if len(known) <= length:
            continue
        end = list(known[-length:])
        for start in range(len(known) - length - 1, -1, -1):
            after = start + length
            if list(known[start:after]) == end:
                return list(known[after : after + most])
    return []


class StopStrings:
    """A filter that cuts a stream of text at its first stop string.

    The stop string and the text after it are dropped. Characters that may turn out to begin a stop
    string are held back.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Add text; return the text that is safe to show, and whether a stop string was met."""
        self._held += text
        starts = [self._held.find(stop) for stop in self._stop]
        found = [start for start in starts if start >= 0]
        if found:
            shown = self._held[: min(found)]
            self._held = ""
            return shown, True
        safe = len(self._held) - self._unsafe()
        shown = self._held[:safe]
        self._held = self._held[safe:]
        return shown, False

    def finish(self) -> str:
        """Return the held text at the end of the stream."""
        shown = self._held
        self._held = ""
        return shown

    def _unsafe(self) -> int:
        """Return the length of the longest end of the held text that begins a stop string."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self._stop):
                return length
        return 0
