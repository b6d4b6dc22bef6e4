"""``/v1/responses`` as OpenAI's client uses it: answers, calls and images are the library's."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from typing import Any, Literal

import mlx_janus

# isort: split
import httpx
import numpy as np
import openai
import pydantic
import pytest
from PIL import Image

from mlx_janus.errors import JanusError
from mlx_janus.processing.saved_images import encode_image
from mlx_janus.worlds import shapes
from tests.support.fake_engine import FakeEngine
from tests.support.serving import (
    ServerProcess,
    refusal,
    served,
    started,
    still_works,
    to,
    wait_until,
)

RESPONSES = "/v1/responses"
QUESTION = "what is in the picture?"
STOP: dict[str, Any] = {"type": "function", "name": "stop"}
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
DRAW: dict[str, Any] = {"type": "image_generation"}
MESSAGE_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


class Scene(pydantic.BaseModel):
    """A picture in a few words."""

    color: Literal["red", "green", "blue"]


@pytest.fixture(scope="module")
def janus() -> mlx_janus.JanusPipeline:
    return mlx_janus.load("tiny", dtype="float32")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with started("--dtype", "float32", "--quiet") as server:
        yield server


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with to_openai(server.url) as client:
        yield client
    with to(server.url) as plain:
        wait_until(lambda: is_idle(plain))


def is_idle(plain: httpx.Client) -> bool:
    health = plain.get("/health").json()
    return not any(health[name] for name in ("waiting", "answering", "drawing"))


def to_openai(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return shapes.render(shapes.sample_scene(np.random.default_rng(4)))


def data_url(picture: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(encode_image(picture, {})).decode()}"


def user(text: str, *pictures: Image.Image) -> Any:
    """A message with pictures."""
    parts = [{"type": "input_image", "image_url": data_url(each)} for each in pictures]
    return {"role": "user", "content": [*parts, {"type": "input_text", "text": text}]}


def alike(b64: str, expected: Image.Image) -> bool:
    """Compare images decoded with other numbers of BLAS threads, which may round differently."""
    found = np.array(Image.open(io.BytesIO(base64.b64decode(b64)))).astype(int)
    return bool(np.abs(found - np.array(expected)).max() <= 1)


def kinds(events: list[Any]) -> list[str]:
    """The events' types, with those of one kind in a row once; their numbers are checked."""
    assert [event.sequence_number for event in events] == list(range(len(events)))
    types = [event.type for event in events]
    return [kind for kind, before in zip(types, [None, *types], strict=False) if kind != before]


# Answers


@pytest.mark.check
def test_an_answer_is_the_librarys(
    client: openai.OpenAI, janus: mlx_janus.JanusPipeline, picture: Image.Image
) -> None:
    plain = client.responses.create(model="default", input=QUESTION, store=True)
    assert plain.output_text == janus.generate_text(QUESTION).text
    assert plain.model_extra == {"store": False}
    expected = janus.generate_text(QUESTION, picture, system="Be brief.")
    reply = client.responses.create(
        model="janus-tiny",
        input=[user(QUESTION, picture)],
        instructions="Be brief.",
        metadata={"a": "b"},
        truncation="disabled",
    )
    assert reply.output_text == expected.text
    assert (reply.status, reply.incomplete_details, reply.error) == ("completed", None, None)
    assert (reply.instructions, reply.metadata) == ("Be brief.", {"a": "b"})
    assert (reply.temperature, reply.top_p, reply.tool_choice) == (0, 1, "auto")
    assert reply.usage is not None
    tokens = (reply.usage.input_tokens, reply.usage.output_tokens)
    assert tokens == (expected.prompt_tokens, len(expected.tokens))
    assert reply._request_id
    again = [user(QUESTION, picture), *reply.output, user("how many shapes are there?")]
    second = client.responses.create(model="default", input=again, instructions="Be brief.")
    assert second.output_text
    assert second.usage is not None
    assert second.usage.input_tokens > sum(tokens)
    assert second.usage.input_tokens_details.cached_tokens >= tokens[0]


def test_a_stream_has_openais_events_in_openais_order(
    client: openai.OpenAI, picture: Image.Image
) -> None:
    asked: dict[str, Any] = {"model": "default", "input": [user(QUESTION, picture)]}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert kinds(events) == [*MESSAGE_EVENTS, "response.completed"]
    assert (events[0].response.status, events[0].response.output) == ("in_progress", [])
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(pieces) > 3
    final = events[-1].response
    assert "".join(pieces) == final.output_text == whole.output_text
    assert final.usage is not None
    assert whole.usage is not None
    assert final.usage.output_tokens == whole.usage.output_tokens
    ids = {event.item_id for event in events if hasattr(event, "item_id")}
    assert ids == {final.output[0].id}
    assert events[-2].item == final.output[0]


