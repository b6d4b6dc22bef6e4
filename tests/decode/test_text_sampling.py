"""Penalties, bias, filters and log-probabilities of answers, against OpenAI's formulas in NumPy."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_janus
from mlx_janus.decode.sampling import scale_logits
from mlx_janus.errors import OptionError
from mlx_janus.processing.prompts import Turn

Janus = mlx_janus.JanusPipeline

QUESTION = "Hello? Say it again."
LENGTH = 30  # tokens of an answer
PENALTIES: list[dict[str, Any]] = [
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -0.5},
    {"presence_penalty": 1.5},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "presence_penalty": -0.3},
    {"logit_bias": {7: 2.5, 11: -100, 300: 1}},
]
FILTERS: list[dict[str, Any]] = [{"top_k": 5}, {"min_p": 0.2}, {"top_k": 8, "top_p": 0.6}]
ALL: dict[str, Any] = {
    "frequency_penalty": 0.4,
    "presence_penalty": 0.2,
    "repetition_penalty": 1.1,
    "logit_bias": {7: 1.5, 20: -3},
    "top_k": 40,
    "min_p": 0.02,
    "top_p": 0.95,
}


def prompt_ids(janus: Janus) -> list[int]:
    return janus.prompts.answering([Turn("user", QUESTION)])


def own_logits(janus: Janus, ids: list[int]) -> np.ndarray:
    """The logits of all positions by one pass of the network, without a cache: (L, V)."""
    embeddings = janus.model.embed_text(mx.array([ids]))
    logits = janus.model.text_logits(janus.model.hidden_states(embeddings))
    return np.array(logits[0]).astype(np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def changed(logits: np.ndarray, prompt: list[int], answer: list[int], o: dict[str, Any]) -> Any:
    """Bias, repetition penalty over all text, OpenAI's two penalties over the whole answer."""
    z = logits.copy()
    for token, bias in o.get("logit_bias", {}).items():
        z[token] += bias
    for token in {*prompt, *answer}:
        factor = o.get("repetition_penalty", 1)
        z[token] = z[token] / factor if z[token] > 0 else z[token] * factor
    for token, count in Counter(answer).items():
        z[token] -= count * o.get("frequency_penalty", 0) + o.get("presence_penalty", 0)
    return z


def filtered(z: np.ndarray, o: dict[str, Any]) -> np.ndarray:
    """Probabilities that min-p, top-k and the nucleus keep, in this order; they do not sum to 1."""
    p = np.exp(log_softmax(z))
    p[p < o.get("min_p", 0) * p.max()] = 0
    order = np.argsort(-p)
    p[order[o.get("top_k") or len(p) :]] = 0
    above = np.cumsum(p[order]) - p[order]
    p[order[above >= o.get("top_p", 1) * p.sum()]] = 0
    return p


def expected_answer(janus: Janus, seed: int, temperature: float, o: dict[str, Any]) -> list[int]:
    prompt = prompt_ids(janus)
    answer: list[int] = []
    key = mx.random.key(seed)
    while len(answer) < LENGTH:
        key, step_key = mx.random.split(key)
        z = changed(own_logits(janus, [*prompt, *answer])[-1], prompt, answer, o)
        if temperature:
            noise = np.array(mx.random.gumbel(z.shape, key=step_key))
            with np.errstate(divide="ignore"):
                z = np.log(filtered(z / temperature, o)) + noise
        token = int(z.argmax())
        if token in janus.prompts.end_ids:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("options", [*PENALTIES, ALL], ids=str)
def test_greedy_answers_follow_the_formulas(pro: Janus, options: dict[str, Any]) -> None:
    plain = pro.generate_text(QUESTION, max_tokens=LENGTH).tokens
    result = pro.generate_text(QUESTION, max_tokens=LENGTH, **options)
    assert list(result.tokens) == expected_answer(pro, 0, 0, options)
    assert result.tokens != plain
    drafted = pro.generate_text(QUESTION, max_tokens=LENGTH, lookup=5, **options)
    assert drafted.tokens == result.tokens


@pytest.mark.parametrize(
    "options", [*FILTERS, {"frequency_penalty": -2}, PENALTIES[3], ALL], ids=str
)
def test_sampled_answers_follow_the_formulas(pro: Janus, options: dict[str, Any]) -> None:
    """The same noise, over the tokens that the filters keep."""
    choice: dict[str, Any] = {"max_tokens": LENGTH, "temperature": 1.3, "seed": 5}
    result = pro.generate_text(QUESTION, **choice, **options)
    assert list(result.tokens) == expected_answer(pro, 5, 1.3, options)
    assert result.tokens != pro.generate_text(QUESTION, **choice).tokens
    drafted = pro.generate_text(QUESTION, lookup=5, **choice, **options)
    assert drafted.tokens == result.tokens


@pytest.mark.parametrize("options", [*FILTERS, {"top_k": 3, "min_p": 0.1, "top_p": 0.9}], ids=str)
def test_filters_keep_the_tokens_of_the_formula(options: dict[str, Any]) -> None:
    logits = np.random.default_rng(1).normal(size=(6, 50)).astype(np.float32) * 3
    choice = {"top_p": 1.0} | options
    kept = np.array(scale_logits(mx.array(logits), 0.7, **choice))
    for row, expected in zip(kept, logits, strict=True):
        assert np.array_equal(np.isfinite(row), filtered(expected / 0.7, options) > 0)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0}, {"min_p": 1}], ids=str)
def test_the_narrowest_filters_are_greedy(pro: Janus, options: dict[str, Any]) -> None:
    greedy = pro.generate_text(QUESTION, max_tokens=LENGTH)
    hot = pro.generate_text(QUESTION, max_tokens=LENGTH, temperature=3, seed=2, **options)
    assert hot.tokens == greedy.tokens


