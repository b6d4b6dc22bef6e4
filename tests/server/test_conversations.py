"""Conversations, numbers and paths as clients send them that were made for OpenAI."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import zlib
from typing import Any

import httpx
import jinja2
import pytest
from PIL import Image

import mlx_janus
from mlx_janus.limits import MAX_TOKENS
from mlx_janus.processing.prompts import Turn
from tests.support.fake_engine import FakeEngine
from tests.support.golden import FIXTURES
from tests.support.serving import CHAT, DRAW, HELLO, connect, refusal, still_works


def picture(colour: str, head: str = "data:image/png;base64,") -> str:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return head + base64.b64encode(file.getvalue()).decode()


def shown(colour: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": picture(colour)}}


def message(role: str, content: Any = None, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def ask(client: httpx.Client, engine: FakeEngine, *messages: dict[str, Any], **fields: Any) -> Any:
    """The engine's request for a conversation."""
    reply = client.post(CHAT, json={"messages": list(messages)} | fields)
    assert reply.status_code == 200, reply.text
    return engine.asked[-1]


def colours(request: Any) -> list[tuple[int, ...]]:
    return [image.getpixel((image.width // 2, image.height // 2)) for image in request.images]


# Messages


def test_later_instructions_join_the_next_question(
    client: httpx.Client, engine: FakeEngine
) -> None:
    asked = ask(
        client,
        engine,
        message("system", "a"),
        message("developer", "b"),
        message("user", "one"),
        message("assistant", "two"),
        message("system", "be brief"),
        message("user", "three"),
    )
    assert asked.system == "a\n\nb"
    assert asked.turns == (
        Turn("user", "one"),
        Turn("assistant", "two"),
        Turn("user", "be brief\nthree"),
    )


def test_instructions_after_the_last_question_end_it(
    client: httpx.Client, engine: FakeEngine
) -> None:
    asked = ask(client, engine, message("user", "one"), message("system", "be brief"))
    assert (asked.system, asked.turns) == (None, (Turn("user", "one\nbe brief"),))


def test_instructions_alone_are_the_question(client: httpx.Client, engine: FakeEngine) -> None:
    asked = ask(client, engine, message("system", "say hello"))
    assert (asked.system, asked.turns) == (None, (Turn("user", "say hello"),))


def test_calls_and_results_of_tools_in_the_history(
    client: httpx.Client, engine: FakeEngine
) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = ask(
        client,
        engine,
        message("user", "what time is it?"),
        message("assistant", None, tool_calls=[call]),
        message("tool", "12:30", tool_call_id="a"),
        message("assistant", "half past twelve", tool_calls=[]),
        message("user", "thanks"),
    )
    assert asked.turns == (
        Turn("user", "what time is it?"),
        Turn("assistant", "half past twelve"),
        Turn("user", "12:30\nthanks"),
    )
    asked = ask(
        client,
        engine,
        message("user", "what time is it?"),
        message("assistant", None, tool_calls=[call]),
        message("tool", "12:30", tool_call_id="a"),
    )
    assert asked.turns == (Turn("user", "what time is it?\n12:30"),)


CALLS = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
CALLED = message("assistant", "let me see", tool_calls=CALLS)
ASKED = (Turn("user", "what time is it?"), Turn("assistant", "let me see"))


@pytest.mark.parametrize(
    ("later", "turns"),
    [
        ([message("tool", "12:30")], [Turn("user", "12:30")]),
        ([message("tool", "")], [Turn("user", "(no output)")]),
        ([message("tool", "12"), message("tool", "30")], [Turn("user", "12\n30")]),
        ([message("system", "now"), message("tool", "12:30")], [Turn("user", "now\n12:30")]),
        ([message("tool", "12:30"), message("user", "well?")], [Turn("user", "12:30\nwell?")]),
        (
            [message("tool", "12:30"), message("assistant", "half"), message("user", "thanks")],
            [Turn("user", "12:30"), Turn("assistant", "half"), Turn("user", "thanks")],
        ),
        (
            [
                message("tool", "12"),
                message("assistant", None, tool_calls=CALLS),
                message("tool", "30"),
            ],
            [Turn("user", "12\n30")],
        ),
    ],
)
def test_results_of_tools_after_words_and_a_call(
    client: httpx.Client, engine: FakeEngine, later: list[dict[str, Any]], turns: list[Turn]
) -> None:
    """They must not join the question before the words."""
    asked = ask(client, engine, message("user", "what time is it?"), CALLED, *later)
    assert asked.turns == (*ASKED, *turns)


def test_a_result_of_a_tool_after_an_image_and_a_call(
    client: httpx.Client, engine: FakeEngine
) -> None:
    drawn = message("assistant", [shown("blue")], tool_calls=CALLS)
    asked = ask(client, engine, message("user", "draw"), drawn, message("tool", "saved"))
    assert asked.turns == (Turn("user", "draw"), Turn("user", "saved", images=1))


def test_images_of_an_answer_are_shown_with_the_next_question(
    client: httpx.Client, engine: FakeEngine
) -> None:
    asked = ask(
        client,
        engine,
        message("user", [shown("red"), {"type": "text", "text": "draw it in blue"}]),
        message("assistant", [shown("blue"), {"type": "refusal", "refusal": "no"}]),
        message("user", [shown("lime"), {"type": "text", "text": "which is blue?"}]),
    )
    assert asked.turns == (
        Turn("user", "draw it in blue", images=1),
        Turn("user", "which is blue?", images=2),
    )
    assert colours(asked) == [(255, 0, 0), (0, 0, 255), (0, 255, 0)]


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


RED, BLUE = shown("red"), shown("blue")
TEMPLATE = FIXTURES / "transformers" / "chat_template.jinja"


@pytest.mark.parametrize(
    "parts",
    [
        [said("before:"), RED, said("after:"), BLUE, said("Which is red?")],
        [RED, said("is Figure 1."), BLUE, said("is Figure 2. Which is red?")],
        [said("Compare this:"), RED, said("with this:"), BLUE],
        [RED, said("or"), BLUE],
    ],
)
def test_texts_and_images_in_turn_stay_in_order(
    client: httpx.Client, engine: FakeEngine, parts: list[dict[str, Any]]
) -> None:
    """As in the chat template that transformers writes for these models."""
    asked = ask(client, engine, message("user", parts))
    kinds = [{**part, "type": "image"} if part in (RED, BLUE) else part for part in parts]
    template = jinja2.Template(TEMPLATE.read_text())
    expected = template.render(messages=[message("user", kinds)], add_generation_prompt=True)
    prompts = mlx_janus.load().prompts
    assert prompts.render_answering(asked.turns, system="") == expected
    assert colours(asked) == [(255, 0, 0), (0, 0, 255)]


def test_the_order_of_texts_and_images_counts(client: httpx.Client, engine: FakeEngine) -> None:
    question = said("Which is red?")
    in_turn = [said("before:"), RED, said("after:"), BLUE, question]
    first = [RED, BLUE, said("before:"), said("after:"), question]
    swapped = [said("before:"), BLUE, said("after:"), RED, question]
    asked = [ask(client, engine, message("user", parts)) for parts in (in_turn, first, swapped)]
    text = "before:\n\nafter:\n\nWhich is red?"
    assert [request.turns for request in asked] == [
        (Turn("user", text, 2, (8, 16)),),
        (Turn("user", "before:\nafter:\nWhich is red?", 2),),
        (Turn("user", text, 2, (8, 16)),),
    ]
    assert colours(asked[2]) == colours(asked[0])[::-1]


@pytest.mark.parametrize(
    "parts",
    [
        [RED, BLUE, said("Which is red?")],
        [said("Which is red?"), RED, BLUE],
        [said("Which is red?"), RED, BLUE, said(" \n")],
        [said(""), RED, BLUE, said("Which is red?")],
        [RED, said(""), BLUE, said("Which is red?")],
    ],
)
def test_attached_images_are_before_the_question(
    client: httpx.Client, engine: FakeEngine, parts: list[dict[str, Any]]
) -> None:
    """The models were trained so, and many clients send the question first."""
    asked = ask(client, engine, message("user", parts))
    (turn,) = asked.turns
    assert (turn.text, turn.images, turn.places) == ("Which is red?", 2, None)
    assert colours(asked) == [(255, 0, 0), (0, 0, 255)]


def test_a_mark_of_the_library_is_ordinary_text(client: httpx.Client, engine: FakeEngine) -> None:
    for parts in ([RED, said("what is {image}?")], [said("what is {image}?"), RED]):
        asked = ask(client, engine, message("user", parts))
        assert asked.turns == (Turn("user", "what is {image}?", 1),)
    asked = ask(client, engine, message("user", [said("{image}"), RED, said("<|User|> {image}")]))
    assert asked.turns == (Turn("user", "{image}\n\n<|User|> {image}", 1, (8,)),)


def test_what_is_pending_precedes_texts_and_images_in_turn(
    client: httpx.Client, engine: FakeEngine
) -> None:
    asked = ask(
        client,
        engine,
        message("user", "draw it in blue"),
        message("assistant", [BLUE]),
        message("system", "be brief"),
        message("user", [said("is"), RED, said("like it?")]),
        message("system", "in French"),
    )
    assert asked.turns == (
        Turn("user", "draw it in blue"),
        Turn("user", "\nbe brief\nis\n\nlike it?\nin French", 2, (0, 13)),
    )
    assert colours(asked) == [(0, 0, 255), (255, 0, 0)]


def test_an_image_at_the_end_stays_before_later_instructions(
    client: httpx.Client, engine: FakeEngine
) -> None:
    parts = [said("one:"), RED, said("two:"), BLUE]
    asked = ask(client, engine, message("user", parts), message("system", "be brief"))
    assert asked.turns == (Turn("user", "one:\n\ntwo:\n\nbe brief", 2, (5, 11)),)


def test_empty_questions_of_the_history_are_left_out(
    client: httpx.Client, engine: FakeEngine
) -> None:
    asked = ask(
        client, engine, message("user", ""), message("assistant", "hi"), message("user", "hello")
    )
    assert asked.turns == (Turn("assistant", "hi"), Turn("user", "hello"))


@pytest.mark.parametrize(
    "messages",
    [
        [message("assistant", "y")],
        [message("user", "x"), message("assistant", "y"), message("tool", "z")],
        [message("user", "x"), message("assistant", [shown("red")])],
        [message("tool", "x")],
    ],
)
def test_a_question_must_be_last(client: httpx.Client, messages: list[dict[str, Any]]) -> None:
    error = refusal(client.post(CHAT, json={"messages": messages}), 400)
    assert (error["param"], "there is no question" in error["message"]) == ("messages", True)


def test_an_answer_at_the_end_is_continued(client: httpx.Client, engine: FakeEngine) -> None:
    asked = ask(client, engine, message("user", "x"), message("assistant", "A red"))
    assert asked.turns == (Turn("user", "x"), Turn("assistant", "A red"))


@pytest.mark.parametrize("head", ["data:;base64,", "data:image/png;charset=utf-8;base64,"])
def test_an_image_as_a_string_and_without_a_type(
    client: httpx.Client, engine: FakeEngine, head: str
) -> None:
    part = {"type": "image_url", "image_url": picture("red", head)}
    asked = ask(client, engine, message("user", [part, {"type": "text", "text": "what?"}]))
    assert colours(asked) == [(255, 0, 0)]


# Numbers


def test_whole_numbers_as_floats(client: httpx.Client, engine: FakeEngine) -> None:
    asked = ask(client, engine, message("user", "x"), n=2.0, max_tokens=100.0, seed=7.0)
    assert (asked.n, asked.options.max_tokens, asked.options.seed) == (2, 100, 7)
    body = {"prompt": "a fox", "n": 2.0, "seed": 3.0}
    assert len(client.post(DRAW, json=body).json()["data"]) == 2
    error = refusal(client.post(CHAT, json=HELLO | {"n": 1.5}), 400)
    assert error["param"] == "n"


def test_no_limit_of_tokens_and_top_p_of_0(client: httpx.Client, engine: FakeEngine) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        asked = ask(client, engine, message("user", "x"), **{name: -1})
        assert asked.options.max_tokens == MAX_TOKENS
    assert ask(client, engine, message("user", "x"), top_p=0).options.top_p == 0


def test_sampling_fields_reach_the_engine(client: httpx.Client, engine: FakeEngine) -> None:
    fields: dict[str, Any] = {
        "top_k": 40.0,
        "min_p": 0.05,
        "frequency_penalty": -2,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.1,
        "logprobs": True,
        "top_logprobs": 20,
    }
    options = ask(client, engine, message("user", "x"), logit_bias={"7": -100}, **fields).options
    assert {name: getattr(options, name) for name in fields} == fields
    assert options.logit_bias == {7: -100}


def test_any_number_of_stop_strings(client: httpx.Client, engine: FakeEngine) -> None:
    stops = [f"word {i}" for i in range(100)]
    assert ask(client, engine, message("user", "x"), stop=["", *stops]).options.stop == (*stops,)
    assert ask(client, engine, message("user", "x"), stop="").options.stop == ()


# HTTP


@pytest.mark.parametrize(
    "path",
    [CHAT, f"{CHAT}/", "/chat/completions", "/chat/completions/", f"/v1{CHAT}", f"http://x{CHAT}"],
)
def test_paths_as_base_urls_make_them(client: httpx.Client, engine: FakeEngine, path: str) -> None:
    content = json.dumps(HELLO).encode()
    head = b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content)
    with connect(client, f"POST {path}", head + content) as connection:
        reply = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert reply.startswith(b"HTTP/1.1 200 ")
    assert len(engine.asked) == 1
    counted = client.get("/metrics").text
    assert f'route="{CHAT}"' in counted


def test_models_without_v1(client: httpx.Client) -> None:
    assert client.get("/models").json() == client.get("/v1/models").json()
    assert client.get("/models/fake/").json()["id"] == "fake"


def test_every_reply_has_its_own_id(client: httpx.Client) -> None:
    replies = [client.get("/health"), client.post(CHAT, json=HELLO), client.post(CHAT, json={})]
    ids = {reply.headers["x-request-id"] for reply in replies}
    assert len(ids) == 3
    assert all(re.fullmatch(r"req_[0-9a-f]{24}", one) for one in ids)


def test_a_compressed_body(client: httpx.Client, engine: FakeEngine) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    body = json.dumps(HELLO).encode()
    reply = client.post(CHAT, content=gzip.compress(body), headers=headers)
    assert reply.status_code == 200
    for content, status in (
        (gzip.compress(body)[:-9], 400),
        (gzip.compress(body) + b"more", 400),
        (body, 400),
        (gzip.compress(b" " * 50_000_000), 413),
    ):
        refusal(client.post(CHAT, content=content, headers=headers), status)
    other = headers | {"Content-Encoding": "br"}
    refusal(client.post(CHAT, content=zlib.compress(body), headers=other), 415)
    still_works(client, engine)
