"""A folder with the images of many prompts: names and seeds, and templates of names."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mlx_janus.commands.image_folder import (
    FolderLayout,
    PlannedImage,
    check_existing,
    check_template,
    plan_images,
)
from mlx_janus.errors import OptionError, OutputError
from mlx_janus.limits import MAX_SEED
from mlx_janus.processing.saved_images import save_image

OUT = Path("out")


def names(*prompts: str, n: int = 1, template: str = "{name}") -> list[str]:
    check_template(template)
    images = plan_images(FolderLayout(OUT, template), prompts, n, 7)
    assert [image.prompt for image in images] == [prompt for prompt in prompts for _ in range(n)]
    return [str(image.path.relative_to(OUT)) for image in images]


def test_exact_words_are_the_name_and_others_get_a_hash() -> None:
    assert names("a red fox") == ["a-red-fox.png"]
    assert names("A fox!", "城", "an owl " * 20) == [
        "a-fox-c22bca0e19.png",
        "picture-76f47004cc.png",
        "an-owl-an-owl-an-owl-an-owl-an-owl-an-ow-97891d622d.png",
    ]


def test_no_two_prompts_have_one_name() -> None:
    """Also those that look like another one's copy, hash, or short form."""
    hashed = names("A fox!")[0].removesuffix(".png").replace("-", " ")
    prompts = [
        "a fox",
        "A fox",
        "a-fox",
        "a  fox",
        "a fox 2",
        "A fox!",
        hashed,
        "picture",
        "!",
        "?",
    ]
    prompts += ["x" * 50, "x" * 51, "x" * 40, "a\udcff", "a\udcfe", "straße", "strasse"]
    assert len(set(names(*prompts, n=3))) == 3 * len(prompts)


def test_equal_prompts_are_copies_of_one() -> None:
    assert names("a", "b", "a", n=2) == [
        *["a.png", "a-2.png"],
        *["b.png", "b-2.png"],
        *["a-3.png", "a-4.png"],
    ]


def test_names_and_seeds_stay_where_prompts_are_added_or_moved() -> None:
    few = plan_images(FolderLayout(OUT), ["a fox", "an owl"], 1, 7)
    many = plan_images(FolderLayout(OUT), ["a hen", "an owl", "a fox", "an owl"], 3, 7)
    assert set(few) < set(many)
    assert len({(image.prompt, image.seed) for image in many}) == len(many)
    first = {image.prompt: image.seed for image in reversed(many)}
    assert len(set(first.values())) == 3  # each prompt has its own noise


def test_one_noise_for_all_prompts() -> None:
    layout = FolderLayout(OUT, same_seeds=True)
    images = plan_images(layout, ["a fox", "an owl", "a fox"], 2, 7)
    assert [image.seed for image in images] == [7, 8, 7, 8, 9, 10]


def test_seeds_stay_in_their_range() -> None:
    images = plan_images(FolderLayout(OUT), ["a fox", "an owl"] * 3, 2, MAX_SEED)
    assert all(0 <= image.seed <= MAX_SEED for image in images)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{line0:05}/samples/{image0:04}", ["00000/samples/0000.png", "00000/samples/0001.png"]),
        ("{prompt}_{copy0:06}.png", ["a_ red .fox._000000.png", "a_ red .fox._000001.png"]),
        ("{line:04}-{words}-{copy}", ["0001-a-red-fox-1.png", "0001-a-red-fox-2.png"]),
        ("{name}.webp", ["a-red-fox-4d3a1a9eb3.webp", "a-red-fox-4d3a1a9eb3-2.webp"]),
        ("v1.{image}.JPG", ["v1.1.JPG", "v1.2.JPG"]),
        ("{{{image:02d}}}", ["{01}.png", "{02}.png"]),
        ("./{seed}", ["1295653541.png", "1295653542.png"]),
    ],
)
def test_templates(template: str, expected: list[str]) -> None:
    assert names("a/ red .fox.", n=2, template=template) == expected


def test_a_prompt_cannot_lead_out_of_the_folder() -> None:
    assert names("..", "../a", "/b", ".c", "d\n\0", template="{prompt}/x{line}") == [
        *["_./x1.png", "_._a/x2.png", "_b/x3.png", "_c/x4.png", "d__/x5.png"],
    ]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{", "a brace without its partner"),
        ("a}", "a brace without its partner"),
        ("{}", "no field {}: it must be one of name, words"),
        ("{0}", "no field {0}"),
        ("{line.real}", "no field"),
        ("{name[0]}", "no field"),
        ("{line:{image}}", "a wrong width of {line}: only a number has one"),
        ("{line:5}", "a wrong width"),
        ("{line:0999}", "a wrong width"),
        ("{line:x}", "a wrong width"),
        ("{words:04}", "a wrong width of {words}"),
        ("{words!r}", "a wrong width"),
        ("{name}.gif", "only .png, .jpg and .webp are written"),
        ("", "names no file"),
        ("{line}/", "names no file"),
        (".", "names no file"),
        ("../{name}", "leads out of the folder"),
        ("/tmp/{name}", "leads out of the folder"),
        ("a/../{name}", "leads out of the folder"),
    ],
)
def test_templates_that_are_refused(template: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_template(template)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("template", "prompts", "message"),
    [
        ("{words}", ["a fox", "a fox!"], "two images the name out/a-fox.png: add {name}"),
        ("{prompt}", ["a fox", "A FOX"], "two images the name out/A FOX.png"),
        ("{prompt}", ["\u00e9", "e\u0301"], "two images the name"),
        ("{line}", ["a", "b"], ""),
        ("x", ["a", "b"], "two images the name out/x.png"),
        ("{prompt}", ["ä" * 200], "a name of 404 bytes, and 255 are possible: use {name}"),
    ],
)
def test_names_that_are_equal_or_too_long(template: str, prompts: list[str], message: str) -> None:
    if not message:
        assert names(*prompts, template=template)
        return
    with pytest.raises(OutputError) as caught:
        names(*prompts, template=template)
    assert message in str(caught.value)


def test_files_that_show_another_prompt(tmp_path: Path) -> None:
    layout = FolderLayout(tmp_path, "{line}")
    path = tmp_path / "1.png"
    there = [PlannedImage("a\udcff\0", 1, path)]
    save_image(Image.new("RGB", (1, 1)), path, {"prompt": "a\udcff\0"})
    check_existing(layout, there)
    with pytest.raises(OutputError, match=r"1\.png shows another prompt, 'a\?': name another"):
        check_existing(layout, [PlannedImage("b", 1, path)])
    check_existing(FolderLayout(tmp_path, "{name}"), [PlannedImage("b", 1, path)])
    Image.new("RGB", (1, 1)).save(path)  # from elsewhere
    check_existing(layout, there)
    path.write_text("no image")
    check_existing(layout, there)
