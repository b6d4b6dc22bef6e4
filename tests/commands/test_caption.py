"""``caption``: many pictures and one question to JSON lines, which a stopped run goes on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mlx_janus
from mlx_janus.commands import caption, inputs
from tests.support.golden import FIXTURES
from tests.support.programs import Outcome, call, error_line

PICTURE = FIXTURES / "picture.png"
NAMES = ["photos/a.jpg", "photos/b.PNG", "photos/c.webp"]
Janus = mlx_janus.JanusPipeline


@pytest.fixture
def model(converted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small random model; the working folder holds pictures and what is none."""
    photos = tmp_path / "photos"
    (photos / "deep.png").mkdir(parents=True)
    for name, colour in zip(NAMES, ("teal", "red", "white"), strict=True):
        Image.new("RGB", (40, 30), colour).save(tmp_path / name)
    shutil.copy(PICTURE, photos / "deep.png" / "d.png")
    (photos / "._a.jpg").write_text("what macOS leaves beside a picture")
    (photos / "notes.txt").write_text("hello")
    monkeypatch.chdir(tmp_path)
    return converted["deepseek-pro-bin"]


def ask(model: Path, *arguments: object) -> Outcome:
    return call(caption.main, "-m", model, "--max-tokens", 4, *arguments)


def lines(text: str) -> list[dict[str, Any]]:
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.check
def test_a_folder_becomes_lines_in_the_order_of_names(model: Path, pro: Janus) -> None:
    done = ask(model, "photos", "--seed", 3)
    assert done.code == 0, done.stderr
    facts = lines(done.stdout)
    assert [line["path"] for line in facts] == NAMES
    for line in facts:
        expected = pro.generate_text("Describe the picture.", line["path"], max_tokens=4)
        assert (line["text"], line["tokens"]) == (expected.text, list(expected.tokens))
        assert (line["finish_reason"], line["seed"], line["model"]) == (
            expected.finish_reason,
            3,
            model.name,
        )
        assert line["prompt"] == "Describe the picture."


def test_a_mark_is_the_place_of_the_image(model: Path, pro: Janus) -> None:
    done = ask(model, NAMES[0], "-p", "Describe {image} in a word.")
    expected = pro.generate_text("Describe {image} in a word.", NAMES[0], max_tokens=4)
    assert lines(done.stdout)[0]["tokens"] == list(expected.tokens)
    error = error_line(ask(Path("no/such/model"), NAMES[0], "-p", "{image} or {image}?"))
    assert "2 {image} marks and 1 image" in error


def test_penalties_reach_captions(model: Path, pro: Janus) -> None:
    words = ("--presence-penalty", 2, "--repetition-penalty", 3, "--max-tokens", 12)
    (line, *_) = lines(ask(model, "photos", *words).stdout)
    choice: dict[str, Any] = {"presence_penalty": 2, "repetition_penalty": 3, "max_tokens": 12}
    expected = pro.generate_text("Describe the picture.", line["path"], **choice)
    assert line["tokens"] == list(expected.tokens)
    plain = pro.generate_text("Describe the picture.", line["path"], max_tokens=12)
    assert expected.tokens != plain.tokens


def test_files_patterns_and_folders_are_taken_once_each(model: Path) -> None:
    paths = (
        "photos/deep.png/d.png",
        "photos/[ab].*",
        "./photos//b.PNG",
        "photos",
        "photos/**/d.png",
    )
    done = ask(model, *paths, "-p", "Was ist das für ein Bild?")
    assert [line["path"] for line in lines(done.stdout)] == ["photos/deep.png/d.png", *NAMES]
    assert '"Was ist das für ein Bild?"' in done.stdout


