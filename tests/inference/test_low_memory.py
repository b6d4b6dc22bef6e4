"""Low memory: the weights of one task at a time, and the same results."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_janus
from benchmarks.memory_table import published_config
from mlx_janus import JanusPipeline as Janus
from mlx_janus.errors import CheckpointError, OutOfMemoryError
from mlx_janus.inference import loaded
from mlx_janus.inference.loaded import TASKS
from mlx_janus.weights import footprint
from mlx_janus.weights import load as load_module
from mlx_janus.weights.convert import ConvertOptions, Source, convert_checkpoint
from mlx_janus.weights.footprint import check_memory
from tests.support.golden import FIXTURES

PICTURE, PROMPT = FIXTURES / "picture.png", "a red fox"


def use(janus: Janus) -> list[object]:
    """What every task gives."""
    images = janus.generate_images(PROMPT, n=2, seed=3, exact=True)
    answers = [
        janus.generate_text("What is it?", shown, max_tokens=5).tokens
        for shown in ((), [PICTURE, PICTURE])
    ]
    return [
        *answers,
        *(image.tokens.tolist() for image in images),
        *(image.image.tobytes() for image in images),
    ]


def active() -> int:
    gc.collect()  # models of earlier tests, which may be freed at any time otherwise
    mx.synchronize()
    mx.clear_cache()
    return int(mx.get_active_memory())


def size(arrays: dict[str, mx.array]) -> int:
    return sum(array.nbytes for array in arrays.values())


@pytest.mark.parametrize("form", ["float", "quantized", "quantized as it is loaded"])
def test_results_are_the_same_again_and_again(
    form: str, converted: dict[str, Path], tmp_path: Path
) -> None:
    folder, bits = converted["deepseek-pro-bin"], None if form == "float" else 4
    if form == "quantized":
        source = Source(FIXTURES / "deepseek-pro-bin", "pro")
        folder = convert_checkpoint(source, tmp_path / "out", ConvertOptions(bits=4)).path
    plain = use(mlx_janus.load(folder, bits=bits))
    small = mlx_janus.load(folder, bits=bits, low_memory=True)
    assert small.low_memory
    assert use(small) == plain
    assert use(small) == plain


@pytest.mark.parametrize("bits", [None, 4])
def test_only_the_last_tasks_weights_are_held(bits: int | None, converted: dict[str, Path]) -> None:
    def held(low_memory: bool, work: Callable[[Janus], object]) -> tuple[int, Janus]:
        before = active()
        janus = mlx_janus.load(converted["deepseek-pro-bin"], bits=bits, low_memory=low_memory)
        work(janus)
        return active() - before, janus

    def draw(janus: Janus) -> object:
        return janus.generate_images(PROMPT, seed=1)

    def ask(janus: Janus) -> object:
        return janus.generate_text("What is it?", PICTURE, max_tokens=2)

    for work, freed in ((draw, "drawing_arrays"), (ask, "encoding_arrays")):
        whole, plain = held(False, work)
        part, small = held(True, work)
        assert whole - part == pytest.approx(
            size(getattr(plain.model, freed)()), rel=0.05, abs=20_000
        )
        del plain, small


def test_a_preview_leaves_the_drawing_as_it_is(pro: Janus, converted: dict[str, Path]) -> None:
    small = mlx_janus.load(converted["deepseek-pro-bin"], low_memory=True)
    want = pro.generate_images(PROMPT, seed=5, window=1)[0]
    for step in small.stream_images(PROMPT, seed=5, window=1):
        if step.index in (1, 9):
            step.preview()
    assert np.array_equal(step.images[0].tokens, want.tokens)


def test_a_reading_that_fails_leaves_nothing_more_in_memory(
    converted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read before the failure is freed with the next task."""
    gc.collect()
    before = active()
    janus = mlx_janus.load(converted["deepseek-pro-bin"], low_memory=True)
    janus.generate_text("Hello?", max_tokens=1)
    alone = active() - before
    read = loaded.materialize

    def failing(arrays: Iterable[mx.array], check: Callable[[], None]) -> None:
        read(arrays, check)
        raise MemoryError("no room")

    for task in TASKS:
        with monkeypatch.context() as patch:
            patch.setattr(loaded, "materialize", failing)
            if task != "answer":
                with pytest.raises(MemoryError, match="no room"):
                    janus.thread.call(partial(janus.load_weights_for, task))
        janus.generate_text("Hello?", max_tokens=1)
        gc.collect()
        assert active() - before < alone + 20_000


def test_a_folder_that_was_replaced_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    convert_checkpoint(Source(FIXTURES / "deepseek-pro-bin", "one"), folder)
    small = mlx_janus.load(folder, low_memory=True)
    small.generate_text("Hello?", max_tokens=1)
    shutil.rmtree(folder)
    convert_checkpoint(Source(FIXTURES / "deepseek-janus-safetensors", "other"), folder)
    with pytest.raises(CheckpointError, match="was replaced since it was loaded"):
        small.generate_images(PROMPT, seed=1)


@pytest.mark.parametrize(
    ("free", "bits", "advice"),
    [
        (4.0, None, "low_memory=True needs 3.6 GB and fits"),
        (3.4, None, "bits=8 needs 3.3 GB and fits"),
        (3.0, None, "bits=8, low_memory=True needs 2.2 GB and fits"),
        (1.7, None, 'recipe="balanced", low_memory=True needs 1.6 GB and fits'),
        (1.6, None, "bits=4, low_memory=True needs 1.6 GB and fits"),
        (1.0, None, "close other programs"),
        (3.0, 8, "low_memory=True needs 2.2 GB and fits"),
    ],
)
def test_what_does_not_fit_names_what_would(
    free: float, bits: int | None, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_module.with_quantization(published_config("1b"), bits, Path())
    monkeypatch.setattr(footprint, "available_memory", lambda: free * 1e9)
    with pytest.raises(OutOfMemoryError, match=advice):
        check_memory(config, "bfloat16", "model")
