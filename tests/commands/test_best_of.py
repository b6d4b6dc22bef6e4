"""``generate --best-of``: files numbered from the best, scores in JSON, metadata and notes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mlx_janus
from mlx_janus.commands import generate
from tests.support.images import pixels, png_text
from tests.support.programs import Outcome, call

PROMPT = "a red circle"


@pytest.fixture(autouse=True)
def model(converted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small random model, "model" in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(converted["deepseek-pro-bin"])
    return Path("model")


def run(*arguments: object) -> Outcome:
    return call(generate.main, "-m", "model", "--window", 1, "--seed", 3, *arguments)


def draw(*arguments: object) -> Outcome:
    done = run(*arguments)
    assert done.code == 0, done.stderr
    return done


def test_the_best_image_is_saved_with_its_score() -> None:
    done = draw("-p", PROMPT, "--best-of", 3)
    assert done.stdout == "janus.png\n"
    stored = png_text("janus.png")
    assert (stored["best_of"], stored["rank"]) == ("3", "1")
    assert f"seed {stored['seed']}, score {float(stored['score']):.2f}" in done.stderr
    with mlx_janus.load("model") as janus:
        (best,) = janus.generate_images(PROMPT, best_of=3, seed=3, window=1)
    assert stored["seed"] == str(best.seed)
    assert np.array_equal(pixels("janus.png"), np.array(best.image))


def test_all_images_are_kept_in_the_order_of_their_ranks() -> None:
    report = json.loads(draw("-p", PROMPT, "--best-of", 3, "--keep-all", "--json").stdout)
    images = report["images"]
    assert [image["path"] for image in images] == ["janus-1.png", "janus-2.png", "janus-3.png"]
    assert [image["rank"] for image in images] == [1, 2, 3]
    scores = [image["score"] for image in images]
    assert scores == sorted(scores, reverse=True)
    assert sorted(image["seed"] for image in images) == [3, 4, 5]
    for image in images:
        stored = png_text(image["path"])
        assert stored["rank"] == str(image["rank"])
        assert float(stored["score"]) == pytest.approx(image["score"], rel=1e-4)
    plain = json.loads(draw("-p", PROMPT, "--json", "-o", "plain.png").stdout)
    assert "score" not in plain["images"][0]  # only of a choice


def test_the_best_image_is_drawn_again_from_its_file() -> None:
    draw("-p", PROMPT, "--best-of", 3, "-o", "best.png")
    again = call(
        generate.main, "-m", "model", "--window", 1, "--config-from", "best.png", "-o", "again.png"
    )
    assert again.code == 0, again.stderr
    assert np.array_equal(pixels("again.png"), pixels("best.png"))
    assert "best_of" not in png_text("again.png")  # it was not chosen again


def test_several_images_do_not_go_to_stdout() -> None:
    done = run("-p", PROMPT, "--best-of", 2, "--keep-all", "-o", "-")
    assert done.code == 2
    assert "--output - writes one image" in done.stderr


def test_previews_show_the_candidates() -> None:
    draw("-p", PROMPT, "--best-of", 2, "--preview-dir", "steps", "--preview-every", 8)
    names = sorted(path.name for path in Path("steps").iterdir())
    assert names[:4] == ["step-0008-1.png", "step-0008-2.png", "step-0016-1.png", "step-0016-2.png"]
    assert len(names) == 4  # none while images are scored


def test_a_folder_is_completed() -> None:
    """A line whose best images are there is skipped; a missing one is chosen as before."""
    Path("prompts.txt").write_text("a star\na blue square\na star\n")
    options = ("--prompts-file", "prompts.txt", "--best-of", 2, "-o", "out")
    first = json.loads(draw(*options, "--json").stdout)["images"]
    assert [image["prompt"] for image in first] == ["a star", "a blue square", "a star"]
    assert len({image["path"] for image in first}) == 3
    before = {image["path"]: pixels(image["path"]) for image in first}
    Path(first[1]["path"]).unlink()
    again = draw(*options)
    assert again.stdout == f"{first[1]['path']}\n"
    assert "2 of 3 images exist already" in again.stderr
    for path, values in before.items():
        assert np.array_equal(pixels(path), values)


def test_a_missing_rank_of_a_folder_is_drawn_and_the_others_are_kept() -> None:
    Path("prompts.txt").write_text("a star\n")
    options = ("--prompts-file", "prompts.txt", "--best-of", 3, "-n", 2, "-o", "out")
    paths = [image["path"] for image in json.loads(draw(*options, "--json").stdout)["images"]]
    second = pixels(paths[1])
    Path(paths[1]).unlink()
    assert draw(*options).stdout == f"{paths[1]}\n"
    assert np.array_equal(pixels(paths[1]), second)
    assert png_text(paths[1])["rank"] == "2"
    assert len(list(Path("out").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keep-all",), "--keep-all needs --best-of: say how many to draw."),
        (("--best-of", 2, "-n", 3), "--n is more than --best-of draws: take a smaller --n."),
        (("--best-of", 2, "-n", 2, "--keep-all"), "leave --n out."),
        (("--best-of", 2, "-i", "a.png", "-o", "b.png"), "leave --image out."),
        (("--best-of", 2, "--text"), "--best-of does not go with answering"),
        (("--best-of", 2, "-p", "b", "--name", "{seed}"), "--name cannot have {seed}"),
        (("--best-of", 0), "is not in the range 1<=x<=1000"),
        (("--best-of", 2, "--seed", 2**63 - 1), "take a smaller --seed"),
    ],
)
def test_options_that_do_not_fit(arguments: tuple[object, ...], message: str) -> None:
    Image.new("RGB", (8, 8)).save("a.png")
    done = run("-p", "a", *arguments)
    assert done.code == 2
    assert message in " ".join(done.stderr.split())
    assert done.stdout == ""
