"""Structured answers as OpenAI's client asks for them: JSON by a schema, and calls of tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import mlx_janus

# isort: split
import openai
import pydantic
import pytest

from mlx_janus.decode.grammar import Tool
from mlx_janus.server.structured_answers import CallReader
from tests.support.fake_engine import FakeEngine
from tests.support.serving import CHAT, HELLO, ServerProcess, refusal, served, started, to

QUESTION = [{"role": "user", "content": "what is in the picture?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
STOP: dict[str, Any] = {"type": "function", "function": {"name": "stop"}}


class Scene(pydantic.BaseModel):
    """A picture in a few words."""

    color: Literal["red", "green", "blue"]
    words: list[str]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with started("--dtype", "float32", "--quiet") as server:
        yield server


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(model="default", messages=QUESTION, **fields)  # type: ignore[call-overload]


@pytest.mark.check
def test_parse(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="default",
        messages=QUESTION,  # type: ignore[arg-type]
        response_format=Scene,
        max_tokens=40,
    )
    assert isinstance(reply.choices[0].message.parsed, Scene)
    assert reply.choices[0].finish_reason == "stop"
    text = reply.choices[0].message.content
    library = mlx_janus.load("tiny", dtype="float32").generate_text(
        "what is in the picture?", schema=Scene, max_tokens=40
    )
    assert text == library.text  # the schema is not a part of the prompt
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == library.prompt_tokens


def test_a_stream_of_json(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="default",
        messages=QUESTION,  # type: ignore[arg-type]
        response_format=Scene,
        max_tokens=40,
    ) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert len(pieces) > 5
    assert isinstance(final.choices[0].message.parsed, Scene)
    assert json.loads("".join(pieces)) == final.choices[0].message.parsed.model_dump()


def test_any_object_and_several_answers(client: openai.OpenAI) -> None:
    reply = ask(
        client,
        response_format={"type": "json_object"},
        max_tokens=20,
        temperature=2,
        seed=1,
        n=2,
    )
    for choice in reply.choices:
        assert isinstance(json.loads(choice.message.content), dict)
        assert choice.message.tool_calls is None
    assert ask(client, response_format={"type": "text"}, max_tokens=3).choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "stop"}}])
def test_a_call_that_is_demanded(client: openai.OpenAI, choice: Any) -> None:
    fields: dict[str, Any] = {"tools": [WEATHER, STOP], "tool_choice": choice, "max_tokens": 70}
    reply = ask(client, **fields).choices[0]
    assert (reply.finish_reason, reply.message.content) == ("tool_calls", None)
    (call,) = reply.message.tool_calls
    assert (call.type, call.id[:5]) == ("function", "call_")
    names = ["stop"] if isinstance(choice, dict) else ["get_weather", "stop"]
    assert call.function.name in names
    arguments = json.loads(call.function.arguments)
    assert arguments == {} if call.function.name == "stop" else arguments["city"]
    chunks = list(ask(client, stream=True, **fields))
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert [part.function.name for part in parts if part.function.name] == [call.function.name]
    assert "".join(part.function.arguments for part in parts) == call.function.arguments
    assert {part.index for part in parts} == {0}
    assert (chunks[-1].choices[0].finish_reason, parts[0].type) == ("tool_calls", "function")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""


def test_tools_without_room_are_left_out(client: openai.OpenAI) -> None:
    """Open WebUI sends 36 tools with each question, which exceed Janus-Tiny's context."""
    words = "a long description " * 100
    many = [
        {"type": "function", "function": {"name": f"tool_{i}", "description": words}}
        for i in range(12)
    ]
    plain = ask(client)
    reply = ask(client, tools=many)
    assert reply.choices[0].message.content == plain.choices[0].message.content
    assert reply.usage.prompt_tokens == plain.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="context length"):
        ask(client, tools=many, tool_choice="required")


def test_auto_is_decided_by_the_first_token(client: openai.OpenAI) -> None:
    brace = mlx_janus.load("tiny").prompts.encode("{")[0]
    words = ask(client, tools=[WEATHER, STOP], max_tokens=20).choices[0]
    assert words.message.content
    assert words.message.tool_calls is None
    assert words.finish_reason in ("stop", "length")
    call = ask(client, tools=[STOP], max_tokens=40, logit_bias={str(brace): 100}).choices[0]
    assert call.finish_reason == "tool_calls"
    assert call.message.tool_calls[0].function.name == "stop"
    never = ask(
        client, tools=[STOP], tool_choice="none", max_tokens=20, logit_bias={str(brace): 100}
    ).choices[0]
    assert never.message.content.startswith("{{")
    assert never.message.tool_calls is None


def test_an_answer_of_one_token(client: openai.OpenAI) -> None:
    reply = ask(client, tools=[STOP], max_tokens=1)
    assert reply.usage.completion_tokens == 1


