"""``/v1/messages``: Anthropic's API, with its own client where that is installed."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any, Literal

import mlx_janus

# isort: split
import httpx
import numpy as np
import pydantic
import pytest
from PIL import Image

from mlx_janus.errors import JanusError
from mlx_janus.processing.saved_images import encode_image
from mlx_janus.worlds import shapes
from tests.support.fake_engine import FakeEngine
from tests.support.serving import ServerProcess, served, started, still_works, to

MESSAGES = "/v1/messages"
QUESTION = "what is in the picture?"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
NO_INPUT: dict[str, Any] = {
    "name": "stop",
    "input_schema": {"type": "object", "properties": {}, "additionalProperties": False},
}


class Scene(pydantic.BaseModel):
    """A picture in a few words."""

    color: Literal["red", "green", "blue"]


@pytest.fixture(scope="module")
def janus() -> mlx_janus.JanusPipeline:
    return mlx_janus.load("tiny", dtype="float32")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with started("--dtype", "float32", "--quiet", "--api-key", "secret") as server:
        yield server


@pytest.fixture
def plain(server: ServerProcess) -> Iterator[httpx.Client]:
    with to(server.url, **{"x-api-key": "secret"}) as client:
        yield client


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Any]:
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(
        base_url=server.url, api_key="secret", max_retries=0, timeout=60
    ) as client:
        yield client


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return shapes.render(shapes.sample_scene(np.random.default_rng(4)))


def shown(picture: Image.Image) -> dict[str, Any]:
    """An image as a block."""
    data = base64.b64encode(encode_image(picture, {})).decode()
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each named by its type."""
    events = []
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    """Anthropic's error object, checked for its form."""
    assert reply.status_code == status, reply.text
    assert reply.json().keys() == {"type", "error"}
    assert reply.json()["type"] == "error"
    error: dict[str, Any] = reply.json()["error"]
    assert error.keys() == {"type", "message"}
    assert reply.headers["request-id"] == reply.headers["x-request-id"]
    return error


# With plain HTTP


