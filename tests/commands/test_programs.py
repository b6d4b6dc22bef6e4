"""``generate``, ``convert`` and ``mlx-janus``: output, files, refusals, and interruptions."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image

import mlx_janus
from mlx_janus.__main__ import COMMANDS as NAMES
from mlx_janus.__main__ import main as group
from mlx_janus.commands import caption, chat, convert, generate, progress
from mlx_janus.config import JanusConfig
from mlx_janus.weights.footprint import required_memory
from tests.support.golden import FIXTURES, FOLDERS
from tests.support.programs import (
    INTERRUPTIBLE,
    ROOT,
    Outcome,
    call,
    error_line,
    finish,
    run,
    run_together,
    start,
)

PROMPT = "a lighthouse in a storm"
QUESTION = "What is in this image?"
PICTURE = FIXTURES / "picture.png"
SOURCE = FIXTURES / "deepseek-pro-bin"
COMMANDS = (
    "mlx_janus",
    "mlx_janus.generate",
    "mlx_janus.chat",
    "mlx_janus.convert",
    "mlx_janus caption",
    "mlx_janus serve",
    "mlx_janus evaluate",
    "mlx_janus train",
)
"""As typed after ``python -m``."""
Janus = mlx_janus.JanusPipeline


@pytest.fixture
def model(converted: dict[str, Path]) -> Path:
    return converted["deepseek-pro-bin"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def facts(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        image.load()
        return dict(image.text)  # type: ignore[attr-defined]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def draw(model: Path, *arguments: object) -> Outcome:
    return call(generate.main, "-m", model, "-p", PROMPT, *arguments)


def answer(model: Path, *arguments: object) -> Outcome:
    return call(generate.main, "-m", model, "-p", QUESTION, *arguments)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Drawing


def test_draws_to_janus_png_and_keeps_what_is_there(model: Path, here: Path) -> None:
    first = draw(model, "--seed", 5)
    assert (first.code, first.stdout) == (0, "janus.png\n")
    before = (here / "janus.png").read_bytes()
    second = draw(model, "--seed", 6)
    assert (second.code, second.stdout) == (0, "janus_2.png\n")
    assert (here / "janus.png").read_bytes() == before
    assert facts(here / "janus_2.png")["seed"] == "6"
    assert names(here) == ["janus.png", "janus_2.png"]


@pytest.mark.check
def test_stdout_is_paths_and_stderr_progress(model: Path, here: Path) -> None:
    """In a process of its own: nothing that a library prints may join the paths."""
    done = run(
        "-m", "mlx_janus.generate", "-m", model, "-p", PROMPT, "--n", 2, "--seed", 3, cwd=here
    )
    assert (done.code, done.stdout) == (0, "janus-1.png\njanus-2.png\n")
    assert re.search(r"drawing: 100%.* 16/16 .*\d images/min", done.stderr)
    assert re.findall(r"seed (\d+)", done.stderr) == ["3", "4"]
    assert "Warning" not in done.stderr


def test_several_pictures_have_following_names_and_seeds(
    model: Path, here: Path, pro: Janus
) -> None:
    done = draw(
        model, "--n", 3, "-o", here / "out.png", "--seed", 40, "--cfg-weight", 3.5, "--top-p", 0.9
    )
    paths = [here / f"out-{i}.png" for i in (1, 2, 3)]
    assert done.stdout.splitlines() == [str(path) for path in paths]
    expected = pro.generate_images(PROMPT, n=3, seed=40, cfg_weight=3.5, top_p=0.9)
    for seed, path, image in zip((40, 41, 42), paths, expected, strict=True):
        assert facts(path) == {
            "prompt": PROMPT,
            "seed": str(seed),
            "cfg_weight": "3.5",
            "temperature": "1",
            "top_p": "0.9",
            "model": model.name,
            "dtype": "float32",
            "version": f"mlx_janus {mlx_janus.__version__}",
        }
        assert np.array_equal(pixels(path), np.array(image.image))


def test_a_file_of_prompts_is_drawn_into_a_folder_and_resumed(
    model: Path, here: Path, pro: Janus
) -> None:
    """Equal lines are images of one prompt, with consecutive seeds."""
    Path("prompts.txt").write_text("a fox\n\n  a fox in a storm \na fox\n", encoding="utf-8")
    words = ("-m", model, "--prompts-file", "prompts.txt", "--seed", "5", "-o", "out/deep")
    first = call(generate.main, *words)
    assert first.code == 0, first.stderr
    names = ["a-fox-2.png", "a-fox-in-a-storm.png", "a-fox.png"]
    assert sorted(p.name for p in Path("out/deep").iterdir()) == names
    assert sorted(first.stdout.splitlines()) == [str(Path("out/deep") / name) for name in names]
    before = {name: (Path("out/deep") / name).read_bytes() for name in names}
    (Path("out/deep") / names[0]).unlink()
    again = call(generate.main, *words)
    assert again.stdout == str(Path("out/deep") / names[0]) + "\n"
    assert "2 of 3 images exist already" in again.stderr
    assert {name: (Path("out/deep") / name).read_bytes() for name in names} == before
    done = call(generate.main, *words)
    assert (done.code, done.stdout) == (0, "")
    seeds = [int(facts(Path("out/deep") / name)["seed"]) for name in names]
    assert seeds[0] == seeds[2] + 1
    assert abs(seeds[1] - seeds[2]) > 1
    for name, seed, prompt in zip(
        names, seeds, ("a fox", "a fox in a storm", "a fox"), strict=True
    ):
        alone = pro.generate_images(prompt, seed=seed, window=1)[0]
        assert np.array_equal(pixels(Path("out/deep") / name), np.array(alone.image))


def test_lines_that_move_are_not_drawn_again(model: Path, here: Path) -> None:
    """A byte order mark and comments are no prompts. A new folder gets the same images."""
    words = ("-m", model, "--prompts-file", "prompts.txt", "--seed", "5", "-o")
    Path("prompts.txt").write_text("a fox\n")
    assert call(generate.main, *words, "out").stdout == f"{Path('out/a-fox.png')}\n"
    Path("prompts.txt").write_text("\ufeff# mine\nan owl\n a fox\n  # two\na fox\n", "utf-8")
    more = call(generate.main, *words, "out")
    assert sorted(more.stdout.split()) == [f"out/{name}.png" for name in ("a-fox-2", "an-owl")]
    assert call(generate.main, *words, "new").code == 0
    old = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert old == {path.name: path.read_bytes() for path in Path("new").iterdir()}


def test_all_prompts_may_start_from_one_seed(model: Path, here: Path) -> None:
    words = ("-m", model, "-p", "a fox", "-p", "an owl", "-p", "a fox", "--seed", 5, "--same-seeds")
    assert call(generate.main, *words, "-n", 2).code == 0
    names = ["a-fox", "a-fox-2", "a-fox-3", "a-fox-4", "an-owl", "an-owl-2"]
    seeds = [int(facts(Path("janus") / f"{name}.png")["seed"]) for name in names]
    assert seeds == [5, 6, 7, 8, 5, 6]


def test_images_are_named_as_benchmarks_want_them(model: Path, here: Path) -> None:
    """GenEval's layout. A file that shows another prompt is not taken for the line's image."""
    Path("prompts.txt").write_text("a fox\nan owl\n")
    template = "{line0:05}/samples/{image0:04}"
    words = ("-m", model, "--prompts-file", "prompts.txt", "-n", 2, "--name", template, "-o", "out")
    assert call(generate.main, *words).code == 0
    files = sorted(str(path) for path in Path("out").rglob("*.png"))
    assert files == [f"out/0000{line}/samples/000{image}.png" for line in "01" for image in "01"]
    assert facts(Path(files[2]))["prompt"] == "an owl"
    Path(files[2]).unlink()
    assert call(generate.main, *words).stdout == f"{files[2]}\n"
    Path("prompts.txt").write_text("a hen\na fox\nan owl\n")
    before = {path: path.read_bytes() for path in Path("out").rglob("*.png")}
    line = error_line(call(generate.main, *words))
    assert line.startswith(f"Error: {files[0]} shows another prompt, 'a fox': name another folder")
    assert before == {path: path.read_bytes() for path in Path("out").rglob("*.png")}


def test_several_prompts_and_pictures_of_each_resume_in_the_middle(model: Path, here: Path) -> None:
    words = ("-m", model, "-p", "a fox", "-p", "Ein Schloß, 城", "--n", "2", "--seed", "5")
    assert call(generate.main, *words).code == 0
    stem = "ein-schlo-a6a5aef56a"
    names = ["a-fox-2.png", "a-fox.png", f"{stem}-2.png", f"{stem}.png"]
    assert sorted(p.name for p in Path("janus").iterdir()) == names
    seeds = [int(facts(Path("janus") / name)["seed"]) for name in names]
    assert (seeds[0] - seeds[1], seeds[2] - seeds[3]) == (1, 1)
    (Path("janus") / names[1]).unlink()
    assert call(generate.main, *words).stdout.split() == [str(Path("janus") / names[1])]
    assert facts(Path("janus") / names[1])["seed"] == str(seeds[1])


def test_prompts_that_cannot_be_read(here: Path) -> None:
    Path("empty.txt").write_text("\n \n")
    Path("latin.txt").write_bytes("ein Schloß\n".encode("latin-1"))
    for name, what in (
        ("empty.txt", "holds no prompt"),
        ("latin.txt", "is not UTF-8 text"),
        ("none.txt", "none.txt"),
    ):
        outcome = call(generate.main, "--prompts-file", name)
        assert outcome.code == 2
        assert what in outcome.stderr
    Path("file").write_text("")
    assert "file/out cannot be made" in error_line(
        call(generate.main, "-p", "a", "-p", "b", "-o", "file/out")
    )


def test_an_image_goes_into_a_folder(model: Path, here: Path) -> None:
    """A name that ends in a slash is a folder, which is made. So is that of an existing one."""
    for output, names in [
        ("new/deep/", ["new/deep/janus.png"]),
        ("new/deep", ["new/deep/janus_2.png"]),
        (".", ["janus.png"]),
    ]:
        assert draw(model, "-o", output).stdout.split() == names
    assert draw(model, "-o", "two/", "-n", 2).stdout.split() == [
        *["two/janus-1.png", "two/janus-2.png"]
    ]


def test_an_image_goes_to_stdout(
    model: Path, here: Path, pro: Janus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else does, and no file is made."""
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data))
    words = ["-m", str(model), "-p", PROMPT, "--seed", "5", "--upscale", "2", "-o", "-"]
    generate.main(words, standalone_mode=False)
    image = pro.generate_images(PROMPT, seed=5, window=1)[0].upscaled(2)
    with Image.open(io.BytesIO(data.getvalue()), formats=["PNG"]) as written:
        assert written.tobytes() == image.image.tobytes()
        assert written.text == image.metadata  # type: ignore[attr-defined]
    assert data.getvalue().endswith(b"IEND\xaeB`\x82")
    assert not list(here.iterdir())


