"""The likelihood of given answers: how probable a model finds each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from ..decode.prefill import prefill_all
from ..decode.text import PREFILL_STEP
from ..errors import ContextLengthError, OptionError
from ..models.backbone import Cache, take_rows
from .loaded import LoadedModel, Stopwatch
from .results import TokenLogprob
from .text_generation import ImageFeatures, embed_prompt

_ROWS = 16  # answers in one pass
_LOGIT_ROWS = 64  # positions whose logits are in memory at once; each has the vocabulary's size


@dataclass(frozen=True)
class AnswerScore:
    """The likelihood of an answer to a question."""

    answer: str
    logprob: float
    """Natural logarithm of the answer's probability: that of its spellings together."""
    spelling: str  # the most likely spelling of the answer
    tokens: tuple[TokenLogprob, ...]  # of ``spelling``

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of the tokens, which does not favour short answers."""
        return sum(token.logprob for token in self.tokens) / len(self.tokens)


def spellings_of(answer: str) -> list[str]:
    """Return the spellings of a short answer, without duplicates, the given one first.

    They begin with or without a space, with a small or a capital letter: for "yes" they are "yes",
    "Yes", " yes" and " Yes".
    """
    bare = answer.strip()
    words = [answer, bare]
    if bare:
        words += [bare[0].lower() + bare[1:], bare[0].upper() + bare[1:]]
    words += [f" {word}" for word in words if word[:1] != " "]
    return list(dict.fromkeys(words))


def score_answers(
    janus: LoadedModel,
    ids: Sequence[int],
    features: ImageFeatures,
    answers: Sequence[str],
    *,
    spellings: bool,
) -> list[AnswerScore]:
    """Score answers to one prompt; call it in the model's thread.

    The prompt is read once. Then up to ``_ROWS`` spellings are read in one pass.

    Args:
        janus: the model.
        ids: the prompt.
        features: encodes the prompt's images.
        answers: the answers, as they continue the prompt.
        spellings: whether to sum the probabilities of all ``spellings_of`` an answer.

    Returns:
        The scores, in the order of the answers.

    Raises:
        OptionError: there is no answer, or an answer is empty.
        ContextLengthError: an answer does not fit into the context after the prompt.
    """
    groups = [spellings_of(answer) if spellings else [answer] for answer in answers]
    texts = list(dict.fromkeys(text for group in groups for text in group))
    if not texts:
        raise OptionError("there is no answer to score: give one or more")
    tokens = {text: janus.prompts.encode(text) for text in texts}
    _check_lengths(tokens, len(ids), janus.config.language.max_position_embeddings)
    images = features(Stopwatch())
    janus.load_weights_for("answer")
    cache = janus.model.make_cache()
    embeddings = embed_prompt(janus, ids, images)
    last_hidden = prefill_all(janus.model, embeddings[None], cache, PREFILL_STEP)
    scored: dict[str, list[float]] = {}
    # Texts of similar length share a pass, so that little padding is read.
    by_length = sorted(texts, key=lambda text: len(tokens[text]))
    for start in range(0, len(by_length), _ROWS):
        janus.thread.check()
        batch = by_length[start : start + _ROWS]
        rows = [tokens[text] for text in batch]
        logprobs = _score_rows(janus, cache, last_hidden, rows)
        scored |= dict(zip(batch, logprobs, strict=True))
    return [
        _combine(janus, answer, group, tokens, scored)
        for answer, group in zip(answers, groups, strict=True)
    ]


def _check_lengths(tokens: dict[str, list[int]], prompt_length: int, context: int) -> None:
    """Check that each text has a token, and fits into the context after the prompt.

    Raises:
        OptionError: a text is empty.
        ContextLengthError: a text is too long.
    """
    for text, ids in tokens.items():
        if not ids:
            raise OptionError(f"an answer to score must not be empty, got {text!r}")
        if prompt_length + len(ids) > context:
            raise ContextLengthError(
                f"the prompt and an answer are {prompt_length + len(ids)} tokens long, and this "
                f"model's maximum context length is {context}: shorten them"
            )


def _score_rows(
    janus: LoadedModel, cache: Cache, last_hidden: mx.array, rows: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Return the log-probability of each token of each row.

    Args:
        janus: the model.
        cache: holds the prompt in one row; it does not change.
        last_hidden: (1, hidden), the state at the prompt's last position.
        rows: the token ids of each text.
    """
    count = len(rows)
    longest = max(map(len, rows))
    states = mx.broadcast_to(last_hidden[:, None], (count, 1, last_hidden.shape[-1]))
    if longest > 1:
        # The last token of a text predicts nothing here, so it is not read. A pad's id does not
        # matter: the states before it do not depend on it.
        padded = [[*row[:-1], *[0] * (longest - len(row))] for row in rows]
        embeddings = janus.model.embed_text(mx.array(padded, mx.int32))
        copies = take_rows(cache, [0] * count)
        states = mx.concatenate([states, janus.model.hidden_states(embeddings, copies)], axis=1)
    # The states that predict a token, of all rows one after the other.
    places = [row * longest + k for row, ids in enumerate(rows) for k in range(len(ids))]
    targets = [token for ids in rows for token in ids]
    flat = states.reshape(count * longest, -1)
    logprobs = list(_logprobs(janus, flat[mx.array(places)], targets))
    result = []
    done = 0
    for ids in rows:
        result.append(logprobs[done : done + len(ids)])
        done += len(ids)
    return result


def _logprobs(janus: LoadedModel, states: mx.array, targets: Sequence[int]) -> Iterator[float]:
    """Yield the log-probability of each target, predicted by its state, (n, hidden)."""
    for start in range(0, len(targets), _LOGIT_ROWS):
        part = slice(start, start + _LOGIT_ROWS)
        logits = janus.model.text_logits(states[part])
        wanted = mx.array(list(targets[part]))[:, None]
        chosen = mx.take_along_axis(logits, wanted, axis=-1)[:, 0]
        logprobs = chosen - mx.logsumexp(logits, axis=-1)
        yield from cast(list[float], logprobs.tolist())


def _combine(
    janus: LoadedModel,
    answer: str,
    spellings: Sequence[str],
    tokens: dict[str, list[int]],
    logprobs: dict[str, list[float]],
) -> AnswerScore:
    """Return the score of an answer from those of its spellings.

    Args:
        janus: the model.
        answer: the answer.
        spellings: its spellings.
        tokens: the token ids of each spelling.
        logprobs: the log-probabilities of these tokens.
    """
    sums = {text: math.fsum(logprobs[text]) for text in spellings}
    likeliest = max(sums, key=lambda text: sums[text])
    highest = sums[likeliest]
    total = highest + math.log(math.fsum(math.exp(value - highest) for value in sums.values()))
    scores = []
    for token, logprob in zip(tokens[likeliest], logprobs[likeliest], strict=True):
        text, utf8 = janus.prompts.spelling(token)
        scores.append(TokenLogprob(token, text, utf8, logprob))
    return AnswerScore(answer, min(total, 0.0), likeliest, tuple(scores))