@pytest.mark.check
def test_an_answer_is_the_librarys(
    plain: httpx.Client, janus: mlx_janus.JanusPipeline, picture: Image.Image
) -> None:
    expected = janus.generate_text(QUESTION, picture, system="Be brief.\n\nBe kind.")
    content = [shown(picture), {"type": "text", "text": QUESTION}]
    body = {
        "model": "janus-tiny",
        "max_tokens": 100,
        "system": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}],
        "messages": [{"role": "user", "content": content}],
        "metadata": {"user_id": "me"},
        "thinking": {"type": "disabled"},
    }
    whole = plain.post(MESSAGES, json=body).json()
    assert whole["content"] == [{"type": "text", "text": expected.text, "citations": None}]
    assert (whole["stop_reason"], whole["role"]) == ("end_turn", "assistant")
    usage = whole["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == expected.prompt_tokens
    assert usage["output_tokens"] == len(expected.tokens)
    counted = plain.post(f"{MESSAGES}/count_tokens", json=body).json()
    assert counted == {"input_tokens": expected.prompt_tokens}
    events = events_of(plain.post("/messages", json={**body, "stream": True}).text)
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[0]["message"]["usage"]["input_tokens"] == expected.prompt_tokens
    assert "".join(event["delta"]["text"] for event in events[3:-3]) == expected.text
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["cache_read_input_tokens"] == expected.prompt_tokens - 1


def test_why_an_answer_ends(
    plain: httpx.Client, janus: mlx_janus.JanusPipeline, picture: Image.Image
) -> None:
    whole = janus.generate_text(QUESTION, picture).text
    word = whole.split()[1]
    content = [shown(picture), {"type": "text", "text": QUESTION}]
    body = {"messages": [{"role": "user", "content": content}]}
    cut = plain.post(MESSAGES, json={**body, "stop_sequences": ["never", word]}).json()
    assert cut["content"][0]["text"] == whole[: whole.index(word)]
    assert (cut["stop_reason"], cut["stop_sequence"]) == ("stop_sequence", word)
    short = plain.post(MESSAGES, json={**body, "max_tokens": 2}).json()
    assert (short["stop_reason"], short["stop_sequence"]) == ("max_tokens", None)
    sampling = {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "seed": 4}
    sampled = plain.post(MESSAGES, json={**HELLO, **sampling}).json()
    expected = janus.generate_text("Hello", max_tokens=20, **sampling)
    assert sampled["content"][0]["text"] == expected.text


def test_a_call_in_a_stream(plain: httpx.Client) -> None:
    body = {**HELLO, "max_tokens": 60, "tools": [WEATHER], "tool_choice": {"type": "any"}}
    (call,) = plain.post(MESSAGES, json=body).json()["content"]
    assert (call["type"], call["name"], call["id"][:6]) == ("tool_use", "get_weather", "toolu_")
    assert call["input"]["city"] in ("Paris", "Rome")
    _, _, start, *deltas, stop, end, _ = events_of(
        plain.post(MESSAGES, json={**body, "stream": True}).text
    )
    assert start["content_block"]["input"] == {}
    assert json.loads("".join(each["delta"]["partial_json"] for each in deltas)) == call["input"]
    assert (stop["type"], end["delta"]["stop_reason"]) == ("content_block_stop", "tool_use")
    cut = plain.post(MESSAGES, json={**body, "max_tokens": 12}).json()
    assert cut["stop_reason"] in ("max_tokens", "tool_use")


def test_the_input_of_a_call_is_an_object(plain: httpx.Client) -> None:
    body = {**HELLO, "max_tokens": 60, "temperature": 1, "tool_choice": {"type": "any"}}
    for seed in range(3):
        tools = [{"name": "f", "input_schema": {}}]
        reply = plain.post(MESSAGES, json={**body, "tools": tools, "seed": seed})
        assert reply.status_code == 200, reply.text
        (block,) = reply.json()["content"]
        assert (block["type"], type(block["input"])) == ("tool_use", dict)
    tools = [{"name": "f", "input_schema": {"type": "string"}}]
    error = error_of(plain.post(MESSAGES, json={**body, "tools": tools}), 400)
    assert "tools: the arguments of 'f' must have the type" in error["message"]


def test_blocks_as_a_conversation() -> None:
    engine = FakeEngine(mlx_janus.load("tiny").config)
    use = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    thinking = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
    words = {"type": "text", "text": "Let me see."}
    seven = {"type": "tool_result", "tool_use_id": "t", "content": "7"}
    blocks = {**seven, "content": [{"type": "text", "text": "7"}]}
    nothing = {"type": "tool_result", "tool_use_id": "t"}
    question = {"role": "user", "content": "How many?"}
    said = [
        ([use], [seven]),
        ([thinking, words, use], [blocks, {"type": "text", "text": "Well?"}]),
        ([use], [nothing]),
        ([words, use], [nothing]),
    ]
    with served(engine) as url, to(url) as plain:
        for answer, result in said:
            messages = [
                question,
                {"role": "assistant", "content": answer},
                {"role": "user", "content": result},
            ]
            reply = plain.post(MESSAGES, json={"messages": messages, "max_tokens": 5})
            assert reply.status_code == 200, reply.text
        later = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, question]
        reply = plain.post(MESSAGES, json={"messages": [question, *later], "max_tokens": 5})
        assert reply.status_code == 200, reply.text
        later[0]["content"] = [shown(Image.new("RGB", (9, 9)))]
        error = error_of(plain.post(MESSAGES, json={"messages": [question, *later]}), 400)
        assert "messages[1].content: instructions have no images" in error["message"]
    turns = [[(turn.role, turn.text) for turn in request.turns] for request in engine.asked]  # type: ignore[union-attr]
    assert turns == [
        [("user", "How many?"), ("user", "7")],
        [("user", "How many?"), ("assistant", "Let me see."), ("user", "7\nWell?")],
        [("user", "How many?\n")],
        [("user", "How many?"), ("assistant", "Let me see."), ("user", "(no output)")],
        [("user", "How many?"), ("user", "Be brief.\nHow many?")],
    ]


@pytest.mark.parametrize(
    ("fields", "status", "kind", "message"),
    [
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens: an answer has one token"),
        ({"messages": []}, 400, "invalid_request_error", "messages: "),
        (
            {"messages": [{"role": "user", "content": "x"}] * 4096, "system": "Be brief."},
            400,
            "invalid_request_error",
            "at most 4096",
        ),
        ({"model": "claude-9"}, 404, "not_found_error", "there is no model"),
        ({"mcp_servers": [{}]}, 400, "invalid_request_error", "mcp_servers is not supported"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            400,
            "invalid_request_error",
            "tools[0]: the tool 'web_search_20250305' is not supported",
        ),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "go"}},
            400,
            "invalid_request_error",
            "no function 'go' in tools",
        ),
        (
            {"messages": [{"role": "user", "content": "circle " * 2000}]},
            400,
            "invalid_request_error",
            "prompt is too long: ",  # as in Anthropic's message
        ),
    ],
)
def test_errors_have_anthropics_form(
    plain: httpx.Client, fields: dict[str, Any], status: int, kind: str, message: str
) -> None:
    error = error_of(plain.post(MESSAGES, json={**HELLO, **fields}), status)
    assert error["type"] == kind
    assert message in error["message"]


