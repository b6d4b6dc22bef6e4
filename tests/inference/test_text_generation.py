"""How an answer ends."""

from __future__ import annotations

import mlx_janus
from mlx_janus.inference.text_generation import _Answer


def test_a_stop_string_in_the_last_characters_ends_the_answer(pro: mlx_janus.JanusPipeline) -> None:
    prompts = pro.prompts
    answer = _Answer(prompts.detokenizer(), prompts.end_ids, stop=["\N{REPLACEMENT CHARACTER}"])
    first, *_ = prompts.encode("é")  # half a character, which the end replaces by U+FFFD
    assert answer.add(first) == ""
    assert answer.finish() == ""
    assert answer.ended
