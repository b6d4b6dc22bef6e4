"""What a server should not be sent: it refuses in one sentence, lets go of the work, and answers the next."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import logging
import re
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import mlx_janus

# isort: split
import httpx
import numpy as np
import pytest
from fake_engine import FakeEngine
from PIL import Image
from serving import served, wait_until

from mlx_janus import inputs
from mlx_janus.config import JanusConfig
from mlx_janus.errors import CheckpointError, JanusError, OptionError, OutOfMemoryError
from mlx_janus.server.requests import StoppingError
from mlx_janus.server.settings import Settings

CHAT, DRAW = "/v1/chat/completions", "/v1/images/generations"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
def config() -> JanusConfig:
    return mlx_janus.load().config


@pytest.fixture(scope="module")
def server(config: JanusConfig) -> Iterator[tuple[FakeEngine, str]]:
    """An engine and the address of a server with small limits."""
    limits: dict[str, Any] = {"body_limit": 200_000, "bodies_limit": 300_000, "picture_limit": 50_000}
    engine = FakeEngine(config)
    with served(engine, body_seconds=0.5, most_requests=8, heartbeat_seconds=0.2, **limits) as url:
        yield engine, url


@pytest.fixture
def engine(server: tuple[FakeEngine, str]) -> FakeEngine:
    """The engine as new."""
    wait_until(lambda: server[0].open == 0)
    server[0].reset()
    return server[0]


@pytest.fixture
def client(engine: FakeEngine, server: tuple[FakeEngine, str]) -> Iterator[httpx.Client]:
    with to(server[1]) as client:
        yield client


def to(url: str, **headers: str) -> httpx.Client:
    return httpx.Client(base_url=url, trust_env=False, headers=headers, timeout=20)


def refusal(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error object of a refusal, checked for its form."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert set(reply.json()) == {"error"}
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
    assert error["type"] == kinds.get(status, "invalid_request_error")
    return error


def still_works(client: httpx.Client, engine: FakeEngine) -> None:
    """Nothing is left under way, and the next request is answered."""
    wait_until(lambda: engine.open == 0)
    assert client.get("/health").json() == {
        "status": "ok", "model": "fake", "waiting": 0, "answering": 0, "drawing": 0
    }  # fmt: skip
    engine.pause = 0
    reply = client.post(CHAT, json=HELLO)
    assert reply.json()["choices"][0]["message"]["content"] == "".join(engine.pieces)


def connect(client: httpx.Client, request: str, body: bytes = b"") -> socket.socket:
    """A connection on which a request, or a part of one, has been sent."""
    parts = urlsplit(str(client.base_url))
    connection = socket.create_connection((parts.hostname, parts.port or 80), timeout=20)
    head = f"{request} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    connection.sendall(head.encode() + body)
    return connection


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> socket.socket:
    content = json.dumps(body).encode()
    return connect(client, f"POST {path}", b"Content-Length: %d\r\n\r\n%s" % (len(content), content))


def png(width: int, height: int, *, noise: bool = False) -> str:
    """A data URL of a picture."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)) if noise else np.zeros((height, width, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return data_url(file.getvalue())


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def bomb() -> str:
    """A data URL of a picture that says it is 50,000 x 50,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return data_url(data + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))


def ask(*urls: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]}


# Clients that leave, dawdle, or do not finish


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO), (DRAW, {"prompt": "a fox"})])
def test_the_work_for_a_client_that_leaves_ends(
    client: httpx.Client, engine: FakeEngine, path: str, body: dict[str, Any], stream: bool
) -> None:
    engine.pause = 60
    with post(client, path, body | {"stream": stream}):
        wait_until(lambda: engine.open == 1)
    wait_until(lambda: engine.open == 0, seconds=5)
    still_works(client, engine)


def test_a_client_that_does_not_read_keeps_nobody_waiting(client: httpx.Client, engine: FakeEngine) -> None:
    engine.pieces = ("x" * 300_000,) * 30
    with post(client, CHAT, HELLO | {"stream": True}):
        wait_until(lambda: engine.open == 1)
        assert client.post(CHAT, json=HELLO).status_code == 200
    still_works(client, engine)


def test_a_body_that_does_not_come_is_waited_for_so_long(client: httpx.Client, engine: FakeEngine) -> None:
    with connect(client, f"POST {CHAT}", b'Content-Length: 100\r\n\r\n{"messages"') as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
    still_works(client, engine)


def test_a_head_that_does_not_come_is_waited_for_so_long(client: httpx.Client, engine: FakeEngine) -> None:
    with connect(client, "GET /health") as connection:
        time.sleep(0.3)
        connection.sendall(b"X-Slow: 1\r\n")  # which does not gain time
        begun = time.monotonic()
        assert connection.recv(100) == b""
        assert time.monotonic() - begun < 5
    still_works(client, engine)


def test_a_connection_is_kept_between_requests(client: httpx.Client, engine: FakeEngine) -> None:
    engine.pause = 0.3
    parts = urlsplit(str(client.base_url))
    with contextlib.closing(http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)) as connection:
        connection.request("POST", CHAT, json.dumps(HELLO), {"Content-Type": "application/json"})
        assert connection.getresponse().read()  # took longer than a head may
        kept = connection.sock
        for _ in range(2):
            connection.request("GET", "/health")
            assert json.loads(connection.getresponse().read())["status"] == "ok"
            assert connection.sock is kept is not None


def test_half_a_body_and_a_client_that_is_gone(client: httpx.Client, engine: FakeEngine) -> None:
    connect(client, f"POST {CHAT}", b'Content-Length: 100\r\n\r\n{"messages"').close()
    wait_until(lambda: 'route="none",status="499"' in client.get("/metrics").text)
    assert not engine.asked
    still_works(client, engine)


def test_a_large_body_is_refused_before_it_is_sent(client: httpx.Client, engine: FakeEngine) -> None:
    with connect(client, f"POST {CHAT}", b"Content-Length: 200001\r\n\r\n") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    still_works(client, engine)


def test_a_large_body_that_does_not_say_so_is_refused_while_it_comes(client: httpx.Client, engine: FakeEngine) -> None:
    chunk = b"186a0\r\n" + b" " * 100_000 + b"\r\n"
    with connect(client, f"POST {CHAT}", b"Transfer-Encoding: chunked\r\n\r\n" + 2 * chunk + b"1\r\n") as connection:
        connection.sendall(b" \r\n1\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    still_works(client, engine)


def test_all_bodies_together_have_a_limit(client: httpx.Client, engine: FakeEngine) -> None:
    begun = b"Content-Length: 190000\r\n\r\n" + b" " * 180_000
    with connect(client, f"POST {CHAT}", begun) as one, connect(client, f"POST {CHAT}", begun) as other:
        replies = [one.recv(100), other.recv(100)]
        assert sorted(reply[:12] for reply in replies) == [b"HTTP/1.1 408", b"HTTP/1.1 429"]
    still_works(client, engine)


def test_more_requests_at_once_than_may_be(client: httpx.Client, engine: FakeEngine) -> None:
    engine.pause = 60
    open_ones = [post(client, CHAT, HELLO) for _ in range(8)]
    wait_until(lambda: engine.open == 8)
    reply = client.post(CHAT, json=HELLO)
    refusal(reply, 429)
    assert int(reply.headers["retry-after"]) > 0
    assert client.get("/health").json()["answering"] == 8
    for connection in open_ones:
        connection.close()
    still_works(client, engine)


def test_health_says_when_nothing_is_taken_any_more(client: httpx.Client, engine: FakeEngine) -> None:
    engine.stopping = True
    reply = client.get("/health")
    assert (reply.status_code, reply.json()["status"]) == (503, "stopping")
    engine.stopping = False
    still_works(client, engine)


def test_a_full_queue_says_when_to_come_again(client: httpx.Client, engine: FakeEngine) -> None:
    engine.room = 0
    for path, body in ((CHAT, HELLO), (DRAW, {"prompt": "a fox", "stream": True})):
        reply = client.post(path, json=body)
        assert refusal(reply, 429)["code"] == "rate_limit_exceeded"
        assert reply.headers["retry-after"] == "7"
    engine.room = 1
    still_works(client, engine)


def test_a_stream_that_waits_says_that_it_lives(client: httpx.Client, engine: FakeEngine) -> None:
    engine.pause = 0.5
    text = client.post(CHAT, json=HELLO | {"stream": True}).text
    assert text.count(": still at work\n\n") >= 4
    assert text.endswith("data: [DONE]\n\n")
    still_works(client, engine)


# Failures


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (RuntimeError("secret at /home/ann"), 500),
        (CheckpointError("/home/ann/model.safetensors is damaged: secret"), 500),
        (OutOfMemoryError("secret"), 503),
        (StoppingError(), 503),
        (OptionError("n must be less"), 400),
    ],
)
def test_what_fails_is_told_without_what_is_inside(
    client: httpx.Client,
    engine: FakeEngine,
    failure: Exception,
    status: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine.failure = failure
    error = refusal(client.post(CHAT, json=HELLO), status)
    lines = client.post(CHAT, json=HELLO | {"stream": True}).text.split("\n\n")
    assert lines[-2].startswith("event: error\ndata: ")
    assert json.loads(lines[-2].partition("data: ")[2])["error"] == error | {"param": None}
    assert "secret" not in str([error, lines])
    assert ("Traceback" in caplog.text) is False
    assert ("internal error, " in caplog.text) is (status == 500)
    if not isinstance(failure, JanusError):  # its message may hold what was sent
        assert "secret" not in caplog.text
    engine.failure = None
    still_works(client, engine)


# Wrong types


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}, "messages[1].role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"model": "gpt-5"}, "model"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63 - 1, "n": 2}, "seed"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"tools": [{"type": "function"}], "tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ],
)
def test_a_conversation_that_cannot_be_honoured(
    client: httpx.Client, engine: FakeEngine, change: dict[str, Any], param: str
) -> None:
    error = refusal(client.post(CHAT, json=HELLO | change), 404 if param == "model" else 400)
    assert error["param"] == param
    assert not engine.asked
    still_works(client, engine)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "  "}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"model": "dall-e-3"}, "model"),
        ({"n": 0}, "n"),
        ({"size": "1024x1024"}, "size"),
        ({"response_format": "url"}, "response_format"),
        ({"output_format": "webp"}, "output_format"),
        ({"background": "transparent"}, "background"),
        ({"partial_images": 17}, "partial_images"),
        ({"seed": 2**63}, "seed"),
        ({"cfg_weight": -1}, "cfg_weight"),
    ],
)
def test_a_drawing_that_cannot_be_honoured(
    client: httpx.Client, engine: FakeEngine, change: dict[str, Any], param: str
) -> None:
    error = refusal(client.post(DRAW, json={"prompt": "a fox"} | change), 404 if param == "model" else 400)
    assert error["param"] == param
    assert not engine.asked
    still_works(client, engine)


def test_what_changes_nothing_is_ignored(client: httpx.Client, engine: FakeEngine) -> None:
    neutral = {
        "user": "ann",
        "tools": [{"type": "function", "function": {"name": "look_up"}}],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "logprobs": False,
    }
    assert client.post(CHAT, json=HELLO | neutral | {"frequency_penalty": 0, "store": True}).status_code == 200
    assert client.post(DRAW, json={"prompt": "x", "quality": "high", "style": "vivid"}).status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"[" * 100_000,
        b'{"messages":' * 10_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b"\x00" * 1000,
        "[]".encode("utf-16"),
    ],
)
def test_what_is_no_json_or_no_message(client: httpx.Client, engine: FakeEngine, content: bytes) -> None:
    refusal(client.post(CHAT, content=content, headers={"Content-Type": "application/json"}), 400)
    still_works(client, engine)


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_form_of_a_web_page_can_send(client: httpx.Client, engine: FakeEngine, kind: str) -> None:
    refusal(client.post(CHAT, content=json.dumps(HELLO), headers={"Content-Type": kind}), 415)
    assert not engine.asked


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1", 404),
        ("GET", "/v1/chat/completions/", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/models/gpt-5", 404),
        ("GET", CHAT, 405),
        ("POST", "/health", 405),
        ("DELETE", "/v1/models/fake", 405),
        ("TRACE", "/", 405),
    ],
)
def test_paths_and_methods_that_are_not_there(client: httpx.Client, method: str, path: str, status: int) -> None:
    with connect(client, f"{method} {path}", b"Content-Length: 0\r\nConnection: close\r\n\r\n") as connection:
        reply = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert reply.startswith(b"HTTP/1.1 %d " % status)
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    assert b"root:" not in reply


# Pictures


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (png(200, 200, noise=True), "larger than 0.05 MB"),
        (bomb(), "megapixels"),
        (data_url(b"GIF89a, and no more"), "damaged"),
        (data_url(b"%PDF-1.7"), "PDF"),
        (data_url(b""), "empty"),
        ("data:image/png;base64,!!!!", "base64 is damaged"),
        ("data:image/png;base64,iVBORw0KGgo", "base64 is damaged"),
        ("data:image/png;base64, iVBORw0KGgo=", "base64 is damaged"),
        ("data:image/png;base64,é", "base64 is damaged"),
        ("data:image/png,abc", "must be given as data:"),
        (data_url(b"<svg/>", "text/html"), "must be given as data:"),
        ("", "must be given as data:"),
        ("photo.png", "must be given as data:"),
        ("/etc/passwd", "must be given as data:"),
        ("file:///etc/passwd", "must be given as data:"),
        ("http://127.0.0.1/a.png", "must be given as data:"),
        ("ftp://example.org/a.png", "must be given as data:"),
        ("https://example.org/a.png", "fetches no pictures"),
    ],
)
def test_a_picture_that_is_none(client: httpx.Client, engine: FakeEngine, url: str, words: str) -> None:
    error = refusal(client.post(CHAT, json=ask(png(8, 8), url)), 400)
    assert words in error["message"]
    assert error["param"] == "messages[0].content[1].image_url.url"
    assert not engine.asked
    still_works(client, engine)


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/a.png",
        "https://localhost/a.png",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1]/a.png",
        "https://10.0.0.1/a.png",
    ],
)
def test_addresses_of_this_network_are_not_fetched(config: JanusConfig, url: str) -> None:
    engine = FakeEngine(config)
    with served(engine, allow_url_images=True) as address, to(address) as client:
        error = refusal(client.post(CHAT, json=ask(url)), 400)
        assert "is not a public address" in error["message"]
        assert (
            "must be given as data:image/png;base64,... or an https address"
            in refusal(client.post(CHAT, json=ask(url.replace("https", "http"))), 400)["message"]
        )
        assert not engine.asked
        still_works(client, engine)


def test_an_address_is_fetched_where_that_is_allowed(config: JanusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = FakeEngine(config), list[tuple[str, int]]()

    def fetch(url: str, *, most_bytes: int) -> bytes:
        asked.append((url, most_bytes))
        return base64.b64decode(png(8, 8).partition(",")[2])

    monkeypatch.setattr(inputs, "fetch_public", fetch)
    with served(engine, allow_url_images=True, picture_limit=1234) as address, to(address) as client:
        assert client.post(CHAT, json=ask("https://example.org/a.png")).status_code == 200
    assert asked == [("https://example.org/a.png", 1234)]


def test_too_many_pictures(client: httpx.Client, engine: FakeEngine) -> None:
    refusal(client.post(CHAT, json=ask(*[png(8, 8)] * 17)), 400)
    assert client.post(CHAT, json=ask(*[png(8, 8)] * 16)).status_code == 200
    assert len(engine.asked[0].pictures) == 16  # type: ignore[union-attr]


def test_pictures_are_kept_small(client: httpx.Client, engine: FakeEngine) -> None:
    assert client.post(CHAT, json=ask(png(3000, 2000))).status_code == 200
    side = engine.config.image_size
    assert [picture.size for picture in engine.asked[0].pictures] == [(side, side)]  # type: ignore[union-attr]


# Whose request it is


def test_a_key_is_asked_for(engine: FakeEngine) -> None:
    with served(engine, api_key="s3cret") as url, to(url) as client:
        for value in (
            "",
            "s3cret",
            "Bearer",
            "Bearer wrong",
            "Bearer s3cre",
            "Bearer s3cret2",
            "Basic s3cret",
            "Bearer é",
        ):
            headers = [("Authorization", value.encode())]
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
                assert refusal(client.get(path, headers=headers), 401)["code"] == "invalid_api_key"
            reply = client.post(CHAT, json=HELLO, headers=headers)
            assert reply.headers["www-authenticate"] == "Bearer"
            refusal(reply, 401)
        assert [client.get(path).status_code for path in ("/", "/health")] == [200, 200]
        assert not engine.asked
        client.headers["Authorization"] = "Bearer s3cret"
        assert client.post(CHAT, json=HELLO).status_code == 200
        assert client.get("/openapi.json").json()["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
        assert client.get("/health", headers={"Host": "janus.example.org"}).status_code == 200


def test_a_key_given_twice(engine: FakeEngine) -> None:
    with served(engine, api_key="s3cret") as url, to(url) as client:
        headers = [("Authorization", "Bearer s3cret"), ("Authorization", "Bearer wrong")]
        refusal(client.get("/v1/models", headers=headers), 401)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"host": "0.0.0.0"}, "set a key"),
        ({"host": "192.168.1.2"}, "set a key"),
        ({"host": "::"}, "set a key"),
        ({"host": "example.org"}, "set a key"),
        ({"host": "localhost.example.org"}, "set a key"),
        ({"api_key": ""}, "without spaces"),
        ({"api_key": "a b"}, "without spaces"),
        ({"api_key": "schlüssel"}, "without spaces"),
        ({"cors_origins": ("*",)}, "no origin"),
        ({"cors_origins": ("https://example.org/",)}, "no origin"),
        ({"cors_origins": ("example.org",)}, "no origin"),
    ],
)
def test_settings_that_are_not_safe_or_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Settings(**settings)


def test_hosts_of_this_machine_alone_need_no_key() -> None:
    for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1"):
        assert Settings(host=host).host == host


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "192.168.0.7", "", "[::2]:80", "a:b:c"]
)
def test_a_foreign_name_that_points_to_this_machine(client: httpx.Client, engine: FakeEngine, host: str) -> None:
    for path in ("/", "/health", "/v1/models"):
        assert refusal(client.get(path, headers={"Host": host}), 403)["code"] == "wrong_host"
    refusal(client.post(CHAT, json=HELLO, headers={"Host": host}), 403)
    assert not engine.asked


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8080", "[::1]"])
def test_names_of_this_machine(client: httpx.Client, host: str) -> None:
    assert client.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://localhost"},
        {"Origin": "file://"},
        {"Origin": "http://[::1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_site(client: httpx.Client, engine: FakeEngine, headers: dict[str, str]) -> None:
    replies = [
        client.post(CHAT, json=HELLO, headers=headers),
        client.get("/v1/models", headers=headers),
        client.options(CHAT, headers=headers | {"Access-Control-Request-Method": "POST"}),
    ]
    for reply in replies:
        assert refusal(reply, 403)["code"] == "wrong_origin"
        assert not [name for name in reply.headers if name.startswith("access-control")]
    assert not engine.asked


def test_the_servers_own_page_and_a_link_to_it(client: httpx.Client) -> None:
    own = str(client.base_url).rstrip("/")
    assert client.post(CHAT, json=HELLO, headers={"Origin": own, "Sec-Fetch-Site": "same-origin"}).status_code == 200
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status_code == 200
    https = {"Origin": "https://localhost", "Host": "localhost"}  # behind a proxy that has the certificate
    assert client.get("/v1/models", headers=https).status_code == 200


def test_a_site_that_is_named(engine: FakeEngine) -> None:
    site = {"Origin": "https://chat.example.org", "Sec-Fetch-Site": "cross-site"}
    with served(engine, cors_origins=("https://chat.example.org",), api_key="s3cret") as url, to(url) as client:
        preflight = site | {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
            "Access-Control-Request-Private-Network": "true",
        }
        reply = client.options(CHAT, headers=preflight)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == site["Origin"]
        assert "authorization" in reply.headers["access-control-allow-headers"]
        assert reply.headers["access-control-allow-private-network"] == "true"
        key = {"Authorization": "Bearer s3cret"}
        for reply, status in (
            (client.post(CHAT, json=HELLO, headers=site | key), 200),
            (client.post(CHAT, json={}, headers=site | key), 400),
            (client.post(CHAT, json=HELLO, headers=site), 401),  # which the site can read
            (client.post(CHAT, content=b"x" * 65_000_000, headers=site | key), 413),
        ):
            assert reply.status_code == status
            assert reply.headers["access-control-allow-origin"] == site["Origin"]
            assert "access-control-allow-credentials" not in reply.headers
        other = {"Origin": "https://chat.example.org.evil.example"}
        assert refusal(client.post(CHAT, json=HELLO, headers=other | key), 403)["code"] == "wrong_origin"


# What is let out


def test_replies_say_how_a_browser_has_to_take_them(client: httpx.Client) -> None:
    for reply in (client.get("/"), client.get("/health"), client.get("/nowhere"), client.post(CHAT, json=HELLO)):
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["x-frame-options"] == "DENY"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]
        assert "server" not in {name.lower() for name in reply.headers} - {"server"}
    assert client.get("/health").headers["cache-control"] == "no-store"


def test_only_the_pages_own_style_and_script_run(client: httpx.Client) -> None:
    reply = client.get("/")
    policy = reply.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "connect-src 'self'; img-src 'self' data: blob:;" in policy
    for tag in re.findall(r"<(style|script)>", reply.text):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", reply.text, re.DOTALL)
        assert content is not None
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy


@pytest.mark.parametrize("wanted", [False, True])
def test_nothing_of_a_request_is_logged(
    engine: FakeEngine, wanted: bool, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = {"messages": [{"role": "user", "content": "my secret"}]}
    with served(engine, log_requests=wanted, api_key="s3cret-key") as url, to(url) as client:
        client.headers["Authorization"] = "Bearer s3cret-key"
        client.post(f"{CHAT}?secret=1", json=secret)
        client.get("/v1/models/secret")
        client.post(CHAT, json={"secret": "secret"})
        client.post(DRAW, json={"prompt": "secret"})
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert not [line for line in ours if "ecret" in line]
    assert capfd.readouterr() == ("", "")
    lines = [line for line in ours if "bytes in" in line]
    assert len(lines) == (4 if wanted else 0)
    if wanted:
        assert re.fullmatch(rf"POST {CHAT} 200, \d\d bytes in, \d+ out, \d\.\d{{3}} s", lines[0])
        assert lines[1].startswith("GET /v1/models/{name:path} 404, 0 bytes in, ")
