"""``generate``: images repeated from their files, enlarged and previewed; JSON; completion."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mlx_janus
from mlx_janus import errors
from mlx_janus.commands import convert, generate
from mlx_janus.processing.saved_images import save_image
from tests.support.golden import FIXTURES
from tests.support.programs import ROOT, Outcome, call, error_line

PROMPT = "a lighthouse in a storm, “Ärger”"
PICTURE = FIXTURES / "picture.png"


@pytest.fixture
def model(converted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small random model, and an empty working folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return converted["deepseek-pro-bin"]


def draw(model: Path, *arguments: object) -> Outcome:
    done = call(generate.main, "-m", model, "--window", 1, *arguments)
    assert done.code == 0, done.stderr
    return done


def facts(path: str) -> dict[str, str]:
    with Image.open(path) as image:
        image.load()
        return dict(image.text)  # type: ignore[attr-defined]


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


# Again


def test_a_picture_is_drawn_again_from_its_file(model: Path) -> None:
    choice = ("--cfg-weight", 3.14159265, "--temperature", 0.9, "--top-p", 0.8)
    draw(model, "-p", PROMPT, "--seed", 5, "-n", 2, *choice, "-o", "a.png")
    again = draw(model, "--config-from", "a-2.png", "-o", "b.png")
    assert facts("b.png") == facts("a-2.png")
    assert (facts("b.png")["seed"], facts("b.png")["cfg_weight"]) == ("6", "3.14159265")
    assert np.array_equal(pixels("b.png"), pixels("a-2.png"))
    assert "was drawn by" not in again.stderr
    draw(model, "--config-from", "a-2.png", "--seed", 5, "--top-p", 1, "-p", "a fox", "-o", "c.png")
    assert facts("c.png") == facts("a-2.png") | {"seed": "5", "top_p": "1", "prompt": "a fox"}


def test_a_picture_of_another_model_is_drawn_with_the_one_that_is_named(model: Path) -> None:
    draw(model, "-p", PROMPT, "--seed", 5, "-o", "a.png")
    other = shutil.copytree(model, "other")
    done = draw(Path(other), "--config-from", "a.png")
    who = "{!r} --dtype float32".format
    assert (
        f"a.png was drawn by {who(model.name)}, this is {who('other')}: only the same model"
        in done.stderr
    )
    assert facts("janus.png")["model"] == "other"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--bits", 4), {"bits": "4", "dtype": "float32"}),
        (("--recipe", "light", "--dtype", "bfloat16"), {"recipe": "light", "dtype": "bfloat16"}),
        ((), {"dtype": "float32"}),
    ],
)
def test_a_picture_is_drawn_again_in_its_precision(
    model: Path, flags: tuple[object, ...], said: dict[str, str]
) -> None:
    draw(model, "-p", PROMPT, "--seed", 5, *flags, "-o", "a.png")
    assert {
        name: facts("a.png")[name] for name in ("bits", "recipe", "dtype") if name in facts("a.png")
    } == said
    again = draw(model, "--config-from", "a.png", "-o", "b.png")
    assert facts("b.png") == facts("a.png")
    assert np.array_equal(pixels("b.png"), pixels("a.png"))
    assert "was drawn by" not in again.stderr


def test_a_picture_is_drawn_again_with_its_roles(model: Path) -> None:
    draw(model, "-p", PROMPT, "--seed", 5, "--roles", "plain", "-o", "a.png")
    assert facts("a.png")["roles"] == "plain"
    again = draw(model, "--config-from", "a.png", "-o", "b.png")
    assert facts("b.png") == facts("a.png")
    assert np.array_equal(pixels("b.png"), pixels("a.png"))
    assert "was drawn by" not in again.stderr
    draw(model, "-p", PROMPT, "--seed", 5, "-o", "own.png")
    assert not np.array_equal(pixels("own.png"), pixels("a.png"))
    other = draw(model, "--config-from", "a.png", "--roles", "pro", "-o", "c.png")
    name = f"{model.name!r} --dtype float32 --roles"
    assert f"a.png was drawn by {name} plain, this is {name} pro: only" in other.stderr
    assert np.array_equal(pixels("c.png"), pixels("own.png"))


def test_roles_change_an_answer(model: Path) -> None:
    words = ("-m", model, "--text", "-p", "Who?", "--max-tokens", 8)
    answers = [
        call(generate.main, *words, *roles).stdout
        for roles in ((), ("--roles", "pro"), ("--roles", "plain"))
    ]
    assert answers[0] == answers[1] != answers[2]
    wrong = call(generate.main, *words, "--roles", "User")
    assert (wrong.code, "--roles" in wrong.stderr) == (2, True)


def test_the_precision_that_is_asked_for_prevails_and_is_said(model: Path) -> None:
    draw(model, "-p", PROMPT, "--seed", 5, "--bits", 4, "-o", "a.png")
    other = draw(model, "--config-from", "a.png", "--recipe", "light", "-o", "b.png")
    name = repr(model.name)
    assert (
        f"by {name} --bits 4 --dtype float32, this is {name} --recipe light --dtype float32: only"
        in other.stderr
    )
    assert "bits" not in facts("b.png")
    call(
        convert.main, FIXTURES / "deepseek-pro-bin", "light", "--recipe", "light"
    )  # is that already, and stays so
    assert (
        "this is 'light' --recipe light --dtype"
        in draw(Path("light"), "--config-from", "a.png").stderr
    )
    assert "has the recipe light, not 8" in error_line(
        call(generate.main, "-m", "light", "--config-from", "a.png", "--bits", 8)
    )


def test_a_picture_of_a_release_that_did_not_say_its_precision(model: Path) -> None:
    draw(model, "-p", PROMPT, "--seed", 5, "-o", "a.png")
    chunks = facts("a.png")
    del chunks["dtype"]
    save_image(Image.open("a.png"), "b.png", chunks)
    assert "was drawn by" not in draw(model, "--config-from", "b.png", "-o", "c.png").stderr
    assert np.array_equal(pixels("c.png"), pixels("a.png"))


def test_files_that_say_nothing_of_a_drawing() -> None:
    refused = call(generate.main, "-m", "no/such/model", "--config-from", PICTURE)
    assert f"{PICTURE} carries no settings of a drawing" in error_line(refused)
    assert "absent.png does not exist" in error_line(
        call(generate.main, "--config-from", "absent.png")
    )


@pytest.mark.parametrize(
    "change",
    [{"seed": "x"}, {"upscale": "9 (Lanczos)"}, {"top_p": None}, {"top_p": "7"}, {"bits": "3"}],
)
def test_settings_that_were_changed(model: Path, change: dict[str, str | None]) -> None:
    draw(model, "-p", "a fox", "-o", "a.png")
    chunks = facts("a.png") | change
    save_image(
        Image.open("a.png"),
        "b.png",
        {key: value for key, value in chunks.items() if value is not None},
    )
    line = error_line(call(generate.main, "-m", model, "--config-from", "b.png"))
    assert "b.png carries settings that were changed or cut" in line or "top_p" in line
    assert not Path("janus.png").exists()


# Larger


def test_pictures_are_enlarged_and_say_so(model: Path) -> None:
    draw(model, "-p", PROMPT, "--seed", 5, "-o", "plain.png")
    draw(model, "-p", PROMPT, "--seed", 5, "--upscale", 3, "-o", "large.png")
    plain = Image.open("plain.png")
    expected = plain.resize((3 * plain.width, 3 * plain.height), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels("large.png"), np.array(expected))
    assert facts("large.png") == facts("plain.png") | {"upscale": "3 (Lanczos)"}
    draw(model, "--config-from", "large.png", "-o", "again.png")
    assert np.array_equal(pixels("again.png"), pixels("large.png"))
    draw(model, "--config-from", "large.png", "--upscale", 1, "-o", "small.png")
    assert facts("small.png") == facts("plain.png")


def test_the_librarys_pictures_are_enlarged_by_whole_numbers_up_to_four(
    pro: mlx_janus.JanusPipeline,
) -> None:
    image = pro.generate_images("a fox", seed=1, window=1)[0]
    for factor in (0, 5, 1.5, 2.0, True):
        with pytest.raises(errors.OptionError, match="from 1 to 4"):
            image.upscaled(factor)  # type: ignore[arg-type]


# On their way


def test_previews_show_what_is_there_so_far(model: Path) -> None:
    draw(
        model,
        "-p",
        PROMPT,
        "--seed",
        5,
        "--preview-dir",
        "on/the/way",
        "--preview-every",
        6,
        "-o",
        "a.png",
    )
    names = ["step-0006.png", "step-0012.png"]
    assert (
        sorted(path.name for path in Path("on/the/way").iterdir()) == names
    )  # of 16 tokens, 4 in a row
    grey = [(pixels(f"on/the/way/{name}") == 127).all(axis=(1, 2)).sum() for name in names]
    height = pixels("a.png").shape[0]
    assert grey == [height // 2, height // 4]
    assert facts("on/the/way/step-0006.png") == {"step": "6 of 16"}


def test_previews_of_several_pictures_leave_finished_ones_out(model: Path) -> None:
    draw(model, "-p", PROMPT, "--seed", 5, "-n", 2, "--preview-dir", "together")
    assert len(list(Path("together").iterdir())) == 2 * 4  # a row is the default
    draw(
        model,
        "-p",
        PROMPT,
        "--seed",
        5,
        "-n",
        2,
        "--exact",
        "--preview-dir",
        "apart",
        "--preview-every",
        10,
    )
    assert sorted(path.name for path in Path("apart").iterdir()) == [
        "step-0010-1.png",
        "step-0020-2.png",
        "step-0030-2.png",
    ]


def test_a_folder_for_previews_that_cannot_be_made(model: Path) -> None:
    Path("file").write_text("")
    line = error_line(
        call(generate.main, "-m", "no/such/model", "-p", "x", "--preview-dir", "file/previews")
    )
    assert "file/previews cannot be made" in line
    assert line.endswith("name another folder with --preview-dir")


# For scripts


def test_json_when_every_picture_is_there(model: Path) -> None:
    words = ("-p", "a fox", "-p", "an owl", "--seed", 5, "--json")
    first = json.loads(draw(model, *words).stdout)
    assert [len(first["images"]), first["model"]] == [2, model.name]
    done = json.loads(draw(model, *words).stdout)
    assert done["images"] == []
    assert done["model"] is None  # none was loaded
    assert set(done) == set(first)


def test_images_of_a_question_stand_at_its_marks(model: Path) -> None:
    Image.new("RGB", (30, 20), "red").save("red.png")
    question = "Is {image} darker than {image}?"
    images = ["-i", "red.png", "-i", PICTURE]
    words = ("-p", question, "--json", "--max-tokens", 6)
    done = call(generate.main, "-m", model, *images, *words)
    expected = mlx_janus.load(model).generate_text(question, ["red.png", PICTURE], max_tokens=6)
    assert json.loads(done.stdout)["tokens"] == list(expected.tokens)
    plain = call(generate.main, "-m", model, "--text", *words)
    assert json.loads(plain.stdout)["prompt_tokens"] < expected.prompt_tokens
    # Refused before the model is looked for.
    few = call(generate.main, "-m", "no/such/model", "-i", "red.png", *words)
    assert "2 {image} marks and 1 image" in error_line(few)


def test_json_of_an_answer_has_timings(model: Path) -> None:
    done = call(generate.main, "-m", model, "-p", "Hello", "--text", "--json", "--max-tokens", 6)
    result = json.loads(done.stdout)
    assert 0 < result["time_to_first_token"] <= result["seconds"] < 60


def test_quiet_leaves_errors_and_answers(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert draw(model, "-p", "a fox", "-q") == Outcome(0, "janus.png\n", "")
    words = ("-p", "x", "--text", "--max-tokens", 2, "--temperature", 1)
    named = call(generate.main, "-m", model, *words, "--quiet")
    assert named.stdout
    assert (named.code, named.stderr) == (0, "")
    assert "no/such/model" in error_line(
        call(generate.main, "-m", "no/such/model", "-p", "x", "-q")
    )
    assert call(generate.main, *words, "-q").stderr == ""
    assert not caplog.records
    assert "seed" in call(generate.main, *words).stderr  # and it ends with the command
    assert "No model is named" in caplog.text
    assert logging.getLogger("mlx_janus").level == logging.NOTSET
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("mlx-janus cap", ["plain,caption"]),
        ("mlx-janus generate --config-f", ["plain,--config-from"]),
        ("mlx-janus generate --dtype bfl", ["plain,bfloat16"]),
        ("mlx-janus generate -i pho", ["file,pho"]),
        ("mlx-janus generate -m mod", ["dir,mod"]),
        ("mlx-janus generate -o out", ["file,out"]),
        ("mlx-janus caption pho", ["file,pho"]),
        ("mlx-janus convert mod", ["dir,mod"]),
    ],
)
def test_a_shell_completes_commands_options_and_paths(line: str, completions: list[str]) -> None:
    program = "from mlx_janus.__main__ import main; main(prog_name='mlx-janus')"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "_MLX_JANUS_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - 1),
    }
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == completions