def test_a_terminal_gets_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stdout in (Terminal(), None):  # None: closed
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(click.UsageError, match=r"add > image\.png"):
            generate.main(["-p", "x", "-o", "-"], standalone_mode=False)


def test_windows_and_lookups_change_time_alone(model: Path, here: Path) -> None:
    for i, window in enumerate(("1", "4")):
        assert draw(model, "--seed", "3", "--window", window, "-o", f"{i}.png").code == 0
    assert np.array_equal(pixels(Path("0.png")), pixels(Path("1.png")))
    answers = [
        answer(model, "--text", "--max-tokens", "12", "--lookup", k).stdout for k in ("0", "6")
    ]
    assert answers[0] == answers[1]


def test_a_random_seed_is_shown_stored_and_repeats(model: Path, here: Path) -> None:
    done = draw(model)
    seed = facts(here / "janus.png")["seed"]
    assert f"seed {seed}\n" in done.stderr
    draw(model, "--seed", seed, "-o", "again.png")
    assert np.array_equal(pixels(here / "janus.png"), pixels(here / "again.png"))
    draw(model, "-o", "other.png")
    assert facts(here / "other.png")["seed"] != seed


def test_defaults_are_the_models_own(model: Path, here: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["generation"] |= {"cfg_weight": 2.5, "temperature": 0.5}
    (other / "config.json").write_text(json.dumps(config))
    draw(other, "-o", "own.png")
    assert (facts(here / "own.png")["cfg_weight"], facts(here / "own.png")["temperature"]) == (
        "2.5",
        "0.5",
    )
    draw(other, "-o", "given.png", "--cfg-weight", 0, "--temperature", 0)
    assert (facts(here / "given.png")["cfg_weight"], facts(here / "given.png")["temperature"]) == (
        "0",
        "0",
    )


def test_drawing_as_json(model: Path, here: Path, pro: Janus) -> None:
    done = draw(model, "--json", "--n", 2, "--seed", 8)
    summary = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert set(summary) == {"images", "seconds", "peak_memory", "model"}
    expected = pro.generate_images(PROMPT, n=2, seed=8)
    assert summary["images"] == [
        {
            "path": f"janus-{i + 1}.png",
            "prompt": PROMPT,
            "seed": 8 + i,
            "passes": image.passes,
            "tokens": image.tokens.tolist(),
        }
        for i, image in enumerate(expected)
    ]
    assert names(here) == ["janus-1.png", "janus-2.png"]


@pytest.mark.parametrize("bits", [4, 8])
def test_draws_from_pytorch_folders_and_quantized(here: Path, bits: int) -> None:
    """Converted into the cache the first time, with a bar, and silently found there afterwards."""
    first = draw(FIXTURES / "transformers", "--bits", bits, "--seed", 1)
    again = draw(FIXTURES / "transformers", "--bits", bits, "--seed", 1)
    assert (first.code, again.code) == (0, 0)
    assert "converting: 100%" in first.stderr
    assert "converting" not in again.stderr
    assert np.array_equal(pixels(here / "janus.png"), pixels(here / "janus_2.png"))


# Answering


@pytest.mark.check
@pytest.mark.parametrize("folder", FOLDERS)
def test_answers_are_the_librarys(
    converted: dict[str, Path], pipelines: dict[str, Janus], folder: str
) -> None:
    done = answer(converted[folder], "-i", PICTURE, "--max-tokens", 20)
    expected = pipelines[folder].generate_text(QUESTION, PICTURE, max_tokens=20)
    assert (done.code, done.stdout) == (0, f"{expected.text}\n")


def test_an_answer_is_streamed(model: Path, pro: Janus, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []
    echo = click.echo
    monkeypatch.setattr(
        click, "echo", lambda message="", **more: (pieces.append(message), echo(message, **more))[1]
    )
    answer(model, "--text", "--max-tokens", 20)
    chunks = [chunk.text for chunk in pro.stream_text(QUESTION, max_tokens=20)]
    assert len(chunks) > 5
    assert pieces[: len(chunks)] == chunks


def test_several_pictures_and_other_options(model: Path, pro: Janus, tmp_path: Path) -> None:
    other = tmp_path / "other.jpg"
    Image.new("RGB", (50, 90), "teal").save(other)
    flags = (
        "--max-tokens",
        12,
        "--system",
        "Be brief.",
        "--top-p",
        0.9,
        "--temperature",
        1,
        "--seed",
        7,
    )
    done = answer(model, "-i", PICTURE, "-i", other, *flags)
    expected = pro.generate_text(
        QUESTION,
        [PICTURE, other],
        max_tokens=12,
        system="Be brief.",
        top_p=0.9,
        temperature=1,
        seed=7,
    )
    assert done.stdout == f"{expected.text}\n"
    turned = pro.generate_text(QUESTION, [other, PICTURE], max_tokens=12, temperature=1, seed=7)
    assert turned.text != expected.text


def test_penalties_and_filters_of_an_answer(model: Path, pro: Janus) -> None:
    choice: dict[str, Any] = {
        "max_tokens": 20,
        "temperature": 1.5,
        "seed": 7,
        "top_k": 20,
        "min_p": 0.01,
        "frequency_penalty": -1.5,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.4,
    }
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in choice.items()]
    expected = pro.generate_text(QUESTION, PICTURE, **choice)
    done = answer(model, "-i", PICTURE, *(part for flag in flags for part in flag))
    assert done.stdout == f"{expected.text}\n"
    greedy = pro.generate_text(QUESTION, max_tokens=20).text
    done = answer(model, "--text", "--max-tokens", 20, "--temperature", 3, "--top-p", 0)
    assert done.stdout == f"{greedy}\n" != f"{expected.text}\n"


def test_a_drawn_answer_shows_its_seed(model: Path) -> None:
    done = answer(model, "--text", "--temperature", 1, "--max-tokens", 20)
    found = re.search(r"^seed (\d+)$", done.stderr, re.MULTILINE)
    assert found
    again = answer(model, "--text", "--temperature", 1, "--max-tokens", 20, "--seed", found[1])
    assert again.stdout == done.stdout
    assert "seed" not in answer(model, "--text", "--max-tokens", 5).stderr  # nothing was drawn


def test_a_cut_answer_says_so(model: Path) -> None:
    assert answer(model, "--text", "--max-tokens", 5).stderr == (
        "Cut after 5 tokens, by --max-tokens or the model's context.\n"
    )


def test_answering_as_json(model: Path, pro: Janus) -> None:
    done = answer(model, "-i", PICTURE, "--json", "--max-tokens", 9, "--seed", 3)
    result = json.loads(done.stdout)
    expected = pro.generate_text(QUESTION, PICTURE, max_tokens=9, seed=3)
    assert done.stdout.count("\n") == 1
    assert (result["text"], result["tokens"]) == (expected.text, list(expected.tokens))
    assert (result["finish_reason"], result["prompt_tokens"]) == ("length", expected.prompt_tokens)
    assert (result["seed"], result["model"]) == (3, model.name)
    assert set(result) > {"prompt_tps", "generation_tps", "peak_memory"}


# Wrong use: exit code 2

WRONG_USES = [
    (generate.main, ["-p", "x", "--frobnicate"], "No such option"),
    (generate.main, [], "Missing option"),
    (generate.main, ["-p", ""], "is empty"),
    (generate.main, ["-p", " \n"], "is empty"),
    (generate.main, ["-p", "x", "--temperature", "-1"], "--temperature"),
    (generate.main, ["-p", "x", "--temperature", "nan"], "not a finite number"),
    (generate.main, ["-p", "x", "--temperature", "inf"], "--temperature"),
    (generate.main, ["-p", "x", "--cfg-weight", "nan"], "not a finite number"),
    (generate.main, ["-p", "x", "--top-p", "0"], "--top-p"),
    (generate.main, ["-p", "x", "--seed", str(2**63 - 1), "--n", "2"], "--seed"),
    (generate.main, ["-p", "x", "--top-p", "1.5"], "--top-p"),
    (generate.main, ["-p", "x", "--top-k", "5"], "--top-k does not go with drawing"),
    (generate.main, ["-p", "x", "--min-p", "0"], "--min-p does not go with drawing"),
    (generate.main, ["-p", "x", "--text", "--top-k", "-2"], "--top-k"),
    (generate.main, ["-p", "x", "--text", "--min-p", "nan"], "not a finite number"),
    (generate.main, ["-p", "x", "--text", "--frequency-penalty", "3"], "--frequency-penalty"),
    (generate.main, ["-p", "x", "--text", "--repetition-penalty", "0"], "--repetition-penalty"),
    (generate.main, ["-p", "x", "--n", "0"], "--n"),
    (generate.main, ["-p", "x", "--n", "two"], "--n"),
    (generate.main, ["-p", "x", "--seed", "-2"], "--seed"),
    (generate.main, ["-p", "x", "--seed", str(2**63)], "--seed"),
    (generate.main, ["-p", "x", "--bits", "3"], "--bits"),
    (generate.main, ["-p", "x", "--recipe", "heavy"], "--recipe"),
    (
        generate.main,
        ["-p", "x", "--recipe", "light", "--bits", "4"],
        "--recipe does not go with --bits",
    ),
    (chat.main, ["--bits", "4", "--recipe", "light"], "--recipe does not go with --bits"),
    (generate.main, ["-p", "x", "--dtype", "int8"], "--dtype"),
    (
        generate.main,
        ["-p", "x", "--image", "a.png", "--output", "b.png"],
        "--output does not go with answering",
    ),
    (generate.main, ["-p", "x", "--text", "--n", "2"], "--n does not go with answering"),
    (generate.main, ["-p", "x", "-p", "y", "--text"], "one question at a time"),
    (generate.main, ["-p", "x", "--window", "0"], "--window"),
    (generate.main, ["-p", "x", "--lookup", "4"], "--lookup does not go with drawing"),
    (generate.main, ["-p", "x", "--text", "--exact"], "--exact does not go with answering"),
    (generate.main, ["-p", "x", "--max-tokens", "5"], "--max-tokens does not go with drawing"),
    (generate.main, ["-p", "x", "--system", ""], "--system does not go with drawing"),
    (generate.main, ["-p", "x", "--text", "--max-tokens", "0"], "--max-tokens"),
    (generate.main, ["-p", "x", "and", "more"], "unexpected extra argument"),
    (
        generate.main,
        ["-p", "x", "-i", "http://a.org/b.png"],
        "http:// is not read: give a file, or an address",
    ),
    (generate.main, ["-p", "x", "-i", "ftp://a.org/b.png"], "ftp:// is not read"),
    (caption.main, ["a.png", "http://a.org/b.png"], "http:// is not read: give a file"),
    (generate.main, ["-p", "x", "-o", "-", "-n", "2"], "--output - writes one image"),
    (generate.main, ["-p", "x", "-p", "y", "-o", "-"], "--output - writes one image"),
    (generate.main, ["--prompts-file", "-", "-o", "-"], "--output - writes one image"),
    (generate.main, ["-p", "x", "-o", "-", "--json"], "leave --json and --show out"),
    (generate.main, ["-p", "x", "-o", "-", "--show"], "leave --json and --show out"),
    (generate.main, ["-p", "x", "--name", "{words}"], "are for several prompts"),
    (generate.main, ["-p", "x", "--same-seeds"], "are for several prompts"),
    (generate.main, ["-p", "x", "-p", "y", "--name", "{title}"], "has no field {title}"),
    (generate.main, ["-p", "x", "--text", "--same-seeds"], "--same-seeds does not go with answer"),
    (generate.main, ["-p", "-", "-i", "-"], "stdin can be read once"),
    (generate.main, ["-p", "x", "-i", "-", "-i", "-"], "stdin can be read once"),
    (generate.main, ["-p", "-", "--prompts-file", "-"], "stdin can be read once"),
    (
        generate.main,
        ["-p", "x", "--text", "--config-from", "a.png"],
        "--config-from does not go with answering",
    ),
    (
        generate.main,
        ["-p", "x", "--text", "--upscale", "2"],
        "--upscale does not go with answering",
    ),
    (generate.main, ["-p", "x", "--text", "--show"], "--show does not go with answering"),
    (generate.main, ["-p", "x", "-i", ""], "is empty: name an image"),
    (generate.main, ["-p", "x", "--upscale", "5"], "--upscale"),
    (generate.main, ["-p", "x", "--preview-every", "5"], "--preview-every needs --preview-dir"),
    (
        generate.main,
        ["-p", "x", "-p", "y", "--preview-dir", "a"],
        "--preview-dir needs exactly one prompt",
    ),
    (caption.main, [], "Missing argument"),
    (caption.main, ["a.png", "-p", " "], "--prompt is empty"),
    (caption.main, ["a.png", ""], "PATH is empty"),
    (convert.main, ["a"], "Missing argument"),
    (convert.main, ["a", "b", "--bits", "3"], "--bits"),
    (convert.main, ["a", "b", "--group-size", "16", "--bits", "4"], "--group-size"),
    (
        convert.main,
        ["a", "b", "--bits", "4", "--recipe", "light"],
        "--recipe does not go with --bits",
    ),
    (
        convert.main,
        ["a", "b", "--recipe", "light", "--group-size", "32"],
        "--group-size needs --bits",
    ),
    (convert.main, ["a", "b", "--verify", "--recipe", "light"], "--verify checks"),
    (convert.main, ["a", "b", "--group-size", "32"], "--group-size needs --bits"),
    (convert.main, ["a", "b", "--private"], "--private needs --upload"),
    (convert.main, ["a", "b", "--verify", "--bits", "4"], "--verify checks OUTPUT as it was made"),
    (convert.main, ["a", "b", "--verify", "--dtype", "float32"], "--verify checks"),
    (convert.main, ["a", "b", "--verify", "--group-size", "32"], "--verify checks"),
    (convert.main, ["a", "b", "--verify", "--overwrite"], "--verify checks"),
    (convert.main, ["a", "b", "--verify", "--roles", "pro"], "--verify checks"),
    (convert.main, ["a", "b", "--roles", "User"], "--roles"),
    (chat.main, ["--roles", "<|User|>"], "--roles"),
    (group, ["draw"], "No such command"),
]


@pytest.mark.parametrize(("command", "arguments", "message"), WRONG_USES)
def test_wrong_use(command: click.Command, arguments: list[str], message: str) -> None:
    done = call(command, *arguments)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: program")
    assert re.search(rf"^Error: .*{re.escape(message)}", done.stderr, re.MULTILINE)


def test_wrong_use_does_not_wait_for_mlx() -> None:
    """All of them in one process, that must not have imported what takes a second."""
    program = (
        "import contextlib, io, sys\n"
        "from mlx_janus import convert, generate\n"
        "with contextlib.redirect_stderr(io.StringIO()):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        generate.main('-p x --text --n 2'.split())\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        convert.main('a b --verify --bits 4'.split())\n"
        "print([name for name in ('mlx.core', 'numpy', 'PIL', 'tqdm') if name in sys.modules])\n"
    )
    assert run("-c", program).stdout == "[]\n"


# What only trying shows: exit code 1


def test_no_model_and_missing_models(here: Path) -> None:
    (here / "weights.bin").write_bytes(b"x")
    (here / "empty").mkdir()
    assert "deepseek-ai/Janus-Pro-1B" in error_line(
        call(generate.main, "-p", "x", "--revision", "main")
    )
    for model, what in [
        ("absent/folder/of/mine", "absent/folder/of/mine is neither a folder nor a Hub id"),
        ("weights.bin", "weights.bin is a file"),
        ("empty", "config.json is missing: download"),
        ("", "config.json is missing"),
    ]:
        assert what in error_line(draw(Path(model) if model else model, "-o", "out.png"))  # type: ignore[arg-type]
    assert names(here) == ["empty", "weights.bin"]


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (
            {
                "model_type": "multi_modality",
                "vision_gen_enc_config": {},
                "vision_und_enc_config": {},
            },
            "JanusFlow",
        ),
        (
            {"model_type": "multi_modality", "vision_config": {}, "aligner_config": {}},
            "DeepSeek-VL",
        ),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
    ],
)
def test_foreign_models_are_named(here: Path, config: dict[str, object], family: str) -> None:
    (here / "model").mkdir()
    (here / "model/config.json").write_text(json.dumps(config))
    for outcome in (draw(here / "model"), call(convert.main, here / "model", here / "out")):
        line = error_line(outcome)
        assert str(here / "model/config.json") in line
        assert family in line
        assert "deepseek-ai/Janus-Pro-1B" in line
    assert names(here) == ["model"]


