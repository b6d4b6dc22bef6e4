"""The tools at ``/mcp`` of the server: in a process, with both generations of the protocol."""

from __future__ import annotations

import asyncio
import base64
import signal
import threading
from collections.abc import Iterator
from typing import Any

import mlx_janus

# isort: split
import pytest
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

from mlx_janus.mcp.tools import ASK, EDIT, GENERATE
from tests.support.fake_engine import FakeEngine
from tests.support.golden import FIXTURES
from tests.support.mcp_client import Notification, connected, error_text
from tests.support.serving import ServerProcess, refusal, served, started, to, wait_until

PICTURE = FIXTURES / "picture.png"
QUESTION = "what is in the picture?"
IDLE = {
    "status": "ok",
    "model": "janus-tiny",
    "models": 1,
    "loaded": 1,
    "waiting": 0,
    "answering": 0,
    "drawing": 0,
}
INITIALIZE: dict[str, Any] = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "x", "version": "1"},
    },
}
BOTH = {"Accept": "application/json, text/event-stream"}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with started() as server:
        yield server


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_the_tools_over_http(server: ServerProcess, mode: str) -> None:
    with connected(lambda: f"{server.url}/mcp", mode) as client, to(server.url) as http:
        listed = client.do(client.client.list_tools()).tools
        assert [tool.name for tool in listed] == [GENERATE, ASK, EDIT]
        told: list[Notification] = []
        drawn = client.call(GENERATE, told, prompt="a red circle", seed=3)
        image, line = drawn.content
        assert image.type == "image"
        assert line.type == "text"
        assert line.text == "One image of 64 x 64 pixels, seed 3."
        assert told[-1] == (64, 64, "drawing")
        (answer,) = client.call(ASK, image=image.data, question=QUESTION).content
        assert answer.type == "text"
        assert "red circle" in answer.text
        data = base64.b64encode(PICTURE.read_bytes()).decode()
        url = f"data:image/png;base64,{data}"
        assert not client.call(EDIT, images=[url], prompt="a blue circle").is_error
        client.cancel_a_call(GENERATE, prompt="a red circle", n=4)
        wait_until(lambda: http.get("/health").json() == IDLE)
        assert not client.call(GENERATE, prompt="a star").is_error


def test_the_server_reads_no_files_and_fetches_nothing(server: ServerProcess) -> None:
    with connected(lambda: f"{server.url}/mcp") as client:
        for image in (str(PICTURE), PICTURE.as_uri()):
            reason = error_text(client.call(ASK, image=image, question=QUESTION))
            assert reason.startswith("an image must be given as data:image/png;base64,...")
        found = client.call(ASK, image="https://example.org/a.png", question=QUESTION)
        assert error_text(found).startswith("this server fetches no images")


def test_calls_are_counted(server: ServerProcess) -> None:
    with connected(lambda: f"{server.url}/mcp") as client, to(server.url) as http:
        before = http.get("/metrics").text
        client.call(GENERATE, prompt="a star", n=2)
        after = http.get("/metrics").text
    name = "\nmlx_janus_pictures_total "
    counts = [float(text.split(name)[1].split("\n")[0]) for text in (before, after)]
    assert counts[1] - counts[0] == 2
    assert 'route="/mcp"' in after


def test_the_servers_own_rules_hold() -> None:
    engine = FakeEngine(mlx_janus.load().config)
    with served(engine) as url, to(url) as http:
        foreign = http.post("/mcp", json=INITIALIZE, headers=BOTH | {"Origin": "https://x.org"})
        assert refusal(foreign, 403)["code"] == "wrong_origin"
        foreign = http.post("/mcp", json=INITIALIZE, headers=BOTH | {"Host": "x.org"})
        assert refusal(foreign, 403)["code"] == "wrong_host"
        engine.stopping = True
        assert refusal(http.post("/mcp", json=INITIALIZE, headers=BOTH), 503)
    with served(engine, api_key="secret") as url, to(url) as http:
        assert refusal(http.post("/mcp", json=INITIALIZE, headers=BOTH), 401)


def test_a_page_of_an_allowed_site_may_keep_its_session() -> None:
    site = "https://chat.example.org"
    engine = FakeEngine(mlx_janus.load().config)
    with served(engine, cors_origins=(site,)) as url, to(url) as http:
        preflight = http.options(
            "/mcp",
            headers={
                "Origin": site,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "mcp-session-id",
            },
        )
        assert preflight.status_code == 200
        health = http.get("/health", headers={"Origin": site})
        assert "Mcp-Session-Id" in health.headers["access-control-expose-headers"]


@pytest.mark.parametrize("failing", ["__init__", "run"])
def test_a_failed_start_is_tried_again(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no room")

    engine = FakeEngine(mlx_janus.load().config)
    monkeypatch.setattr(engine, "ended", asyncio.Event(), raising=False)  # it goes on to the end
    with served(engine) as url, to(url) as http:
        with monkeypatch.context() as patch:
            patch.setattr(StreamableHTTPSessionManager, failing, fail)
            for _ in range(2):
                assert http.post("/mcp", json=INITIALIZE, headers=BOTH).status_code == 500
        assert http.post("/mcp", json=INITIALIZE, headers=BOTH).status_code == 200


def test_without_the_package_there_is_no_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_janus.server.mcp_route.is_installed", lambda: False)
    with served(FakeEngine(mlx_janus.load().config)) as url, to(url) as http:
        assert refusal(http.post("/mcp", json=INITIALIZE, headers=BOTH), 404)


def test_a_stopping_server_sends_the_last_image_and_ends_open_streams(
    server: ServerProcess,
) -> None:
    """The last test of this process."""
    with connected(lambda: f"{server.url}/mcp") as client:
        client.do(client.client.list_tools())
        begun = threading.Event()

        class Told(list[Notification]):
            def append(self, notification: Notification) -> None:
                begun.set()

        results: list[Any] = []
        call = threading.Thread(
            target=lambda: results.append(client.call(GENERATE, Told(), prompt="a star", n=4))
        )
        call.start()
        assert begun.wait(60)
        code, _ = server.stop(signal.SIGTERM, 30)
        call.join()
    assert code == 0
    assert results[0].content[-1].text.startswith("4 images of 64 x 64 pixels")
