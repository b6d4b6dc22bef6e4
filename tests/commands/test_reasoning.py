"""``generate --plan`` and ``--reflect``: files, JSON, repeating an image, progress, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_janus.commands import generate
from mlx_janus.commands.progress import follow_drawing
from mlx_janus.inference import planning, reflection
from mlx_janus.inference.results import ImageStep
from mlx_janus.weights.convert import Source, convert_checkpoint
from tests.support.golden import FIXTURES
from tests.support.images import pixels, png_text
from tests.support.programs import Outcome, call

SHORT = 12  # tokens of a text, for quick tests


@pytest.fixture
def model(converted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small random model whose texts are short, and an empty working folder."""
    monkeypatch.setattr(planning, "MAX_PLAN_TOKENS", SHORT)
    monkeypatch.setattr(reflection, "MAX_JUDGEMENT_TOKENS", SHORT)
    monkeypatch.chdir(tmp_path)
    return converted["deepseek-pro-bin"]


def draw(model: Path, *arguments: object) -> Outcome:
    done = call(generate.main, "-m", model, "--window", 1, *arguments)
    assert done.code == 0, done.stderr
    return done


def test_a_plan_stands_in_the_file_and_the_json(model: Path) -> None:
    done = draw(model, "-p", "a fox", "--plan", "--seed", 3, "-n", 2, "--json", "-o", "a.png")
    images = json.loads(done.stdout)["images"]
    for number, image in enumerate(images, 1):
        assert image["plan"] == png_text(f"a-{number}.png")["plan"]
        assert "rounds" not in image
    assert images[0]["plan"] != images[1]["plan"]


def test_an_image_is_drawn_again_without_planning_again(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(model, "-p", "a fox", "--plan", "--seed", 3, "-o", "a.png")
    with monkeypatch.context() as patch:
        patch.delattr(planning, "write_plan")
        draw(model, "--config-from", "a.png", "-o", "b.png")
    assert png_text("b.png") == png_text("a.png")
    assert np.array_equal(pixels("b.png"), pixels("a.png"))
    draw(model, "--config-from", "a.png", "--no-plan", "-o", "c.png")
    assert "plan" not in png_text("c.png")
    draw(model, "--config-from", "a.png", "-p", "a cup", "-o", "d.png")
    assert png_text("d.png")["plan"] != png_text("a.png")["plan"]  # of another prompt
    draw(model, "--config-from", "a.png", "--plan", "-o", "e.png")
    assert png_text("e.png") == png_text("a.png")


def test_an_image_without_a_plan_is_drawn_again_without_one(model: Path) -> None:
    convert_checkpoint(Source(FIXTURES / "deepseek-pro-bin", "CaraJ/T2I-R1"), Path("t2i"))
    draw(Path("t2i"), "-p", "a fox", "--no-plan", "--seed", 3, "-o", "a.png")
    draw(Path("t2i"), "--config-from", "a.png", "-o", "b.png")
    assert png_text("b.png") == png_text("a.png")
    draw(Path("t2i"), "-p", "a fox", "--seed", 3, "-o", "c.png")
    assert "plan" in png_text("c.png")


def test_rounds_stand_in_the_file_and_the_json(model: Path) -> None:
    words = ("-p", "a cup on a table", "--reflect", 2, "--temperature", 0)
    done = draw(model, *words, "--seed", 3, "--json", "-o", "a.png")
    (image,) = json.loads(done.stdout)["images"]
    assert image["rounds"][0]["matches"] is False
    assert image["rounds"][0]["words"]
    assert 0 < image["rounds"][0]["probability"] < 0.5
    stored = png_text("a.png")
    assert stored["reflect"] == "2"
    assert [one["words"] for one in json.loads(stored["rounds"])] == [
        one["words"] for one in image["rounds"]
    ]
    draw(model, "--config-from", "a.png", "-o", "b.png")
    assert png_text("b.png") == stored
    assert np.array_equal(pixels("b.png"), pixels("a.png"))


def test_previews_show_images_only_while_they_are_drawn(model: Path) -> None:
    words = ("-p", "a cup on a table", "--plan", "--reflect", 1, "--temperature", 0, "--seed", 1)
    draw(model, *words, "--preview-dir", "previews", "-o", "a.png")
    names = sorted(path.name for path in Path("previews").iterdir())
    assert names[0] == "step-0004.png"
    assert not any("_2" in name for name in names)  # no step was saved twice


def test_several_prompts_have_plans_in_a_folder(model: Path) -> None:
    done = draw(model, "-p", "a fox", "-p", "a cup", "--plan", "--seed", 1, "-o", "folder")
    paths = done.stdout.split()
    assert len(paths) == 2
    assert all(png_text(path)["plan"] for path in paths)


def test_a_drawing_with_rounds_lends_its_settings_to_a_change(model: Path) -> None:
    draw(model, "-p", "a fox", "--plan", "--reflect", 1, "--seed", 3, "-o", "a.png")
    draw(model, "--config-from", "a.png", "-i", "a.png", "-o", "b.png")
    assert {"plan", "reflect", "rounds"}.isdisjoint(png_text("b.png"))
    draw(model, "--config-from", "a.png", "--reflect", 0, "-o", "c.png")
    assert "rounds" not in png_text("c.png")
    assert png_text("c.png")["plan"] == png_text("a.png")["plan"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-p", "x", "--reflect", 11), "11 is not in the range 0<=x<=10"),
        (("-p", "x", "--text", "--plan"), "--plan does not go with answering"),
        (("-p", "x", "--text", "--reflect", 1), "--reflect does not go with answering"),
    ],
)
def test_options_that_do_not_fit(model: Path, arguments: tuple[object, ...], said: str) -> None:
    done = call(generate.main, "-m", model, *arguments)
    assert done.code == 2
    assert said in done.stderr


def test_no_preview_is_shown_while_a_text_is_written() -> None:
    class Previews:
        shown = 0

        def is_due(self, step: ImageStep) -> bool:
            return True

        def show_step(self, step: ImageStep) -> None:
            assert step.stage == "draw"
            self.shown += 1

    steps = [
        ImageStep(0, 1, (), list, stage="plan", text="a"),
        ImageStep(1, 1, (), list),
        ImageStep(1, 1, (), list, stage="judge", text="Yes"),
    ]
    previews: Any = Previews()
    follow_drawing(steps, 1, lambda image: None, previews)
    assert previews.shown == 1
