"""The decode loops for text, with or without draft tokens, and a filter for stop strings."""

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

_LONGEST_NGRAM = 4  # tokens of the n-gram that a draft continues, at most
_SHORTEST_NGRAM = 2  # tokens of that n-gram, at least
PREFILL_STEP = 2048  # positions of a prompt read at once, as in mlx-lm


@dataclass(frozen=True)
class TextOptions:
    """Options of an answer: sampling, length, stop strings and draft tokens.

    Raises:
        OptionError: a number has a wrong type or is out of range, or a stop string is empty or not
            text.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    lookup: int = 0  # maximum of draft tokens in a pass, copied from earlier tokens; 0: none

    def __post_init__(self) -> None:
        set_checked(
            self,
            max_tokens=check_int("max_tokens", self.max_tokens, 1, MAX_TOKENS),
            temperature=check_number("temperature", self.temperature, 0, MAX_TEMPERATURE),
            top_p=check_number("top_p", self.top_p, 0, 1, above_low=True),  # 0 is refused
            seed=check_int("seed", self.seed, 0, MAX_SEED),
            lookup=check_int("lookup", self.lookup, 0, MAX_LOOKUP),
        )
        if not all(isinstance(text, str) and text for text in self.stop):
            raise OptionError(f"stop must be strings that are not empty, got {self.stop!r}")


class _LanguageModel:
    """An adapter that lets mlx-lm's ``generate_step`` call the language model."""

    def __init__(self, model: JanusModel):
        self.model = model
        self.layers = model.language_model.layers

    def make_cache(self) -> Cache:
        return self.model.make_cache()

    def __call__(
        self, inputs: mx.array, cache: Cache | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Return the logits of each position.

        Args:
            inputs: (B, L) token ids, read only if there are no ``input_embeddings``.
            cache: the KV cache, which grows by L positions; None: no cache.
            input_embeddings: (B, L, hidden).
        """
        if input_embeddings is None:
            input_embeddings = self.model.embed_text(inputs)
        return self.model.text_logits(self.model.hidden_states(input_embeddings, cache))


def answer_tokens(
    model: JanusModel,
    embeddings: mx.array,
    options: TextOptions,
    cache: Cache | None = None,
    *,
    ids: Sequence[int] = (),
    **step_arguments: Any,
) -> Iterator[int]:
    """Yield ``options.max_tokens`` token ids of an answer.

    Neither an end token nor ``options.stop`` ends the loop: the caller closes the generator.

    Args:
        model: the weights.
        embeddings: (L, hidden), the part of the prompt that ``cache`` does not hold.
        options: sampling and length. With ``lookup``, fewer passes give the same tokens, except
            where rounding changes one.
        cache: a KV cache that holds the beginning of the prompt, and grows; None: a new cache.
        ids: the prompt's ids, from which drafts are copied. Only ``options.lookup`` uses them.
        step_arguments: further arguments of mlx-lm's ``generate_step``; ignored with
            ``options.lookup``.
    """
    with weights_wired():
        if options.lookup:
            yield from _answer_in_windows(model, embeddings, options, cache, list(ids))
        else:
            yield from _answer_one_by_one(model, embeddings, options, cache, **step_arguments)


def _answer_one_by_one(
    model: JanusModel,
    embeddings: mx.array,
    options: TextOptions,
    cache: Cache | None,
    **step_arguments: Any,
) -> Iterator[int]:
    """Run mlx-lm's loop with a sampler whose noise depends only on the seed and the position."""
    key = mx.random.key(options.seed)

    def sampler(logprobs: mx.array) -> mx.array:
        """Choose the next token of one row, with the next key of the sequence."""
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
        **step_arguments,
    )
    for token, _ in steps:
        yield int(token)