def test_an_answer_that_is_cut_is_incomplete(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "default", "input": QUESTION, "max_output_tokens": 2}
    events = list(client.responses.create(**asked, stream=True))
    assert kinds(events) == [*MESSAGE_EVENTS, "response.incomplete"]
    for reply in (events[-1].response, client.responses.create(**asked)):
        assert reply.status == reply.output[0].status == "incomplete"
        assert reply.incomplete_details.reason == "max_output_tokens"
        assert reply.output_text


def test_sampling_and_logprobs(client: openai.OpenAI, janus: mlx_janus.JanusPipeline) -> None:
    sampling: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9}
    own = {"seed": 3, "top_k": 20, "stop": [" and"], "frequency_penalty": 0.5}
    expected = janus.generate_text(
        QUESTION, logprobs=True, top_logprobs=2, max_tokens=12, **sampling, **own
    )
    asked: dict[str, Any] = {
        "model": "default",
        "input": QUESTION,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "max_output_tokens": 12,
        "extra_body": own,
        **sampling,
    }
    reply = client.responses.create(**asked)
    assert reply.output_text == expected.text
    found = reply.output[0].content[0].logprobs
    assert expected.logprobs is not None
    said = [(token.text, token.logprob) for token in expected.logprobs]
    assert [(token.token, token.logprob) for token in found] == said
    assert {len(token.top_logprobs) for token in found} == {2}
    events = list(client.responses.create(**asked, stream=True))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    streamed = [token.token for event in deltas for token in event.logprobs]
    assert streamed == [token for token, _ in said]


def test_answers_by_a_schema(client: openai.OpenAI) -> None:
    reply = client.responses.parse(model="default", input=QUESTION, text_format=Scene)
    assert isinstance(reply.output_parsed, Scene)
    with client.responses.stream(model="default", input=QUESTION, text_format=Scene) as stream:
        list(stream)
        assert isinstance(stream.get_final_response().output_parsed, Scene)
    anything = client.responses.create(
        model="default", input=QUESTION, text={"format": {"type": "json_object"}}
    )
    assert isinstance(json.loads(anything.output_text), dict)


# Calls


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "name": "get_weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"name": "get_weather"}]},
    ],
)
def test_a_call_that_is_demanded(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": "default",
        "input": [user("what is the weather?")],
        "tools": [WEATHER, STOP],
        "tool_choice": choice,
    }
    reply = client.responses.create(**asked)
    (call,) = reply.output
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    assert reply.output_text == ""
    events = list(client.responses.create(**asked, stream=True))
    assert kinds(events) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    parts = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(parts) == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "It is sunny."}
    follow_up = [*asked["input"], *reply.output, result]
    assert client.responses.create(model="default", input=follow_up).output_text


def test_the_model_decides_with_auto(client: openai.OpenAI) -> None:
    brace = mlx_janus.load("tiny").prompts.encode("{")[0]
    asked: dict[str, Any] = {"model": "default", "input": QUESTION, "tools": [STOP, DRAW]}
    assert client.responses.create(**asked).output[0].type == "message"
    for stream in (False, True):
        body = {"logit_bias": {str(brace): 100}}
        call = client.responses.create(
            **asked | {"tools": [STOP]}, extra_body=body, stream=stream, max_output_tokens=40
        )
        final = list(call)[-1].response if stream else call
        assert final.output[0].name == "stop"


def test_the_items_as_a_conversation() -> None:
    """An answer in words that ends with a call needs a question of its own for the result."""
    engine = FakeEngine(mlx_janus.load("tiny").config)
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": "7"}
    words = {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Let me see."}],
    }
    conversations = [
        [user("How many?"), call, result],
        [user("How many?"), words, call, result],
        [{"role": "developer", "content": "Be kind."}, {"type": "reasoning"}, user("Hello")],
        [user("Draw"), drawn_item(Image.new("RGB", (9, 9))), user("And?")],
        [user("Draw"), drawn_item(Image.new("RGB", (9, 9)))],
    ]
    with served(engine) as url, to(url) as plain:
        for conversation in conversations:
            reply = plain.post(RESPONSES, json={"input": conversation, "instructions": "Be brief."})
            assert reply.status_code == 200, reply.text
    turns = [
        [(turn.role, turn.text, turn.images) for turn in request.turns]  # type: ignore[union-attr]
        for request in engine.asked
    ]
    assert turns == [
        [("user", "How many?\n7", 0)],
        [("user", "How many?", 0), ("assistant", "Let me see.", 0), ("user", "7", 0)],
        [("user", "Hello", 0)],
        [("user", "Draw", 0), ("user", "And?", 1)],
        [("user", "Draw", 1)],  # the Agents SDK asks so after an image
    ]
    systems = [request.system for request in engine.asked[:3]]  # type: ignore[union-attr]
    assert systems == ["Be brief.", "Be brief.", "Be brief.\n\nBe kind."]


