"""Image preprocessing gives the reference's pixels for every option that changes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_janus.config import ImageConfig
from mlx_janus.errors import ConfigError, UnsupportedModelError
from mlx_janus.processing.images import preprocess
from mlx_janus.weights.published import Published, read_published
from tests.support.golden import FIXTURES

LAYOUTS = ("deepseek-pro-bin", "transformers")
MEAN = [0.48, 0.25, 0.75]
STD = [0.3, 0.2, 0.4]


def read_with(folder: Path, layout: str, **options: Any) -> Published:
    """Read a fixture whose image options are changed; None removes an option."""
    for file in (FIXTURES / layout).iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder)
    name = "preprocessor_config.json" if layout == "deepseek-pro-bin" else "processor_config.json"
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    section = content if layout == "deepseek-pro-bin" else content["image_processor"]
    section.update(options)
    for option in [option for option, value in section.items() if value is None]:
        del section[option]
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return read_published(folder)


def wide_image() -> Image.Image:
    """A 4 x 2 image; scaled to 64 x 32 it has padding above and below."""
    pixels = np.random.RandomState(0).randint(0, 256, (2, 4, 3), np.uint8)
    return Image.fromarray(pixels)


def reference_pixels(
    mean: list[float], std: list[float], rescale_factor: float = 1 / 255
) -> np.ndarray:
    """DeepSeek's order of operations: pad with int(255 * mean), rescale, normalize."""
    square = Image.new("RGB", (64, 64), tuple(int(255 * channel) for channel in mean))
    square.paste(wide_image().resize((64, 32), Image.Resampling.BICUBIC), (0, 16))
    pixels = np.asarray(square).astype(np.float64) * rescale_factor
    return (pixels - mean) / std


def assert_same_pixels(config: ImageConfig, wanted: np.ndarray) -> None:
    found = preprocess(wide_image(), config)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("background", [None, [127, 127, 127], [122, 63, 191]])
def test_the_padding_has_the_colour_of_the_mean(
    tmp_path: Path, layout: str, background: list[int] | None
) -> None:
    """The reference writes ``background_color`` and computes the colour from the mean."""
    published = read_with(
        tmp_path, layout, image_mean=MEAN, image_std=STD, background_color=background
    )
    assert published.config.image.background == (122, 63, 191)
    assert_same_pixels(published.config.image, reference_pixels(MEAN, STD))
    assert published.notes == ()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_mean_is_noted(tmp_path: Path, layout: str) -> None:
    """The reference has another default, which no published model was trained with."""
    published = read_with(tmp_path, layout, image_mean=None, image_std=None)
    assert published.config.image == ImageConfig(64)
    assert [note.partition(": ")[2] for note in published.notes] == [
        "image_mean is missing; 0.5 is used, as published",
        "image_std is missing; 0.5 is used, as published",
    ]


def test_a_chosen_background_is_kept_and_noted(tmp_path: Path) -> None:
    published = read_with(tmp_path, LAYOUTS[0], background_color=[1, 2, 3])
    assert published.config.image.background == (1, 2, 3)
    assert published.notes == (
        "preprocessor_config.json: background_color [1, 2, 3] is used; "
        "DeepSeek's code pads with the colour of image_mean, [127, 127, 127]",
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factor", [1 / 127.5, 1 / 255, 0.01])
def test_the_rescale_factor(tmp_path: Path, layout: str, factor: float) -> None:
    published = read_with(tmp_path, layout, rescale_factor=factor, image_mean=MEAN, image_std=STD)
    assert_same_pixels(published.config.image, reference_pixels(MEAN, STD, factor))
    assert published.config.image.background == (122, 63, 191)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_published_factor_changes_nothing(tmp_path: Path, layout: str) -> None:
    image = read_with(tmp_path, layout, rescale_factor=0.00392156862745098).config.image
    assert image == ImageConfig(64)


def test_leaving_out_the_rescaling_is_transformers_option(tmp_path: Path) -> None:
    image = read_with(tmp_path, "transformers", do_rescale=False).config.image
    assert_same_pixels(image, reference_pixels([0.5] * 3, [0.5] * 3, 1.0))
    assert read_with(tmp_path, LAYOUTS[0], do_rescale=False).config.image == ImageConfig(64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_error_of_old_copies_is_not_followed(tmp_path: Path, layout: str) -> None:
    """transformers' converter copied ``do_normalize: false`` from them."""
    published = read_with(tmp_path, layout, do_normalize=False)
    assert published.config.image == ImageConfig(64)
    assert [note.partition(":")[2][:22] for note in published.notes] == [" do_normalize is false"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("resample", 2), ("resample", "nearest"), ("do_resize", False), ("do_pad", False)],
)
def test_other_pixels_are_refused_by_name(tmp_path: Path, option: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read_with(tmp_path, "transformers", **{option: value})
    assert str(caught.value).startswith(f"{tmp_path / 'processor_config.json'} has {option} ")
    # DeepSeek's code has no such option.
    assert read_with(tmp_path, LAYOUTS[0], **{option: value}).config.image == ImageConfig(64)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (LAYOUTS[0], {"image_size": 384}),
        ("transformers", {"size": {"height": 384, "width": 384}}),
        ("transformers", {"size": {"shortest_edge": 64}}),
    ],
)
def test_another_size_is_noted(tmp_path: Path, layout: str, options: dict[str, Any]) -> None:
    published = read_with(tmp_path, layout, **options)
    assert published.config.image.image_size == 64
    (note,) = published.notes
    assert f"{next(iter(options))} is " in note
    assert note.endswith(" is used")


@pytest.mark.parametrize("size", [64, {"width": 64, "height": 64}])
def test_the_encoders_size_is_not_noted(tmp_path: Path, size: Any) -> None:
    assert read_with(tmp_path, "transformers", size=size).notes == ()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {"rescale_factor": 0},
        {"rescale_factor": -1.0},
        {"rescale_factor": "1/255"},
        {"rescale_factor": True},
        {"rescale_factor": 10**400},
        {"rescale_factor": float("nan")},
        {"image_mean": 0.5},
        {"image_mean": [0.5, "x", 0.5]},
        {"image_mean": [5, 5, 5]},
        {"image_std": [0, 1, 1]},
        {"background_color": "grey"},
        {"background_color": [1, 2]},
    ],
)
def test_impossible_values(tmp_path: Path, layout: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_with(tmp_path, layout, **options)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_section_of_the_processor_has_priority_in_transformers_layout(tmp_path: Path) -> None:
    own = {"image_mean": MEAN, "image_std": STD}
    read_with(tmp_path, "transformers")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own), encoding="utf-8")
    assert read_published(tmp_path).config.image == ImageConfig(64)
    (tmp_path / "processor_config.json").unlink()
    assert read_published(tmp_path).config.image.mean == tuple(MEAN)
