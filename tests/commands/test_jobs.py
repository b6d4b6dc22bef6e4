"""Jobs of ``generate``: frozen records of a command line, complete before a model is loaded."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mlx_janus.commands import generate
from mlx_janus.commands.arguments import (
    EditArguments,
    ImageArguments,
    LoadArguments,
    TextArguments,
)
from mlx_janus.commands.jobs import AskJob, DrawJob, Origin, Previews
from mlx_janus.errors import JanusError
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
        seed=6, cfg_weight=3.5, temperature=0.9, top_p=0.8, exact=False, plan=False
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
        seed=1, cfg_weight=3.5, temperature=0.9, top_p=1.0, exact=False, plan=False
    )
    assert (job.load, job.fallback) == (LoadArguments(recipe="light", dtype="float32"), None)


@pytest.fixture
def changed() -> str:
    """The name of a changed image with its settings."""
    inputs = '[{"name": "photo.jpg", "sha256": "00", "size": "8x4"}]'
    facts = {"task": "edit", "inputs": inputs, "cfg_weight2": "2", "crop": "no"}
    return str(save_image(Image.new("RGB", (8, 8)), "c.png", SETTINGS | facts))


def test_images_and_an_output_change_them(jobs: list[Any]) -> None:
    words = ("-i", "b.png", "-i", "-", "-p", "it is night", "--cfg-weight2", 3, "--no-crop")
    name, job = job_of(jobs, *words, "-o", "night.png", "-n", 2, "--seed", 4)
    assert (name, job.images, job.output, job.n) == ("draw", ("b.png", "-"), Path("night.png"), 2)
    assert job.arguments == EditArguments(
        seed=4, cfg_weight2=3.0, crop=False, top_p=1.0, exact=False
    )
    name, job = job_of(jobs, "-i", "b.png", "-p", "night", "-p", "day", "-o", "both")
    assert (name, job.images, job.output) == ("draw_into_folder", ("b.png",), Path("both"))
    assert job_of(jobs, "-i", "b.png", "-p", "Is it night?")[0] == "ask"
    assert job_of(jobs, "-p", "a fox", "-o", "fox.png", "--no-crop")[1].images == ()


def test_images_are_changed_again_as_a_file_says(jobs: list[Any], changed: str) -> None:
    words = ("--config-from", changed, "-i", "b.png", "-o", "again.png")
    _, job = job_of(jobs, *words)
    assert (job.prompts, job.images, job.upscale) == (("a fox",), ("b.png",), 2)
    stored = EditArguments(
        seed=6, cfg_weight=3.5, temperature=0.9, top_p=0.8, exact=False, cfg_weight2=2.0, crop=False
    )
    assert job.arguments == stored
    _, job = job_of(jobs, *words, "--crop", "--cfg-weight2", 7)
    assert job.arguments == replace(stored, cfg_weight2=7.0, crop=True)
    for flags in ((), ("-o", "again.png"), ("-p", "a fox")):
        done = call(generate.main, "--config-from", changed, *flags)
        assert done.code == 2
        assert "c.png was made from photo.jpg: add --image FILE and --output" in done.stderr


def test_a_drawing_lends_its_settings_to_a_change(jobs: list[Any], drawn: str) -> None:
    _, job = job_of(jobs, "--config-from", drawn, "-i", "b.png", "-o", "c.png")
    assert job.arguments == EditArguments(
        seed=6, cfg_weight=3.5, temperature=0.9, top_p=0.8, exact=False
    )


def test_prompts_of_a_file_prevail_over_the_images(jobs: list[Any], drawn: str) -> None:
    Path("prompts.txt").write_text("an owl\n")
    name, job = job_of(jobs, "--config-from", drawn, "--prompts-file", "prompts.txt")
    assert (name, job.prompts, job.arguments.seed) == ("draw_into_folder", ("an owl",), 6)


DRAWING_FLAGS: tuple[tuple[object, ...], ...] = (
    ("-n", 2),
    ("--best-of", 3),
    ("--cfg-weight", 2),
    ("--cfg-weight2", 2),
    ("--crop",),
    ("--plan",),
    ("--no-plan",),
    ("--reflect", 0),
    ("--reflect", 1),
    ("--exact",),
    ("--window", 1),
    ("--window", 2),
    ("--steps", 2),
    ("--vae", "vae"),
    ("--temperature", 0.5),
    ("--top-p", 0),
    ("--top-p", 0.5),
    ("--seed", 2**63 - 1),
)


@pytest.mark.parametrize("task", [(), ("-i", "a.png", "-o", "b.png")], ids=["draw", "change"])
def test_no_pair_of_options_fails_only_after_loading(
    jobs: list[Any], pro: Any, flow: Any, task: tuple[str, ...]
) -> None:
    """A drawing with two options is refused at once, or some model takes both of them."""
    picture = Image.new("RGB", (8, 8))
    refused = 0
    for first, second in combinations(DRAWING_FLAGS, 2):
        if first[0] == second[0]:
            continue
        done = call(generate.main, "-p", "a fox", *task, *first, *second)
        if done.code == 2:
            refused += 1
            continue
        assert done.code == 0
        _, job = jobs.pop()
        # A model of image tokens has no autoencoder to convert with it.
        models = [flow] if job.load.vae else [pro, flow]
        assert any(takes(janus, job, picture) for janus in models), (first, second)
    assert 10 < refused < 140


def takes(janus: Any, job: DrawJob, picture: Image.Image) -> bool:
    """Return whether a model takes the options of a job; nothing is drawn."""
    images = [picture] if job.images else []
    try:
        janus.stream_images(job.prompts, images=images, **job.keywords).close()
    except JanusError:
        return False
    return True


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-i a.png -o b.png --plan", "--plan does not go with changing images"),
        ("-i a.png -o b.png --reflect 1", "--reflect does not go with changing images"),
        ("-i a.png -o b.png --steps 3", "--steps does not go with changing images"),
        ("-i a.png -o b.png --vae vae", "--vae does not go with changing images"),
        ("--exact --window 2", "--exact draws token by token: leave --window out"),
        ("--steps 3 --temperature 1", "and --temperature for those that draw image tokens"),
        ("--vae vae --plan", "--vae is for models that draw by a rectified flow, and --plan"),
    ],
)
def test_options_that_suit_no_model_are_refused(jobs: list[Any], words: str, said: str) -> None:
    done = call(generate.main, "-p", "a fox", *words.split())
    assert done.code == 2
    assert said in " ".join(done.stderr.split())
    assert jobs == []


def test_neutral_values_suit_every_task(jobs: list[Any]) -> None:
    """Scripts may always pass them."""
    neutral = ("--no-plan", "--reflect", 0, "--top-p", 1)
    assert job_of(jobs, "-p", "a fox", "-i", "a.png", "-o", "b.png", *neutral)[0] == "draw"
    assert job_of(jobs, "-p", "a fox", "--steps", 3, *neutral)[0] == "draw"
    assert job_of(jobs, "-p", "a fox", "--exact", "--window", 1)[0] == "draw"


def test_options_must_suit_the_settings_of_the_image(jobs: list[Any], drawn: str) -> None:
    unsampled = {name: SETTINGS[name] for name in SETTINGS if name not in ("temperature", "top_p")}
    flow_drawn = str(save_image(Image.new("RGB", (8, 8)), "f.png", unsampled | {"steps": "3"}))
    for file, flags, said in (
        (drawn, ("--steps", 3), "a.png was drawn as image tokens: leave --steps out"),
        (flow_drawn, ("--plan",), "f.png was drawn by a rectified flow: leave --plan out"),
        (flow_drawn, ("--top-p", 0.5), "f.png was drawn by a rectified flow: leave --top-p out"),
    ):
        done = call(generate.main, "--config-from", file, *flags)
        assert done.code == 2
        assert said in " ".join(done.stderr.split())
    assert job_of(jobs, "--config-from", flow_drawn)[1].arguments.steps == 3
    _, change = job_of(jobs, "--config-from", flow_drawn, "-i", "b.png", "-o", "c.png")
    assert (change.arguments.steps, change.arguments.cfg_weight) == (None, 3.5)
    last = SETTINGS | {"seed": str(2**63 - 1)}
    file = str(save_image(Image.new("RGB", (8, 8)), "l.png", last))
    done = call(generate.main, "--config-from", file, "-n", 2)
    assert (done.code, "take a smaller --seed" in done.stderr) == (2, True)


ASKING_FLAGS: tuple[tuple[object, ...], ...] = (
    ("--max-tokens", 2),
    ("--system", ""),
    ("--lookup", 0),
    ("--lookup", 2),
    ("--schema", "json"),
    ("--top-k", 1),
    ("--min-p", 0.1),
    ("--frequency-penalty", 1),
    ("--repetition-penalty", 2),
    ("--temperature", 0.5),
    ("--top-p", 0),
    ("--seed", 2**63 - 1),
)


def test_no_pair_of_options_of_a_question_fails_only_after_loading(
    jobs: list[Any], pro: Any
) -> None:
    for first, second in combinations(ASKING_FLAGS, 2):
        if first[0] == second[0]:
            continue
        done = call(generate.main, "-p", "What is red?", "--text", *first, *second)
        if done.code != 2:
            assert done.code == 0
            _, job = jobs.pop()
            pro.stream_text(job.prompt, **job.arguments.keywords()).close()
