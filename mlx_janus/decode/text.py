"""The decode loops for text, with or without draft tokens, and a filter for stop strings."""

from __future__ import annotations

from .. import open_files  # noqa: F401  before mlx_lm

# isort: split
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import generate_step

from ..memory import weights_wired
from ..models.backbone import Cache, trim_cache
from ..models.janus import JanusModel
from .logit_changes import LogitChanges
from .logprobs import AnswerToken, TokenScores
from .prefill import prefill_all
from .sampling import choose
from .text_options import TextOptions as TextOptions  # other layers import it from here

_LONGEST_NGRAM = 4  # tokens of the n-gram that a draft continues, at most
_SHORTEST_NGRAM = 2  # tokens of that n-gram, at least
PREFILL_STEP = 2048  # positions of a prompt read at once, as in mlx-lm


class _LanguageModel:
    """An adapter that lets mlx-lm's ``generate_step`` call the language model.

    Args:
        model: the weights.
        changes: bias and penalties of the answer.
    """

    def __init__(self, model: JanusModel, changes: LogitChanges):
        self.model = model
        self.layers = model.language_model.layers
        # (1, V), the newest logits without the changes; None if there are no changes
        self.own_logits: mx.array | None = None
        self._changes = changes
        self._answer = mx.array([], mx.int32)  # tokens of the answer that were read

    def make_cache(self) -> Cache:
        return self.model.make_cache()

    def __call__(
        self, inputs: mx.array, cache: Cache | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Return the logits of each position; only those of the last one if there are changes.

        Args:
            inputs: (B, L) token ids of the answer, read only if there are no ``input_embeddings``.
            cache: the KV cache, which grows by L positions; None: no cache.
            input_embeddings: (B, L, hidden), of the prompt.
        """
        embeddings = input_embeddings
        if embeddings is None:
            embeddings = self.model.embed_text(inputs)
        logits = self.model.text_logits(self.model.hidden_states(embeddings, cache))
        if not self._changes:
            return logits
        if input_embeddings is None:
            self._answer = mx.concatenate([self._answer, inputs[0]])
        self.own_logits = logits[:, -1]
        return self._changes(self.own_logits, self._answer)[:, None]


def answer_tokens(
    model: JanusModel,
    embeddings: mx.array,
    options: TextOptions,
    cache: Cache | None = None,
    *,
    ids: Sequence[int] = (),
    **step_arguments: Any,
) -> Generator[AnswerToken, None, None]:
    """Yield ``options.max_tokens`` tokens of an answer.

    Neither an end token nor ``options.stop`` ends the loop: the caller closes the generator.

    Args:
        model: the weights.
        embeddings: (L, hidden), the part of the prompt that ``cache`` does not hold.
        options: sampling and length. With ``lookup``, fewer passes give the same tokens, except
            where rounding changes one.
        cache: a KV cache that holds the beginning of the prompt, and grows; None: a new cache.
        ids: the prompt's ids. Drafts are copied from them, and the repetition penalty counts them.
        step_arguments: further arguments of mlx-lm's ``generate_step``; ignored with
            ``options.lookup``.
    """
    changes = LogitChanges(
        options.logit_bias,
        options.repetition_penalty,
        options.presence_penalty,
        options.frequency_penalty,
        ids,
    )
    with weights_wired():
        if options.lookup:
            yield from _answer_in_windows(model, embeddings, options, changes, cache, list(ids))
        else:
            yield from _answer_one_by_one(
                model, embeddings, options, changes, cache, **step_arguments
            )


def _choose(logprobs: mx.array, keys: mx.array, options: TextOptions) -> mx.array:
    """Choose a token for each row of log-probabilities, as the options say.

    Args:
        logprobs: (W, V).
        keys: (W, 2), a random key for each row.
        options: the sampling.

    Returns:
        (W,) token ids.
    """
    return choose(logprobs, keys, options.temperature, options.top_p, options.top_k, options.min_p)


def _log_softmax(logits: mx.array) -> mx.array:
    """Return the log-probabilities of each row of logits."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _answer_one_by_one(
    model: JanusModel,
    embeddings: mx.array,
    options: TextOptions,
    changes: LogitChanges,
    cache: Cache | None,
    **step_arguments: Any,
) -> Generator[AnswerToken, None, None]:
    """Run mlx-lm's loop with a sampler whose noise depends only on the seed and the position."""
    key = mx.random.key(options.seed)
    network = _LanguageModel(model, changes)
    scores: deque[TokenScores] = deque()  # of the tokens that were not yielded yet

    def sampler(logprobs: mx.array) -> mx.array:
        """Choose the next token of one row, with the next key of the sequence."""
        nonlocal key
        key, step_key = mx.random.split(key)
        tokens = _choose(logprobs, step_key[None], options)
        if options.logprobs:
            own_logits = network.own_logits
            own_logprobs = logprobs if own_logits is None else _log_softmax(own_logits)
            scores.append(TokenScores(own_logprobs, tokens, options.top_logprobs))
        return tokens

    steps = generate_step(
        mx.array([], dtype=mx.int32),  # no ids: the prompt is ``input_embeddings``
        network,
        max_tokens=options.max_tokens,
        sampler=sampler,
        prompt_cache=cache,
        input_embeddings=embeddings,
        **step_arguments,
    )
    for token, _ in steps:
        if options.logprobs:
            yield from scores.popleft().read()
        else:
            yield AnswerToken(int(token))