def test_pictures_that_cannot_be_read(here: Path) -> None:
    """They show before the model is even looked for."""
    (here / "broken.png").write_bytes(PICTURE.read_bytes()[:2000])
    (here / "notes.txt").write_text("hello")
    for name, what in [
        ("absent.png", "absent.png does not exist: check the path"),
        ("broken.png", "broken.png is damaged or cut short"),
        ("notes.txt", "notes.txt is not an image that can be read"),
        (".", "is a folder"),
    ]:
        assert what in error_line(
            call(generate.main, "-m", "no/such/model", "-p", "x", "-i", PICTURE, "-i", name)
        )


def test_outputs_that_cannot_be_written(here: Path) -> None:
    """They show before the model is even looked for."""
    (here / "file").write_text("x")
    (here / "folder").mkdir()
    for output, what in [
        ("absent/out.png", "absent is not a folder: make it first"),
        ("file/out.png", "file is not a folder"),
        ("file/", "file cannot be made"),
        ("out.gif", "only .png, .jpg and .webp are written, got .gif: name it out.png"),
        ("", "is a folder: give the name of a file in it"),
    ]:
        assert what in error_line(
            call(generate.main, "-m", "no/such/model", "-p", "x", "-o", output)
        )
    assert names(here) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(here: Path) -> None:
    locked = here / "locked"
    locked.mkdir(mode=0o500)
    assert "locked cannot be written to" in error_line(
        call(generate.main, "-p", "x", "-o", locked / "out.png")
    )


