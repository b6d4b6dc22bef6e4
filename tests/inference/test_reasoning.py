"""Drawing by plans and with reflection: results, metadata, steps, options and ends."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_janus
from mlx_janus.errors import ContextLengthError, OptionError
from mlx_janus.inference import planning, reflection
from mlx_janus.inference.image_generation import image_jobs
from mlx_janus.inference.reflection import Judgement
from mlx_janus.inference.results import GeneratedImage, read_settings
from mlx_janus.weights.convert import Source, convert_checkpoint
from tests.support.golden import FIXTURES

PRO = FIXTURES / "deepseek-pro-bin"
SHORT = 12  # tokens of a plan, for quick tests


@pytest.fixture(autouse=True)
def _short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights never end a text by themselves."""
    monkeypatch.setattr(planning, "MAX_PLAN_TOKENS", SHORT)
    monkeypatch.setattr(reflection, "MAX_JUDGEMENT_TOKENS", SHORT)


def draw(janus: mlx_janus.JanusPipeline, prompt: str, **options: Any) -> list[GeneratedImage]:
    return janus.generate_images(prompt, window=1, **options)


def judgements(monkeypatch: pytest.MonkeyPatch, *verdicts: bool) -> None:
    """Replace the model's verdicts, one for each judgement, and keep their words."""
    judge = reflection.judge
    given = iter(verdicts)

    def decided(*arguments: Any) -> Generator[str, None, Judgement]:
        own = yield from judge(*arguments)
        return Judgement(next(given), own.probability, own.tokens, own.words)

    monkeypatch.setattr(reflection, "judge", decided)


# Plans


def test_each_image_has_its_own_plan_and_is_drawn_again_by_it(pro: Any) -> None:
    first, second = draw(pro, "a red fox", n=2, plan=True, seed=7)
    assert (first.seed, second.seed) == (7, 8)
    assert first.plan != second.plan
    assert first.plan == first.metadata["plan"]
    (again,) = draw(pro, "a red fox", plan=first.plan, seed=7)
    assert np.array_equal(again.image, first.image)
    assert again.metadata == first.metadata
    (planned_again,) = draw(pro, "a red fox", plan=True, seed=8)
    assert planned_again.plan == second.plan
    (plain,) = draw(pro, "a red fox", seed=7)
    assert plain.plan is None
    assert not np.array_equal(plain.image, first.image)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_file_keeps_the_plan(pro: Any, tmp_path: Path, suffix: str) -> None:
    plan = " a “fox”,\r\n\x02 with \ufffd and\ttabs  "
    (image,) = draw(pro, "a fox", plan=plan, seed=1)
    settings = read_settings(image.save(tmp_path / f"fox{suffix}"))
    assert settings["plan"] == plan
    assert settings["reflect"] == 0


def test_an_empty_plan_is_a_plan(pro: Any, tmp_path: Path) -> None:
    (image,) = draw(pro, "a fox", plan="", seed=1)
    assert image.plan == ""
    assert read_settings(image.save(tmp_path / "fox.png"))["plan"] == ""


@pytest.mark.parametrize(
    ("name", "plans"),
    [
        ("CaraJ/T2I-R1", True),
        ("someone/t2i-r1-4bit", True),
        ("T2I_R1", True),
        ("someone/T2I-R12", False),
        ("deepseek-ai/Janus-Pro-7B", False),
        ("midbee/Janus-Pro-R1-7B", False),
    ],
)
def test_the_recorded_name_decides_whether_plans_are_the_default(
    pro: Any, monkeypatch: pytest.MonkeyPatch, name: str, plans: bool
) -> None:
    monkeypatch.setattr(pro, "_source", name)
    assert pro.trained_for_plans is plans
    (image,) = draw(pro, "x", seed=1)
    assert (image.plan is not None) is plans


def test_the_default_of_t2i_r1_gives_way_to_the_request(tmp_path: Path) -> None:
    convert_checkpoint(Source(PRO, "CaraJ/T2I-R1"), tmp_path / "model")
    janus = mlx_janus.load(tmp_path / "model", dtype="float32")
    assert draw(janus, "x", seed=1)[0].plan is not None
    assert draw(janus, "x", seed=1, plan=False)[0].plan is None
    plain = janus.prompts.with_roles("plain")
    assert janus.pathway.prompt_ids("x") == plain.drawing("x") != janus.prompts.drawing("x")
    pro = mlx_janus.load(tmp_path / "model", dtype="float32", roles="pro")
    assert pro.pathway.prompt_ids("x") == janus.prompts.drawing("x")
    picture = Image.new("RGB", (64, 64), "red")
    assert draw(janus, "x", seed=1, images=picture)[0].plan is None


