"""Jobs of ``generate``: frozen records of a command line, complete before a model is loaded."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mlx_janus.commands import generate
from mlx_janus.commands.arguments import ImageArguments, LoadArguments, TextArguments
from mlx_janus.commands.jobs import AskJob, DrawJob, Origin, Previews
from mlx_janus.processing.saved_images import save_image
from tests.support.programs import call

SETTINGS = {
    "prompt": "a fox",
    "seed": "6",
    "cfg_weight": "3.5",
    "temperature": "0.9",
    "top_p": "0.8",
    "model": "janus-pro-1b",
    "dtype": "bfloat16",
    "bits": "4",
    "upscale": "2 (Lanczos)",
    "version": "mlx_janus 0.1.0",
}
"""Text chunks of a drawn image."""


@pytest.fixture(autouse=True)
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The jobs of ``generate`` and the names of the functions that would run them; none runs."""
    monkeypatch.chdir(tmp_path)
    done: list[Any] = []
    for name in ("ask", "draw", "draw_into_folder"):
        monkeypatch.setattr(generate, name, lambda job, name=name: done.append((name, job)))
    return done


@pytest.fixture
def drawn() -> str:
    """The name of an image with its settings."""
    return str(save_image(Image.new("RGB", (8, 8)), "a.png", SETTINGS))


def job_of(jobs: list[Any], *words: object, stdin: bytes = b"") -> tuple[str, Any]:
    done = call(generate.main, *words, stdin=stdin)
    assert done.code == 0, done.stderr
    return jobs[-1]


def test_arguments_are_taken_by_name_and_left_to_the_library_if_not_given() -> None:
    values = {"bits": 4, "model": None, "prompt": "x", "low_memory": True}
    load = LoadArguments.from_options(values)
    assert load == LoadArguments(bits=4, low_memory=True)
    assert load.keywords() == {"bits": 4, "low_memory": True}
    assert TextArguments(temperature=0.0, system="").keywords() == {
        "temperature": 0.0,
        "system": "",
    }


def test_a_question(jobs: list[Any]) -> None:
    words = (
        "-m",
        "a/b",
        "--bits",
        8,
        "-i",
        "a.png",
        "-i",
        "-",
        "-p",
        "What?",
        "--top-p",
        0.5,
        "--lookup",
        4,
        "--json",
    )
    assert job_of(jobs, *words) == (
        "ask",
        AskJob(
            load=LoadArguments(model="a/b", bits=8),
            prompt="What?",
            images=("a.png", "-"),
            arguments=TextArguments(top_p=0.5, lookup=4),
            as_json=True,
        ),
    )
    with pytest.raises(FrozenInstanceError):
        jobs[0][1].prompt = "Why?"


def test_a_drawing(jobs: list[Any]) -> None:
    words = (
        "-p",
        "-",
        "-n",
        3,
        "--seed",
        5,
        "--window",
        2,
        "-o",
        "b.png",
        "--no-show",
        "--preview-dir",
        "on",
    )
    assert job_of(jobs, *words, stdin=b" a fox\n") == (
        "draw",
        DrawJob(
            load=LoadArguments(),
            fallback=None,
            prompts=("a fox",),
            n=3,
            arguments=ImageArguments(seed=5, top_p=1.0, exact=False, window=2),
            output=Path("b.png"),
            into_folder=False,
            upscale=1,
            show=False,
            as_json=False,
            previews=Previews(Path("on"), None),
            origin=None,
        ),
    )


def test_several_prompts_are_drawn_into_a_folder(jobs: list[Any]) -> None:
    Path("prompts.txt").write_text("an owl\n\n#no\n a fox # \n", encoding="utf-8")
    name, job = job_of(jobs, "-p", "a fox", "-p", "#a fox")
    assert (name, job.prompts, job.template) == ("draw_into_folder", ("a fox", "#a fox"), "{name}")
    name, job = job_of(jobs, "-p", "an owl", "--prompts-file", "prompts.txt", "--same-seeds")
    assert (name, job.prompts) == ("draw_into_folder", ("an owl", "an owl", "a fox #"))
    assert job.same_seeds
    name, job = job_of(jobs, "--prompts-file", "-", stdin=b"a fox\n")
    assert (name, job.prompts) == ("draw_into_folder", ("a fox",))


@pytest.mark.parametrize(
    ("output", "path", "makes_folder"),
    [
        ("new/", "new/janus.png", True),
        ("new/deep/", "new/deep/janus.png", True),
        ("there", "there/janus.png", True),
        (".", "janus.png", True),
        ("new", "new", False),
        ("there/a.webp", "there/a.webp", False),
        ("file:///there/a%20b.png", "/there/a b.png", False),
    ],
)
def test_an_image_goes_into_a_folder_that_is_named(
    jobs: list[Any], output: str, path: str, makes_folder: bool
) -> None:
    Path("there").mkdir()
    _, job = job_of(jobs, "-p", "a fox", "-o", output)
    assert (job.output, job.makes_folder) == (Path(path), makes_folder)
    _, several = job_of(jobs, "-p", "a fox", "-p", "an owl", "-o", "new/")
    assert (several.output, several.makes_folder) == (Path("new"), False)


def test_an_image_is_drawn_again_as_it_says(jobs: list[Any], drawn: str) -> None:
    name, job = job_of(jobs, "--config-from", drawn, "-m", "here")
    assert (name, job.prompts, job.upscale) == ("draw", ("a fox",), 2)
    assert job.arguments == ImageArguments(
        seed=6, cfg_weight=3.5, temperature=0.9, top_p=0.8, exact=False
    )
    assert job.load == LoadArguments(model="here", bits=4, dtype="bfloat16")
    assert job.fallback == LoadArguments(
        model="here", dtype="bfloat16"
    )  # for a folder that is quantized otherwise
    assert job.origin == Origin(
        file="a.png",
        prompt="a fox",
        seed=6,
        cfg_weight=3.5,
        temperature=0.9,
        top_p=0.8,
        upscale=2,
        model="janus-pro-1b",
        dtype="bfloat16",
        bits=4,
        recipe=None,
    )


def test_the_command_line_prevails_over_the_image(jobs: list[Any], drawn: str) -> None:
    words = (
        "--recipe",
        "light",
        "--dtype",
        "float32",
        "--seed",
        1,
        "--top-p",
        1,
        "--upscale",
        1,
        "-p",
        "an owl",
    )
    _, job = job_of(jobs, "--config-from", drawn, *words)
    assert (job.prompts, job.upscale) == (("an owl",), 1)
    assert job.arguments == ImageArguments(
        seed=1, cfg_weight=3.5, temperature=0.9, top_p=1.0, exact=False
    )
    assert (job.load, job.fallback) == (LoadArguments(recipe="light", dtype="float32"), None)


def test_prompts_of_a_file_prevail_over_the_images(jobs: list[Any], drawn: str) -> None:
    Path("prompts.txt").write_text("an owl\n")
    name, job = job_of(jobs, "--config-from", drawn, "--prompts-file", "prompts.txt")
    assert (name, job.prompts, job.arguments.seed) == ("draw_into_folder", ("an owl",), 6)
