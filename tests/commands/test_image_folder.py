"""A folder of numbered images: names of files, and calls that draw what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_janus.commands.image_folder import DrawCall, image_files, plan_calls

PROMPTS = ("A fox!", "城", "an owl " * 20)


def test_names_have_the_prompts_number_its_words_and_the_images_number() -> None:
    names = [file.path.name for file in image_files(Path("out"), PROMPTS, 1)]
    assert names == [
        "0001-a-fox.png",
        "0002-picture.png",
        "0003-an-owl-an-owl-an-owl-an-owl-an-owl-an-ow.png",
    ]
    files = image_files(Path("out"), PROMPTS, 2)
    assert [(file.index, file.path.name) for file in files[:2]] == [
        (0, "0001-a-fox-1.png"),
        (1, "0001-a-fox-2.png"),
    ]


@pytest.mark.parametrize(
    ("there", "calls"),
    [
        ([], [DrawCall(PROMPTS, 0, 2)]),
        ([0, 1, 2, 3, 4, 5], []),
        ([0], [DrawCall(PROMPTS[1:], 0, 2), DrawCall(PROMPTS[:1], 1, 1)]),
        ([1, 2, 5], [DrawCall((PROMPTS[0], PROMPTS[2]), 0, 1), DrawCall(PROMPTS[1:2], 1, 1)]),
        ([2, 3], [DrawCall((PROMPTS[0], PROMPTS[2]), 0, 2)]),
    ],
)
def test_prompts_that_lack_all_are_drawn_together(there: list[int], calls: list[DrawCall]) -> None:
    files = image_files(Path("out"), PROMPTS, 2)
    missing = [file for number, file in enumerate(files) if number not in there]
    assert list(plan_calls(missing, 2)) == calls
    drawn = [
        (prompt, call.index + offset)
        for call in plan_calls(missing, 2)
        for prompt, offset in [
            (prompt, offset) for prompt in call.prompts for offset in range(call.n)
        ]
    ]
    assert sorted(drawn) == sorted((file.prompt, file.index) for file in missing)  # each once