def test_requested_roles_are_those_of_the_plan(converted: dict[str, Path], pro: Any) -> None:
    named = mlx_janus.load(converted["deepseek-pro-bin"], dtype="float32", roles="pro")
    plain = mlx_janus.load(converted["deepseek-pro-bin"], dtype="float32", roles="plain")
    ids = [planning.plan_ids(janus, "a fox") for janus in (pro, plain, named)]
    assert ids[0] == ids[1] != ids[2]


def test_braces_in_a_prompt_are_ordinary_text(pro: Any) -> None:
    text = pro.prompts.decode(planning.plan_ids(pro, "{} and {0} {image}"))
    assert 'based on this prompt: "{} and {0} {image}"\n' in text


def test_a_plan_is_cut_to_the_room_for_it(pro: Any) -> None:
    (job,) = image_jobs(pro, "a fox", 1, 1, {})
    tried: list[str] = []

    def make_job(plan: str) -> Any:
        tried.append(plan)
        if len(pro.prompts.encode(plan)) > SHORT // 2:
            raise ContextLengthError("too long")
        return job

    ids = planning.plan_ids(pro, "a fox")
    for _ in planning.write_plan(pro, job, ids, 0.0, make_job):
        pass
    assert len(tried) > 1
    assert len(tried[-1]) < len(tried[0])


def test_a_prompt_without_room_for_a_plan_is_refused_at_once() -> None:
    janus = mlx_janus.load()
    with pytest.raises(ContextLengthError, match=r"asks for a plan .* shorten the prompt"):
        janus.stream_images("a red circle " * 170, plan=True)
    with pytest.raises(ContextLengthError, match="no room for a judgement: shorten"):
        janus.stream_images("a red circle " * 280, reflect=1)
    with pytest.raises(ContextLengthError, match="shorten"):
        janus.stream_images("a red circle", plan="a red circle " * 330)


# Reflection


