"""Changing images as the published code of Janus-4o does, on the weights of the pro folder."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from mlx_janus.errors import OptionError, PromptError
from mlx_janus.inference.pathway import ImageJob, InputImages
from mlx_janus.processing.images import preprocess
from tests.support.golden import FIXTURES, assert_close

GOLDEN = FIXTURES / "janus4o.golden.safetensors"
CASES = {"edit": 1, "edit2": 2}  # number of images


@cache
def want() -> dict[str, mx.array]:
    arrays = mx.load(str(GOLDEN))
    assert isinstance(arrays, dict)
    return arrays


def instruction(case: str) -> str:
    with safe_open(str(GOLDEN), framework="numpy") as file:
        prompt = file.metadata()[f"{case}.prompt"]
    return str(prompt.split("<end_of_image>")[-1].split("\n\n")[0])


def pictures(case: str) -> list[Image.Image]:
    return [Image.fromarray(np.array(want()[f"image.{i}.rgb"])) for i in range(CASES[case])]


@pytest.mark.parametrize("case", CASES)
def test_the_prompt_and_its_three_rows(pro: Any, case: str) -> None:
    ids = pro.pathway.edit_prompt_ids(instruction(case), CASES[case])
    assert ids == want()[f"{case}.input_ids"].tolist()
    pixels = tuple(preprocess(image, pro.config.image) for image in pictures(case))
    for ours, reference in zip(pixels, want()[f"{case}.pixel_values"], strict=True):
        assert_close(ours.transpose(2, 0, 1), reference)
    tokens = pro.model.encode_image_tokens(mx.array(np.stack(pixels)))
    assert tokens.tolist() == want()[f"{case}.codes"].tolist()
    options = pro.pathway.edit_options({})
    rows = pro.pathway._rows(ImageJob("", ids, 0, options, InputImages(pixels)), options)
    for row, reference in zip(rows, want()[f"{case}.inputs_embeds"], strict=True):
        assert_close(row.embed(pro.model), reference)


@pytest.mark.parametrize("case", CASES)
def test_guided_logits(pro: Any, case: str) -> None:
    options = pro.pathway.edit_options({})
    for step in range(3):
        names = [f"{case}.step{step}.logits_{row}" for row in ("full", "part", "uncond")]
        guided = options.guided([want()[name] for name in names])
        assert_close(guided, want()[f"{case}.step{step}.logits_guided"])


@pytest.mark.check
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_greedy_change_is_the_references(pro: Any, case: str, window: int) -> None:
    """By the public names: the same tokens and pixels, for one image and for two at once."""
    for n in (1, 2):
        changed = pro.generate_images(
            instruction(case), images=pictures(case), n=n, temperature=0, seed=3, window=window
        )
        for image in changed:
            assert image.tokens.tolist() == want()[f"{case}.greedy_tokens"].tolist()
            difference = np.asarray(image.image).astype(int) - np.array(
                want()[f"{case}.image_u8"][0]
            )
            # A value may be at the edge between two bytes.
            assert np.abs(difference).max() <= 1
            assert np.count_nonzero(difference) <= 2
    assert changed[0].metadata["cfg_weight2"] == "5"


def test_other_weights_of_guidance(pro: Any) -> None:
    (changed,) = pro.generate_images(
        instruction("edit"),
        images=pictures("edit"),
        cfg_weight=3,
        cfg_weight2=1,
        temperature=0,
        window=1,
    )
    assert changed.tokens.tolist() == want()["edit.w3_w2_1.greedy_tokens"].tolist()


@pytest.mark.parametrize(("weight", "rows"), [((1, 0), 1), ((1, 5), 2), ((5, 0), 2), ((5, 5), 3)])
def test_rows_without_effect_are_not_computed(
    pro: Any, weight: tuple[float, float], rows: int
) -> None:
    choices = {"cfg_weight": weight[0], "cfg_weight2": weight[1]}
    options = pro.pathway.edit_options(choices)
    assert options.rows == rows
    (one,) = pro.generate_images("x", images=pictures("edit"), seed=1, window=1, **choices)
    near = {name: value or 1e-6 for name, value in choices.items()}
    near["cfg_weight"] += 1e-6
    (other,) = pro.generate_images("x", images=pictures("edit"), seed=1, window=1, **near)
    assert one.tokens.tolist() == other.tokens.tolist()


def test_what_cannot_be_changed(pro: Any) -> None:
    with pytest.raises(OptionError, match="cfg_weight2"):
        pro.generate_images("x", cfg_weight2=3)
    with pytest.raises(OptionError, match="cfg_weight2"):
        pro.generate_images("x", images=pictures("edit"), cfg_weight2=-1)
    with pytest.raises(PromptError, match="describe the change"):
        pro.generate_images(" ", images=pictures("edit"))
