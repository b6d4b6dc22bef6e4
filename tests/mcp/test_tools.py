"""The tools in this process: loading, failures, cancellation, images that a program may name."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx_janus

# isort: split
import jsonschema_rs
import pytest
from mcp_types import CallToolResult

from mlx_janus.engine.tickets import Counts
from mlx_janus.errors import JanusError
from mlx_janus.inference.results import read_settings
from mlx_janus.mcp import calls, progress, protocol
from mlx_janus.mcp.protocol import create_server
from mlx_janus.mcp.stdio import LocalHost
from mlx_janus.mcp.tools import ASK, EDIT, GENERATE
from mlx_janus.pipeline import JanusPipeline
from mlx_janus.processing.saved_images import read_metadata
from tests.support.engines import tiny
from tests.support.golden import FIXTURES
from tests.support.mcp_client import Connection, Notification, connected, error_text
from tests.support.serving import wait_until

PICTURE = FIXTURES / "picture.png"
QUESTION = "what is in the picture?"


class Local:
    """A host in this process, with a client.

    Args:
        host: the host.
        connection: the client's.
        reports: the lines that the host would print to stderr.
    """

    def __init__(self, host: LocalHost, connection: Connection, reports: list[str]):
        self.host, self.connection, self.reports = host, connection, reports
        self.call = connection.call

    @property
    def counts(self) -> Counts:
        assert self.host._engine is not None
        return self.host._engine.counts

    def names(self) -> list[str]:
        listed = self.connection.do(self.connection.client.list_tools(cache_mode="bypass"))
        return [tool.name for tool in listed.tools]


@contextlib.contextmanager
def local(load: Callable[[], JanusPipeline], folder: Path | None = None) -> Iterator[Local]:
    """A host that loads in the background, as the command does."""
    reports: list[str] = []
    host = LocalHost(load, str, reports.append, folder)

    def start() -> Any:
        host.start_loading()
        return create_server(host)

    with connected(start) as connection:
        try:
            yield Local(host, connection, reports)
        finally:
            assert connection.do(host.close())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def janus(folder: Path) -> Iterator[Local]:
    with local(tiny, folder) as janus:
        yield janus


def text_of(result: CallToolResult) -> str:
    assert not result.is_error, result
    last = result.content[-1]
    assert last.type == "text"
    return last.text


def test_an_image_is_saved_and_its_path_can_be_asked_about(janus: Local, folder: Path) -> None:
    line = text_of(janus.call(GENERATE, prompt="a red circle", seed=3, cfg_weight=4))
    path = folder.resolve() / "janus-3.png"
    assert line == f"One image of 64 x 64 pixels, seed 3; saved as {folder / 'janus-3.png'}."
    facts = read_metadata(path)
    assert (facts["prompt"], facts["cfg_weight"]) == ("a red circle", "4")
    assert "red circle" in text_of(janus.call(ASK, image=str(path), question=QUESTION))


def test_images_in_every_form(janus: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = base64.b64encode(PICTURE.read_bytes()).decode()
    monkeypatch.setenv("HOME", str(PICTURE.parent))
    forms = [
        str(PICTURE),
        PICTURE.as_uri(),
        f"~/{PICTURE.name}",
        f"data:image/png;base64,{encoded}",
        encoded,
    ]
    answers = {text_of(janus.call(ASK, image=form, question=QUESTION)) for form in forms}
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("/no/such/file.png", "/no/such/file.png does not exist: check the path"),
        ("http://example.org/a.png", "http://example.org/a.png is a web address"),
        ("https://127.0.0.1/a.png", "https://127.0.0.1/a.png is not a public address"),
        ("data:image/png;base64,AAAA", "the image is not an image that can be read"),
        ("data:image/png;base64,!", "the image's base64 is damaged or cut short"),
        (__file__, "is not an image that can be read"),
    ],
)
def test_an_image_that_cannot_be_read_is_an_error_of_the_tool(
    janus: Local, image: str, reason: str
) -> None:
    assert reason in error_text(janus.call(ASK, image=image, question=QUESTION))


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        (GENERATE, {}, "prompt is missing: add it"),
        (GENERATE, {"prompt": "x", "n": 5}, "n: it must be less than or equal to 4, got 5"),
        (
            GENERATE,
            {"prompt": "x", "seed": "abc"},
            "seed: it must be a valid integer, unable to parse string as an integer, got 'abc'",
        ),
        (
            ASK,
            {"image": "x", "questoin": "y", "question": "y"},
            "there is no argument 'questoin': use image, question, max_tokens, temperature",
        ),
        (EDIT, {"prompt": "x", "images": []}, "images: List should have at least 1 item"),
        ("draw", {}, "there is no tool 'draw'"),
        (ASK, {"image": str(PICTURE), "question": "why? " * 1000}, "maximum context length"),
    ],
)
def test_wrong_arguments_are_errors_of_the_tool(
    janus: Local, tool: str, arguments: dict[str, Any], message: str
) -> None:
    assert message in error_text(janus.call(tool, **arguments))


def test_the_schemas_say_what_is_accepted(janus: Local) -> None:
    listed = janus.connection.do(janus.connection.client.list_tools()).tools
    assert [tool.name for tool in listed] == [GENERATE, ASK, EDIT]
    for tool in listed:
        assert tool.description
        assert tool.annotations is not None
        assert not tool.annotations.destructive_hint
        assert all("description" in each for each in tool.input_schema["properties"].values())
    drawing, asking, _ = listed
    assert drawing.annotations is not None
    assert not drawing.annotations.read_only_hint
    assert asking.annotations is not None
    assert asking.annotations.read_only_hint
    validator = jsonschema_rs.validator_for(drawing.input_schema)
    assert validator.is_valid({"prompt": "x", "n": 4, "seed": 0, "cfg_weight": 2.5})
    for wrong in ({}, {"prompt": ""}, {"prompt": "x", "n": 5}, {"prompt": "x", "seed": None}):
        assert not validator.is_valid(wrong)
    assert next(iter(drawing.input_schema["properties"])) == "prompt"


def test_a_model_may_leave_an_argument_null(janus: Local) -> None:
    text_of(janus.call(GENERATE, prompt="a star", seed=None, cfg_weight=None))


def test_an_image_is_changed(janus: Local) -> None:
    told: list[Notification] = []
    result = janus.call(EDIT, told, images=str(PICTURE), prompt="a blue circle", n=2, seed=8)
    assert [content.type for content in result.content] == ["image", "image", "text"]
    assert told[-1] == (128, 128, "drawing")
    assert "seeds 8, 9" in text_of(result)


def test_a_changed_image_names_its_inputs(janus: Local, folder: Path) -> None:
    encoded = base64.b64encode(PICTURE.read_bytes()).decode()
    janus.call(EDIT, images=[str(PICTURE), encoded], prompt="a blue circle", seed=21)
    settings = read_settings(folder.resolve() / "janus-21.png")
    sha256 = hashlib.sha256(PICTURE.read_bytes()).hexdigest()
    assert [record.name for record in settings["inputs"]] == [PICTURE.name, None]
    assert [record.sha256 for record in settings["inputs"]] == [sha256, sha256]
    assert settings["crop"] is False


def test_images_that_are_too_large_for_programs_become_jpegs(
    janus: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = janus.call(GENERATE, prompt="a star", seed=3).content[0]
    assert one.type == "image"
    assert one.mime_type == "image/png"
    monkeypatch.setattr(calls, "_MAX_RESULT", len(one.data) + 10)
    *images, _ = janus.call(GENERATE, prompt="a star", seed=3, n=2).content
    assert len(images) == 2
    for image in images:
        assert image.type == "image"
        assert image.mime_type == "image/jpeg"
        assert base64.b64decode(image.data).startswith(b"\xff\xd8")


def test_progress_grows_to_the_end(janus: Local) -> None:
    told: list[Notification] = []
    janus.call(GENERATE, told, prompt="a red circle", n=2)
    done = [progress for progress, _, _ in told]
    assert done == sorted(set(done))
    assert 2 <= len(told) < 64
    assert told[-1] == (128, 128, "drawing")
    told.clear()
    question = f"{QUESTION} " * 60  # more than one part of the prompt that is read at once
    janus.call(ASK, told, image=str(PICTURE), question=question, max_tokens=40)
    done = [progress for progress, _, _ in told]
    assert done == sorted(set(done))
    assert told[0][2] == "reading the prompt"


def test_a_cut_answer_says_so(janus: Local) -> None:
    line = text_of(janus.call(ASK, image=str(PICTURE), question=QUESTION, max_tokens=2))
    assert line == "The answer was cut after 2 tokens, by max_tokens or the model's context."


def test_a_cancelled_call_stops_and_the_next_is_served(janus: Local) -> None:
    for tool, more in ((GENERATE, {}), (EDIT, {"images": [str(PICTURE)]})):
        janus.connection.cancel_a_call(tool, prompt="a red circle", n=4, **more)
        begun = time.monotonic()
        wait_until(lambda: janus.counts == Counts())
        assert time.monotonic() - begun < 5
    text_of(janus.call(GENERATE, prompt="a red circle"))


def test_calls_at_once_take_turns(janus: Local) -> None:
    results: list[str] = []
    threads = [
        threading.Thread(
            target=lambda seed=seed: results.append(
                text_of(janus.call(GENERATE, prompt="a star", seed=seed))
            )
        )
        for seed in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3


def test_a_client_is_answered_while_the_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_LISTING_WAIT", 0.01)
    monkeypatch.setattr(progress, "_HEARTBEAT", 0.05)
    wanted = threading.Event()

    def load() -> JanusPipeline:
        assert wanted.wait(60)
        return tiny()

    with local(load) as janus:
        assert janus.names() == [GENERATE, ASK, EDIT]
        told: list[Notification] = []
        threading.Timer(0.3, wanted.set).start()
        result = janus.call(GENERATE, told, prompt="a star")
        assert text_of(result).startswith("One image of 64 x 64 pixels, seed ")
        assert "saved" not in text_of(result)
    loading = [progress for progress, _, message in told if message == "loading the model"]
    assert len(loading) >= 2
    assert loading == sorted(set(loading))
    assert janus.reports == ["janus-tiny is ready"]


def test_an_image_that_cannot_be_saved_is_sent(tmp_path: Path) -> None:
    with local(tiny, tmp_path / "gone") as janus:
        result = janus.call(GENERATE, prompt="a star", seed=1)
    assert result.content[0].type == "image"
    line = text_of(result)
    assert line.startswith("One image of 64 x 64 pixels, seed 1; not saved: ")
    assert "make the folder" in line


def test_a_client_that_leaves_while_the_model_loads_is_no_failure() -> None:
    left = threading.Event()

    def load() -> JanusPipeline:
        assert left.wait(60)
        return tiny()

    with local(load) as janus:
        threading.Timer(0.2, left.set).start()
    assert janus.reports == []


def test_a_model_that_cannot_be_loaded_is_tried_again() -> None:
    failures = iter([JanusError("the network is gone: try again"), JanusError("still gone")])

    def load() -> JanusPipeline:
        for failure in failures:
            raise failure
        return tiny()

    with local(load) as janus:
        wait_until(lambda: janus.reports)
        assert error_text(janus.call(GENERATE, prompt="a star")) == "still gone"
        text_of(janus.call(GENERATE, prompt="a star"))
    assert janus.reports == [
        "Error: the network is gone: try again",
        "Error: still gone",
        "janus-tiny is ready",
    ]


def test_a_model_that_cannot_change_images_does_not_offer_it(flow_folder: Path) -> None:
    with local(lambda: mlx_janus.load(flow_folder, dtype="float32")) as janus:
        assert janus.names() == [GENERATE, ASK]
        reason = error_text(janus.call(EDIT, prompt="x", images=str(PICTURE)))
        assert reason.startswith("this model generates images from prompts only")
        reason = error_text(janus.call(GENERATE, prompt="x", temperature=1))
        assert reason.startswith("temperature is no option")
        text_of(janus.call(GENERATE, prompt="x"))
        told: list[Notification] = []
        text_of(janus.call(GENERATE, told, prompt="x", n=2, steps=3))
        assert told[-1] == (6, 6, "drawing")
        wrong = error_text(janus.call(GENERATE, prompt="x", steps=0))
        assert wrong.startswith("steps: it must be greater than or equal to 1")


def test_steps_of_a_model_that_draws_tokens(janus: Local) -> None:
    reason = error_text(janus.call(GENERATE, prompt="x", steps=3))
    assert reason.startswith("steps is no option of a model that draws image tokens")