def test_the_prompt_has_the_tools_and_no_schema() -> None:
    engine = FakeEngine(mlx_janus.load("tiny").config)
    messages = [{"role": "system", "content": "Be kind."}, *QUESTION]
    with served(engine) as url, to(url) as client:
        for fields in (
            {"tools": [WEATHER, STOP]},
            {"tools": [WEATHER], "tool_choice": "required"},
            {"tools": [WEATHER], "tool_choice": "none"},
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        ):
            assert client.post(CHAT, json={"messages": messages, **fields}).status_code == 200
    systems = [request.system for request in engine.asked]  # type: ignore[union-attr]
    weather = (
        '{"name": "get_weather", "description": "Get the weather of a city.", "parameters": '
        f"{json.dumps(WEATHER['function']['parameters'])}}}"
    )
    form = 'answer with JSON of this form: {"name":...,"arguments":{...}}'
    functions = f"Be kind.\n\nYou can call these functions:\n{weather}\n"
    assert systems == [
        f'{functions}{{"name": "stop"}}\nTo call a function, {form}. Otherwise answer in words.',
        f"{functions}Call a function: {form}.",
        "Be kind.",
        "Be kind.",
    ]


TEXT = {"type": "string"}
CHOICE = {"enum": ["a", "b"]}  # no object


def schema_format(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": schema_format({"type": "strange"})}, "response_format", "Invalid"),
        (
            {"response_format": schema_format({"uniqueItems": True}, strict=True)},
            "response_format",
            "Unimplemented keys",
        ),
        ({"response_format": schema_format({"pattern": "("})}, "response_format", "regex"),
        ({"response_format": schema_format({"$ref": "#"})}, "response_format", "no value"),
        (
            {"response_format": schema_format({"$ref": "file:///etc/passwd"})},
            "response_format",
            "not present",
        ),
        ({"response_format": schema_format({"enum": ["x" * 70_000]})}, "response_format", "large"),
        (
            {"response_format": schema_format({"type": "integer", "multipleOf": 987654321})},
            "response_format",
            "too complex",
        ),
        ({"response_format": {"type": "yaml"}}, "response_format", "json_schema"),
        ({"tool_choice": "required"}, "tool_choice", "add tools"),
        (
            {"tools": [STOP], "tool_choice": {"type": "function", "function": {"name": "go"}}},
            "tool_choice",
            "no function 'go'",
        ),
        ({"tools": [STOP, STOP]}, "tools", "same name"),
        ({"tools": [STOP], "response_format": {"type": "json_object"}}, "response_format", "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": 1}}}]},
            "tools",
            "tools is not supported",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": TEXT}}]},
            "tools",
            "the arguments of 'f' must have the type \"object\", got 'string'",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": CHOICE}}]},
            "tools",
            "Unsatisfiable schema",
        ),
    ],
)
def test_mistakes_are_refused(
    server: ServerProcess, fields: dict[str, Any], param: str, message: str
) -> None:
    with to(server.url) as client:
        error = refusal(client.post(CHAT, json={**HELLO, **fields}), 400)
        assert error["param"] == param
        assert message in error["message"]


def test_an_answer_that_has_begun_is_refused(server: ServerProcess) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": '{"color":'}]
    body = {"messages": messages, "response_format": {"type": "json_object"}}
    with to(server.url) as client:
        error = refusal(client.post(CHAT, json=body), 400)
        assert "end the conversation with a question" in error["message"]


def test_deep_schemas_are_refused(server: ServerProcess) -> None:
    start = json.dumps({**HELLO, "response_format": schema_format("HERE")})
    for depth in (70, 500, 20_000):
        body = start.replace('"HERE"', '{"items":' * depth + "{}" + "}" * depth)
        with to(server.url) as client:
            reply = client.post(
                CHAT, content=body.encode(), headers={"Content-Type": "application/json"}
            )
            assert refusal(reply, 400)["message"]


def test_a_call_that_is_cut(client: openai.OpenAI) -> None:
    parts = ['{"name":"p', 'aint","argum', 'ents":{"a":', "[1", "]}", "}"]
    for count in range(len(parts) + 1):
        reader = CallReader([Tool("paint", {})])
        deltas = [reader.add(part) for part in parts[:count]] + [reader.finish()]
        streamed = "".join(
            part.function.arguments for delta in deltas for part in delta.tool_calls or []
        )
        call = reader.call
        expected = "".join(parts[:count]).removeprefix('{"name":"paint","arguments":')
        if count < 3:
            assert call is None
            assert deltas[-1].content == ("".join(parts[:count]) or None)
        else:
            assert call is not None
            expected = expected if count < 6 else expected[:-1]
            assert call.function.arguments == streamed == expected
        assert reader.complete == (count == 6)
    cut = ask(client, tools=[WEATHER], tool_choice="required", max_tokens=5).choices[0]
    assert (cut.finish_reason, cut.message.tool_calls) == ("length", None)
