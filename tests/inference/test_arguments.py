"""Arguments in the forms that programs have: open files, arrays, NumPy numbers."""

from __future__ import annotations

import inspect
import io
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_janus
from mlx_janus.decode.text_options import SamplingArguments
from mlx_janus.errors import ImageError, OptionError
from mlx_janus.inference.text_generation import TEXT_OPTIONS, text_options
from mlx_janus.processing.images import open_image
from tests.support.golden import FIXTURES

PICTURE = FIXTURES / "picture.png"
Janus = mlx_janus.JanusPipeline


@pytest.fixture
def pixels() -> np.ndarray:
    """The picture as an array."""
    with Image.open(PICTURE) as image:
        return np.asarray(image.convert("RGB"))


def test_images_in_every_form_are_the_same_image(pixels: np.ndarray, tmp_path: Path) -> None:
    want = open_image(PICTURE)
    data = PICTURE.read_bytes()
    opaque = np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], axis=2)
    forms: list[Any] = [
        data,
        bytearray(data),
        memoryview(data),
        io.BytesIO(data),
        pixels,
        opaque,
        mx.array(pixels),
    ]
    forms.append(pixels[::-1][::-1])  # not contiguous
    for form in forms:
        assert open_image(form) == want, type(form)
    with PICTURE.open("rb") as file:
        assert open_image(file) == want


def test_transparent_arrays_lie_on_white() -> None:
    clear = np.zeros((4, 4, 4), np.uint8)
    assert (np.asarray(open_image(clear)) == 255).all()