def test_prompts_longer_than_the_context(model: Path, here: Path) -> None:
    for more in ((), ("--text",)):
        line = error_line(call(generate.main, "-m", model, "-p", "lighthouse " * 10_000, *more))
        assert re.search(r"prompt is \d+ tokens long.* context .*16384: shorten it", line)
    assert names(here) == []


def test_a_model_too_large_for_the_memory(
    model: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = JanusConfig.load(model / "config.json")
    needed = [
        max(required_memory(config, "float32", low_memory=low).values()) for low in (True, False)
    ]
    monkeypatch.setattr("mlx_janus.weights.footprint.available_memory", lambda: sum(needed) // 2)
    for folder in (model, SOURCE):
        line = error_line(draw(folder))
        assert re.search(
            r" needs 10 MB of memory and 10 MB are free: --low-memory needs 9 MB and fits", line
        )
        assert draw(folder, "--low-memory").code == 0
    monkeypatch.setattr("mlx_janus.weights.footprint.available_memory", lambda: 1_000_000)
    assert "1 MB are free: close other programs, or take a smaller model" in error_line(draw(model))


def test_failures_of_mlx_are_one_line_and_bugs_are_not(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> None:
        def stream(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(Janus, "stream_text", stream)

    fail(RuntimeError("[malloc] Unable to allocate\n 8 bytes."))
    assert error_line(answer(model, "--text")).startswith("Error: there is not enough memory: ")
    fail(RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory"))
    assert error_line(answer(model, "--text")).startswith("Error: there is not enough memory: ")
    fail(RuntimeError("[load_safetensors] cannot\nread"))
    assert (
        error_line(answer(model, "--text")) == "Error: MLX failed: [load_safetensors] cannot read"
    )
    fail(MemoryError())
    assert error_line(answer(model, "--text")).startswith("Error: there is not enough memory: ")
    fail(OSError(5, "Input/output error", "a.bin"))
    assert error_line(answer(model, "--text")) == "Error: a.bin: Input/output error"
    fail(RuntimeError("dictionary changed size"))
    with pytest.raises(RuntimeError, match="changed size"):
        answer(model, "--text")


# Streams


def test_a_reader_that_leaves(model: Path, here: Path) -> None:
    """As in ``generate ... | head -0``: the pipe is closed, so the second image is not drawn."""
    arguments = ["-m", "mlx_janus.generate", "-m", model, "-p", PROMPT, "--n", 3, "--exact"]
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        stderr = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in stderr
    assert "Exception ignored" not in stderr
    assert names(here) == ["janus-1.png"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("redirection", "code", "stderr"),
    [
        (">/dev/full", 1, "Error: No space left on device"),
        (">&-", 0, "Cut after 3 tokens"),
        ("2>&-", 0, ""),
        ("<&-", 0, "Cut after 3 tokens"),  # the weights' file must not take stdin's number
        ("<&- >&- 2>&-", 0, ""),
    ],
)
def test_streams_that_take_nothing_or_are_closed(
    model: Path, redirection: str, code: int, stderr: str
) -> None:
    program = f'"{sys.executable}" -m mlx_janus.generate'
    line = f'{program} -m "{model}" -p Hello --text --max-tokens 3 {redirection}'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code
    assert done.stderr.startswith(stderr)
    assert done.stderr.count("\n") == bool(stderr)


def test_characters_that_an_encoding_lacks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys; sys.stdout.reconfigure(encoding='latin-1')\n"
        "from mlx_janus.commands import generate\n"
        "generate.ask = lambda job: generate.click.echo('caf\\u00e9 \\u706f')\n"
        "generate.main(['-p', 'x', '--text'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, b"caf\xe9 ?\n")


def test_one_stage_ends_its_line_before_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.byte_progress() as report:
        report("hashing", 5, 10)
        report("hashing", 10, 10)
        report("converting", 0, 10)
        report("converting", 10, 10)
    lines = capsys.readouterr().err.split("\n")
    assert [line.split("\r")[-1].split(":")[0] for line in lines] == ["hashing", "converting", ""]
    assert "converting" not in lines[0]


# Stopping

SLOW_CONVERT = (
    INTERRUPTIBLE
    + """
import time
from mlx_janus.weights.convert import ConversionPlan
real = ConversionPlan.convert
ConversionPlan.convert = lambda *arguments: (time.sleep(0.05), real(*arguments))[1]
from mlx_janus.commands.convert import main
main()
"""
)

DRAW = INTERRUPTIBLE + "from mlx_janus.commands.generate import main; main()\n"


def begin_conversion(output: Path) -> subprocess.Popen[str]:
    """A slow conversion that has begun to write."""
    process = start(SLOW_CONVERT, SOURCE, output)
    deadline = time.monotonic() + 30
    while not list(output.parent.glob(".*.partial")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_conversion_leaves_nothing(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = begin_conversion(tmp_path / "out")
    process.send_signal(number)
    done = finish(process)
    assert done.code == code
    assert "Traceback" not in done.stderr
    assert names(tmp_path) == []
    if number == signal.SIGINT:
        assert done.stderr.endswith("\nstopped\n")


def test_a_killed_conversion_is_cleared_away_by_the_next(tmp_path: Path) -> None:
    process = begin_conversion(tmp_path / "out")
    process.kill()
    finish(process)
    assert len(names(tmp_path)) == 1  # the partial folder, and no output
    done = call(convert.main, SOURCE, tmp_path / "out")
    assert done.code == 0
    assert names(tmp_path) == ["out"]
    assert call(convert.main, SOURCE, tmp_path / "out", "--verify").code == 0


def test_a_stopped_drawing_keeps_what_is_finished(model: Path, tmp_path: Path) -> None:
    process = start(
        DRAW, "-m", model, "-p", PROMPT, "--n", 500, "--exact", "--seed", 0, cwd=tmp_path
    )
    assert process.stdout
    assert process.stdout.readline() == "janus-1.png\n"
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 130
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith("\nstopped\n")
    written = {path.name for path in tmp_path.iterdir()}  # hidden ones too
    assert {"janus-1.png", *done.stdout.split()} <= written
    assert written <= {f"janus-{i}.png" for i in range(1, 500)}
    for name in written:
        assert f"janus-{int(facts(tmp_path / name)['seed']) + 1}.png" == name


def test_no_show_goes_with_answering(model: Path) -> None:
    """A script may give it to whatever it asks for."""
    assert answer(model, "--text", "--max-tokens", 2, "--no-show").code == 0


AMID_MLX = (
    INTERRUPTIBLE
    + """
import enum, os
real = enum.EnumMeta.__call__
def call(cls, value, *arguments, **options):
    if value == "DtypeCategory":  # MLX makes it in its setup, where an exception aborts
        os.kill(os.getpid(), getattr(signal, NAME))
        print("sent")
    return real(cls, value, *arguments, **options)
enum.EnumMeta.__call__ = call
from mlx_janus.__main__ import main
main()
"""
)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("words", ["generate -p x", "models", "doctor", "convert a b"])
def test_stopped_while_mlx_is_imported(tmp_path: Path, words: str, name: str, code: int) -> None:
    done = finish(start(AMID_MLX.replace("NAME", repr(name)), *words.split(), cwd=tmp_path))
    assert (done.code, done.stdout) == (code, "sent\n")
    assert done.stderr == ("\nstopped\n" if name == "SIGINT" else "")


def test_a_stopped_answer(model: Path) -> None:
    process = start(DRAW, "-m", model, "-p", QUESTION, "--text", "--max-tokens", 16_000)
    assert process.stdout
    assert process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert (done.code, done.stderr) == (130, "\nstopped\n")


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes fail with EFBIG, like ENOSPC on a full disk
from mlx_janus import convert, generate
command, limit = {"convert": convert, "generate": generate}[sys.argv.pop(1)], int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
command.main()
"""


def test_a_full_disk_during_conversion(tmp_path: Path) -> None:
    line = error_line(finish(start(LIMITED, "convert", 1_000_000, SOURCE, tmp_path / "out")))
    assert f"{tmp_path / 'out'} cannot be written" in line
    assert "free some space or choose another folder" in line
    assert names(tmp_path) == []


def test_a_full_disk_while_a_picture_is_saved(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    line = error_line(
        finish(start(LIMITED, "generate", 1000, "-m", model, "-p", PROMPT, "-o", output))
    )
    assert f"{output} cannot be written" in line
    assert names(tmp_path) == []


# Converting


@pytest.mark.parametrize(
    ("flags", "roles"),
    [
        ((), "<|User|> and <|Assistant|> (special_tokens_map.json has <|User|>)"),
        (("--roles", "plain"), "User and Assistant (as requested)"),
        (("--roles", "pro"), "<|User|> and <|Assistant|> (as requested)"),
    ],
)
def test_a_conversion_tells_its_roles(here: Path, flags: tuple[str, ...], roles: str) -> None:
    done = call(convert.main, SOURCE, "out", *flags)
    assert f"\nRoles: {roles}.\n" in done.stderr
    prompt = JanusConfig.load(here / "out/config.json").prompt
    assert roles.startswith(f"{prompt.user} and {prompt.assistant} ")
    assert call(convert.main, SOURCE, "out", "--verify").code == 0


def test_a_conversion_tells_doubts_and_unknown_options(here: Path) -> None:
    shutil.copytree(FIXTURES / "deepseek-janus-safetensors", "source")
    processor = Path("source/processor_config.json")
    options = json.loads(processor.read_text(encoding="utf-8")) | {"new_tag": "x"}
    processor.write_text(json.dumps(options), encoding="utf-8")
    done = call(convert.main, "source", "out")
    notes = [line for line in done.stderr.splitlines() if line.startswith("Note: ")]
    assert notes == [
        "Note: the roles are User and Assistant (processor_config.json says deepseek_old), but "
        "special_tokens_map.json has <|User|>: pass --roles pro for the others.",
        "Note: processor_config.json: unknown options have no effect: new_tag.",
    ]


@pytest.mark.parametrize("command", ["generate", "chat", "caption", "serve", "convert"])
def test_commands_that_ask_a_model_take_roles(command: str) -> None:
    assert "--roles [pro|plain]" in call(group, command, "--help").stdout


@pytest.mark.check
@pytest.mark.parametrize(
    ("flags", "bits", "group_size", "dtype"),
    [
        ((), None, None, None),
        (("--dtype", "float16"), None, None, "float16"),
        (("--bits", 4), 4, 64, None),
        (("--bits", 8, "--group-size", 32, "--dtype", "bfloat16"), 8, 32, "bfloat16"),
    ],
)
def test_converts_and_verifies(
    here: Path,
    flags: tuple[object, ...],
    bits: int | None,
    group_size: int | None,
    dtype: str | None,
) -> None:
    done = call(convert.main, SOURCE, "out", *flags)
    assert (done.code, done.stdout) == (0, "")
    assert re.search(r"^Wrote out: \d+ tensors, \d MB\.$", done.stderr, re.MULTILINE)
    config = JanusConfig.load(here / "out/config.json")
    assert dtype is None or config.dtype == dtype
    if bits:
        assert config.quantization
        assert (config.quantization.bits, config.quantization.group_size) == (bits, group_size)
        assert "kept float: gen_aligner.layers.0" in done.stderr
    else:
        assert config.quantization is None
        assert "uantized" not in done.stderr
    verified = call(convert.main, SOURCE, "out", "--verify")
    assert verified.code == 0
    assert re.search(r"out matches deepseek-pro-bin: \d+ tensors compared\.\n$", verified.stderr)
    assert draw(here / "out").code == 0


def test_outputs_that_are_not_replaced(model: Path, here: Path) -> None:
    shutil.copytree(model, here / "mine")
    (here / "notes").mkdir()
    (here / "notes/diary.txt").write_text("dear")
    (here / "file").write_text("x")
    for output, flag, what in [
        ("mine", (), "mine exists already: pass --overwrite to replace it"),
        ("notes", (), "notes exists already"),
        ("notes", ("--overwrite",), "notes is not a converted model, so it is not replaced"),
        ("file", ("--overwrite",), "file is not a converted model, so it is not replaced"),
        ("absent/out", (), "absent is not a folder: make it first"),
        ("file/out", (), "file is not a folder"),
        ("x" * 300, (), "File name too long"),
    ]:
        assert what in error_line(call(convert.main, SOURCE, output, *flag))
    assert names(here) == ["file", "mine", "notes"]
    assert names(here / "notes") == ["diary.txt"]


def test_overwrite_replaces_a_converted_model(model: Path, here: Path) -> None:
    shutil.copytree(model, here / "out")
    (here / "out/stray").write_text("x")  # what is not a model's is not thrown away
    assert "out also holds stray" in error_line(call(convert.main, SOURCE, "out", "--overwrite"))
    (here / "out/stray").unlink()
    assert call(convert.main, SOURCE, "out", "--overwrite", "--bits", 8).code == 0
    assert names(here) == ["out"]
    assert "stray" not in names(here / "out")
    assert JanusConfig.load(here / "out/config.json").quantization


def test_a_failed_overwrite_leaves_the_old_one(model: Path, here: Path) -> None:
    shutil.copytree(model, here / "out")
    source = shutil.copytree(SOURCE, here / "source")
    (source / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in error_line(
        call(convert.main, source, "out", "--overwrite")
    )
    assert names(here) == ["out", "source"]
    assert call(convert.main, SOURCE, "out", "--verify").code == 0


def test_sources_that_cannot_be_converted(model: Path, here: Path) -> None:
    assert "is converted already: load it as it is" in error_line(call(convert.main, model, "out"))
    assert "neither a folder nor a Hub id" in error_line(
        call(convert.main, "no/such/folder", "out")
    )
    assert "which has no revisions" in error_line(
        call(convert.main, SOURCE, "out", "--revision", "main")
    )
    inside = shutil.copytree(SOURCE, here / "source")
    for output in (inside, here):
        assert "choose another" in error_line(call(convert.main, inside, output))
    assert names(here) == ["source"]


def change_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_verify_finds_a_changed_byte(model: Path, here: Path) -> None:
    shutil.copytree(model, here / "out")
    assert call(convert.main, SOURCE, "out", "--verify").code == 0
    change_last_byte(here / "out/model.safetensors")
    line = error_line(call(convert.main, SOURCE, "out", "--verify"))
    assert re.search(r"out: \S+ differs from what .*deepseek-pro-bin gives: convert again", line)
    assert names(here) == ["out"]


def test_verify_finds_a_changed_source(model: Path, here: Path) -> None:
    source = shutil.copytree(SOURCE, here / "source")
    change_last_byte(source / "pytorch_model-00002-of-00002.bin")
    line = error_line(call(convert.main, source, model, "--verify"))
    assert f"pytorch_model-00002-of-00002.bin is not the file that {model} was made from" in line


@pytest.mark.parametrize("output", ["absent", "file"])
def test_verify_without_a_converted_folder(here: Path, output: str) -> None:
    (here / "file").write_text("x")
    assert f"{output} is not a folder: convert" in error_line(
        call(convert.main, SOURCE, output, "--verify")
    )
    assert names(here) == ["file"]


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_at_once(command: str) -> None:
    """With examples, under half a second; time is CPU time, as other programs may be running."""
    best = 9.0
    for _ in range(3):
        before = os.times()
        done = run("-m", *command.split(), "--help")
        after = os.times()
        best = min(
            best,
            after.children_user
            - before.children_user
            + after.children_system
            - before.children_system,
        )
        assert done.code == 0
        assert done.stderr == ""
        assert "Examples:\n" in done.stdout
        if best < 0.5:
            break
    assert best < 0.5


@pytest.fixture(scope="module")
def asked() -> dict[tuple[str, ...], tuple[Outcome, set[str]]]:
    """Help and version of every command in every spelling, asked for in one process."""
    lines = [(*command.split(), flag) for command in COMMANDS for flag in ("-h", "--version", "-V")]
    lines += [("mlx_janus", command, "-h") for command in ("models", "doctor")]
    spellings = ("mlx_janus", pip_script())
    lines += [(spelling, name, "--help") for name in NAMES for spelling in spellings]
    return run_together(lines)


def pip_script() -> str:
    """Return the program that pip installs as ``mlx-janus``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"]["mlx-janus"].partition(":")
    start = f"from {module} import {function}; sys.exit({function}())"
    return f"import sys; sys.argv[0] = 'mlx-janus'; {start}"


@pytest.mark.parametrize("command", [*COMMANDS, "mlx_janus models", "mlx_janus doctor"])
def test_help_does_not_import_mlx(
    command: str, asked: dict[tuple[str, ...], tuple[Outcome, set[str]]]
) -> None:
    done, imported = asked[(*command.split(), "-h")]
    assert done.stdout.startswith("Usage: ")
    assert "mlx_janus.commands.options" in imported
    assert not imported & {
        "mlx.core",
        "mlx_lm",
        "numpy",
        "PIL",
        "tokenizers",
        "huggingface_hub",
        "tqdm",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_version(command: str, asked: dict[tuple[str, ...], tuple[Outcome, set[str]]]) -> None:
    for flag in ("--version", "-V"):
        done, _ = asked[(*command.split(), flag)]
        assert done == Outcome(0, f"mlx_janus {mlx_janus.__version__}\n", "")


def test_the_group_runs_the_commands(model: Path, here: Path) -> None:
    listed = call(group, "--help").stdout
    assert set(NAMES) >= {
        "generate",
        "caption",
        "chat",
        "serve",
        "convert",
        "evaluate",
        "train",
        "models",
        "doctor",
    }
    for command in NAMES:
        assert re.search(rf"^  {command} ", listed, re.MULTILINE)
        assert call(group, command, "--help").stdout.startswith(f"Usage: program {command} ")
    done = call(group, "generate", "-m", model, "-p", PROMPT)
    assert (done.code, done.stdout) == (0, "janus.png\n")
    assert "is neither" in error_line(call(group, "generate", "-m", "no/such/model", "-p", PROMPT))
    assert call(group, "generate").code == 2


@pytest.mark.parametrize("name", NAMES)
def test_every_command_runs_in_both_spellings(
    name: str, asked: dict[tuple[str, ...], tuple[Outcome, set[str]]]
) -> None:
    """``python -m mlx_janus NAME``, and ``mlx-janus NAME`` as pip's script runs it."""
    for spelling in ("mlx_janus", pip_script()):
        done, _ = asked[(spelling, name, "--help")]
        assert (done.code, done.stderr) == (0, "")
        assert done.stdout.startswith(f"Usage: mlx-janus {name} [OPTIONS]")


@pytest.mark.parametrize("name", ["generate", "chat", "convert"])
def test_the_roots_scripts(name: str) -> None:
    done = run(f"{name}.py", "--help", cwd=ROOT)
    assert done.code == 0
    assert done.stdout.startswith(f"Usage: python {name}.py ")


def test_help_goes_to_a_reader_that_leaves() -> None:
    process = start("from mlx_janus.__main__ import main; main(['--help'])")
    assert process.stdout
    process.stdout.close()
    with contextlib.closing(process.stderr) as stderr:  # type: ignore[type-var]
        assert "Traceback" not in stderr.read()  # type: ignore[union-attr]
    assert process.wait(30) in (0, 1)
