"""JanusFlow in the commands: ``convert --vae``, ``generate --steps``, chat."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

import mlx_janus
from mlx_janus.commands import caption, chat, convert, evaluate, generate
from tests.support.flow import VAE, source
from tests.support.golden import FIXTURES
from tests.support.programs import call, error_line
from tests.support.serving import CHAT, DRAW, EDIT, refusal, started, to

FOLDER = source().folder
PICTURE = FIXTURES / "picture.png"


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
        (("--plan",), "cannot draw by a plan, as models that draw image tokens can"),
        (("--reflect", 1), "cannot draw again after a judgement, as models that draw image"),
        (("--image", PICTURE, "-o", "changed.png"), "generates images from prompts only"),
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


def test_a_chat_takes_the_options_of_drawing(
    flow_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--steps", 2, "--cfg-weight", 1.5, "--cfg-weight2", 4, "--seed", 3)
    lines = "/draw a fox\n/set\n/set steps default\n/set\n"
    done = call(chat.main, "-m", flow_folder, *flags, stdin=lines)
    assert done.code == 0, done.stderr
    with Image.open("janus.png") as image:
        stored = image.text  # type: ignore[attr-defined]
    assert (stored["steps"], stored["cfg_weight"], stored["seed"]) == ("2", "1.5", "3")
    for line in ("steps 2", "cfg_weight 1.5", "cfg_weight2 4.0", "steps default"):
        assert line in done.stderr.splitlines()
    assert call(chat.main, "-m", flow_folder, "--steps", 0).code == 2
    line = error_line(call(chat.main, "--steps", 3, stdin="/draw a circle\n"))
    assert "steps is no option of a model that draws image tokens" in line


def test_a_chat_asks_about_images_and_says_that_it_changes_none(
    flow_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = f"/image {PICTURE}\nWhat is it?\n/edit make it blue\n"
    done = call(chat.main, "-m", flow_folder, "--max-tokens", 4, stdin=lines)
    assert done.code == 0, done.stderr
    answer = mlx_janus.load(flow_folder).generate_text("What is it?", PICTURE, max_tokens=4)
    assert answer.text.strip() in done.stdout
    assert "this model generates images from prompts only" in done.stderr
    assert not list(tmp_path.iterdir())


def test_images_are_captioned_and_the_best_are_kept(
    flow_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(caption.main, "-m", flow_folder, PICTURE, "--max-tokens", 4)
    assert done.code == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    flags = ("--best-of", 2, "--seed", 3, "--steps", 2, "--low-memory", "--json")
    done = call(generate.main, "-m", flow_folder, "-p", "a fox", *flags)
    assert done.code == 0, done.stderr
    (made,) = json.loads(done.stdout)["images"]
    assert made["rank"] == 1


def test_a_list_of_prompts_has_steps(
    flow_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a fox\nan owl\n")
    flags = ("--prompts-file", "prompts.txt", "--steps", 2, "-o", "images")
    done = call(generate.main, "-m", flow_folder, *flags)
    assert done.code == 0, done.stderr
    saved = sorted(Path("images").glob("*.png"))
    assert len(saved) == 2
    for path in saved:
        with Image.open(path) as image:
            assert image.text["steps"] == "2"  # type: ignore[attr-defined]


def test_a_server_draws_and_answers(flow_folder: Path) -> None:
    janus = mlx_janus.load(flow_folder)
    (expected,) = janus.generate_images("a fox", seed=3, steps=2)
    with started("-m", flow_folder) as server, to(server.url) as client:
        body = {"prompt": "a fox", "seed": 3, "steps": 2}
        (drawn,) = client.post(DRAW, json=body).json()["data"]
        with Image.open(io.BytesIO(base64.b64decode(drawn["b64_json"]))) as image:
            assert image.tobytes() == expected.image.tobytes()
            assert image.text["steps"] == "2"  # type: ignore[attr-defined]
        url = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
        parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What is it?"}]
        asked = {"messages": [{"role": "user", "content": parts}], "max_tokens": 4}
        reply = client.post(CHAT, json=asked).json()
        answer = janus.generate_text("What is it?", PICTURE, max_tokens=4)
        assert reply["choices"][0]["message"]["content"] == answer.text
        refused = client.post(EDIT, json={"prompt": "a red fox", "images": [url]})
        assert "cannot change images" in refusal(refused, 400)["message"]


def test_the_benchmark_of_shapes_refuses_it_at_once(flow_folder: Path) -> None:
    line = error_line(call(evaluate.main, "shapes", "-m", flow_folder))
    assert "this model does not generate image tokens" in line
