"""How an answer ends."""

from __future__ import annotations

import numpy as np
import pytest

import mlx_janus
from mlx_janus.decode.logprobs import AnswerToken
from mlx_janus.decode.text import TextOptions
from mlx_janus.inference.text_generation import Token, _Answer
from mlx_janus.processing.prompts import Turn
from mlx_janus.worlds import shapes


def test_a_stop_string_in_the_last_characters_ends_the_answer(pro: mlx_janus.JanusPipeline) -> None:
    prompts = pro.prompts
    options = TextOptions(stop=("\N{REPLACEMENT CHARACTER}",))
    answer = _Answer(prompts, options, continues=False)
    first, *_ = prompts.encode("é")  # half a character, which the end replaces by U+FFFD
    assert answer.add(AnswerToken(first)) == Token(first, "")
    assert answer.finish() == ""
    assert answer.ended


@pytest.mark.parametrize("words", [1, 3, 6])
def test_a_begun_answer_is_continued_to_the_same_end(words: int) -> None:
    janus = mlx_janus.load()
    scene = shapes.sample_scene(np.random.default_rng(4), "two")
    image = shapes.render(scene)
    question = Turn("user", "What is in the picture?", images=1)
    options = TextOptions()
    complete = "".join(
        chunk.text for chunk in janus.stream_turns([question], [image], options=options)
    )
    beginning = " ".join(complete.split(" ")[:words])
    assert beginning != complete
    turns = [question, Turn("assistant", beginning)]
    *_, last = janus.stream_turns(turns, [image], options=options)
    assert last.result is not None
    assert beginning + last.result.text == complete
