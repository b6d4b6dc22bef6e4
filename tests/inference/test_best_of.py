"""Best of N: the kept images are those of plain calls, ranked by the model's own score."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

import mlx_janus
from mlx_janus.errors import JanusError, OptionError, PromptError
from mlx_janus.inference import best_of
from mlx_janus.inference.best_of import (
    DEFAULT_WORDING,
    WORDINGS,
    Selection,
    Wording,
    best_of_steps,
    score_images,
)
from mlx_janus.inference.image_generation import image_jobs
from mlx_janus.inference.results import GeneratedImage, ImageStep, read_settings
from mlx_janus.worlds.shapes import Scene, Thing, render

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def tiny() -> Any:
    with mlx_janus.load("tiny") as janus:
        yield janus


def seeds_of(images: list[GeneratedImage]) -> list[int]:
    return [image.seed for image in images]


def scores(janus: Any, prompt: str, images: Any, wording: Wording) -> list[float]:
    return janus.thread.call(lambda: list(score_images(janus, prompt, images, wording)))


def thing(colour: str, shape: str) -> Any:
    rgb = {"red": (220, 40, 40), "blue": (40, 60, 220)}[colour]
    one = Thing(shape, colour=colour, size=22.0, x=32.0, y=32.0, angle=0.0, rgb=rgb)
    return render(Scene((one,), (240, 240, 240)))


def test_the_images_are_those_of_a_plain_call_best_first(tiny: Any) -> None:
    plain = tiny.generate_images(PROMPT, n=4, seed=7, window=1)
    ranked = tiny.generate_images(PROMPT, n=4, best_of=4, seed=7, window=1)
    assert sorted(seeds_of(ranked)) == seeds_of(plain) == [7, 8, 9, 10]
    assert [image.rank for image in ranked] == [1, 2, 3, 4]
    by_seed = {image.seed: image for image in plain}
    for image in ranked:
        assert np.array_equal(image.tokens, by_seed[image.seed].tokens)
        likelihood = tiny.score(DEFAULT_WORDING.question, f" {PROMPT}", image.image)[0].logprob
        assert image.score == pytest.approx(likelihood, abs=1e-4)
    ranked_scores = [image.score for image in ranked]
    assert ranked_scores == sorted(ranked_scores, reverse=True)
    assert all(image.score is None and image.rank is None for image in plain)


def test_the_best_few_are_kept_of_each_prompt(tiny: Any) -> None:
    """Prompts keep their order, and a prompt that repeats is chosen from again."""
    prompts = ["a blue star and a red circle", "a star", "a star"]
    kept = tiny.generate_images(prompts, n=1, best_of=3, seed=[5, 5, 20], window=1)
    assert [image.prompt for image in kept] == prompts
    for image, first_seed in zip(kept, (5, 5, 20), strict=True):
        alone = tiny.generate_images(image.prompt, n=3, best_of=3, seed=first_seed, window=1)
        assert (image.seed, image.rank) == (alone[0].seed, 1)
        assert image.score == pytest.approx(alone[0].score, abs=1e-4)
        assert image.seed in range(first_seed, first_seed + 3)


@pytest.mark.parametrize("name", WORDINGS)
def test_a_right_image_scores_higher_than_a_wrong_one(tiny: Any, name: str) -> None:
    images = [thing("red", "circle"), thing("blue", "square")]
    right, wrong = scores(tiny, "a red circle.", images, WORDINGS[name])
    assert right > wrong + 1


def test_a_prompt_is_no_template(tiny: Any) -> None:
    """Braces and the mark of an image are words of the prompt."""
    for prompt in ("{prompt}", "{image} of {0}", "a {"):
        for wording in (WORDINGS["see"], WORDINGS["show"]):
            (value,) = scores(tiny, prompt, [thing("red", "circle")], wording)
            assert np.isfinite(value)


def test_the_choice_is_in_the_metadata_and_the_image_can_be_drawn_again(
    tiny: Any, tmp_path: Any
) -> None:
    best, second = tiny.generate_images(PROMPT, n=2, best_of=3, seed=3, window=1)
    assert (best.metadata["best_of"], best.metadata["rank"]) == ("3", "1")
    assert second.metadata["rank"] == "2"
    assert float(best.metadata["score"]) == pytest.approx(best.score, rel=1e-4)
    stored = read_settings(best.save(tmp_path / "best.png"))
    again = tiny.generate_images(stored["prompt"], seed=stored["seed"], window=1)[0]
    assert np.array_equal(again.tokens, best.tokens)


def test_steps_count_up_to_the_total_and_previews_show_what_is_drawn(tiny: Any) -> None:
    steps = list(tiny.stream_images(["a star", PROMPT], n=1, best_of=2, seed=1, window=1))
    drawing = [step for step in steps if not step.images]
    indices = [step.index for step in drawing]
    assert indices == list(range(1, len(indices) + 1))  # each counts
    assert steps[-1].index == steps[-1].total == indices[-1]
    assert len(drawing) == 2 * (64 + 2 + 2)  # of each prompt: tokens, decodings and scores
    assert [len(step.images) for step in steps].count(1) == 2
    assert len(drawing[0].preview()) == 2  # both candidates
    assert [len(step.preview()) for step in steps if step.images] == [1, 2]


@pytest.mark.parametrize(
    ("counts", "totals"),
    [
        ([(4, 8), (4, 4)], [16, 20, 20]),  # only the first prompt is drawn again
        ([(4, 4), (4, 8)], [16, 16, 20]),  # only the second
        ([(8, 8), (4, 4)], [24, 24, 24]),  # the second takes fewer steps than expected
    ],
)
def test_the_total_never_falls(
    tiny: Any,
    monkeypatch: pytest.MonkeyPatch,
    counts: list[tuple[int, int]],
    totals: list[int],
) -> None:
    """Counts are the steps of drawing each prompt, as its first and its last step have them."""
    monkeypatch.setattr(best_of, "score_images", lambda *_: iter([0.0, 1.0]))
    prompts = iter(counts)

    def draw(jobs: Any, *, reset_peak: bool) -> Any:
        first, last = next(prompts)
        yield ImageStep(1, first, (), list)
        canvas = Image.new("RGB", (8, 8))
        for job in jobs:
            image = GeneratedImage(canvas, None, job.seed, job.prompt, {})
            yield ImageStep(last, last, (image,), list)

    jobs = image_jobs(tiny, ["a star", PROMPT], 2, 1, {})
    steps = list(best_of_steps(tiny, jobs, Selection(drawn=2, kept=1), draw))
    seen = [step.total for step in steps]
    assert seen == sorted(seen)
    assert [seen[0], seen[6], seen[-1]] == totals
    indices = [step.index for step in steps]
    assert indices == sorted(indices)
    assert indices[-1] == totals[-1]


def test_closing_ends_the_drawing_and_the_scoring(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = []
    score = best_of._score
    monkeypatch.setattr(best_of, "_score", lambda *a: scored.append(1) or score(*a))
    early = tiny.stream_images(PROMPT, best_of=3, seed=1, window=1)
    next(early)
    early.close()
    assert list(early) == []
    late = tiny.stream_images(PROMPT, best_of=3, seed=1, window=1)
    while not scored:
        next(late)
    late.close()
    assert len(scored) == 1
    assert tiny.generate_images(PROMPT, seed=1, window=1)[0].seed == 1  # the model still works


def test_an_interrupt_during_the_scoring_leaves_a_usable_model(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(best_of, "_score", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny.generate_images(PROMPT, best_of=2, seed=1, window=1)
    monkeypatch.undo()
    assert len(tiny.generate_images(PROMPT, best_of=2, seed=1, window=1)) == 1


def test_low_memory_gives_the_same_choice(converted: Any, pipelines: Any) -> None:
    folder = "deepseek-pro-bin"
    options = {"n": 3, "best_of": 3, "seed": 4, "window": 1}
    wanted = pipelines[folder].generate_images("a fox", **options)
    with mlx_janus.load(converted[folder], dtype="float32", low_memory=True) as janus:
        found = janus.generate_images("a fox", **options)
    assert seeds_of(found) == seeds_of(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4)


@pytest.mark.parametrize("options", [{"plan": "a red fox"}, {"reflect": 1}])
def test_plans_and_rounds_go_with_it(pro: Any, options: dict[str, Any]) -> None:
    """Each candidate is the image of a plain call with the same options."""
    plain = pro.generate_images("a fox", n=2, seed=4, window=1, **options)
    ranked = pro.generate_images("a fox", n=2, best_of=2, seed=4, window=1, **options)
    by_seed = {image.seed: image for image in ranked}
    for image in plain:
        assert np.array_equal(by_seed[image.seed].tokens, image.tokens)
        assert by_seed[image.seed].plan == image.plan
    assert [image.rank for image in ranked] == [1, 2]
    assert all(image.prompt == "a fox" for image in ranked)
    with pytest.raises(OptionError):
        pro.stream_images("a fox", best_of=2, reflect=-1)  # before the drawing


def test_only_one_prompts_images_are_held(tiny: Any) -> None:
    """Images come when their prompt is done: the first before the second prompt is begun."""
    steps = tiny.stream_images(["a star", PROMPT], best_of=2, seed=1, window=1)
    count = 0
    while not next(steps).images:
        count += 1
    assert count == 64 + 2 + 2
    steps.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"best_of": 0}, "best_of must be a whole number from 1 to 1000"),
        ({"best_of": 1001}, "best_of must be a whole number from 1 to 1000"),
        ({"best_of": True}, "best_of must be a whole number"),
        ({"best_of": 2, "n": 3}, "n must be a whole number from 1 to 2"),
        ({"best_of": 2, "images": [thing("red", "circle")]}, "leave images out"),
    ],
)
def test_wrong_numbers_are_refused_before_the_drawing(
    tiny: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        tiny.stream_images(PROMPT, **options)


def test_a_prompt_whose_question_does_not_fit_is_refused_before_the_drawing(tiny: Any) -> None:
    with pytest.raises(PromptError):
        tiny.stream_images("a red circle " * 500, best_of=2)
    with pytest.raises(JanusError):
        tiny.stream_images("", best_of=2)
