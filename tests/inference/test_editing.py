"""Changing images by the public names: the crop, the metadata, and models not trained for it."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_janus
from mlx_janus.errors import ImageError, OptionError
from mlx_janus.inference.input_records import read_edit
from mlx_janus.inference.results import read_settings
from mlx_janus.processing.images import letterbox, resize_and_pad
from mlx_janus.processing.saved_images import save_image
from mlx_janus.weights.convert import Source, convert_checkpoint
from tests.support.golden import FIXTURES

Janus = mlx_janus.JanusPipeline
WIDE = (64, 40)


def photo(size: tuple[int, int] = WIDE) -> Image.Image:
    width, height = size
    noise = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def change(janus: Janus, **choices: Any) -> mlx_janus.GeneratedImage:
    choices = {"images": photo(), "seed": 3, "window": 1} | choices
    return janus.generate_images("make it night", **choices)[0]


# The crop


@pytest.mark.parametrize("size", [(64, 40), (3, 64), (500, 1), (7, 7), (1000, 999)])
def test_the_letterbox_is_the_place_of_the_image(pro: Janus, size: tuple[int, int]) -> None:
    """All pixels outside are bars, and no row or column inside is one."""
    config = pro.config.image
    white = Image.new("RGB", size, "white")
    square = np.asarray(resize_and_pad(white, config))
    left, top, right, bottom = letterbox(size, config)
    expected = np.full_like(square, config.background)
    expected[top:bottom, left:right] = 255
    assert np.array_equal(square, expected)


def test_the_result_has_the_shape_of_the_image(pro: Janus) -> None:
    cropped = change(pro)
    whole = change(pro, crop=False)
    box = letterbox(WIDE, pro.config.image)
    side = pro.config.image_size
    assert whole.image.size == (side, side)
    assert cropped.image.size == (side, int(side * 40 / 64))
    assert cropped.image.tobytes() == whole.image.crop(box).tobytes()
    assert (cropped.metadata["crop"], whole.metadata["crop"]) == ("yes", "no")
    assert np.array_equal(cropped.tokens, whole.tokens)
    assert change(pro, images=photo((40, 40))).image.size == (side, side)


def test_of_several_images_the_result_is_square_unless_told(pro: Janus) -> None:
    both = [photo((20, 60)), photo()]
    side = pro.config.image_size
    assert change(pro, images=both).image.size == (side, side)
    assert change(pro, images=both, crop=True).image.size == (int(side * 20 / 60), side)


def test_previews_are_cropped(pro: Janus) -> None:
    steps = list(pro.stream_images("x", images=photo(), seed=3, window=1))
    sizes = {image.size for step in steps for image in step.preview()}
    assert sizes == {change(pro).image.size}


def test_what_is_no_crop(pro: Janus) -> None:
    with pytest.raises(OptionError, match="crop is for changing images"):
        pro.generate_images("x", crop=False)
    with pytest.raises(OptionError, match="crop must be True, False or None, got 1"):
        change(pro, crop=1)
    with pytest.raises(ImageError, match=r"absent\.png does not exist"):
        change(pro, images="absent.png")


# The metadata


def test_metadata_record_the_inputs_without_their_folders(pro: Janus, tmp_path: Path) -> None:
    path = tmp_path / "my “photo”.png"
    photo().save(path)
    data = path.read_bytes()
    hexadecimal = hashlib.sha256(data).hexdigest()
    image = change(pro, images=[path, data, io.BytesIO(data), photo()], crop=True, cfg_weight2=2)
    assert image.metadata["task"] == "edit"
    size = "64x40"
    assert json.loads(image.metadata["inputs"]) == [
        {"name": path.name, "sha256": hexadecimal, "size": size},
        {"sha256": hexadecimal, "size": size},
        {"size": size},
        {"size": size},
    ]
    saved = image.save(tmp_path / "a.png")
    assert str(tmp_path).encode() not in saved.read_bytes()
    settings = read_settings(saved)
    assert (settings["cfg_weight2"], settings["crop"]) == (2.0, True)
    assert [record.name for record in settings["inputs"]] == [path.name, None, None, None]
    assert settings["inputs"][0].sha256 == hexadecimal
    drawn = pro.generate_images("a fox", seed=1)[0]
    assert not {"task", "inputs", "crop"} & set(drawn.metadata)
    assert read_settings(drawn.save(tmp_path / "b.png"))["inputs"] == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": "paint"},
        {"inputs": "[]"},
        {"inputs": "[3]"},
        {"inputs": '[{"size": 3}]'},
        {"inputs": '[{"size": "1x1", "folder": "/"}]'},
        {"inputs": "{"},
        {"crop": "maybe"},
        {"cfg_weight2": "x"},
    ],
)
def test_changed_metadata_are_refused(pro: Janus, tmp_path: Path, wrong: dict[str, str]) -> None:
    image = change(pro)
    path = save_image(image.image, tmp_path / "a.png", image.metadata | wrong)
    with pytest.raises(ImageError, match="carries settings that were changed or cut"):
        read_settings(path)


def test_a_changed_image_without_its_inputs_is_not_drawn_again(pro: Janus, tmp_path: Path) -> None:
    """As earlier releases of the server wrote it. Drawing it would give another image."""
    image = change(pro)
    facts = {name: image.metadata[name] for name in image.metadata.keys() - {"task", "inputs"}}
    path = save_image(image.image, tmp_path / "a.png", facts)
    with pytest.raises(ImageError, match=r"a\.png was made from other images, which its settings"):
        read_settings(path)
    with pytest.raises(ValueError):  # noqa: PT011
        read_edit(facts)


def test_a_pipe_is_read_once(pro: Janus, tmp_path: Path) -> None:
    """Its hash would need a second reading, which would wait for ever."""
    data = io.BytesIO()
    photo().save(data, "PNG")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(data.getvalue()))
    writer.start()
    image = change(pro, images=pipe)
    writer.join()
    assert json.loads(image.metadata["inputs"]) == [{"size": "64x40"}]


# Models


def test_a_model_that_was_not_trained_for_it_warns_once(
    converted: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with mlx_janus.load(converted["deepseek-pro-bin"]) as janus:
        assert not janus.trained_for_editing
        janus.generate_images("a fox", seed=1)
        assert not caplog.records
        for _ in range(2):
            change(janus)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("mlx_janus", logging.WARNING)
    line = record.getMessage()
    assert "deepseek-pro-bin was not trained to change images" in line
    assert "FreedomIntelligence/Janus-4o-7B" in line


@pytest.mark.parametrize(
    ("source", "folder", "trained"),
    [
        ("FreedomIntelligence/Janus-4o-7B", "small", True),
        ("deepseek-ai/Janus-Pro-7B", "janus-4o-7b-4bit", True),
        ("me/janus_4o-tuned", "small", True),
        ("deepseek-ai/Janus-Pro-7B", "small", False),
        ("me/janus-4oak", "small", False),
    ],
)
def test_the_name_or_that_of_the_source_tells(
    converted: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    source: str,
    folder: str,
    trained: bool,
) -> None:
    target = Path(shutil.copytree(converted["deepseek-pro-bin"], tmp_path / folder))
    for file in target.glob("*.safetensors"):
        arrays, stamp = mx.load(str(file), return_metadata=True)
        mx.save_safetensors(str(file), arrays, stamp | {"source": source})
    with mlx_janus.load(target) as janus:
        assert janus.trained_for_editing == trained
        change(janus)
    assert (not caplog.records) == trained


def test_low_memory_changes_nothing(pro: Janus, converted: dict[str, Path]) -> None:
    with mlx_janus.load(converted["deepseek-pro-bin"], dtype="float32", low_memory=True) as low:
        assert change(low).image == change(pro).image


def test_a_conversion_of_a_folder_keeps_its_name(tmp_path: Path) -> None:
    convert_checkpoint(Source(FIXTURES / "deepseek-pro-bin", "Janus-4o-7B"), tmp_path / "x")
    with mlx_janus.load(tmp_path / "x") as janus:
        assert janus.trained_for_editing
