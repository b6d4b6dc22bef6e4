"""Drawing by a rectified flow: options, streams, batches, memory, and what must always hold."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_janus
from mlx_janus.decode import flow as decode_flow
from mlx_janus.decode.flow import FlowDrawing, flow_velocity, seed_noise
from mlx_janus.engine.engine import Engine
from mlx_janus.engine.messages import DrawingRequest, Drawn, Partial
from mlx_janus.errors import (
    ContextLengthError,
    ImageError,
    OptionError,
    OutOfMemoryError,
    PromptError,
)
from mlx_janus.inference import image_generation
from mlx_janus.inference.results import read_settings
from mlx_janus.models.janus import JanusModel
from mlx_janus.weights import footprint
from mlx_janus.weights.footprint import required_memory, task_memory
from tests.support.flow import PROMPT, drawing_at, noise, picture
from tests.support.golden import rms_error

pytestmark = pytest.mark.check
SAME = 1e-5
"""Relative rms between two orders of the same sums; a step magnifies what differs before it."""


def latents_of(images: Any) -> np.ndarray:
    return np.stack([image.latents for image in images])


# What must always hold


def test_a_kept_prompt_is_a_prompt_read_again(flow: Any) -> None:
    drawing = drawing_at(flow, 0, steps=3)
    for step in range(3):
        again = drawing_at(flow, 0, steps=3)
        again.steps_done, again.latents = step, drawing.latents
        drawing.step()
        again.step()
        assert rms_error(drawing.latents, again.latents) < SAME
        assert {layer.offset for layer in drawing._cache} == {drawing._prompt_length}


def test_one_sequence_is_a_prompt_and_a_pass(flow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the reference does: the prompt, the time and the patches at once, without a cache."""
    prompt = flow.pathway.prompt_ids(PROMPT)[:-1]
    drawing = drawing_at(flow, 0, cfg_weight=1)
    before = drawing.latents
    drawing.step()
    hidden_states = JanusModel.hidden_states

    def at_once(self: JanusModel, embeddings: mx.array, cache: Any, mask: Any) -> mx.array:
        text = mx.broadcast_to(self.embed_text(mx.array([prompt])), (2, len(prompt), 64))
        sequence = mx.concatenate([text, embeddings], axis=1)
        return hidden_states(self, sequence)[:, len(prompt) :]

    monkeypatch.setattr(JanusModel, "hidden_states", at_once)
    velocity = flow_velocity(flow.model, before, drawing._times[0][None], cache=[])
    assert rms_error(drawing.predicted - before, velocity) < SAME


def test_an_image_is_the_same_alone_and_in_any_batch(flow: Any) -> None:
    together = flow.generate_images(PROMPT, n=3, seed=7, steps=3)
    for image in together:
        (alone,) = flow.generate_images(PROMPT, seed=image.seed, steps=3)
        assert rms_error(alone.latents, image.latents) < SAME
    assert rms_error(together[0].latents, together[1].latents) > 0.1
    begin = seed_noise(8, (8, 8, 4))
    (given,) = flow.generate_images(PROMPT, seed=1, steps=3, latents=begin[None])
    assert rms_error(given.latents, together[1].latents) < SAME


def test_prompts_of_one_length_are_generated_together(flow: Any) -> None:
    prompts = ["a red fox", "a red cat", "a much longer prompt about foxes"]
    together = flow.generate_images(prompts, seed=[1, 2, 3], steps=2)
    for image, prompt in zip(together, prompts, strict=True):
        (alone,) = flow.generate_images(prompt, seed=image.seed, steps=2)
        assert rms_error(alone.latents, image.latents) < SAME


