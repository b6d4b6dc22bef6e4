"""The likelihood of given answers equals the reference's, and that of one pass over each alone."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_janus
from mlx_janus.errors import ContextLengthError, OptionError, PromptError
from mlx_janus.inference.scoring import spellings_of
from mlx_janus.inference.text_generation import embed_prompt
from mlx_janus.processing.images import open_image, preprocess
from mlx_janus.processing.prompts import Prompts, Turn
from mlx_janus.worlds import shapes
from tests.support.golden import golden

PRO = "deepseek-pro-bin"
QUESTION = "What is in this image?"


def alone(janus: Any, prompt: mx.array, ids: list[int]) -> list[float]:
    """The log-probability of each id, by one pass over prompt and answer without a cache."""
    answer = janus.model.embed_text(mx.array([ids]))[0]
    hidden = janus.model.hidden_states(mx.concatenate([prompt, answer])[None])[0]
    logits = np.array(janus.model.text_logits(hidden[len(prompt) - 1 : -1])).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))[:, None]
    logprobs -= logits.max(-1, keepdims=True)
    return [float(logprobs[i, token]) for i, token in enumerate(ids)]


def test_scores_are_the_references(pro: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's logits of its own answer of 16 tokens; here beginnings of it, in one batch."""
    want = golden(PRO)
    tokens = want["und.greedy_tokens"][0].tolist()
    logits = np.array(want["und.greedy_logits"][0]).astype(np.float64)
    highest = logits.max(-1)
    logsumexp = highest + np.log(np.exp(logits - highest[:, None]).sum(-1))
    logprobs = logits[np.arange(16), tokens] - logsumexp
    answers = {str(length): tokens[:length] for length in (16, 1, 5, 2)}
    encode = Prompts.encode
    monkeypatch.setattr(Prompts, "encode", lambda self, t: answers.get(t) or encode(self, t))
    pixels = np.array(want["und.pixel_values"][0, 0]).transpose(1, 2, 0)
    monkeypatch.setattr("mlx_janus.pipeline.preprocess", lambda *_: pixels)
    monkeypatch.setattr("mlx_janus.pipeline.open_image", lambda image: image)
    scores = pro.score(QUESTION, list(answers), b"replaced by the reference's pixels")
    for score, length in zip(scores, (16, 1, 5, 2), strict=True):
        found = [token.logprob for token in score.tokens]
        assert found == pytest.approx(logprobs[:length].tolist(), abs=1e-4)
        assert score.logprob == pytest.approx(logprobs[:length].sum(), abs=1e-4)
        assert [token.id for token in score.tokens] == tokens[:length]


def test_a_score_does_not_depend_on_the_answers_beside_it(pro: Any) -> None:
    """40 answers of different lengths take three passes, with padding."""
    words = [
        "a",
        "red",
        "circle",
        "above",
        "the",
        "blue",
        "star",
        "and",
        "below",
        "a",
        "green",
        "square",
    ]
    answers = [" ".join(words[: 1 + i % 12]) + "!" * (i // 12) for i in range(40)]
    image = shapes.render(shapes.sample_scene(np.random.default_rng(1), "single"))
    ids = pro.prompts.answering([Turn("user", QUESTION, 1)])
    pixels = preprocess(open_image(image), pro.config.image)
    prompt = embed_prompt(pro, ids, pro.encode([pixels]))
    scores = pro.score(QUESTION, answers, image)
    assert [score.answer for score in scores] == answers
    for score in islice(scores, 0, 40, 7):
        expected = alone(pro, prompt, pro.prompts.encode(score.answer))
        assert [token.logprob for token in score.tokens] == pytest.approx(expected, abs=1e-4)
        assert score.mean_logprob == pytest.approx(np.mean(expected), abs=1e-4)


def test_spellings_are_summed(pro: Any) -> None:
    (summed,) = pro.score(QUESTION, "yes", spellings=True)
    spellings = ["yes", "Yes", " yes", " Yes"]
    assert sorted(spellings_of("yes")) == sorted(spellings)
    each = pro.score(QUESTION, spellings)
    total = math.log(sum(math.exp(score.logprob) for score in each))
    assert summed.logprob == pytest.approx(total, abs=1e-5)
    likeliest = max(each, key=lambda score: score.logprob)
    assert summed.spelling == likeliest.answer
    assert [token.id for token in summed.tokens] == [token.id for token in likeliest.tokens]


@pytest.mark.check
def test_the_trained_model_chooses_by_likelihood() -> None:
    janus = mlx_janus.load()
    colours = list(shapes.COLOURS)
    random = np.random.default_rng(5)
    right = 0
    for _ in range(12):
        scene = shapes.sample_scene(random, "single")
        image = shapes.render(scene)
        scores = janus.score("what color is the shape?", colours, image, spellings=True)
        best = max(scores, key=lambda score: score.logprob)
        right += best.answer == scene.things[0].colour
    assert right == 12


@pytest.mark.parametrize(
    ("prompt", "answers", "error"),
    [
        ("x", [], OptionError),
        ("x", [""], OptionError),
        ("x", ["a", 3], OptionError),
        ("x", 3, OptionError),
        (" ", ["a"], PromptError),
        ("x", ["a b " * 50_000], ContextLengthError),
    ],
)
def test_what_cannot_be_scored_is_refused(
    pro: Any, prompt: str, answers: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        pro.score(prompt, answers)
