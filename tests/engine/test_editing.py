"""Images changed by prompts, beside drawings: each is what the library alone makes of it."""

from __future__ import annotations

import asyncio
import io
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_janus.decode.batch import DrawingBatch
from mlx_janus.engine.engine import Engine
from mlx_janus.engine.messages import DrawingRequest, Drawn, Event, Partial, edit_arguments
from mlx_janus.errors import ContextLengthError, PromptError
from mlx_janus.inference.input_records import input_image
from mlx_janus.inference.vq_pathway import VQPathway
from mlx_janus.models.janus import JanusModel
from mlx_janus.pipeline import JanusPipeline
from mlx_janus.processing.images import open_image
from mlx_janus.processing.saved_images import encode_image
from tests.support.engines import draw, drawn_alone, events, served, tiny

UNGUIDED = {"cfg_weight": 1.0, "cfg_weight2": 0.0, "temperature": 0.8}
TWO_ROWS = {"cfg_weight": 3.0, "cfg_weight2": 0.0, "temperature": 0.8}


def change(
    janus: JanusPipeline,
    prompt: str,
    seed: int,
    *images: Image.Image,
    n: int = 1,
    partial_images: int = 0,
    **choices: float,
) -> DrawingRequest:
    options = janus.pathway.edit_options(choices)  # type: ignore[attr-defined]
    return DrawingRequest(prompt, options, seed, n, partial_images, images)


def changed_alone(janus: JanusPipeline, request: DrawingRequest, seed: int) -> np.ndarray:
    options: Any = request.options
    (image,) = janus.generate_images(
        request.prompt,
        images=request.images,
        seed=seed,
        cfg_weight=options.cfg_weight,
        cfg_weight2=options.cfg_weight2,
        temperature=options.temperature,
        exact=True,
    )
    return image.tokens


