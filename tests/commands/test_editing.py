"""``generate`` with images and an output: the images are changed, as the library changes them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mlx_janus
from mlx_janus.commands import editing, generate
from tests.support.golden import FIXTURES
from tests.support.images import png_text
from tests.support.programs import Outcome, call, error_line, run

PROMPT = "make it night"
OTHER = FIXTURES / "picture.png"


@pytest.fixture
def model(converted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small random model, and a working folder with one photo."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    noise = np.random.default_rng(1).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save("photo.png")
    return converted["deepseek-pro-bin"]


def change(model: Path, *arguments: object, **inputs: Any) -> Outcome:
    words = ("-m", model, "-i", "photo.png", "-p", PROMPT, "--window", 1)
    done = call(generate.main, *words, *arguments, **inputs)
    assert done.code == 0, done.stderr
    return done


def same(path: str, expected: Image.Image) -> bool:
    with Image.open(path) as image:
        return image.size == expected.size and image.tobytes() == expected.tobytes()


def test_the_images_are_the_librarys(model: Path, pro: mlx_janus.JanusPipeline) -> None:
    done = change(model, "-i", OTHER, "-n", 2, "--seed", 5, "-o", "night.png", "--crop")
    assert done.stdout == "night-1.png\nnight-2.png\n"
    photos = ["photo.png", OTHER]
    expected = pro.generate_images(PROMPT, images=photos, n=2, seed=5, window=1, crop=True)
    assert all(same(f"night-{i}.png", image.image) for i, image in enumerate(expected, 1))
    assert expected[0].image.width > expected[0].image.height
    weights = ("--cfg-weight", 2, "--cfg-weight2", 1, "--no-crop")
    change(model, "--seed", 5, "-o", "weak.png", *weights)
    options: dict[str, Any] = {"cfg_weight": 2, "cfg_weight2": 1, "crop": False}
    (weak,) = pro.generate_images(PROMPT, images="photo.png", seed=5, window=1, **options)
    assert same("weak.png", weak.image)
    assert weak.image.width == weak.image.height


def test_a_change_is_repeated_from_its_file(model: Path) -> None:
    change(model, "--seed", 5, "--cfg-weight2", 2, "-o", "night.png")
    stored = png_text("night.png")
    photo = hashlib.sha256(Path("photo.png").read_bytes()).hexdigest()
    assert stored["task"] == "edit"
    assert json.loads(stored["inputs"]) == [{"name": "photo.png", "sha256": photo, "size": "64x40"}]
    (Path("away")).mkdir()
    shutil.copy("photo.png", "away/moved.png")
    words = ("-m", model, "--config-from", "night.png", "-o", "again.png")
    again = call(generate.main, *words, "-i", "away/moved.png")
    assert "was made from other images" not in again.stderr
    inputs = stored["inputs"].replace("photo.png", "moved.png")
    assert png_text("again.png") == stored | {"inputs": inputs}
    assert same("again.png", Image.open("night.png"))
    other = call(generate.main, *words, "-i", OTHER)
    assert other.code == 0
    assert "night.png was made from other images: only the same ones" in other.stderr


def test_nothing_is_overwritten_and_a_folder_gets_janus_png(model: Path) -> None:
    paths = [change(model, "-o", name).stdout for name in ("photo.png", "out/", "out", "-q.png")]
    assert paths == ["photo_2.png\n", "out/janus.png\n", "out/janus_2.png\n", "-q.png\n"]


def test_json_previews_and_larger_images(model: Path) -> None:
    flags = ("--json", "--upscale", 2, "--preview-dir", "steps", "--preview-every", 8)
    report = json.loads(change(model, "-o", "night.png", *flags).stdout)
    assert [image["path"] for image in report["images"]] == ["night.png"]
    with Image.open("steps/step-0008.png") as preview, Image.open("night.png") as night:
        assert (preview.width * 2, preview.height * 2) == night.size
        assert night.width > night.height
    assert png_text("night.png")["upscale"] == "2 (Lanczos)"


def test_several_prompts_change_into_a_folder(model: Path) -> None:
    words = ("-p", "a red hat", "-o", "out", "--seed", 5)
    done = change(model, *words)
    assert len(done.stdout.splitlines()) == 2
    again = change(model, *words)
    assert (again.stdout, "2 of 2 images exist already" in again.stderr) == ("", True)
    # The same prompts with another photo must not count as done.
    refused = call(generate.main, "-m", "no/such", "-i", OTHER, "-p", PROMPT, *words)
    line = error_line(refused)
    assert "was not made from these images: name another folder with --output" in line


def test_an_image_through_pipes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path("photo.png").read_bytes()
    words = ("-m", model, "-i", "-", "-p", PROMPT, "--seed", 5, "--window", 1)
    piped = call(generate.main, *words, "-o", "piped.png", stdin=data)
    assert piped.code == 0, piped.stderr
    change(model, "--seed", 5, "-o", "named.png")
    assert same("piped.png", Image.open("named.png"))
    photo = hashlib.sha256(data).hexdigest()
    assert json.loads(png_text("piped.png")["inputs"]) == [{"sha256": photo, "size": "64x40"}]
    out = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(generate.click, "echo", lambda text, nl: out.buffer.write(text))
    change(model, "--seed", 5, "-o", "-", "-q")
    assert out.buffer.getvalue() == Path("named.png").read_bytes()  # type: ignore[attr-defined]


def test_images_of_the_web_and_of_pipes_are_read_once(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path("photo.png").read_bytes()
    fetched = iter([data])  # a second time would fail
    monkeypatch.setattr(editing, "fetch", lambda _: next(fetched))
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: Path("pipe").write_bytes(data))
    writer.start()
    change(model, "-i", "https://example.org/a.png?key=secret", "-i", "pipe", "-o", "night.png")
    writer.join()
    inputs = json.loads(png_text("night.png")["inputs"])
    photo = hashlib.sha256(data).hexdigest()
    assert inputs[0]["name"] == "photo.png"
    assert inputs[1:] == [{"sha256": photo, "size": "64x40"}] * 2


def test_an_image_without_a_recorded_hash_may_be_any(model: Path) -> None:
    """As those of chats are."""
    with mlx_janus.load(model) as janus:
        janus.generate_images(PROMPT, images=Image.open("photo.png"))[0].save("night.png")
    words = ("-m", model, "--config-from", "night.png", "-o", "again.png")
    refused = call(generate.main, *words)
    assert refused.code == 2
    assert "night.png was made from another image: add --image FILE" in refused.stderr
    done = call(generate.main, *words, "-i", OTHER)
    assert (done.code, "was made from other images" in done.stderr) == (0, False)
    two = call(generate.main, *words, "-i", OTHER, "-i", OTHER)
    assert "was made from other images" in two.stderr


def test_images_that_cannot_be_read_fail_before_the_model(model: Path) -> None:
    Path("notes.txt").write_text("hello")
    words = ("-m", "no/such/model", "-p", PROMPT, "-o", "night.png", "-i")
    assert "absent.jpg does not exist" in error_line(call(generate.main, *words, "absent.jpg"))
    assert "notes.txt is not an image" in error_line(call(generate.main, *words, "notes.txt"))
    assert "the image on stdin is empty" in error_line(call(generate.main, *words, "-", stdin=b""))
    wrong = (*words[:4], "-o", "night.gif", "-i", "photo.png")
    assert "only .png, .jpg and .webp are written" in error_line(call(generate.main, *wrong))
    assert "no/such/model" in error_line(call(generate.main, *words, "photo.png"))


def test_help_says_what_decides() -> None:
    done = call(generate.main, "--help")
    assert done.code == 0
    text = " ".join(done.stdout.split())
    assert "With --image, --output decides: with it, the images are changed" in text
    assert "Cut a changed image to the shape of the first --image, which the model sees" in text


def test_a_model_not_trained_for_it_says_so_in_one_line(model: Path) -> None:
    """In a process of its own, where Python prints what is logged."""
    words = ("-m", "mlx_janus.generate", "-m", "tiny", "-i", "photo.png", "-p", PROMPT)
    done = run(*words, "-n", 2, "-o", "night.png", cwd=Path.cwd())
    assert (done.code, done.stdout) == (0, "night-1.png\nnight-2.png\n")
    lines = [line for line in done.stderr.splitlines() if "not trained to change images" in line]
    assert len(lines) == 1
    assert lines[0].startswith("janus-tiny was not trained")