def test_an_image_is_drawn_again_until_it_matches(
    pro: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    judgements(monkeypatch, False, False, True)
    (image,) = draw(pro, "a fox", reflect=5, seed=4)
    assert [one.matches for one in image.rounds] == [False, False, True]
    assert image.rounds[-1].image is image.image
    drawings = [np.asarray(one.image) for one in image.rounds]
    assert not np.array_equal(drawings[0], drawings[1])
    assert not np.array_equal(drawings[1], drawings[2])
    (first,) = draw(pro, "a fox", seed=4)
    assert np.array_equal(drawings[0], first.image)
    assert image.steps == 3 * first.steps
    assert image.seed == 4
    for one in image.rounds:
        assert one.words
        assert 0 < one.probability < 1
    settings = read_settings(image.save(tmp_path / "fox.png"))
    assert (settings["seed"], settings["reflect"]) == (4, 5)
    assert '"matches": false' in image.metadata["rounds"]


def test_equal_requests_give_equal_images(pro: Any) -> None:
    one, other = draw(pro, ["a cup", "a cup"], reflect=1, seed=3, temperature=0)
    assert np.array_equal(one.image, other.image)
    assert one.metadata == other.metadata


def test_the_last_drawing_is_not_judged(pro: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    judgements(monkeypatch, False, False)
    (image,) = draw(pro, "a fox", reflect=2, seed=4)
    assert [one.matches for one in image.rounds] == [False, False, None]
    assert image.rounds[-1].words == ""


def test_a_sampled_reflection_is_the_same_with_the_same_seed(pro: Any) -> None:
    one, other = (draw(pro, "a cup", reflect=2, seed=9, n=2) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(a.image, b.image)
        assert a.metadata == b.metadata


def test_images_end_in_order_and_steps_count_up(pro: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    judgements(monkeypatch, False, False, True, True)
    seeds: list[int] = []
    stages: list[str] = []
    index = 0
    for step in pro.stream_images("a fox", window=1, n=2, reflect=3, seed=5):
        assert index <= step.index <= step.total
        index = step.index
        stages.append(step.stage)
        seeds += [image.seed for image in step.images]
        if step.stage == "judge":
            assert len(step.preview()) == 2
    assert seeds == [5, 6]
    assert index == step.total
    assert len(step.preview()) == 2
    assert dict.fromkeys(stages).keys() == {"draw", "judge"}


def test_steps_of_plans_have_their_text(pro: Any) -> None:
    texts: dict[int, str] = {0: "", 1: ""}
    plans: list[str] = []
    index = 0
    for step in pro.stream_images(["a fox", "a cup"], window=1, plan=True, seed=5):
        assert index <= step.index <= step.total
        index = step.index
        if step.stage == "plan":
            texts[len(plans)] += step.text
            assert len(step.preview()) == len(plans)
        plans += [image.plan for image in step.images]
    assert index == step.total
    assert [text.strip() for text in texts.values()] == [plan.strip() for plan in plans]


# Both


def test_a_plan_with_reflection_counts_the_peak_of_all_stages(
    pro: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    judgements(monkeypatch, False, True)
    resets: list[int] = []
    monkeypatch.setattr(mx, "reset_peak_memory", lambda: resets.append(1))
    (image,) = draw(pro, "a fox", plan=True, reflect=1, seed=1)
    assert image.plan
    assert len(image.rounds) == 2
    assert len(resets) == 1


def test_low_memory_gives_the_same_images(
    pro: Any, converted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    judgements(monkeypatch, False, False)
    small = mlx_janus.load(converted["deepseek-pro-bin"], dtype="float32", low_memory=True)
    (want,) = draw(pro, "a fox", plan=True, reflect=1, seed=1)
    (image,) = draw(small, "a fox", plan=True, reflect=1, seed=1)
    assert image.plan == want.plan
    assert np.array_equal(image.image, want.image)


@pytest.mark.parametrize("stage", ["plan", "judge"])
def test_a_closed_stream_ends_a_text(pro: Any, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    ended: list[str] = []

    def watch(module: Any, name: str) -> None:
        write: Callable[..., Generator[str, None, Any]] = getattr(module, name)

        def watched(*arguments: Any) -> Generator[str, None, Any]:
            try:
                return (yield from write(*arguments))
            except GeneratorExit:
                ended.append(name)
                raise

        monkeypatch.setattr(module, name, watched)

    watch(planning, "write_plan")
    watch(reflection, "judge")
    stream = pro.stream_images("a fox", window=1, plan=True, reflect=1, seed=1)
    for step in stream:
        if step.stage == stage and step.text:
            break
    stream.close()
    pro.generate_text("x", max_tokens=1)  # after the model's thread has closed the stream
    assert ended == ["write_plan" if stage == "plan" else "judge"]


def test_every_layout_plans_and_judges(janus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    judgements(monkeypatch, False)
    (image,) = draw(janus, "a red circle", plan=True, reflect=1, seed=1)
    assert image.plan is not None
    assert [one.matches for one in image.rounds] == [False, None]


def test_janus_tiny_plans_and_judges() -> None:
    (image,) = draw(mlx_janus.load(), "a red circle", plan=True, reflect=1, seed=1)
    assert image.plan is not None
    assert image.rounds


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"plan": 3}, "plan must be True, False, None or the text of a plan, got int"),
        ({"plan": ["x"]}, "got list"),
        ({"reflect": -1}, "reflect must be a whole number from 0 to 10, got -1"),
        ({"reflect": 11}, "from 0 to 10, got 11"),
        ({"reflect": True}, "from 0 to 10, got True"),
        ({"reflect": "2"}, "from 0 to 10, got '2'"),
        ({"plan": True, "images": Image.new("RGB", (64, 64))}, "leave plan or images out"),
        ({"reflect": 1, "images": Image.new("RGB", (64, 64))}, "leave reflect or images out"),
    ],
)
def test_options_out_of_range(pro: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        pro.stream_images("x", **options)


def test_a_model_with_another_pathway_says_so(pro: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "pathway_of", lambda janus: object())
    monkeypatch.setattr(reflection, "pathway_of", lambda janus: object())
    with pytest.raises(OptionError, match="cannot draw by a plan"):
        pro.stream_images("x", plan=True)
    with pytest.raises(OptionError, match="cannot draw again after a judgement"):
        pro.stream_images("x", reflect=1)


@pytest.mark.parametrize("reflect", ["x", "-1", "99"])
def test_a_file_with_a_wrong_number_of_rounds_is_refused(
    pro: Any, tmp_path: Path, reflect: str
) -> None:
    (image,) = draw(pro, "x", seed=1)
    image.metadata["reflect"] = reflect
    with pytest.raises(mlx_janus.JanusError, match="changed or cut"):
        read_settings(image.save(tmp_path / "x.png"))