def test_changes_join_and_leave_among_drawings(
    janus: JanusPipeline, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of one, two and three rows, by the step at which they are sent."""
    sizes: list[set[int]] = []  # at each step, the numbers of rows of the images
    step = DrawingBatch.step
    monkeypatch.setattr(
        DrawingBatch,
        "step",
        lambda self: (sizes.append(set(map(len, self._image_rows))), step(self))[1],
    )
    requests = {
        0: draw("a red circle", 3, n=2),
        5: change(janus, "make it blue", 8, pictures[0], n=2),
        9: change(janus, "swap them", 5, pictures[1], pictures[2], temperature=0.7),
        14: change(janus, "make it blue", 6, pictures[3], **TWO_ROWS),
        20: change(janus, "add a star", 7, pictures[3], **UNGUIDED),
        25: draw("a star", 9),
    }

    async def work(engine: Engine) -> list[list[Event]]:
        tasks = []
        for sent_at, request in requests.items():
            while len(sizes) < sent_at:
                await asyncio.sleep(0)
            tasks.append(asyncio.create_task(events(engine.submit(request))))
        return await asyncio.gather(*tasks)

    for request, told in zip(requests.values(), served(work), strict=True):
        assert sorted(event.index for event in told) == list(range(request.n))
        for event in told:
            assert isinstance(event, Drawn)
            seed = request.seed + event.index
            if request.images:
                expected = changed_alone(janus, request, seed)
                per_image = 4 + 64 + janus.config.understanding.tokens
                assert event.input_image_tokens == len(request.images) * per_image
                assert event.prompt_tokens > event.input_image_tokens
            else:
                expected = drawn_alone(janus, request.prompt, seed)
                assert event.input_image_tokens == 0
            assert np.array_equal(event.image.tokens, expected), (request.prompt, seed)
    assert {1, 2, 3} in sizes


def test_images_and_prompt_are_read_once_for_several_results(
    janus: JanusPipeline, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    encode = JanusModel.encode_image_tokens

    def counting(self: JanusModel, pixels: Any) -> Any:
        encoded.append(pixels.shape[0])
        return encode(self, pixels)

    monkeypatch.setattr(JanusModel, "encode_image_tokens", counting)
    request = change(janus, "make it blue", 1, *pictures[:2], n=3, partial_images=2)
    told = served(lambda engine: events(engine.submit(request)))
    assert encoded == [1, 1]  # one at a time: the memory does not grow with their number
    assert sum(isinstance(event, Drawn) for event in told) == 3
    assert sum(isinstance(event, Partial) for event in told) == 6


def test_other_images_go_on_while_a_long_prompt_is_read(
    janus: JanusPipeline, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each encoding of four images, and each part of the prompt, lets the others advance."""
    order: list[str] = []
    step = DrawingBatch.step

    def note(owner: Any, name: str, word: str) -> None:
        method = getattr(owner, name)

        def noting(self: Any, first: Any, *others: Any) -> Any:
            if word != "reads" or first.shape[1] > 1:
                order.append(word)
            return method(self, first, *others)

        monkeypatch.setattr(owner, name, noting)

    note(JanusModel, "understand", "encodes")
    note(JanusModel, "encode_image_tokens", "encodes")
    note(JanusModel, "hidden_states", "reads")
    monkeypatch.setattr(DrawingBatch, "step", lambda self: (order.append("draws"), step(self))[1])
    request = change(janus, "make it blue", 4, *pictures[:4])

    async def work(engine: Engine) -> list[Event]:
        drawing = engine.submit(draw("a star", 3, n=2, partial_images=4))
        await anext(drawing)
        order.clear()
        told = await events(engine.submit(request))
        drawing.cancel()
        return told

    (event,) = served(work)
    monkeypatch.undo()
    assert np.array_equal(event.image.tokens, changed_alone(janus, request, 4))
    parts = [word for word in order if word != "draws"]
    assert parts == ["encodes"] * 8 + ["reads"] * 3  # of 4 * 132 positions and the words
    assert all("draws" in pair for pair in pairwise(order))


def test_a_request_that_ends_while_its_prompt_is_read(
    janus: JanusPipeline, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a cancellation, or by a failure of the batch: the next request is served."""
    encode = JanusModel.encode_image_tokens
    request = change(janus, "make it blue", 4, *pictures[:3])

    async def work(engine: Engine) -> None:
        def cancelling(self: JanusModel, pixels: Any) -> Any:
            cancelled.cancelled = True
            return encode(self, pixels)

        drawing = asyncio.create_task(events(engine.submit(draw("a star", 3))))
        cancelled = engine.submit(request)
        monkeypatch.setattr(JanusModel, "encode_image_tokens", cancelling)
        assert await events(cancelled) == []
        ((event,),) = await asyncio.gather(drawing)
        assert np.array_equal(event.image.tokens, drawn_alone(janus, "a star", 3))
        monkeypatch.undo()

        def failing(self: JanusModel, pixels: Any) -> Any:
            monkeypatch.setattr(DrawingBatch, "step", lambda _: 1 / 0)
            return encode(self, pixels)

        monkeypatch.setattr(JanusModel, "encode_image_tokens", failing)
        with pytest.raises(ZeroDivisionError):
            await events(engine.submit(request))
        monkeypatch.undo()
        (event,) = await events(engine.submit(request))
        assert np.array_equal(event.image.tokens, changed_alone(janus, request, 4))

    served(work)


def test_memory_is_counted_for_three_rows_of_the_longest_prompt(
    janus: JanusPipeline, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: set[tuple[int, int]] = set()
    bytes_per_image = VQPathway.bytes_per_image

    def counting(self: VQPathway, prompt_tokens: int, options: Any) -> int:
        counted.add((prompt_tokens, options.rows))
        return bytes_per_image(self, prompt_tokens, options)

    monkeypatch.setattr(VQPathway, "bytes_per_image", counting)
    request = change(janus, "make it blue", 1, *pictures[:2])

    async def work(engine: Engine) -> None:
        tickets = [engine.submit(draw("a star", 1)), engine.submit(request)]
        await asyncio.gather(*map(events, tickets))

    served(work)
    length = len(janus.pathway.edit_prompt_ids("make it blue", 2))  # type: ignore[attr-defined]
    assert (length, 3) in counted
    assert (length, 2) in counted  # the drawing's rows are padded to it


def test_the_metadata_are_the_librarys(janus: JanusPipeline) -> None:
    """Of the bytes of files, and of images without a source; with and without a crop."""
    wide = Image.new("RGB", (64, 40), "red")
    file = io.BytesIO()
    wide.save(file, "PNG")
    sources = [file.getvalue(), encode_image(Image.new("RGB", (20, 20)), {})]
    config = janus.config.image
    given = [input_image(open_image(source), source, config) for source in sources]
    for crop in (False, True):
        options = janus.pathway.edit_options({})  # type: ignore[attr-defined]
        request = DrawingRequest("x", options, 3, **edit_arguments(given, crop=crop))
        (event,) = served(lambda engine, asked=request: events(engine.submit(asked)))
        (expected,) = janus.generate_images("x", images=sources, seed=3, crop=crop, window=1)
        assert event.image.metadata == expected.metadata
        assert event.image.image.size == expected.image.size == (64, 40 if crop else 64)
    unknown = change(janus, "x", 3, wide)
    (event,) = served(lambda engine: events(engine.submit(unknown)))
    assert event.image.metadata["inputs"] == '[{"size": "64x40"}]'


def test_a_model_that_was_not_trained_for_it_warns_once(
    pictures: list[Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    loaded = tiny()
    assert not loaded.trained_for_editing

    async def work(engine: Engine) -> None:
        await events(engine.submit(draw("a star", 1)))
        assert not caplog.records
        for _ in range(2):
            await events(engine.submit(change(loaded, "x", 1, pictures[0])))

    served(work, lambda: loaded)
    (record,) = caplog.records
    assert "was not trained to change images" in record.getMessage()


def test_changes_that_are_refused(janus: JanusPipeline, pictures: list[Image.Image]) -> None:
    async def work(engine: Engine) -> None:
        with pytest.raises(PromptError, match="describe the change"):
            engine.submit(change(janus, " ", 1, pictures[0]))
        with pytest.raises(ContextLengthError, match="maximum context length is 1024"):
            engine.submit(change(janus, "make it blue", 1, *pictures, pictures[0], pictures[1]))
        cancelled = engine.submit(change(janus, "make it blue", 1, pictures[0]))
        cancelled.cancel()
        assert await events(cancelled) == []
        request = change(janus, "make it blue", 2, pictures[0])
        (event,) = await events(engine.submit(request))
        assert np.array_equal(event.image.tokens, changed_alone(janus, request, 2))

    served(work)