def test_values_that_change_nothing(pro: Janus) -> None:
    choice: dict[str, Any] = {"max_tokens": LENGTH, "temperature": 1.2, "seed": 3}
    plain = pro.generate_text(QUESTION, **choice)
    neutral: list[dict[str, Any]] = [
        {"top_k": -1, "min_p": 0, "top_p": 1, "logprobs": False, "top_logprobs": 0},
        {"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1},
        {"logit_bias": {}, "top_k": 2**31 - 1},
        {"logit_bias": {3: 0}},
        {"logprobs": True, "top_logprobs": 5},
    ]
    for options in neutral:
        assert pro.generate_text(QUESTION, **choice, **options).tokens == plain.tokens


def test_a_bias_forces_and_bans_a_token(pro: Janus) -> None:
    token = next(i for i in range(20, 40) if i not in pro.prompts.end_ids)
    forced = pro.generate_text(QUESTION, max_tokens=4, logit_bias={token: 100})
    assert forced.tokens == (token,) * 4
    free = pro.generate_text(QUESTION, max_tokens=LENGTH)
    ban = dict.fromkeys(free.tokens, -100.0)
    banned = pro.generate_text(QUESTION, max_tokens=LENGTH, logit_bias=ban)
    assert not set(banned.tokens) & set(free.tokens)


# Log-probabilities


@pytest.mark.parametrize("lookup", [0, 5])
@pytest.mark.parametrize("options", [{}, ALL | {"temperature": 1.3, "seed": 5}], ids=str)
def test_logprobs_are_those_of_the_models_own_pass(
    pro: Janus, options: dict[str, Any], lookup: int
) -> None:
    """Whatever changes the choice. Each token is once in the result, and once in the stream."""
    choice: dict[str, Any] = {"max_tokens": LENGTH, "lookup": lookup, **options}
    plain = pro.generate_text(QUESTION, **choice)
    assert plain.logprobs is None
    chunks = list(pro.stream_text(QUESTION, logprobs=True, top_logprobs=4, **choice))
    result = chunks[-1].result
    assert result is not None
    assert result.logprobs is not None
    assert result.tokens == plain.tokens == tuple(token.id for token in result.logprobs)
    assert [token for chunk in chunks for token in chunk.logprobs] == list(result.logprobs)
    assert "".join(chunk.text for chunk in chunks) == result.text == plain.text
    prompt = prompt_ids(pro)
    logprobs = log_softmax(own_logits(pro, [*prompt, *result.tokens])[len(prompt) - 1 :])
    for token, row in zip(result.logprobs, logprobs, strict=False):
        assert token.logprob == pytest.approx(row[token.id], abs=1e-4)
        assert [likely.id for likely in token.top] == np.argsort(-row)[:4].tolist()
        assert [likely.logprob for likely in token.top] == pytest.approx(
            -np.sort(-row)[:4], abs=1e-4
        )
        assert not any(likely.top for likely in token.top)


def test_bytes_of_tokens_are_those_of_the_text(pro: Janus) -> None:
    """Also where a token is a part of a character; and a control token has none."""
    ids = pro.prompts.encode("é 猫 x")
    spelled = [pro.prompts.spelling(token) for token in ids]
    assert b"".join(utf8 for _, utf8 in spelled if utf8 is not None).decode() == "é 猫 x"
    assert any("\N{REPLACEMENT CHARACTER}" in text for text, _ in spelled)
    eos = pro.prompts.special.eos
    assert pro.prompts.spelling(eos) == (pro.prompts.config.eos, None)
    result = pro.generate_text(QUESTION, max_tokens=2, logit_bias={ids[0]: 100}, logprobs=True)
    assert result.logprobs is not None
    assert [token.utf8 for token in result.logprobs] == [spelled[0][1]] * 2


def test_logprobs_where_text_is_held_back_and_cut(pro: Janus) -> None:
    """A stop string cuts the text; the tokens, the stop string's too, keep their places."""
    whole = pro.generate_text(QUESTION, max_tokens=LENGTH)
    stop = whole.text[8:12]
    chunks = list(pro.stream_text(QUESTION, max_tokens=LENGTH, stop=stop, logprobs=True))
    result = chunks[-1].result
    assert result is not None
    assert result.logprobs is not None
    assert result.text == whole.text[: whole.text.index(stop)]
    assert result.tokens == whole.tokens[: len(result.tokens)]
    assert [token.id for chunk in chunks for token in chunk.logprobs] == list(result.tokens)
    assert "".join(chunk.text for chunk in chunks) == result.text


def test_a_conversation_takes_them_too(pro: Janus) -> None:
    talk = pro.conversation()
    choice: dict[str, Any] = {"max_tokens": 8, "frequency_penalty": 1.0, "logprobs": True}
    result = talk.send(QUESTION, **choice)
    assert result.tokens == pro.generate_text(QUESTION, **choice).tokens
    assert result.logprobs is not None
    assert len(result.logprobs) == len(result.tokens)
    later = talk.send("Again?", **choice)
    assert later.cached_tokens >= result.prompt_tokens


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"top_p": -0.1}, "top_p"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {1: 101}}, "logit_bias"),
        ({"logit_bias": {-1: 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {10**6: 1}}, "logit_bias must have token ids from 0 to"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs=True"),
    ],
)
def test_values_out_of_range(pro: Janus, options: dict[str, Any], word: str) -> None:
    with pytest.raises(OptionError, match=word):
        pro.stream_text(QUESTION, **options)
    with pytest.raises(OptionError, match=word):
        pro.conversation().stream(QUESTION, **options)
