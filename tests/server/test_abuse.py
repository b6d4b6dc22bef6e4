"""Bad requests: refused in one sentence, their work is dropped, and the next is answered."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import replace
from typing import Any

import httpx
import pytest

from mlx_janus.decode.text import TextOptions
from mlx_janus.engine.messages import StoppingError
from mlx_janus.errors import CheckpointError, JanusError, OptionError, OutOfMemoryError
from mlx_janus.server.errors import APIError
from mlx_janus.server.middleware.body_limit import check_value_count
from tests.support.fake_engine import FakeEngine
from tests.support.serving import CHAT, DRAW, HELLO, connect, read_all, refusal, still_works

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
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages[0].content[0].text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"model": "gpt-5"}, "model"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"seed": -2}, "seed"),
        ({"seed": 2**63 - 1, "n": 2}, "seed"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": ["a"] * 257}, "stop"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"tools": [{"type": "function"}], "tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": "1"}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"red": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
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
        ({"size": "1000x1000"}, "size"),
        ({"response_format": "file"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 101}, "output_compression"),
        ({"negative_prompt": "red"}, "negative_prompt"),
        ({"background": "transparent"}, "background"),
        ({"partial_images": 17}, "partial_images"),
        ({"seed": 2**63}, "seed"),
        ({"cfg_weight": -1}, "cfg_weight"),
    ],
)
def test_a_drawing_that_cannot_be_honoured(
    client: httpx.Client, engine: FakeEngine, change: dict[str, Any], param: str
) -> None:
    error = refusal(
        client.post(DRAW, json={"prompt": "a fox"} | change), 404 if param == "model" else 400
    )
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
        "top_logprobs": 0,
        "presence_penalty": None,
        "logit_bias": {},
        "top_k": -1,
        "min_p": 0,
        "repetition_penalty": 1,
        "top_p": 1,
    }
    assert (
        client.post(
            CHAT, json=HELLO | neutral | {"frequency_penalty": 0, "store": True}
        ).status_code
        == 200
    )
    assert replace(engine.asked[-1].options, seed=0) == TextOptions()
    assert (
        client.post(DRAW, json={"prompt": "x", "quality": "high", "style": "vivid"}).status_code
        == 200
    )


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
def test_what_is_no_json_or_no_message(
    client: httpx.Client, engine: FakeEngine, content: bytes
) -> None:
    refusal(client.post(CHAT, content=content, headers={"Content-Type": "application/json"}), 400)
    still_works(client, engine)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "a\nb\x1b[2J", "content": "x"},
        {"role": "user", "content": [{"type": "a\nb\x1b[2J"}]},
    ],
)
def test_a_refusal_repeats_a_request_on_one_printable_line(
    client: httpx.Client, message: dict[str, Any]
) -> None:
    error = refusal(client.post(CHAT, json={"messages": [message]}), 400)
    assert "a b" in error["message"]
    assert error["message"].isprintable()


BOTH = b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("request_line", "rest", "said"),
    [
        (
            f"POST {CHAT}",
            BOTH + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "Content-Length does not go with",
        ),
        ("GET /health", BOTH, "Content-Length does not go with"),
        (f"POST {CHAT}", b"Content-Length: x\r\n\r\n", "not a valid HTTP"),
        ("GET / and more", b"\r\n", "not a valid HTTP"),
        (f"POST {CHAT}", CHUNKED + b"no number\r\n", "not a valid HTTP"),
    ],
)
def test_what_is_no_clear_http(
    client: httpx.Client,
    engine: FakeEngine,
    request_line: str,
    rest: bytes,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with connect(client, request_line, rest) as connection:
        reply = read_all(connection)
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/json" in head
    assert said in json.loads(body)["error"]["message"]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    still_works(client, engine)


def test_a_list_of_many_wrong_values_gives_one_error(
    client: httpx.Client, engine: FakeEngine
) -> None:
    """An error for each would take gigabytes, and seconds in which nobody else is served."""
    reply = client.post(CHAT, json={**HELLO, "stop": [1] * 60_000})
    assert refusal(reply, 400)["param"] == "stop[0]"
    still_works(client, engine)


def test_a_body_of_very_many_values_is_refused_before_it_is_parsed() -> None:
    check_value_count(bytearray(b'{"url": "' + b"A" * 50_000_000 + b'"}'))
    check_value_count(bytearray(b"[" + b"1," * 1_900_000 + b"1]"))
    for body in (b"[" + b"1," * 2_100_000 + b"1]", b"[" * 2_100_000, b'{"a":' * 2_100_000):
        with pytest.raises(APIError, match="values") as refused:
            check_value_count(bytearray(body))
        assert refused.value.status_code == 413


def test_a_body_that_turns_out_to_be_none_after_its_reply(
    client: httpx.Client, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(client, "POST /nowhere", b"Content-Length: 999999\r\n\r\n") as connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")
        connection.sendall(b"x" * 100)
        with contextlib.suppress(ConnectionResetError):
            connection.recv(1)
    with connect(client, "GET /health", CHUNKED) as connection:
        assert b"HTTP/1.1 200 " in connection.recv(1 << 16)
        connection.sendall(b"no number\r\n")
        assert b"HTTP" not in read_all(connection)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    still_works(client, engine)


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_what_a_form_of_a_web_page_can_send(
    client: httpx.Client, engine: FakeEngine, kind: str
) -> None:
    refusal(client.post(CHAT, content=json.dumps(HELLO), headers={"Content-Type": kind}), 415)
    assert not engine.asked


@pytest.mark.parametrize(
    "path", ["/", "/health", "/metrics", "/v1/models", "/v1/models/", "/v1/models/fake"]
)
def test_a_head_is_that_of_the_whole(client: httpx.Client, path: str) -> None:
    whole, head = client.get(path), client.head(path)
    assert (whole.status_code, head.status_code, head.content) == (200, 200, b"")
    for name in ("content-type", "content-security-policy"):
        assert head.headers[name] == whole.headers[name]
    assert int(head.headers["content-length"]) > 0


def test_the_models_with_a_slash_are_the_same(client: httpx.Client) -> None:
    assert client.get("/v1/models/").json() == client.get("/v1/models").json()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1", 404),
        ("GET", "/v1/v2/models", 404),
        ("GET", "/v1/chat/completions/", 405),
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
def test_paths_and_methods_that_are_not_there(
    client: httpx.Client, method: str, path: str, status: int
) -> None:
    with connect(
        client, f"{method} {path}", b"Content-Length: 0\r\nConnection: close\r\n\r\n"
    ) as connection:
        reply = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert reply.startswith(b"HTTP/1.1 %d " % status)
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    assert b"root:" not in reply