def test_a_run_that_was_killed_is_gone_on_with(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("photos", "-o", "out.jsonl", "--temperature", 1, "--seed", 8)
    assert ask(model, *words).stdout == ""
    output = Path("out.jsonl")
    whole = output.read_bytes()
    assert len(lines(whole.decode())) == 3
    second = whole.index(b"\n") + 1
    asked: list[object] = []
    real = Janus.generate_text
    monkeypatch.setattr(
        Janus,
        "generate_text",
        lambda self, p, image, **more: (asked.append(image), real(self, p, image, **more))[1],
    )
    for kept in (second + 3, second + 40, len(whole) - 1, second, 0):
        output.write_bytes(whole[:kept])
        asked.clear()
        again = ask(model, *words)
        assert again.code == 0, again.stderr
        assert output.read_bytes() == whole
        assert len(asked) == 3 - whole[:kept].count(b"\n")
    monkeypatch.setattr(caption, "load_pipeline", None)  # not called when nothing is missing
    assert ask(model, *words) == Outcome(0, "", "3 of 3 images are in out.jsonl already\n")


def test_a_stop_keeps_whole_lines(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Janus.generate_text

    def stop_at_the_third(self: Janus, prompt: str, image: str, **more: Any) -> object:
        if image == NAMES[2]:
            assert len(lines(Path("out.jsonl").read_text())) == 2  # written while the run goes on
            raise KeyboardInterrupt
        return real(self, prompt, image, **more)

    monkeypatch.setattr(Janus, "generate_text", stop_at_the_third)
    done = ask(model, "photos", "-o", "out.jsonl")
    assert (done.code, done.stderr.splitlines()[-1]) == (130, "stopped")
    assert [line["path"] for line in lines(Path("out.jsonl").read_text())] == NAMES[:2]


def test_pictures_that_cannot_be_read_are_named_and_the_rest_is_answered(model: Path) -> None:
    Path(NAMES[1]).write_bytes(PICTURE.read_bytes()[:1000])
    done = ask(model, "photos", "absent.png", "-o", "out.jsonl", "-q")
    assert error_line(done) == "Error: 2 of 4 images could not be read"
    first, second, _ = done.stderr.splitlines()
    assert first.startswith(f"{NAMES[1]} is damaged or cut short")
    assert second.startswith("absent.png does not exist")
    assert [line["path"] for line in lines(Path("out.jsonl").read_text())] == [NAMES[0], NAMES[2]]
    shutil.copy(PICTURE, NAMES[1])
    assert ask(model, "photos", "-o", "out.jsonl", "-q") == Outcome(0, "", "")
    assert lines(Path("out.jsonl").read_text())[2]["path"] == NAMES[1]


def test_a_file_name_that_is_no_text(model: Path) -> None:
    name = b"latin-\xe9.png"
    try:
        shutil.copy(bytes(PICTURE), name)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    for _ in range(2):
        assert ask(model, "latin-*.png", "-o", "out.jsonl").code == 0
        assert [
            line["path"].encode(errors="surrogateescape")
            for line in lines(Path("out.jsonl").read_text())
        ] == [name]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("dear diary", "out.jsonl is not a file of captions"),
        ("dear diary\n", "out.jsonl is not a file of captions"),
        ('{"path": "a.png", "text": "x"}\n', "out.jsonl is not a file of captions"),
        ('[1]\n{"pa', "out.jsonl is not a file of captions"),
        ('{"path": "a.png", "prompt": "Why?"}\n{"pa', "out.jsonl answers another question, 'Why?'"),
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(model: Path, text: str, what: str) -> None:
    Path("out.jsonl").write_text(text)
    assert what in error_line(
        call(caption.main, "-m", "no/such/model", "photos", "-o", "out.jsonl")
    )
    assert Path("out.jsonl").read_text() == text


def test_nothing_to_ask_about_and_nowhere_to_write(model: Path) -> None:
    Path("empty").mkdir()
    for words, what in [
        ("empty", "empty holds no images"),
        ("photos/*.xcf", "photos/*.xcf matches no file"),
        ("photos -o absent/out.jsonl", "absent is not a folder"),
        ("photos -o photos", "photos is a folder"),
        ("photos -o new/", "new/ is a folder: give the name of a file in it, such as captions.js"),
        ("file://elsewhere/a.png", "file://elsewhere/a.png is no file of this machine"),
    ]:
        assert what in error_line(call(caption.main, "-m", "no/such/model", *words.split()))


def test_images_from_stdin_and_from_the_web(
    model: Path, pro: Janus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their paths are as they were typed. An address is not a pattern, though it has a "?"."""
    address = "https://example.org//a.png?size=*"
    fetched: list[str] = []

    def fetch(url: str) -> bytes:
        fetched.append(url)
        return PICTURE.read_bytes()

    monkeypatch.setattr(inputs, "fetch", fetch)
    words = ("-", address, "-", "photos/a.jpg", address, "-o", "out.jsonl")
    teal = Path("photos/c.webp").read_bytes()
    first = call(caption.main, "-m", model, "--max-tokens", 4, *words, stdin=teal)
    assert first.code == 0, first.stderr
    facts = lines(Path("out.jsonl").read_text())
    assert [line["path"] for line in facts] == ["-", address, "photos/a.jpg"]
    for line, source in zip(facts, ("photos/c.webp", PICTURE, "photos/a.jpg"), strict=True):
        expected = pro.generate_text("Describe the picture.", source, max_tokens=4)
        assert line["tokens"] == list(expected.tokens)
    assert fetched == [address]
    again = call(caption.main, "-m", model, "--max-tokens", 4, *words, stdin=b"no image")
    assert "2 of 3 images are in out.jsonl already" in again.stderr
    assert "the image on stdin is not an image that can be read" in again.stderr
    assert fetched == [address]


def test_an_address_that_cannot_be_fetched_is_shown_as_typed(model: Path) -> None:
    done = ask(model, "https://localhost:1/x.png", "-q")
    assert error_line(done) == "Error: 1 of 1 images could not be read"
    assert done.stderr.startswith("https://localhost:1/x.png cannot be fetched")


def test_file_addresses_are_files_folders_and_patterns(model: Path) -> None:
    folder = Path("photos").absolute()
    (folder / "a.jpg").rename(folder / "a b.jpg")
    for address in (folder.as_uri(), f"{folder.as_uri()}/*.*", (folder / "a b.jpg").as_uri()):
        done = ask(model, address)
        assert done.code in (0, 1)
        assert lines(done.stdout)[0]["path"] == str(folder / "a b.jpg")


def test_a_dash_is_stdout(model: Path) -> None:
    assert lines(ask(model, "photos", "-o", "-").stdout)[2]["path"] == NAMES[2]
    assert not Path("-").exists()


def test_answers_in_json_are_values_of_the_lines(model: Path) -> None:
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2}
    Path("schema.json").write_text(json.dumps(schema))
    arguments = ["photos", "--schema", "schema.json", "-o", "out.jsonl", "--seed", 1]
    done = ask(model, *arguments, "--max-tokens", 20)
    assert done.code == 0, done.stderr
    facts = lines(Path("out.jsonl").read_text())
    assert [line["path"] for line in facts] == NAMES
    for line in facts:
        assert "text" not in line
        assert line["json"][0] in ("a", "b")
    again = ask(model, *arguments)
    assert (again.code, "3 of 3 images are in out.jsonl already" in again.stderr) == (0, True)
    other = ask(model, "photos", "-o", "out.jsonl")
    assert "has answers in JSON, not in words" in error_line(other)
    cut = lines(ask(model, NAMES[0], "--schema", "schema.json", "--max-tokens", 2).stdout)[0]
    assert (cut["json"], cut["finish_reason"]) == (None, "length")
    assert cut["text"].startswith("[")


def test_answers_by_another_schema_are_refused(model: Path) -> None:
    schema: dict[str, Any] = {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 1}
    Path("schema.json").write_text(json.dumps(schema))
    Path("spaced.json").write_text(json.dumps(schema, indent=4))
    Path("other.json").write_text(json.dumps(schema | {"minItems": 1}))
    arguments = ["photos", "-o", "out.jsonl", "--max-tokens", 20, "--schema"]
    assert ask(model, *arguments, "schema.json").code == 0
    written = Path("out.jsonl").read_text()
    for other in ("other.json", "json"):
        line = error_line(call(caption.main, "-m", "no/such/model", *arguments, other))
        assert "out.jsonl has answers by another --schema: name another file" in line
        assert Path("out.jsonl").read_text() == written
    assert "3 of 3 images" in ask(model, *arguments, "spaced.json").stderr

    old = lines(written)  # as earlier releases wrote them
    for line in old:
        del line["schema"]
    Path("out.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in old))
    assert "3 of 3 images" in ask(model, *arguments, "other.json").stderr


def test_answers_of_any_object_record_it(model: Path) -> None:
    arguments = [NAMES[0], "-o", "out.jsonl", "--schema"]
    assert ask(model, *arguments, "json", "--max-tokens", 8).code == 0
    assert lines(Path("out.jsonl").read_text())[0]["schema"] == "json"
    Path("object.json").write_text('{"type": "object"}')
    assert "by another --schema" in error_line(ask(model, *arguments, "object.json"))
