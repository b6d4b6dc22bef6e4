"""Pictures that join and leave a running batch are what they would be alone."""

from __future__ import annotations

import numpy as np
import pytest

import mlx_janus
from mlx_janus.decode.batch import BatchImage, DrawingBatch
from mlx_janus.decode.image import DrawOptions, text_rows
from mlx_janus.pipeline import JanusPipeline

LONG = (
    "a picture of two red circles and a blue square "
    "to the left of a yellow triangle at the bottom right"
)


@pytest.fixture(scope="module")
def janus() -> JanusPipeline:
    """Janus-Tiny."""
    return mlx_janus.load("tiny")


def begin(
    batch: DrawingBatch, janus: JanusPipeline, prompt: str, options: DrawOptions, *seeds: int
) -> list[BatchImage]:
    ids = janus.pathway.prompt_ids(prompt)
    pictures = [BatchImage(seed, options) for seed in seeds]
    batch.add(text_rows(ids, janus.prompts.unconditional(ids), options), pictures)
    return pictures


def alone(janus: JanusPipeline, prompt: str, picture: BatchImage) -> np.ndarray:
    options = picture.options
    drawn = janus.generate_images(
        prompt,
        seed=picture.seed,
        cfg_weight=options.cfg_weight,
        temperature=options.temperature,
        top_p=options.top_p,
        exact=True,
    )
    return drawn[0].tokens


def test_pictures_join_at_any_step_and_each_is_as_drawn_alone(janus: JanusPipeline) -> None:
    joins = {
        0: ("a red circle", DrawOptions(2.5, 0.6), (3, 4)),
        7: (LONG, DrawOptions(1.0, 1.0, 0.9), (5,)),
        20: ("a star", DrawOptions(5.0, 0.0), (6, 7)),
        30: ("two blue squares", DrawOptions(0.0, 1.2), (8,)),
        90: ("a star", DrawOptions(2.5, 0.6), (9,)),
    }
    batch, begun, whole = DrawingBatch(janus.model), {}, []
    for step in range(90 + janus.config.generation.tokens):
        if step in joins:
            prompt, options, seeds = joins[step]
            begun |= dict.fromkeys(begin(batch, janus, prompt, options, *seeds), prompt)
        whole += batch.step()
    assert whole == list(begun)  # in the order in which they began: all have as many tokens
    assert not batch.images
    for picture, prompt in begun.items():
        assert np.array_equal(picture.tokens(), alone(janus, prompt, picture)), (
            prompt,
            picture.seed,
        )


def test_a_picture_given_up_leaves_the_others_as_they_are(janus: JanusPipeline) -> None:
    batch, options = DrawingBatch(janus.model), DrawOptions(2.5, 0.6)
    first = begin(batch, janus, "a red circle", options, 1, 2)
    unguided = begin(batch, janus, "a green square", DrawOptions(1.0, 0.8), 3)
    second = begin(batch, janus, LONG, options, 4)
    for _ in range(10):
        assert batch.step() == []
    batch.remove([first[0], unguided[0]])
    batch.remove([first[0]])  # gone already
    assert batch.images == [first[1], second[0]]
    assert len(first[0]) == 10
    for _ in range(janus.config.generation.tokens - 10):
        whole = batch.step()
    assert whole == [first[1], second[0]]
    assert np.array_equal(first[1].tokens(), alone(janus, "a red circle", first[1]))
    assert np.array_equal(second[0].tokens(), alone(janus, LONG, second[0]))
    assert batch.step() == []


def test_a_batch_that_was_emptied_can_be_filled_again(janus: JanusPipeline) -> None:
    batch = DrawingBatch(janus.model)
    batch.remove(begin(batch, janus, "a star", DrawOptions(), 1))
    (picture,) = begin(batch, janus, "a star", DrawOptions(2.5, 0.6), 11)
    for _ in range(janus.config.generation.tokens):
        batch.step()
    assert np.array_equal(picture.tokens(), alone(janus, "a star", picture))
