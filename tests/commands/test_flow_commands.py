"""JanusFlow in the commands: ``convert --vae``, ``generate --steps``, chat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import mlx_janus
from mlx_janus.commands import chat, convert, generate
from tests.support.flow import VAE, source
from tests.support.programs import call, error_line

FOLDER = source().folder


def test_the_programs_draw_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(convert.main, FOLDER, "model", "--vae", VAE)
    assert done.code == 0, done.stderr
    assert call(convert.main, FOLDER, "model", "--vae", VAE, "--verify").code == 0
    done = call(generate.main, "-m", "model", "-p", "a fox", "--seed", 1, "--steps", 3, "--json")
    assert done.code == 0, done.stderr
    (made,) = json.loads(done.stdout)["images"]
    assert (made["tokens"], made["passes"]) == (None, 3)
    again = call(generate.main, "-m", "model", "--config-from", made["path"], "-o", "again.png")
    assert again.code == 0, again.stderr
    with Image.open(made["path"]) as first, Image.open("again.png") as second:
        assert first.tobytes() == second.tobytes()
        assert second.text["steps"] == "3"  # type: ignore[attr-defined]


def test_previews_count_steps(
    flow_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--steps", 4, "--preview-dir", "steps", "--preview-every", 2)
    done = call(generate.main, "-m", flow_folder, "-p", "a fox", "--seed", 1, *flags)
    assert done.code == 0, done.stderr
    assert sorted(path.name for path in Path("steps").iterdir()) == [
        "step-0002.png",
        "step-0004.png",
    ]


def test_options_of_another_kind_of_drawing_are_refused(
    flow_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for flags, message in (
        (("--temperature", 0.5), "temperature is no option of a model that draws by"),
        (("--window", 2), "window is no option"),
        (("--exact",), "exact is no option"),
        (("--vae", VAE), "leave --vae out"),
    ):
        line = error_line(call(generate.main, "-m", flow_folder, "-p", "a fox", *flags))
        assert message in line
    assert call(generate.main, "-m", flow_folder, "-p", "a fox", "--steps", 0).code == 2
    assert call(generate.main, "-m", flow_folder, "-p", "x", "--text", "--steps", 3).code == 2
    line = error_line(call(generate.main, "-p", "a circle", "--steps", 3))
    assert "steps is no option of a model that draws image tokens" in line


def test_a_chat_draws_with_the_options_that_the_model_has(
    flow_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A temperature for answers does not keep the model from drawing."""
    monkeypatch.chdir(tmp_path)
    lines = "/set steps 2\n/set temperature 0.5\n/set seed 3\n/draw a fox\n"
    done = call(chat.main, "-m", flow_folder, stdin=lines)
    assert done.code == 0, done.stderr
    with Image.open("janus.png") as image:
        assert image.text["steps"] == "2"  # type: ignore[attr-defined]
    assert mlx_janus.load(flow_folder).generate_images("a fox", seed=3, steps=2)
