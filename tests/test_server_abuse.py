"""What a server should not be sent: it refuses in one sentence, lets go of the work, and answers the next."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fake_engine import FakeEngine
from serving import CHAT, DRAW, HELLO, refusal, still_works, wait_until

from mlx_janus.errors import CheckpointError, JanusError, OptionError, OutOfMemoryError
from mlx_janus.server.requests import StoppingError


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
        ({"seed": -2}, "seed"),
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
