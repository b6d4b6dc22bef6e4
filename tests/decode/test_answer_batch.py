"""Answers that join and leave a running batch are what they would be alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_janus
from mlx_janus.decode.answer_batch import AnswerBatch, BatchAnswer
from mlx_janus.decode.constraint import Constraint
from mlx_janus.decode.grammar import Grammar, schema_grammar
from mlx_janus.decode.logprobs import AnswerToken
from mlx_janus.decode.text import TextOptions, answer_tokens
from mlx_janus.errors import OptionError
from mlx_janus.models.backbone import (
    Cache,
    add_rows,
    cache_arrays,
    restore,
    snapshot,
    to_ragged_cache,
)
from mlx_janus.models.janus import JanusModel
from mlx_janus.pipeline import JanusPipeline
from mlx_janus.processing.prompts import Turn

ANYTHING = Grammar("start: /(.|\\n)*/", allows_words=True)
WORDS = schema_grammar({"type": "array", "items": {"type": "string"}, "minItems": 2})
QUESTIONS = [
    "how many shapes are there?",
    "is there a red circle above the blue square or to the left of the green star? " * 6,
    "what is it?",
    "describe the picture, and say where each of the shapes is. " * 3,
]
FORMS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 20, "min_p": 0.01, "logprobs": True, "top_logprobs": 3},
    {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"presence_penalty": 1.0, "logit_bias": {7: 3.0, 30: -100.0}, "logprobs": True},
    {"temperature": 1.0, "grammar": WORDS, "logprobs": True},
    {"grammar": WORDS, "frequency_penalty": 0.5},
    {"temperature": 1.0, "grammar": ANYTHING},
]


@pytest.fixture(scope="module")
def janus() -> JanusPipeline:
    """Janus-Tiny."""
    return mlx_janus.load("tiny")


@dataclass(frozen=True)
class Asked:
    """A question with the options of its answer."""

    question: str
    options: TextOptions

    def arguments(self, janus: JanusPipeline) -> dict[str, Any]:
        """The prompt and the grammar, as both loops take them."""
        ids = janus.prompts.answering([Turn("user", self.question)])
        grammar = self.options.grammar
        constraint = None
        if grammar is not None:
            constraint = janus.grammars.constraint(grammar, self.options.max_tokens)
        embeddings = janus.model.embed_text(mx.array(ids)[None])[0]
        return {"embeddings": embeddings, "ids": ids, "constraint": constraint}

    def join(
        self, batch: AnswerBatch, janus: JanusPipeline, cache: Cache | None = None
    ) -> BatchAnswer:
        """Add the answer to a batch."""
        cache = cache or janus.model.make_cache()
        return batch.add(options=self.options, cache=cache, **self.arguments(janus))

    def alone(self, janus: JanusPipeline) -> list[AnswerToken]:
        """The answer without any other."""
        return list(answer_tokens(janus.model, options=self.options, **self.arguments(janus)))


def asked(number: int, length: int = 20) -> Asked:
    """One of many questions, with its own options and seed."""
    form = FORMS[number % len(FORMS)]
    return Asked(QUESTIONS[number % len(QUESTIONS)], TextOptions(length, seed=number, **form))


def assert_same(tokens: list[AnswerToken], wanted: list[AnswerToken]) -> None:
    """The same tokens, and almost the same log-probabilities."""
    assert [token.id for token in tokens] == [token.id for token in wanted]
    for token, other in zip(tokens, wanted, strict=True):
        if other.logprob is None:
            assert token.logprob is None
        else:
            assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [id_ for id_, _ in token.top] == [id_ for id_, _ in other.top]


@pytest.mark.check
def test_answers_join_at_any_step_and_each_is_as_alone(janus: JanusPipeline) -> None:
    """Different prompts, lengths, sampling and grammars; some are given up."""
    choice = random.Random(5)
    batch = AnswerBatch(janus.model)
    running: dict[BatchAnswer, Asked] = {}
    found: dict[BatchAnswer, list[AnswerToken]] = {}
    most = 0
    waiting = [asked(number, choice.randint(1, 16)) for number in range(14)]
    given_up = []
    while waiting or running:
        while waiting and len(running) < 6 and choice.random() < 0.6:
            question = waiting.pop(0)
            answer = question.join(batch, janus)
            running[answer] = question
            found[answer] = []
        most = max(most, len(batch.answers))
        batch.step()
        for answer in list(running):
            token = next(answer, None)
            if token is not None:
                found[answer].append(token)
            if token is None or choice.random() < 0.02:
                answer.close()
                wanted = running.pop(answer).alone(janus)
                if token is not None:
                    given_up.append(answer)
                    wanted = wanted[: len(found[answer])]
                assert_same(found[answer], wanted)
    assert most >= 4
    assert given_up
    assert not batch.answers


def test_an_answer_without_other_work_advances_the_batch_itself(janus: JanusPipeline) -> None:
    batch = AnswerBatch(janus.model)
    questions = [asked(1), asked(2)]
    answers = [question.join(batch, janus) for question in questions]
    for answer, question in zip(answers, questions, strict=True):
        assert_same(list(answer), question.alone(janus))


def test_an_answer_that_leaves_takes_its_cache_with_it(janus: JanusPipeline) -> None:
    batch = AnswerBatch(janus.model)
    long = asked(1).join(batch, janus)
    cache = janus.model.make_cache()
    question = asked(2)
    short = question.join(batch, janus, cache)
    assert cache[0].offset == 0  # the batch holds the positions
    ids = [next(short).id for _ in range(6)]
    short.close()
    short.close()
    assert batch.answers == [long]
    prompt = question.arguments(janus)["ids"]
    whole = janus.model.make_cache()
    janus.model.hidden_states(janus.model.embed_text(mx.array([[*prompt, *ids]])), whole)
    length = len(prompt) + len(ids)
    assert cache[0].offset in (length, length + 1)
    for held, wanted in zip(cache_arrays(cache), cache_arrays(whole), strict=True):
        assert held.shape[0] == 1
        difference = mx.abs(held[..., :length, :] - wanted[..., :length, :]).max()
        assert difference.item() < 1e-4
    assert_same(list(long), asked(1).alone(janus))


def test_logits_do_not_depend_on_the_other_rows(janus: JanusPipeline) -> None:
    model = janus.model
    caches = []
    alone = []
    following = model.embed_text(mx.array([[5]]))
    for question in QUESTIONS:
        embeddings = Asked(question, TextOptions()).arguments(janus)["embeddings"][None]
        for kept in (caches, alone):
            cache = model.make_cache()
            model.hidden_states(embeddings, cache)
            kept.append(cache)
    batch = to_ragged_cache(caches[0])
    for cache in caches[1:]:
        add_rows(batch, to_ragged_cache(cache))
    together = model.hidden_states(mx.repeat(following, len(QUESTIONS), axis=0), batch)
    for row, cache in enumerate(alone):
        wanted = np.array(model.text_logits(model.hidden_states(following, cache)[0]))
        found = np.array(model.text_logits(together[row]))
        assert np.abs(found - wanted).max() < 1e-4 * wanted.std()


def test_a_grammar_that_refuses_tokens_changes_no_other_answer(
    janus: JanusPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []
    another_mask = Constraint.another_mask

    def counted(self: Constraint, token: int, room: int) -> mx.array | None:
        mask = another_mask(self, token, room)
        if mask is not None:
            refused.append(token)
        return mask

    monkeypatch.setattr(Constraint, "another_mask", counted)
    batch = AnswerBatch(janus.model)
    questions = [
        Asked(QUESTIONS[0], TextOptions(14, 1.0, seed=3, grammar=WORDS, logprobs=True)),
        Asked(QUESTIONS[1], TextOptions(14, 1.0, seed=4)),
        Asked(QUESTIONS[2], TextOptions(9, 1.5, seed=5, grammar=WORDS)),
    ]
    answers = [question.join(batch, janus) for question in questions]
    found = [list(answer) for answer in answers]
    assert len(refused) > 2
    monkeypatch.undo()
    for question, tokens in zip(questions, found, strict=True):
        assert_same(tokens, question.alone(janus))


def test_a_grammar_of_any_text_changes_no_token(janus: JanusPipeline) -> None:
    batch = AnswerBatch(janus.model)
    free = Asked(QUESTIONS[0], TextOptions(12, 1.0, seed=8))
    bound = Asked(QUESTIONS[0], TextOptions(12, 1.0, seed=8, grammar=ANYTHING))
    answers = [question.join(batch, janus) for question in (free, bound)]
    one, other = ([token.id for token in answer] for answer in answers)
    assert other[: len(one)] == one[: len(other)]
    assert len(one) == 12


@pytest.mark.parametrize("method", ["mask", "add"])
def test_an_answer_that_fails_leaves_the_others_as_they_are(
    janus: JanusPipeline, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    batch = AnswerBatch(janus.model)
    lasting = [asked(1), asked(6)]
    answers = [question.join(batch, janus) for question in lasting]
    failing = asked(7).join(batch, janus)
    others = [asked(number) for number in (2, 3)]
    answers += [question.join(batch, janus) for question in others]
    for _ in range(3):
        batch.step()
    function = getattr(Constraint, method)

    def fail_once(self: Constraint, *arguments: Any) -> Any:
        if self is failing._constraint:
            raise OptionError("the schema is too complex")
        return function(self, *arguments)

    monkeypatch.setattr(Constraint, method, fail_once)
    with pytest.raises(OptionError, match="too complex"):
        list(failing)
    assert batch.answers == answers
    with pytest.raises(OptionError, match="too complex"):
        next(failing)
    for question, answer in zip([*lasting, *others], answers, strict=True):
        assert_same(list(answer), question.alone(janus))


def test_a_pass_that_fails_ends_its_answers_and_the_batch_goes_on(
    janus: JanusPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise MemoryError("no room")

    batch = AnswerBatch(janus.model)
    # The first one has only its last token to come, and is not cut silently.
    answers = [asked(1, 1).join(batch, janus), asked(2).join(batch, janus)]
    monkeypatch.setattr(JanusModel, "hidden_states", failing)
    batch.step()
    for answer in answers:
        with pytest.raises(MemoryError):
            next(answer)
    monkeypatch.undo()
    assert not batch.answers
    assert_same(list(asked(3).join(batch, janus)), asked(3).alone(janus))


def test_a_prompt_that_fails_does_not_touch_the_batch(
    janus: JanusPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = AnswerBatch(janus.model)
    answer = asked(1).join(batch, janus)
    broken = asked(2)
    with pytest.raises(ValueError, match="rms_norm"):
        batch.add(mx.zeros((4, 3)), broken.options, janus.model.make_cache())
    assert_same(list(answer), asked(1).alone(janus))


def test_a_pass_that_was_built_can_be_undone(janus: JanusPipeline) -> None:
    """A pass with a refused token is neither evaluated nor kept."""
    batch = AnswerBatch(janus.model)
    answers = [asked(number).join(batch, janus) for number in (1, 2)]
    batch.step()
    cache = batch._cache
    mx.eval(cache_arrays(cache))
    position = cache[0].size()
    before = snapshot(cache)
    other = janus.model.hidden_states(janus.model.embed_text(mx.array([[9], [9]])), cache)
    restore(cache, before)
    assert [layer.size() for layer in cache] == [position] * len(cache)
    for array in cache_arrays(cache):
        assert not np.array(array)[..., position, :].any()
    del before, other
    for number, answer in zip((1, 2), answers, strict=True):
        assert_same(list(answer), asked(number).alone(janus))
