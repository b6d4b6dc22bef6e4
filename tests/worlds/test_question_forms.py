"""Questions in the forms of benchmarks keep their meaning, and their answers stay true."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mlx_janus.worlds import language, question_forms, shapes
from mlx_janus.worlds.question_forms import LETTERS, OPTIONS, SHORT, YES_OR_NO


def asked(form: question_forms.Form, number: int = 400) -> list[tuple[language.Question, ...]]:
    """Plain questions, each with the question in a form."""
    random = np.random.default_rng(5)
    pairs = []
    for _ in range(number):
        plain = language.question(shapes.sample_scene(random), random)
        pairs.append((plain, question_forms.reword(plain, form, random)))
    return pairs


def test_options_hold_the_answer_once_under_its_letter() -> None:
    letters = Counter()
    for plain, question in asked("options"):
        if OPTIONS not in question.text:
            assert question.answer == plain.answer
            assert plain.about in ("description", "content")
            continue
        first, *lines, last = [line for line in question.text.split("\n") if line]
        assert first.endswith("?")
        assert last == OPTIONS
        options = dict(line.split(". ", 1) for line in lines)
        assert "".join(options) == LETTERS[: len(options)]
        assert options[question.answer] == plain.answer
        assert len(set(options.values())) == len(options) > 1
        letters[question.answer] += 1
    assert set(letters) == set(LETTERS)
    assert max(letters["C"], letters["D"]) < 2 * min(letters["A"], letters["B"])


def test_short_forms_keep_the_answer() -> None:
    for plain, question in asked("yes or no"):
        assert question.answer == plain.answer
        assert question.text.endswith(YES_OR_NO) == (plain.answer in ("yes", "no"))
    for plain, question in asked("short"):
        assert question.answer == plain.answer
        assert question.text.endswith(f"\n{SHORT}") == (plain.about != "description")


def test_half_of_the_questions_for_what_is_there_say_in_the_image() -> None:
    random = np.random.default_rng(0)
    plain = language.existence_question("circle", "red", yes=True)
    texts = Counter(question_forms.reword(plain, "plain", random).text for _ in range(400))
    assert 140 < texts.pop("Is there a red circle?") < 260
    assert set(texts) == {
        "Is there a red circle in the image?",
        "Is there a red circle in the picture?",
        "Is there a red circle in this image?",
    }


@pytest.mark.parametrize("form", question_forms.FORMS)
def test_every_form_is_sampled(form: question_forms.Form) -> None:
    random = np.random.default_rng(0)
    plain = language.existence_question("circle", "red", yes=True)
    shares = {form: 1.0}
    assert (
        question_forms.sample_form(plain, np.random.default_rng(1), shares).text
        == question_forms.reword(plain, form, _after_choice(shares)).text
    )
    texts = [question_forms.sample_form(plain, random).text for _ in range(200)]
    mark = {"plain": "?", "yes or no": YES_OR_NO, "short": SHORT, "options": OPTIONS}[form]
    share = sum(text.endswith(mark) for text in texts) / len(texts)
    assert abs(share - question_forms.FORMS[form]) < 0.12


def _after_choice(shares: dict[question_forms.Form, float]) -> np.random.Generator:
    """The generator after the form was chosen."""
    random = np.random.default_rng(1)
    random.choice(len(shares), p=list(shares.values()))
    return random