def _answer_in_windows(
    model: JanusModel,
    embeddings: mx.array,
    options: TextOptions,
    changes: LogitChanges,
    cache: Cache | None,
    known_ids: list[int],
) -> Generator[AnswerToken, None, None]:
    """Run the loop with draft tokens (prompt lookup decoding).

    A pass reads the newest token and draft tokens. The noise of a position depends only on the
    seed, so tokens chosen after correct draft tokens equal those of ``_answer_one_by_one``. They
    are accepted. ``known_ids`` holds the prompt's ids, and grows by the answer's ids.
    """
    cache = cache or model.make_cache()
    windows = _WindowChoice(model, options, changes)
    answer: list[int] = []
    draft: list[int] = []
    hidden = prefill_all(model, embeddings[None], cache, PREFILL_STEP)  # (1, hidden)
    while True:
        chosen = windows.choose(hidden, answer, draft)
        accepted = chosen[: _count_accepted([token.id for token in chosen], draft)]
        # Remove the first wrong draft token and those after it.
        trim_cache(cache, len(chosen) - len(accepted))
        for token in accepted:
            known_ids.append(token.id)
            answer.append(token.id)
            yield token
            if len(answer) == options.max_tokens:
                return
        # A pass chooses one token more than it reads draft tokens.
        draft = draft_tokens(known_ids, min(options.lookup, options.max_tokens - len(answer) - 1))
        newest_and_draft = model.embed_text(mx.array([[known_ids[-1], *draft]]))
        hidden = model.hidden_states(newest_and_draft, cache)[0]


class _WindowChoice:
    """The choice of the tokens of consecutive positions of an answer.

    Args:
        model: the weights.
        options: sampling.
        changes: bias and penalties.
    """

    def __init__(self, model: JanusModel, options: TextOptions, changes: LogitChanges):
        self._model = model
        self._options = options
        self._changes = changes
        self._key = mx.random.key(options.seed)
        self._step_keys: list[mx.array] = []  # one for each position of the answer

    def choose(
        self, hidden: mx.array, answer: Sequence[int], draft: Sequence[int]
    ) -> list[AnswerToken]:
        """Choose a token for the next position, and for the position after each draft token.

        Args:
            hidden: (W, hidden) states, one more than there are draft tokens.
            answer: ids of the answer before the first position.
            draft: W - 1 draft tokens.

        Returns:
            W tokens.
        """
        end = len(answer) + len(hidden)
        while len(self._step_keys) < end:
            self._key, step_key = mx.random.split(self._key)
            self._step_keys.append(step_key)
        own_logits = self._model.text_logits(hidden)
        logits = own_logits
        if self._changes:
            logits = self._changes.each_row(own_logits, [*answer, *draft])
        keys = mx.stack(self._step_keys[len(answer) : end])
        tokens = _choose(_log_softmax(logits), keys, self._options)
        if self._options.logprobs:
            return TokenScores(_log_softmax(own_logits), tokens, self._options.top_logprobs).read()
        return [AnswerToken(token) for token in cast(list[int], tokens.tolist())]


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