def _answer_in_windows(
    model: JanusModel,
    embeddings: mx.array,
    options: TextOptions,
    cache: Cache | None,
    known_ids: list[int],
) -> Iterator[int]:
    """Run the loop with draft tokens (prompt lookup decoding).

    A pass reads the newest token and draft tokens. The noise of a position depends only on the
    seed, so tokens chosen after correct draft tokens equal those of ``_answer_one_by_one``. They
    are accepted. ``known_ids`` holds the prompt's ids, and grows by the answer's ids.
    """
    cache = cache or model.make_cache()
    key = mx.random.key(options.seed)
    step_keys: list[mx.array] = []  # one for each position of the answer

    def choose_tokens(hidden: mx.array, position: int) -> list[int]:
        """Choose W tokens of the answer from (W, hidden) states; the first is at ``position``."""
        nonlocal key
        end = position + len(hidden)
        while len(step_keys) < end:
            key, step_key = mx.random.split(key)
            step_keys.append(step_key)
        logits = model.text_logits(hidden)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        window_keys = mx.stack(step_keys[position:end])
        chosen = choose(logprobs, window_keys, options.temperature, options.top_p)
        return cast(list[int], chosen.tolist())

    accepted = choose_tokens(prefill_all(model, embeddings[None], cache, PREFILL_STEP), 0)
    done = 0  # tokens of the answer so far
    while True:
        for token in accepted:
            known_ids.append(token)
            done += 1
            yield token
            if done == options.max_tokens:
                return
        # A pass chooses one token more than it reads draft tokens.
        draft = draft_tokens(known_ids, min(options.lookup, options.max_tokens - done - 1))
        newest_and_draft = model.embed_text(mx.array([[known_ids[-1], *draft]]))
        chosen = choose_tokens(model.hidden_states(newest_and_draft, cache)[0], done)
        accepted = chosen[: _count_accepted(chosen, draft)]
        # Remove the first wrong draft token and those after it.
        trim_cache(cache, len(chosen) - len(accepted))


def _count_accepted(chosen: Sequence[int], draft: Sequence[int]) -> int:
    """Return how many tokens were chosen after correct draft tokens only.

    Args:
        chosen: tokens that a pass chose, for the position of each draft token and the next one.
        draft: draft tokens that the pass read.

    Returns:
        At least 1, as the first token was chosen after no draft token.
    """
    for index, token in enumerate(draft):
        if token != chosen[index]:
            return index + 1
    return len(chosen)


def draft_tokens(known_ids: Sequence[int], max_count: int) -> list[int]:
    """Guess the next tokens: copy those after the last earlier occurrence of the final n-gram.

    The final n-gram is the last n ids, with the largest n from 2 to 4 for which they occur earlier.

    Returns:
        At most ``max_count`` token ids; an empty list if no final n-gram occurs earlier.
    """
    for length in range(_LONGEST_NGRAM, _SHORTEST_NGRAM - 1, -1):
        if len(known_ids) <= length:
            continue
        final_ngram = list(known_ids[-length:])
        for start in reversed(range(len(known_ids) - length)):  # the last occurrence first
            end = start + length
            if list(known_ids[start:end]) == final_ngram:
                return list(known_ids[end : end + max_count])
    return []


class StopStrings:
    """A filter that cuts a stream of text at its first stop string.

    The stop string and the text after it are dropped. Characters that may be the start of a stop
    string are held back until more text decides.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._held = ""  # text that is held back

    def add(self, text: str) -> tuple[str, bool]:
        """Add text; return the text that is safe to show, and whether a stop string was found."""
        self._held += text
        starts = [self._held.find(stop) for stop in self._stop]
        found_starts = [start for start in starts if start >= 0]
        if found_starts:
            safe_text = self._held[: min(found_starts)]
            self._held = ""
            return safe_text, True
        safe_length = len(self._held) - self._unsafe_length()
        safe_text = self._held[:safe_length]
        self._held = self._held[safe_length:]
        return safe_text, False

    def finish(self) -> str:
        """Return the text that is still held back when the stream ends."""
        text = self._held
        self._held = ""
        return text

    def _unsafe_length(self) -> int:
        """Return the length of the longest end of the held text that may begin a stop string."""
        # At least the last character of a stop string is missing, as ``add`` found no entire one.
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