@pytest.mark.parametrize("several", [False, True])
def test_a_question_about_an_array_or_an_open_file(
    pro: Janus, pixels: np.ndarray, several: bool
) -> None:
    want = pro.generate_text("What is it?", [PICTURE] * (1 + several), max_tokens=4).tokens
    for form in (pixels, io.BytesIO(PICTURE.read_bytes())):
        shown = [form, PICTURE] if several else form
        assert pro.generate_text("What is it?", shown, max_tokens=4).tokens == want
    talk = pro.conversation()
    assert (
        talk.send("What is it?", pixels, max_tokens=4).tokens
        == pro.conversation().send("What is it?", PICTURE, max_tokens=4).tokens
    )


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 4), np.uint8), "got 4x4 of uint8"),
        (np.zeros((4, 4, 2), np.uint8), "got 4x4x2"),
        (np.zeros((2, 4, 4, 3), np.uint8), "got 2x4x4x3"),
        (np.zeros((4, 4, 3), np.float32), "of float32"),
        (np.zeros((0, 4, 3), np.uint8), "got 0x4x3"),
        (mx.zeros((4, 4, 3)), "of float32"),
        (mx.zeros((4, 4, 3), mx.bfloat16), "got 4x4x3 of bfloat16"),
    ],
)
def test_other_arrays_are_refused(array: Any, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        open_image(array)


def test_files_that_give_nothing_are_refused(tmp_path: Path) -> None:
    spent = io.BytesIO(PICTURE.read_bytes())
    spent.read()
    with pytest.raises(ImageError, match=r"seek\(0\)"):
        open_image(spent)
    with pytest.raises(ImageError, match="binary mode"):
        open_image(io.StringIO("text"))  # type: ignore[arg-type]
    closed = PICTURE.open("rb")
    closed.close()
    with pytest.raises(ImageError, match="open it again"):
        open_image(closed)


def test_numpy_numbers_are_numbers(pro: Janus) -> None:
    plain = pro.generate_text("Hello?", max_tokens=6, temperature=0.5, seed=5)
    numbers: dict[str, Any] = {
        "max_tokens": np.int32(6),
        "temperature": np.float64(0.5),
        "seed": np.int64(5),
    }
    assert pro.generate_text("Hello?", **numbers).tokens == plain.tokens
    image = pro.generate_images("a fox", n=2, seed=3, cfg_weight=2.0, top_p=0.5)[1]
    choices: dict[str, Any] = {
        "n": np.uint8(2),
        "seed": np.int64(3),
        "cfg_weight": np.float32(2),
        "top_p": np.float16(0.5),
    }
    same = pro.generate_images("a fox", **choices)[1]
    assert same.tokens.tolist() == image.tokens.tolist()
    assert same.metadata == image.metadata
    assert type(same.seed) is int


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda janus: janus.generate_text(None), r"prompt must be text \(str\), got NoneType"),
        (lambda janus: janus.generate_text(["a", "b"]), r"prompt must be text \(str\), got list"),
        (lambda janus: janus.generate_text(b"a"), "got bytes"),
        (
            lambda janus: janus.generate_text("a", None),
            "images must be an image or several, got NoneType",
        ),
        (lambda janus: janus.generate_text("a", [3]), "images must be paths.*got int"),
        (lambda janus: janus.generate_text("a", system=3), "system must be text"),
        (
            lambda janus: janus.generate_text("a", stop=3),
            "stop must be text or several texts, got int",
        ),
        (lambda janus: janus.generate_text("a", temperature="0.5"), "temperature must be a number"),
        (lambda janus: janus.generate_text("a", temperature=True), "temperature must be a number"),
        (
            lambda janus: janus.generate_text("a", seed=np.bool_(True)),
            "seed must be a whole number",
        ),
        (lambda janus: janus.generate_text("a", seed=1.0), "seed must be a whole number"),
        (
            lambda janus: janus.generate_images(None),
            "prompt must be text or several texts, got NoneType",
        ),
        (lambda janus: janus.generate_images(["a", 3]), r"prompt must be text \(str\), got int"),
        (lambda janus: janus.generate_images("a", n=np.float64(1)), "n must be a whole number"),
        (lambda janus: janus.conversation().send(None), r"text must be text \(str\), got NoneType"),
    ],
)
def test_another_type_is_named(pro: Janus, call: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        call(pro)


def test_a_seed_of_minus_one_is_random(pro: Janus) -> None:
    """As the server has it, also for NumPy's -1 and in a list of seeds."""
    minus_one: Any = np.int64(-1)
    for seed in (-1, minus_one, [-1]):
        first = pro.generate_images("a fox", seed=seed)[0]
        again = pro.generate_images("a fox", seed=seed)[0]
        assert 0 <= first.seed != again.seed >= 0
    texts = {pro.generate_text("Hi", seed=-1, temperature=5, max_tokens=12).text for _ in range(3)}
    assert len(texts) > 1
    talk = pro.conversation()
    assert talk.draw("a fox", seed=-1)[0].seed != talk.draw("a fox", seed=-1)[0].seed


def test_each_prompt_may_have_its_own_seed(pro: Janus) -> None:
    """In a batch, also of equal prompts, the images are those of the seeds alone."""
    prompts = ["a fox", "an owl", "a fox"]
    images = pro.generate_images(prompts, n=2, seed=(5, 9, 1))
    found = [(image.prompt, image.seed) for image in images]
    assert found == [
        *[("a fox", 1), ("a fox", 2), ("a fox", 5), ("a fox", 6)],
        *[("an owl", 9), ("an owl", 10)],
    ]
    for image in images:
        alone = pro.generate_images(image.prompt, seed=image.seed, window=1)[0]
        assert alone.tokens.tolist() == image.tokens.tolist()


def test_images_show_themselves_in_notebooks(pro: Janus) -> None:
    image = pro.generate_images("a fox", seed=3)[0]
    side = pro.config.image_size
    assert repr(image) == f"<GeneratedImage 'a fox', seed 3, {side}x{side}>"
    with Image.open(io.BytesIO(image._repr_png_())) as shown:
        assert shown.size == (side, side)
        assert shown.text["seed"] == "3"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["foo", "grammar"])
def test_an_unknown_keyword_is_named_with_the_function(pro: Janus, name: str) -> None:
    talk = pro.conversation()
    talk.send("What is it?", PICTURE, max_tokens=1)
    choice: dict[str, Any] = {name: 1}
    functions = (
        pro.generate_text,
        pro.stream_text,
        pro.generate_images,
        pro.stream_images,
        talk.send,
        talk.stream,
    )
    for function in functions:
        with pytest.raises(TypeError) as refused:
            function("x", **choice)
        message = f"{function.__name__}() got an unexpected keyword argument {name!r}"
        assert str(refused.value) == message
    with pytest.raises(TypeError, match=rf"^regenerate\(\) got an unexpected .* '{name}'$"):
        talk.regenerate(**choice)


def test_all_options_of_an_answer_are_known() -> None:
    """Of a conversation too, which takes them as keywords."""
    named = {*inspect.signature(text_options).parameters} - {"sampling"}
    assert {*TEXT_OPTIONS} == named | {*SamplingArguments.__annotations__}
