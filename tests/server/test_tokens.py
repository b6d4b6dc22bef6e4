"""``/v1/tokenize`` and ``/v1/detokenize``: the counts are those of the prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx_janus

# isort: split
import httpx
import pytest

from mlx_janus.processing.prompts import Turn
from tests.support.serving import CHAT, refusal, started, to

TOKENIZE, DETOKENIZE = "/v1/tokenize", "/v1/detokenize"
BROKEN = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
STOP = {"type": "function", "function": {"name": "stop"}}


@pytest.fixture(scope="module")
def janus() -> mlx_janus.JanusPipeline:
    return mlx_janus.load("tiny")


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with started("--quiet") as server, to(server.url) as client:
        yield client


@pytest.mark.check
def test_a_text(client: httpx.Client, janus: mlx_janus.JanusPipeline) -> None:
    text = "a red circle – and <|User|>"
    ids = [janus.prompts.special.bos, *janus.prompts.encode(text)]
    reply = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert (reply["tokens"], reply["count"], reply["max_model_len"]) == (ids, len(ids), 1024)
    assert reply["token_strs"][:3] == ["<｜begin▁of▁sentence｜>", "a", " red"]
    plain = client.post(TOKENIZE, json={"prompt": text, "add_special_tokens": False}).json()
    assert (plain["tokens"], plain["token_strs"]) == (ids[1:], None)
    assert client.post("/detokenize", json={"tokens": ids[1:]}).json() == {"prompt": text}
    assert client.post(DETOKENIZE, json={"tokens": []}).json() == {"prompt": ""}


def test_a_conversation_has_the_prompts_tokens(
    client: httpx.Client, janus: mlx_janus.JanusPipeline
) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hello"}]
    found = client.post(TOKENIZE, json={"messages": messages, "tools": [STOP]}).json()
    body = {"messages": messages, "tools": [STOP], "max_tokens": 1}
    assert found["count"] == client.post(CHAT, json=body).json()["usage"]["prompt_tokens"]
    messages[0]["content"] = [BROKEN, {"type": "text", "text": "Hello"}]  # it is not decoded
    found = client.post(TOKENIZE, json={"messages": messages}).json()
    assert found["tokens"] == janus.prompts.answering([Turn("user", "Hello", 1)])
    long = client.post(TOKENIZE, json={"messages": [{"role": "user", "content": "red " * 1500}]})
    assert long.json()["count"] > long.json()["max_model_len"]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (TOKENIZE, {}, "prompt", "one of prompt and messages"),
        (TOKENIZE, {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt", ""),
        (TOKENIZE, {"messages": [{"role": "system", "content": ""}]}, "messages", "empty"),
        (TOKENIZE, {"prompt": "circle " * 200_000}, "prompt", "characters long"),
        (DETOKENIZE, {"tokens": [10**6]}, "tokens", "token ids are 0 to"),
        (DETOKENIZE, {"tokens": [-1]}, "tokens[0]", "greater"),
    ],
)
def test_mistakes_are_refused(
    client: httpx.Client, path: str, body: dict[str, Any], param: str, message: str
) -> None:
    error = refusal(client.post(path, json=body), 400)
    assert error["param"] == param
    assert message in error["message"]


def test_variations_are_refused_kindly(client: httpx.Client) -> None:
    form = {"image": ("a.png", b"x", "image/png")}
    error = refusal(client.post("/images/variations", files=form), 404)
    assert "/v1/images/edits" in error["message"]
