"""Plans and reflection as the published code of T2I-R1 and Janus-Pro-R1, on the pro folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from mlx_janus.inference import planning
from mlx_janus.inference.image_generation import image_jobs
from mlx_janus.inference.pathway import EarlierImage, ImageJob
from mlx_janus.inference.planning import plan_ids, planned_job
from mlx_janus.inference.reflection import judge_ids, redraw_job
from mlx_janus.inference.text_generation import embed_prompt
from mlx_janus.inference.vq_pathway import VQPathway
from mlx_janus.processing.images import preprocess
from mlx_janus.processing.prompts import Prompts
from tests.support.golden import FIXTURES, assert_close

GOLDEN = FIXTURES / "reasoning.golden.safetensors"
STEPS = 3  # whose logits the file has
_REDRAW_ROWS = VQPathway._redraw_rows


@cache
def want() -> dict[str, mx.array]:
    arrays = mx.load(str(GOLDEN))
    assert isinstance(arrays, dict)
    return arrays


def fact(name: str) -> str:
    with safe_open(str(GOLDEN), framework="numpy") as file:
        return str(file.metadata()[name])


def ids_of(name: str) -> list[int]:
    return list(map(int, np.array(want()[name])))


def first_job(janus: Any, case: str) -> ImageJob:
    (job,) = image_jobs(janus, fact(f"{case}.prompt"), 1, 0, {"temperature": 0})
    return job


def check_text_logits(janus: Any, embeddings: mx.array, tokens: Sequence[int], name: str) -> None:
    """The logits of the first steps, given the reference's tokens."""
    read = mx.concatenate([embeddings, janus.model.embed_text(mx.array(tokens[: STEPS - 1]))])
    logits = janus.model.text_logits(janus.model.hidden_states(read[None])[0, -STEPS:])
    for step in range(STEPS):
        assert_close(logits[step], want()[f"{name}.step{step}.logits"])


def check_image_logits(janus: Any, job: ImageJob, name: str) -> None:
    """The logits of both rows in the first steps, given the reference's image tokens."""
    tokens = want()[f"{name}.greedy_tokens"][: STEPS - 1]
    rows = janus.pathway._rows(job, job.options)
    for row, label in zip(rows, ("full", "uncond"), strict=True):
        read = mx.concatenate([row.embed(janus.model), janus.model.embed_image_tokens(tokens)])
        logits = janus.model.image_logits(janus.model.hidden_states(read[None])[0, -STEPS:])
        for step in range(STEPS):
            assert_close(logits[step], want()[f"{name}.step{step}.logits_{label}"])


def check_pixels(image: Image.Image, name: str) -> None:
    difference = np.asarray(image).astype(int) - np.array(want()[name])
    assert np.abs(difference).max() <= 1  # a value may be at the edge between two bytes
    assert np.count_nonzero(difference) <= 2


# A plan, then the image


def check_plan_stages(janus: Any) -> None:
    prompt = fact("plan.prompt")
    assert plan_ids(janus, prompt) == ids_of("plan.input_ids")
    job = planned_job(janus, first_job(janus, "plan"), fact("plan.text"))
    assert job.ids == ids_of("plan.draw.input_ids")
    embeddings = janus.model.embed_text(want()["plan.input_ids"])
    check_text_logits(janus, embeddings, ids_of("plan.greedy_tokens"), "plan")
    check_image_logits(janus, job, "plan.draw")


def test_the_stages_of_a_plan(pro: Any) -> None:
    check_plan_stages(pro)


def test_a_plan_with_other_roles_is_noticed(pro: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "plan_prompts", lambda janus: janus.prompts)
    with pytest.raises(AssertionError):
        check_plan_stages(pro)