def test_errors_before_the_route(plain: httpx.Client, server: ServerProcess) -> None:
    for headers in ({}, {"x-api-key": "wrong"}, {"authorization": "Bearer wrong"}):
        with to(server.url, **headers) as stranger:
            error = error_of(stranger.post(MESSAGES, json=HELLO), 401)
            assert error["type"] == "authentication_error"
    for headers in ({"x-api-key": "secret"}, {"authorization": "Bearer secret"}):
        with to(server.url, **headers) as friend:
            assert friend.post(f"{MESSAGES}/count_tokens", json=HELLO).status_code == 200
            assert friend.get("/v1/models").status_code == 200
    assert error_of(plain.post(MESSAGES, content=b"{"), 415)["type"] == "invalid_request_error"
    assert error_of(plain.get(MESSAGES), 405)
    assert error_of(plain.post(f"{MESSAGES}/batches", json={}), 404)["type"] == "not_found_error"


def test_failures_and_clients_that_leave() -> None:
    engine = FakeEngine(mlx_janus.load("tiny").config, failure=JanusError("it broke"))
    with served(engine, heartbeat_seconds=0.1) as url, to(url) as plain:
        assert error_of(plain.post(MESSAGES, json=HELLO), 500)["type"] == "api_error"
        events = events_of(plain.post(MESSAGES, json={**HELLO, "stream": True}).text)
        assert events[-1] == {
            "type": "error",
            "error": {"type": "api_error", "message": "internal error"},
        }
        engine.failure = None
        engine.pause = 0.3
        kinds = [
            event["type"]
            for event in events_of(plain.post(MESSAGES, json={**HELLO, "stream": True}).text)
        ]
        assert kinds.count("ping") > 2  # the heartbeats, too
        with plain.stream("POST", MESSAGES, json={**HELLO, "stream": True}) as reply:
            next(reply.iter_lines())
        still_works(plain, engine)
        engine.pause = 5
        with pytest.raises(httpx.TimeoutException):
            plain.post(MESSAGES, json=HELLO, timeout=0.3)
        still_works(plain, engine)
        engine.room = 0
        assert error_of(plain.post(MESSAGES, json=HELLO), 429)["type"] == "rate_limit_error"


# With Anthropic's client


def test_the_client_asks_and_streams(client: Any, picture: Image.Image) -> None:
    question = {"role": "user", "content": [shown(picture), {"type": "text", "text": QUESTION}]}
    asked: dict[str, Any] = {"model": "default", "max_tokens": 100, "messages": [question]}
    message = client.messages.create(**asked)
    assert message._request_id.startswith("req_")
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == message.content[0].text
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == (
        "end_turn",
        message.usage.output_tokens,
    )
    assert final.usage.cache_read_input_tokens > 0
    second = {"role": "user", "content": "how many shapes are there?"}
    later = {**asked, "messages": [question, {"role": "assistant", "content": message.content}]}
    later["messages"].append(second)
    assert client.messages.create(**later).content[0].text
    counted = client.messages.count_tokens(model="default", messages=asked["messages"])
    assert counted.input_tokens == final.usage.input_tokens + final.usage.cache_read_input_tokens


def test_the_client_calls_tools_and_parses(client: Any) -> None:
    asked: dict[str, Any] = {"model": "default", "max_tokens": 60, "messages": HELLO["messages"]}
    choice = {"type": "tool", "name": "stop"}
    with client.messages.stream(**asked, tools=[WEATHER, NO_INPUT], tool_choice=choice) as stream:
        (call,) = stream.get_final_message().content
    assert (call.type, call.name, call.input) == ("tool_use", "stop", {})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "done"}
    follow_up = [
        *asked["messages"],
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]
    assert client.messages.create(model="default", max_tokens=9, messages=follow_up).content
    parsed = client.messages.parse(**asked, output_format=Scene)
    assert isinstance(parsed.parsed_output, Scene)


def test_the_clients_errors(client: Any) -> None:
    anthropic = pytest.importorskip("anthropic")
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long") as caught:
        client.messages.create(
            model="default",
            max_tokens=9,
            messages=[{"role": "user", "content": "circle " * 2000}],
        )
    assert caught.value.request_id.startswith("req_")
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(model="default", **HELLO)