def test_groups_that_fit_into_memory_draw_the_same(
    flow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = flow.generate_images(PROMPT, n=3, seed=1, steps=2)
    options = flow.pathway.options({"steps": 2})
    per_image = flow.pathway.bytes_per_image(35, options)
    room = int((1.5 * per_image + flow.pathway.decoding_bytes()) / 0.8)
    monkeypatch.setattr(image_generation, "available_memory", lambda: room)
    steps = list(flow.stream_images(PROMPT, n=3, seed=1, steps=2))
    assert steps[-1].total == 6  # three groups
    split = [image for step in steps for image in step.images]
    assert rms_error(latents_of(split), latents_of(whole)) < SAME


def test_guidance_of_weight_1_is_the_conditional_row(flow: Any) -> None:
    without = flow.generate_images(PROMPT, n=2, steps=2, cfg_weight=1, latents=noise())
    nearly = flow.generate_images(PROMPT, n=2, steps=2, cfg_weight=1 + 1e-9, latents=noise())
    guided = flow.generate_images(PROMPT, n=2, steps=2, cfg_weight=3, latents=noise())
    assert flow.pathway.options({"cfg_weight": 1}).rows == 1
    assert rms_error(latents_of(without), latents_of(nearly)) < SAME
    assert rms_error(latents_of(without), latents_of(guided)) > 1e-3


def test_long_prompts_are_read_in_parts(flow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = flow.generate_images(PROMPT, seed=1, steps=2)
    monkeypatch.setattr(decode_flow, "_PREFILL_STEP", 5)
    parts = flow.generate_images(PROMPT, seed=1, steps=2)
    assert rms_error(latents_of(parts), latents_of(whole)) < SAME


def test_the_prompt_is_read_once(flow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    hidden_states = JanusModel.hidden_states

    def spy(self: JanusModel, embeddings: mx.array, *others: Any) -> mx.array:
        shapes.append(embeddings.shape[:2])
        return hidden_states(self, embeddings, *others)

    monkeypatch.setattr(JanusModel, "hidden_states", spy)
    flow.generate_images(PROMPT, n=3, seed=0, steps=2)
    assert shapes == [(2, 34), (6, 17), (6, 17)]


def test_bfloat16_rounds_the_times(flow_folder: Path) -> None:
    janus = mlx_janus.load(flow_folder, dtype="bfloat16")
    drawing = drawing_at(janus, 0, steps=30)
    expected = decode_flow.time_features([334.0], 40)[0].astype(mx.bfloat16)
    assert drawing._times[10].tolist() == expected.tolist()
    (image,) = janus.generate_images(PROMPT, seed=1, steps=2)
    (exact,) = mlx_janus.load(flow_folder, dtype="float32").generate_images(PROMPT, seed=1, steps=2)
    assert image.latents.dtype == np.float32
    assert rms_error(image.latents, exact.latents) < 0.15


# Options


@pytest.mark.parametrize(
    "choice",
    [{"temperature": 0.5}, {"top_p": 0.9}, {"window": 2}, {"exact": True}, {"cfg_weight2": 3}],
)
def test_options_of_image_tokens_are_refused_by_name(flow: Any, choice: dict[str, Any]) -> None:
    (name,) = choice
    with pytest.raises(OptionError, match=f"^{name} is no option of a model that draws by"):
        flow.generate_images("a fox", **choice)


@pytest.mark.parametrize("choice", [{"steps": 3}, {"latents": np.zeros((1, 4, 4, 4))}])
def test_options_of_a_flow_are_refused_by_name(pro: Any, choice: dict[str, Any]) -> None:
    (name,) = choice
    with pytest.raises(OptionError, match=f"^{name} is no option of a model that draws image"):
        pro.generate_images("a fox", **choice)


def test_an_option_of_changing_images_asks_for_images(pro: Any) -> None:
    for draw in (pro.generate_images, pro.conversation().draw):
        with pytest.raises(OptionError, match="cfg_weight2 is for changing images: give images"):
            draw("a fox", cfg_weight2=3)


FLOATS = [mx.bfloat16, mx.float16, mx.float32, np.float16, np.float32, np.float64, np.longdouble]


@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_latents_of_every_float_type_are_taken(flow: Any, kind: Any) -> None:
    given = noise()[:1]
    latents = mx.array(given).astype(kind) if isinstance(kind, mx.Dtype) else given.astype(kind)
    (expected,) = flow.pathway.starts(given, 1)
    for form in (latents, list(latents)):
        (start,) = flow.pathway.starts(form, 1)
        assert start.dtype == np.float32
        assert rms_error(start, expected) < 4e-3  # bfloat16 has 8 bits
    with mx.stream(mx.cpu):  # the only device with float64
        (start,) = flow.pathway.starts(mx.array(given).astype(mx.float64), 1)
    assert np.array_equal(start, expected)


@pytest.mark.parametrize(
    "latents", [noise()[:1] * 1j, mx.array(noise()[:1]).astype(mx.complex64), [[[[1j]]]]]
)
def test_complex_latents_are_refused(flow: Any, latents: Any) -> None:
    with pytest.raises(OptionError, match="latents must be real numbers, got complex"):
        flow.generate_images("a fox", latents=latents)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 to 1000"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"cfg_weight": -1}, "cfg_weight must be a number"),
        ({"latents": noise()}, r"shape \(1, 8, 8, 4\), got \(2, 8, 8, 4\)"),
        ({"latents": noise().transpose(0, 3, 1, 2)[:1]}, r"got \(1, 4, 8, 8\)"),
        ({"latents": "noise"}, "latents must be numbers"),
        ({"latents": noise()[:1].astype(str)}, "latents must be numbers"),
        ({"latents": [[1.0], [2.0, 3.0]]}, "latents must be numbers"),
        ({"latents": np.full((1, 8, 8, 4), 1e300)}, "latents must be finite"),
        ({"latents": np.full((1, 8, 8, 4), np.nan)}, "latents must be finite"),
        ({"images": [picture(0)]}, "from prompts only: leave images out"),
        ({"plan": True}, "cannot draw by a plan, as models that draw image tokens can"),
        ({"plan": "a fox, red"}, "cannot draw by a plan, as models that draw image tokens can"),
        ({"reflect": 1}, "cannot draw again after a judgement, as models that draw image tokens"),
    ],
)
def test_wrong_values_are_refused(flow: Any, choice: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        flow.generate_images("a fox", **choice)


def test_prompts_that_cannot_be_drawn(flow: Any) -> None:
    with pytest.raises(PromptError, match="describe the image"):
        flow.generate_images(" ")
    with pytest.raises(ContextLengthError, match="an image takes 16"):
        flow.generate_images("fox " * 17_000)


# Streams


@pytest.mark.parametrize("low_memory", [False, True])
def test_steps_and_previews(flow_folder: Path, low_memory: bool) -> None:
    janus = mlx_janus.load(flow_folder, low_memory=low_memory)
    steps = []
    previews = []
    for step in janus.stream_images(PROMPT, n=2, seed=3, steps=4):
        steps.append(step)
        previews.append(step.preview())
    assert [step.index for step in steps] == [1, 2, 3, 4, 4, 4]
    assert {step.total for step in steps} == {4}
    images = [image for step in steps for image in step.images]
    assert [(image.seed, image.steps, image.passes) for image in images] == [(3, 4, 4), (4, 4, 4)]
    assert images[0].image.size == (64, 64)
    assert previews[3] == [image.image for image in images]  # the last prediction is the image
    assert previews[0] != previews[1]
    final = np.array(images[0].image).astype(float)
    distances = [np.abs(np.array(shown[0]) - final).mean() for shown in previews[:4]]
    assert distances == sorted(distances, reverse=True)
    again = janus.generate_images(PROMPT, n=2, seed=3, steps=4)
    assert [image.image for image in again] == [image.image for image in images]
    assert janus.generate_text("a fox?", max_tokens=3).tokens


def test_a_preview_is_the_predicted_end(flow: Any) -> None:
    drawing = drawing_at(flow, 0)
    before = drawing.latents
    drawing.step()
    velocity = (drawing.latents - before) * 4
    assert rms_error(drawing.predicted, before + velocity) < SAME
    before = drawing.latents
    drawing.step()
    velocity = (drawing.latents - before) * 4
    assert rms_error(drawing.predicted, before + 0.75 * velocity) < SAME


# Metadata


def test_a_saved_image_can_be_drawn_again(flow: Any, tmp_path: Path) -> None:
    (image,) = flow.generate_images(PROMPT, seed=5, steps=3, cfg_weight=1.5)
    settings = read_settings(image.save(tmp_path / "a.png"))
    assert (settings["steps"], settings["cfg_weight"]) == (3, 1.5)
    assert (settings["temperature"], settings["top_p"]) == (None, None)
    names = ("prompt", "seed", "cfg_weight", "steps")
    (again,) = flow.generate_images(**{name: settings[name] for name in names})
    assert again.image == image.image
    assert read_settings(image.upscaled(2).save(tmp_path / "b.png"))["upscale"] == 2


def test_an_image_of_given_latents_cannot_be_drawn_again(flow: Any, tmp_path: Path) -> None:
    (image,) = flow.generate_images(PROMPT, steps=1, latents=noise()[:1])
    path = image.save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="from given latents"):
        read_settings(path)


# Conversations and the engine


def test_a_conversation_draws_and_is_asked_about_it(flow: Any) -> None:
    talk = flow.conversation()
    (image,) = talk.draw("a fox", seed=1, steps=2)
    assert talk.drawing_options == ("cfg_weight", "steps")
    first = talk.send("What is it?", max_tokens=4)
    shown = flow.generate_text("What is it?", image.image, max_tokens=4)
    assert first.tokens == shown.tokens
    second = talk.send("And now?", max_tokens=4)
    assert second.cached_tokens >= first.prompt_tokens


def test_the_engine_draws_requests_side_by_side(flow_folder: Path) -> None:
    janus = mlx_janus.load(flow_folder)
    requests = [("a fox", 5, 2, 7), ("a lighthouse in a storm", 3, 1, 2), ("a fox", 4, 1, 9)]
    alone = [
        latents_of(janus.generate_images(prompt, n=n, seed=seed, steps=steps))
        for prompt, steps, n, seed in requests
    ]

    async def main() -> list[list[Any]]:
        engine = Engine(lambda: mlx_janus.load(flow_folder))
        await engine.start()

        async def events(prompt: str, steps: int, n: int, seed: int) -> list[Any]:
            options = engine.pathway.options({"steps": steps})
            request = DrawingRequest(prompt, options, seed, n=n, partial_images=1)
            return [event async for event in engine.submit(request)]

        told = await asyncio.gather(*(events(*request) for request in requests))
        await engine.close(0)
        return told

    answers = asyncio.run(main())
    for told, expected in zip(answers, alone, strict=True):
        drawn = {event.index: event.image for event in told if isinstance(event, Drawn)}
        latents = latents_of([drawn[i] for i in range(len(expected))])
        assert rms_error(latents, expected) < SAME
    assert any(isinstance(event, Partial) for told in answers for event in told)


def test_images_leave_a_batch(flow: Any) -> None:
    jobs = image_generation.image_jobs(flow, "a fox", 3, 1, {"steps": 3})
    batch = flow.pathway.batch()
    assert list(batch.start(jobs)) == []  # the prompt is read at once
    batch.step()
    batch.remove([jobs[1]])
    assert list(batch.jobs) == [jobs[0], jobs[2]]
    assert batch.steps_done(jobs[2]) == 1
    assert batch.step() == {}
    finished = batch.step()
    assert list(batch.jobs) == []
    (alone,) = flow.generate_images("a fox", seed=3, steps=3)
    assert rms_error(finished[jobs[2]].finish().latents, alone.latents) < SAME


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_best_images_are_kept(flow_folder: Path, low_memory: bool) -> None:
    """The half of the model that understands images scores them; the flow draws as ever."""
    janus = mlx_janus.load(flow_folder, low_memory=low_memory)
    begin = np.stack([np.array(seed_noise(seed, (8, 8, 4))) for seed in (4, 5, 6)])
    best = janus.generate_images(PROMPT, n=2, best_of=3, seed=4, steps=2, latents=begin)
    assert [image.rank for image in best] == [1, 2]
    assert best[0].score >= best[1].score
    drawn = {image.seed: image for image in janus.generate_images(PROMPT, n=3, seed=4, steps=2)}
    for image in best:
        assert image.tokens is None
        assert rms_error(image.latents, drawn[image.seed].latents) < SAME


# Memory


def test_a_model_that_does_not_fit_is_refused(
    flow_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = mlx_janus.load(flow_folder).config
    needed = required_memory(config, "float32")
    low = required_memory(config, "float32", low_memory=True)
    room = (max(needed.values()) + max(low.values())) // 2
    monkeypatch.setattr(footprint, "available_memory", lambda: room)
    with pytest.raises(OutOfMemoryError, match=r"low_memory=True needs .* and fits"):
        mlx_janus.load(flow_folder)
    mlx_janus.load(flow_folder, low_memory=True).close()


def test_memory_is_counted(flow: Any) -> None:
    tasks = task_memory(flow.config, "float32", pictures=2)
    one = task_memory(flow.config, "float32", pictures=1)
    options = flow.pathway.options({})
    assert tasks["draw"] - one["draw"] == flow.pathway.bytes_per_image(256, options)
    assert required_memory(flow.config, "float32")["drawing"] > one["draw"]
    alone = flow.pathway.options({"cfg_weight": 1})
    assert 2 * flow.pathway.bytes_per_image(35, alone) == flow.pathway.bytes_per_image(35, options)


def test_the_estimate_holds(flow: Any) -> None:
    """Peak memory of a drawing, without the weights, is below the estimate and of its size."""
    options = flow.pathway.options({"steps": 1})
    flow.generate_images(PROMPT, n=16, seed=1, steps=1)
    drawing: FlowDrawing = drawing_at(flow, 0, steps=2)
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    drawing.step()
    used = (mx.get_peak_memory() - before) / 2
    estimate = flow.pathway.bytes_per_image(35, options)
    assert used < estimate < 10 * used


def test_the_estimate_of_decoding_holds(flow: Any) -> None:
    latents = mx.array(noise())[:1]
    mx.eval(flow.model.vae(latents))  # loads the weights
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(flow.model.vae(latents))
    used = mx.get_peak_memory() - before
    assert used < flow.pathway.decoding_bytes() < 1.5 * used