# Images


@pytest.mark.check
@pytest.mark.parametrize("choice", ["required", {"type": "image_generation"}])
def test_an_image_that_is_demanded_is_the_librarys(
    client: openai.OpenAI, janus: mlx_janus.JanusPipeline, choice: Any
) -> None:
    (expected,) = janus.generate_images("a red circle", seed=5, exact=True, cfg_weight=3)
    tools = [{**DRAW, "partial_images": 2, "cfg_weight": 3.0}]
    if isinstance(choice, dict):
        tools.append(STOP)
    asked: dict[str, Any] = {
        "model": "default",
        "input": [user("Hello"), user("a red circle")],
        "tools": tools,
        "tool_choice": choice,
        "extra_body": {"seed": 5},
    }
    reply = client.responses.create(**asked)
    (item,) = reply.output
    assert (item.type, item.status) == ("image_generation_call", "completed")
    assert (item.revised_prompt, item.size, item.action) == ("a red circle", "64x64", "generate")
    assert alike(item.result, expected.image)
    assert reply.usage is not None
    prompt_tokens = len(janus.pathway.prompt_ids("a red circle"))
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (prompt_tokens, 64)
    events = list(client.responses.create(**asked, stream=True))
    assert kinds(events) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.image_generation_call.in_progress",
        "response.image_generation_call.generating",
        "response.image_generation_call.partial_image",
        "response.image_generation_call.completed",
        "response.output_item.done",
        "response.completed",
    ]
    previews = [event for event in events if event.type.endswith("partial_image")]
    assert [event.partial_image_index for event in previews] == [0, 1]
    assert not alike(previews[0].partial_image_b64, expected.image)
    assert alike(events[-1].response.output[0].result, expected.image)


def test_the_model_may_decide_to_draw(
    client: openai.OpenAI, janus: mlx_janus.JanusPipeline
) -> None:
    """It has to call a function without arguments; the image's prompt is the last question."""
    brace = mlx_janus.load("tiny").prompts.encode("{")[0]
    asked: dict[str, Any] = {
        "model": "default",
        "input": "a blue square",
        "tools": [DRAW],
        "extra_body": {"logit_bias": {str(brace): 100}, "seed": 2},
    }
    (expected,) = janus.generate_images("a blue square", seed=2, exact=True)
    reply = client.responses.create(**asked)
    (item,) = reply.output
    assert alike(item.result, expected.image)
    assert reply.usage is not None
    assert reply.usage.output_tokens > 64  # those of the decision, too
    events = list(client.responses.create(**asked, stream=True))
    assert "response.image_generation_call.generating" in kinds(events)
    assert [item.type for item in events[-1].response.output] == ["image_generation_call"]


def test_images_of_the_question_are_changed(
    client: openai.OpenAI, janus: mlx_janus.JanusPipeline, picture: Image.Image
) -> None:
    def draw(*messages: Any, **fields: Any) -> Any:
        reply = client.responses.create(
            model="default",
            input=[*messages],
            tools=[{**DRAW, **fields}],
            tool_choice="required",
            extra_body={"seed": 4},
        )
        return reply.output[0]

    (changed,) = janus.generate_images("make it blue", images=picture, seed=4, window=1)
    (drawn,) = janus.generate_images("make it blue", seed=4, exact=True)
    for item in (
        draw(user("make it blue", picture)),
        draw(user("Hello", picture), user("make it blue"), action="edit"),
    ):
        assert item.action == "edit"
        assert alike(item.result, changed.image)
    for item in (
        draw(user("make it blue", picture), action="generate"),
        draw(user("Hello", picture), user("make it blue")),
    ):
        assert item.action == "generate"
        assert alike(item.result, drawn.image)
    again = draw(user("a circle"), drawn_item(drawn.image), user("make it blue"), action="edit")
    (second,) = janus.generate_images("make it blue", images=drawn.image, seed=4, window=1)
    assert alike(again.result, second.image)


def drawn_item(image: Image.Image) -> dict[str, Any]:
    """An image that was generated earlier, as an item."""
    result = base64.b64encode(encode_image(image, {})).decode()
    return {"type": "image_generation_call", "id": "ig_1", "status": "completed", "result": result}


