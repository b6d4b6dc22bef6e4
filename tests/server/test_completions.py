"""``/v1/completions`` as OpenAI's client uses it: texts that go on without a template."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx_janus

# isort: split
import openai
import pytest

from mlx_janus.errors import JanusError
from tests.support.fake_engine import FakeEngine
from tests.support.serving import ServerProcess, refusal, served, started, still_works, to

COMPLETIONS = "/v1/completions"
PROMPT = "a red circle above"


@pytest.fixture(scope="module")
def janus() -> mlx_janus.JanusPipeline:
    return mlx_janus.load("tiny", dtype="float32")


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


@pytest.mark.check
def test_a_text_goes_on_without_a_template(
    client: openai.OpenAI, janus: mlx_janus.JanusPipeline
) -> None:
    """Janus-Tiny was trained on captions: it goes on with a color and a shape, not an answer."""
    asked: dict[str, Any] = {"model": "default", "prompt": PROMPT, "max_tokens": 3, "logprobs": 0}
    reply = client.completions.create(**asked)
    (choice,) = reply.choices
    assert choice.text.startswith(" ")  # it goes on with the prompt's last word
    assert (choice.finish_reason, reply.object) == ("length", "text_completion")
    prompts = janus.prompts
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == 1 + len(prompts.encode(PROMPT))  # bos and the text
    assert reply.usage.completion_tokens == 3
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or ()) == choice.text
    assert choice.logprobs.top_logprobs is None
    assert (choice.logprobs.text_offset or ())[0] == len(PROMPT)
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    offsets = [chunk.choices[0].logprobs.text_offset for chunk in chunks[:-1]]  # type: ignore[union-attr]
    assert [offset for each in offsets for offset in each or ()] == choice.logprobs.text_offset


def test_several_prompts_with_several_answers(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "default", "n": 2, "temperature": 1.5, "seed": 3}
    reply = client.completions.create(prompt=[PROMPT, "the"], logprobs=2, **asked)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in reply.choices]
    alone = [client.completions.create(prompt=prompt, **asked) for prompt in (PROMPT, "the")]
    assert texts == [choice.text for each in alone for choice in each.choices]
    assert len(set(texts)) > 2
    assert reply.usage is not None
    assert reply.usage.total_tokens == sum(each.usage.total_tokens for each in alone)  # type: ignore[union-attr]
    logprobs = reply.choices[3].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs is not None
    assert {len(top) for top in logprobs.top_logprobs} == {2}
    stream = client.completions.create(
        prompt=[PROMPT, "the"], stream=True, stream_options={"include_usage": True}, **asked
    )
    streamed = ["", "", "", ""]
    for chunk in stream:
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts
    assert chunk.usage == reply.usage.model_copy(
        update={"prompt_tokens_details": chunk.usage.prompt_tokens_details}  # type: ignore[union-attr]
    )


def test_where_a_text_ends(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="default", prompt=PROMPT).choices[0]
    assert client.completions.create(model="default", prompt=PROMPT, max_tokens=16).choices == [
        whole
    ]
    word = whole.text.split()[1]
    cut = client.completions.create(model="default", prompt=PROMPT, stop=[word]).choices[0]
    assert cut.text == whole.text[: whole.text.index(word)]
    assert cut.finish_reason == "stop"
    nothing = client.completions.create(model="default", prompt="", max_tokens=2)
    assert nothing.usage is not None
    assert nothing.usage.prompt_tokens == 1


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"echo": True}, "echo", "echo is not supported"),
        ({"suffix": "the end"}, "suffix", "not supported"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"prompt": [1, 2]}, "prompt[0]", "string"),
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": "circle " * 2000}, "prompt", "maximum context length"),
        ({"prompt": ["a", "circle " * 2000]}, "prompt", "maximum context length"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "token ids are 0 to"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"seed": 2**64}, "seed", ""),
    ],
)
def test_mistakes_are_refused_by_name(
    server: ServerProcess, fields: dict[str, Any], param: str, message: str
) -> None:
    with to(server.url) as plain:
        error = refusal(plain.post(COMPLETIONS, json={"prompt": "a", **fields}), 400)
        assert error["param"] == param
        assert message in error["message"]
        health = plain.get("/health").json()
        assert health["waiting"] == 0


def test_a_full_queue_takes_none_of_the_prompts() -> None:
    engine = FakeEngine(mlx_janus.load("tiny").config, room=2)
    with served(engine) as url, to(url) as plain:
        assert refusal(plain.post(COMPLETIONS, json={"prompt": ["a"] * 3}), 429)
        still_works(plain, engine)


def test_failures_and_clients_that_leave() -> None:
    engine = FakeEngine(mlx_janus.load("tiny").config, failure=JanusError("it broke"))
    body = {"prompt": ["a", "b"]}
    with served(engine) as url, to(url) as plain:
        assert refusal(plain.post(COMPLETIONS, json=body), 500)
        text = plain.post(COMPLETIONS, json={**body, "stream": True}).text
        assert text.split("\n\n")[-2].startswith('event: error\ndata: {"error":')
        engine.failure = None
        engine.pause = 0.05
        with plain.stream("POST", COMPLETIONS, json={**body, "stream": True}) as reply:
            next(reply.iter_lines())
        still_works(plain, engine)
        engine.pause = 5
        with pytest.raises(Exception, match="timed out"):
            plain.post(COMPLETIONS, json=body, timeout=0.3)
        still_works(plain, engine)