@pytest.mark.check
@pytest.mark.parametrize("window", [1, 4])
def test_a_greedy_plan_and_its_image_are_the_references(pro: Any, window: int) -> None:
    """By the public names."""
    options = {"temperature": 0, "window": window, "seed": 3}
    prompt = fact("plan.prompt")
    (image,) = pro.generate_images(
        prompt, plan=True if window == 1 else fact("plan.text"), **options
    )
    assert image.plan == fact("plan.text")
    assert image.tokens.tolist() == ids_of("plan.draw.greedy_tokens")
    check_pixels(image.image, "plan.draw.image_u8")
    assert image.prompt == prompt


# An image, its judgement, another image


def check_reflection_stages(janus: Any, case: str) -> None:
    name = f"reflect.{case}"
    job = first_job(janus, name)
    assert job.ids == ids_of(f"{name}.input_ids")
    check_image_logits(janus, job, f"{name}.draw")
    image = Image.fromarray(np.array(want()[f"{name}.draw.image_u8"]))
    features = janus.encode([preprocess(image, janus.config.image)])
    embeddings = embed_prompt(janus, judge_ids(janus, job.ids), features)
    assert_close(embeddings, want()[f"{name}.judge.inputs_embeds"])
    tokens = ids_of(f"{name}.judge.tokens")
    check_text_logits(janus, embeddings, tokens, f"{name}.judge")
    if case == "no":
        redraw = redraw_job(janus, job, image, tokens, 0)
        rows = janus.pathway._rows(redraw, redraw.options)
        for row, reference in zip(rows, want()[f"{name}.redraw.inputs_embeds"], strict=True):
            assert_close(row.embed(janus.model), reference)
        check_image_logits(janus, redraw, f"{name}.redraw")


@pytest.mark.parametrize("case", ["no", "yes"])
def test_the_stages_of_a_round(pro: Any, case: str) -> None:
    check_reflection_stages(pro, case)


def _keep_all(_prompts: Prompts, ids: Sequence[int]) -> list[int]:
    return list(ids)


def _drop_the_rest(self: Any, ids: Sequence[int], earlier: EarlierImage, options: Any) -> Any:
    """The rows of a redrawing whose unconditional row lacks the image and the judgement too."""
    full, _ = _REDRAW_ROWS(self, ids, earlier, options)
    unconditional = self._janus.prompts.unconditional(ids)
    rows = [full.embed(self._janus.model), self._janus.model.embed_text(mx.array(unconditional))]
    return [type(full)(row) for row in rows]


@pytest.mark.parametrize(
    ("owner", "name", "mistake"),
    [
        (Prompts, "unconditional", _keep_all),
        (VQPathway, "_redraw_rows", _drop_the_rest),
    ],
)
def test_a_wrong_unconditional_row_is_noticed(
    pro: Any, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, mistake: Any
) -> None:
    monkeypatch.setattr(owner, name, mistake)
    with pytest.raises(AssertionError):
        check_reflection_stages(pro, "no")


@pytest.mark.check
@pytest.mark.parametrize("window", [1, 4])
def test_greedy_rounds_are_the_references(pro: Any, window: int) -> None:
    """By the public names: a Yes ends the rounds, and a No leads to another image."""
    prompts = [fact("reflect.no.prompt"), fact("reflect.yes.prompt")]
    again, kept = pro.generate_images(prompts, reflect=1, temperature=0, seed=3, window=window)
    assert [one.matches for one in again.rounds] == [False, None]
    assert [one.matches for one in kept.rounds] == [True]
    assert again.rounds[0].words == fact("reflect.no.words")
    assert kept.rounds[0].words == fact("reflect.yes.words")
    check_pixels(again.rounds[0].image, "reflect.no.draw.image_u8")
    check_pixels(kept.image, "reflect.yes.draw.image_u8")
    check_pixels(again.image, "reflect.no.redraw.image_u8")
    assert again.tokens.tolist() == ids_of("reflect.no.redraw.greedy_tokens")
    assert kept.tokens.tolist() == ids_of("reflect.yes.draw.greedy_tokens")