# Mistakes


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "the whole conversation"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"background": True}, "background", "not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "the tool 'web_search'"),
        ({"tools": [STOP, STOP]}, "tools", "same name"),
        ({"tools": [STOP], "tool_choice": {"type": "function", "name": "go"}}, "tool_choice", "go"),
        ({"tool_choice": "required"}, "tool_choice", "add tools"),
        ({"tools": [STOP], "tool_choice": {"type": "image_generation"}}, "tool_choice", "no"),
        ({"tools": [{**DRAW, "size": "7x7"}]}, "tools", "size must be"),
        ({"tools": [{**DRAW, "steps": 4}]}, None, "steps is no option of a model that draws image"),
        ({"tools": [{**DRAW, "input_image_mask": {}}]}, "tools[0]", "None"),
        ({"tools": [{**DRAW, "action": "edit"}]}, "input", "no image to change"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "store: false"),
        ({"input": [{"type": "web_search_call"}]}, "input[0]", "the type of an item is message"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [{"type": "image_generation_call"}]}, "input", "there is no message"),
        (
            {"input": [{"role": "user", "content": "x"}] * 4096, "instructions": "Be brief."},
            "input",
            "at most 4096",
        ),
        ({"input": " "}, "input", "the question is empty"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "input", "no question"),
        ({"input": "circle " * 2000}, "input", "maximum context length"),
        ({"max_output_tokens": 0}, "max_output_tokens", "one token or more"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "text.format", ""),
        (
            {"tools": [STOP], "text": {"format": {"type": "json_object"}}},
            "text.format",
            "JSON as text.format does not go with tools",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].image_url",
            "an image must be given as data:image/png",
        ),
        ({"model": "gpt-9"}, "model", "there is no model"),
    ],
)
def test_mistakes_are_refused_by_name(
    server: ServerProcess, fields: dict[str, Any], param: str | None, message: str
) -> None:
    with to(server.url) as plain:
        status = 404 if param == "model" else 400
        error = refusal(plain.post(RESPONSES, json={"input": "Hello", **fields}), status)
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    "mistakes",
    [
        {"input": [1] * 100_000},
        {"input": "Hello", "metadata": {str(number): 1 for number in range(100_000)}},
        {"input": "Hello", "tools": [1] * 100_000},
    ],
)
def test_many_mistakes_cost_no_more_than_one(mistakes: dict[str, Any]) -> None:
    with served(FakeEngine(mlx_janus.load("tiny").config)) as url, to(url) as plain:
        content = json.dumps(mistakes).encode()
        started_at = time.perf_counter()
        reply = plain.post(RESPONSES, content=content, headers={"Content-Type": "application/json"})
        assert time.perf_counter() - started_at < 5
        assert refusal(reply, 400)


def test_nothing_is_stored(server: ServerProcess, client: openai.OpenAI) -> None:
    reply = client.responses.create(model="default", input="Hello", max_output_tokens=1)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="stores no responses"):
            call(reply.id)


def test_a_failure_is_told_in_both_of_openais_forms() -> None:
    engine = FakeEngine(mlx_janus.load("tiny").config, failure=JanusError("it broke"))
    with served(engine) as url, to(url) as plain, to_openai(url) as client:
        assert refusal(plain.post(RESPONSES, json={"input": "Hello"}), 500)
        text = plain.post(RESPONSES, json={"input": "Hello", "stream": True}).text
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
        error, failed = events[-2:]
        assert (error["type"], error["code"], error["message"]) == (
            "error",
            "internal_error",
            "internal error",
        )
        assert error["error"]["message"] == "internal error"
        assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
        assert failed["response"]["error"]["code"] == "internal_error"
        numbers = [event["sequence_number"] for event in events]
        assert numbers == list(range(len(events)))
        with pytest.raises(openai.APIError, match="internal error"):
            list(client.responses.create(model="default", input="Hello", stream=True))


@pytest.mark.parametrize("tools", [[], [DRAW]])
def test_clients_that_leave_free_the_device(tools: list[Any]) -> None:
    engine = FakeEngine(mlx_janus.load("tiny").config, pause=0.05)
    body: dict[str, Any] = {"input": "Hello", "tools": tools}
    if tools:
        body |= {"tool_choice": "required"}
    with served(engine) as url, to(url) as plain:
        with plain.stream("POST", RESPONSES, json={**body, "stream": True}) as reply:
            next(reply.iter_lines())
        still_works(plain, engine)
        engine.pause = 5
        with pytest.raises(Exception, match="timed out"):
            plain.post(RESPONSES, json=body, timeout=0.3)
        still_works(plain, engine)
