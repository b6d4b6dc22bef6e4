"""Continuous batching of answers: an answer joins after its prompt was read, and leaves at its end.

Each answer has its own prompt, sampling, grammar and row of the batch. Its noise depends only on
its seed and positions. So the other answers can change it only through rounding.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import cast

import mlx.core as mx

from ..models.backbone import (
    Cache,
    RaggedCache,
    add_rows,
    cache_arrays,
    keep_rows,
    restore,
    snapshot,
    take_out_row,
    to_ragged_cache,
)
from ..models.janus import JanusModel
from .constraint import Constraint
from .logit_changes import LogitChanges
from .logprobs import AnswerToken, TokenScores
from .prefill import prefill_all
from .text import PREFILL_STEP, answer_changes, choose_tokens, log_softmax
from .text_options import TextOptions

_CLEAR_EVERY = 256  # steps between two frees of MLX's buffer cache


class BatchAnswer(Iterator[AnswerToken]):
    """An answer of a batch: an iterator over its tokens. Made by ``AnswerBatch.add``.

    The answer ends after ``max_tokens`` tokens, or when its grammar allows no further token. If the
    answer fails, the iterator raises the error.

    Args:
        batch: the batch of the answer.
        options: sampling and length.
        changes: bias and penalties.
        cache: the KV cache of the prompt. It is empty while the answer is in the batch. When the
            answer leaves, the batch stores prompt and answer in it.
        constraint: the grammar; None: any text.
    """

    def __init__(
        self,
        batch: AnswerBatch,
        options: TextOptions,
        changes: LogitChanges,
        cache: Cache,
        constraint: Constraint | None,
    ):
        self.options = options
        self.cache = cache
        self.error: BaseException | None = None  # the error that ended the answer
        self.step_key = mx.zeros((2,), mx.uint32)  # random key of the newest token
        self.next_key = mx.random.key(options.seed)
        self._batch = batch
        self._changes = changes
        self._constraint = constraint
        self._ids: list[int] = []  # ids of the answer so far
        self._ready: deque[AnswerToken] = deque()  # tokens that ``__next__`` has not returned yet
        # Log-probabilities of the newest token; None: not asked for.
        self._scores: TokenScores | None = None
        # (1, V): logits of the newest token, with the changes. Only with a grammar, which may
        # refuse that token.
        self._logits = mx.zeros((1, 0))
        self._own_logits = mx.zeros((1, 0))  # the same without the changes

    @property
    def room(self) -> int:
        """The number of tokens that may follow the newest one, which is not among ``_ids`` yet."""
        return self.options.max_tokens - len(self._ids) - 1

    @property
    def complete(self) -> bool:
        """Whether the model chooses no more tokens after those that were added."""
        if self._constraint is not None and self._constraint.ended:
            return True
        return len(self._ids) == self.options.max_tokens

    def __next__(self) -> AnswerToken:
        """Return the next token. If the batch has not chosen it yet, advance the batch."""
        while not self._ready:
            if self.error is not None:
                raise self.error
            if self not in self._batch.answers:
                raise StopIteration
            self._batch.step()
        return self._ready.popleft()

    def close(self) -> None:
        """Leave the batch, if the answer is still in it, and return the KV cache."""
        self._batch.remove([self])

    # For the batch

    def prepare(self, own_logits: mx.array) -> mx.array:
        """Return the logits to choose the next token from, and set ``step_key`` for this choice.

        With a grammar, the logits are kept for ``allowed_token``.

        Args:
            own_logits: (1, V), the model's logits, without changes.

        Returns:
            (1, V) logits with bias, penalties and the grammar's mask.

        Raises:
            OptionError: the grammar has become too complex.
        """
        self.next_key, self.step_key = mx.random.split(self.next_key)
        logits = own_logits
        if self._changes:
            logits = self._changes(own_logits, mx.array(self._ids, mx.int32))
        if self._constraint is None:
            return logits
        self._own_logits = own_logits
        self._logits = logits
        return mx.where(self._constraint.mask(), logits, -mx.inf)

    def score(self, own_logits: mx.array, token: mx.array) -> None:
        """Start computing the log-probability of a chosen token, if it was asked for.

        The log-probability is kept for ``add``.

        Args:
            own_logits: (1, V), the model's logits, without changes.
            token: (1,), the chosen token.
        """
        if self.options.logprobs:
            own_logprobs = log_softmax(own_logits)
            self._scores = TokenScores(own_logprobs, token, self.options.top_logprobs)

    def allowed_token(self, token: int) -> int:
        """Return a token after which the grammar can still be completed within ``max_tokens``.

        Args:
            token: the newest token. It is returned if it fits. Otherwise another token is chosen,
                with the same random key.
        """
        if self._constraint is None:
            return token
        allowed = self._constraint.another_mask(token, self.room)
        while allowed is not None:
            logprobs = log_softmax(mx.where(allowed, self._logits, -mx.inf))
            tokens = choose_tokens(logprobs, self.step_key[None], self.options)
            self.score(self._own_logits, tokens)
            token = cast(int, tokens.item())
            allowed = self._constraint.another_mask(token, self.room)
        return token

    def add(self, token: int) -> None:
        """Add the newest token, unless the answer has failed.

        If this completes the answer, and the answer is complete JSON, also add an end token.

        Raises:
            OptionError: the grammar has become too complex.
        """
        if self.error is not None:
            return
        if self._constraint is not None:
            self._constraint.add(token)
        self._ids.append(token)
        if self._scores is None:
            self._ready.append(AnswerToken(token))
        else:
            self._ready += self._scores.read()
        if self.complete and self._constraint is not None and self._constraint.complete:
            self._ready.append(AnswerToken(self._constraint.end))


class AnswerBatch:
    """Answers that advance by one token a step.

    Args:
        model: the weights.
    """

    def __init__(self, model: JanusModel):
        self.answers: list[BatchAnswer] = []
        self._model = model
        self._steps_done = 0
        self._clear()

    def _clear(self) -> None:
        """Forget all answers, because none are left or an error made their rows inconsistent."""
        self.answers = []
        self._cache: RaggedCache = []  # KV cache with one row for each answer
        # The newest tokens, (n,): neither added to the answers nor read by the model yet.
        self._tokens = mx.zeros((0,), mx.uint32)
        # (n, V): logits for the tokens after ``_tokens``; None between two steps.
        self._logits: mx.array | None = None

    def add(
        self,
        embeddings: mx.array,
        options: TextOptions,
        cache: Cache,
        *,
        ids: Sequence[int] = (),
        constraint: Constraint | None = None,
    ) -> BatchAnswer:
        """Read the rest of a prompt, choose the first token, and add the answer to the batch.

        If the batch's cache cannot be extended, all answers of the batch fail.

        Args:
            embeddings: (L, hidden), the part of the prompt that ``cache`` does not hold, L at
                least 1.
            options: sampling and length. ``lookup`` is 0, since a batch uses no draft tokens.
            cache: a KV cache of one row, which holds the beginning of the prompt. It is empty while
                the answer is in the batch. When the answer leaves, the batch stores prompt and
                answer in it, perhaps without the answer's last token or with one token after it.
            ids: the prompt's ids. The repetition penalty counts them.
            constraint: the grammar of the answer; None: any text.

        Raises:
            OptionError: the grammar is too complex.
        """
        changes = answer_changes(options, ids)
        answer = BatchAnswer(self, options, changes, cache, constraint)
        hidden = prefill_all(self._model, embeddings[None], cache, PREFILL_STEP)  # (1, hidden)
        own_logits = self._model.text_logits(hidden)  # (1, V)
        token = _choose(own_logits, [answer.prepare(own_logits)], [answer])
        mx.async_eval(token)
        try:
            self._join(answer, token)
        except BaseException as error:  # some layers may have the new row, others not
            self._lose(self.answers, error)
            raise
        return answer

    def _join(self, answer: BatchAnswer, token: mx.array) -> None:
        """Append an answer to the batch.

        Args:
            answer: the answer, whose cache holds its entire prompt.
            token: its first token, (1,).
        """
        row = to_ragged_cache(answer.cache)
        if not self.answers:
            self._cache = row
            self._tokens = token
        else:
            add_rows(self._cache, row)
            self._tokens = mx.concatenate([self._tokens, token])
            mx.async_eval(cache_arrays(self._cache))
        self.answers = [*self.answers, answer]

    def remove(self, answers: Collection[BatchAnswer]) -> None:
        """Remove answers, complete or not; ignore those that are not in the batch.

        If the rows cannot be removed from the cache, all answers of the batch fail.
        """
        leaving = [answer for answer in self.answers if answer in answers]
        if not leaving:
            return
        try:
            self._take_out(leaving)
        except BaseException as error:  # some layers may have lost rows, others not
            self._lose(self.answers, error)
            raise

    def _take_out(self, leaving: Sequence[BatchAnswer]) -> None:
        """Remove answers with their rows. Store each row in the cache of its answer."""
        kept_indices = []
        for index, answer in enumerate(self.answers):
            if answer in leaving:
                take_out_row(self._cache, index, answer.cache)
                mx.async_eval(cache_arrays(answer.cache))
            else:
                kept_indices.append(index)
        if not kept_indices:
            self._clear()
            return
        keep_rows(self._cache, kept_indices)
        mx.async_eval(cache_arrays(self._cache))
        kept = mx.array(kept_indices)
        self._tokens = self._tokens[kept]
        if self._logits is not None:
            self._logits = self._logits[kept]
        self.answers = [self.answers[index] for index in kept_indices]

    def _lose(self, answers: Sequence[BatchAnswer], error: BaseException) -> None:
        """End answers with an error, and forget all answers of the batch with their rows."""
        for answer in answers:
            answer.error = answer.error or error
        self._clear()

    def step(self) -> None:
        """Add a token to every answer, and start the pass that chooses the next tokens.

        Answers that are complete leave. An error of one answer ends it alone; an error of the pass
        ends all answers of the batch.
        """
        answers = self.answers
        if not answers:
            return
        try:
            self._advance()
        except Exception as error:
            self._lose(answers, error)
            return
        self._steps_done += 1
        if self._steps_done % _CLEAR_EVERY == 0:
            mx.clear_cache()

    def _advance(self) -> None:
        """Do the work of ``step``.

        MLX is lazy: ``_pass_over`` builds the pass, and ``async_eval`` starts it. The pass over the
        newest tokens is built while the previous pass still computes them. It is started after the
        previous pass has ended. Otherwise it would have to copy the cache, which the previous pass
        still reads. The grammars' masks are computed on the CPU while the pass runs.
        """
        answers = self.answers
        tokens = self._tokens
        # Answers that end with their newest token need no further pass. ``answers`` still has them.
        self.remove([answer for answer in answers if not answer.room])
        before_pass = snapshot(self._cache)
        logits = self._pass_over(self._tokens)
        ids = cast(list[int], tokens.tolist())  # waits for the previous pass
        allowed = _allowed_tokens(answers, ids)
        # If a grammar has refused a token, build the pass again with the token chosen instead.
        if any(allowed[answer] != ids[index] for index, answer in enumerate(answers)):
            restore(self._cache, before_pass)
            allowed_ids = [allowed[answer] for answer in self.answers]
            logits = self._pass_over(mx.array(allowed_ids, tokens.dtype))
        del before_pass  # otherwise the pass would copy the cache
        mx.async_eval(logits)
        self._logits = logits
        for answer in answers:
            with _ended_by_errors(answer):
                answer.add(allowed[answer])
        self.remove([answer for answer in self.answers if answer.error or answer.complete])
        self._choose_next_tokens()
        self._logits = None

    def _pass_over(self, tokens: mx.array) -> mx.array:
        """Build a pass of the model, which adds tokens to the cache.

        Args:
            tokens: (n,), one for each answer.

        Returns:
            (n, V) logits for the tokens after them, not evaluated.
        """
        if not self.answers:
            return mx.zeros((0, 0))
        embeddings = self._model.embed_text(tokens[:, None])
        hidden = self._model.hidden_states(embeddings, self._cache)
        return self._model.text_logits(hidden[:, 0])

    def _choose_next_tokens(self) -> None:
        """Choose the next token of every answer. These tokens replace the newest ones."""
        if not self.answers:
            return
        assert self._logits is not None  # ``_advance`` has set it
        prepared = []
        for index, answer in enumerate(self.answers):
            with _ended_by_errors(answer):
                prepared.append(answer.prepare(self._logits[index : index + 1]))
        # ``prepared`` lacks the failed answers already. Remove their rows of ``_logits``, too.
        self.remove([answer for answer in self.answers if answer.error])
        if self.answers:
            self._tokens = _choose(self._logits, prepared, self.answers)
            mx.async_eval(self._tokens, *(answer.next_key for answer in self.answers))


@contextlib.contextmanager
def _ended_by_errors(answer: BatchAnswer) -> Iterator[None]:
    """Catch an error of the block, and set it as the error that ends an answer."""
    try:
        yield
    except Exception as error:
        answer.error = error


def _allowed_tokens(answers: Sequence[BatchAnswer], ids: Sequence[int]) -> dict[BatchAnswer, int]:
    """Return each answer's newest token, or the token chosen instead if its grammar refuses it.

    Args:
        answers: the answers.
        ids: the newest token of each answer.
    """
    allowed = dict(zip(answers, ids, strict=True))
    for answer, token in zip(answers, ids, strict=True):
        with _ended_by_errors(answer):
            allowed[answer] = answer.allowed_token(token)
    return allowed


def _choose(
    own_logits: mx.array, prepared: Sequence[mx.array], answers: Sequence[BatchAnswer]
) -> mx.array:
    """Choose a token for each of n answers, and score it if the answer asks for log-probabilities.

    Args:
        own_logits: (n, V), the model's logits, without changes.
        prepared: n arrays (1, V), the logits with the changes and the mask of each answer.
        answers: the answers.

    Returns:
        The tokens, (n,).
    """
    groups: dict[tuple[float, ...], list[int]] = {}  # by sampling options, the indices of answers
    for index, answer in enumerate(answers):
        options = answer.options
        sampling = (options.temperature, options.top_p, options.top_k, options.min_p)
        groups.setdefault(sampling, []).append(index)
    chosen = [mx.zeros((0,), mx.uint32)] * len(answers)  # (1,) for each answer
    for members in groups.values():
        logprobs = log_softmax(mx.concatenate([prepared[index] for index in members]))
        keys = mx.stack([answers[index].step_key for index in members])
        # All members have the same sampling options, so take those of the first one.
        tokens = choose_tokens(logprobs, keys, answers[members[0]].options)
        for row, index in enumerate(members):
            chosen[index] = tokens[row : row + 1]
    for index, answer in enumerate(answers):
        answer.score(own_logits[index : index + 1], chosen[index])
    return mx.concatenate(chosen)
