"""The server on Janus-Tiny as OpenAI's client uses it: its replies are the library's."""

from __future__ import annotations

import base64
import contextlib
import io
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import mlx_janus

# isort: split
import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from mlx_janus.commands import serve
from mlx_janus.decode.text import TextOptions
from mlx_janus.installation import install_command
from mlx_janus.processing.prompts import Turn
from mlx_janus.processing.saved_images import encode_image, read_metadata
from mlx_janus.server import run
from mlx_janus.server.settings import Settings
from mlx_janus.worlds import shapes
from tests.support.programs import INTERRUPTIBLE, call, error_line, start
from tests.support.serving import ServerProcess, started, wait_until

QUESTION = "what is in the picture?"
ON_CPU = f"""{INTERRUPTIBLE}
import mlx_janus, mlx.core
mlx.core.set_default_device(mlx.core.cpu)  # as in these tests, on a Mac too
"""
SLOWLY = f"""{ON_CPU}
import time
from mlx_janus.decode.batch import DrawingBatch
step = DrawingBatch.step
DrawingBatch.step = lambda batch: (time.sleep(0.05), step(batch))[1]
"""


@pytest.fixture(scope="module")
def janus() -> mlx_janus.JanusPipeline:
    return mlx_janus.load(dtype="float32")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with started("--queue", 1, "--dtype", "float32", program=ON_CPU) as server:
        yield server
        code, stderr = server.stop(signal.SIGINT)
    assert code == 130
    assert "Ctrl-C stops.\n" in stderr
    assert stderr.endswith("\nstopped\n")
    assert "Traceback" not in stderr


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with to(server) as client:
        yield client
    wait_until(lambda: idle(server))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    random = np.random.default_rng(4)
    return [shapes.render(shapes.sample_scene(random)) for _ in range(3)]


def to(server: ServerProcess, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


def health(server: ServerProcess) -> dict[str, Any]:
    facts: dict[str, Any] = httpx.get(f"{server.url}/health", trust_env=False, timeout=20).json()
    return facts


def idle(server: ServerProcess) -> bool:
    facts = health(server)
    return (facts["waiting"], facts["answering"], facts["drawing"]) == (0, 0, 0)


def user(text: str, *pictures: Image.Image) -> Any:
    """A message with pictures."""
    urls = [
        f"data:image/png;base64,{base64.b64encode(encode_image(picture, {})).decode()}"
        for picture in pictures
    ]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def decoded(b64_json: str | None) -> Image.Image:
    assert b64_json is not None
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def alike(one: Image.Image, other: Image.Image) -> bool:
    """Compare images decoded with other numbers of BLAS threads, which may round differently."""
    difference = np.array(one).astype(int) - np.array(other)
    return bool(np.abs(difference).max() <= 1)


# Answers


@pytest.mark.check
def test_an_answer_is_the_librarys(
    client: openai.OpenAI, janus: mlx_janus.JanusPipeline, pictures: list[Image.Image]
) -> None:
    for shown in (pictures[:0], pictures[:1], pictures):
        expected = janus.generate_text(QUESTION, shown)
        reply = client.chat.completions.create(
            model="janus-tiny", messages=[user(QUESTION, *shown)]
        )
        assert reply.choices[0].message.content == expected.text
        assert (reply.choices[0].finish_reason, reply.choices[0].message.role) == (
            "stop",
            "assistant",
        )
        assert reply.usage is not None
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (
            expected.prompt_tokens,
            len(expected.tokens),
        )
        assert reply.usage.total_tokens == expected.prompt_tokens + len(expected.tokens)
        assert (reply.object, reply.model) == ("chat.completion", "janus-tiny")
        assert reply.system_fingerprint


def test_several_answers_have_the_seeds_that_follow(
    client: openai.OpenAI, janus: mlx_janus.JanusPipeline
) -> None:
    expected = [
        janus.generate_text("say something", temperature=1.5, top_p=0.9, seed=seed)
        for seed in (7, 8, 9)
    ]
    assert len({result.text for result in expected}) > 1
    choice: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9, "seed": 7, "n": 3}
    reply = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "say something"}], **choice
    )
    assert [choice.message.content for choice in reply.choices] == [
        result.text for result in expected
    ]
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert reply.usage is not None
    assert reply.usage.completion_tokens == sum(len(result.tokens) for result in expected)
    assert reply.usage.prompt_tokens == expected[0].prompt_tokens


def logprobs_of(reply: Any) -> list[dict[str, Any]]:
    """The log-probabilities of a choice, whole or in pieces, as OpenAI's fields."""
    return [token.model_dump() for token in reply.logprobs.content] if reply.logprobs else []


def assert_close(one: Any, other: Any) -> None:
    """Compare log-probabilities: a row of a batch rounds otherwise than the same answer alone."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert_close(value, other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_close(first, second)
    else:
        assert one == (pytest.approx(other, abs=1e-4) if isinstance(other, float) else other)


def as_openai_says(tokens: Any) -> list[dict[str, Any]]:
    """The library's log-probabilities in OpenAI's fields."""
    said: list[dict[str, Any]] = []
    for token in tokens:
        fields: dict[str, Any] = {"token": token.text, "logprob": token.logprob}
        fields["bytes"] = None if token.utf8 is None else list(token.utf8)
        likely = as_openai_says(token.top)
        for each in likely:
            del each["top_logprobs"]
        said.append(fields | {"top_logprobs": likely})
    return said


def test_sampling_and_logprobs_are_the_librarys(
    client: openai.OpenAI, janus: mlx_janus.JanusPipeline, pictures: list[Image.Image]
) -> None:
    """For two answers, at once and in pieces, where a stop string holds text back and cuts it."""
    shared: dict[str, Any] = {
        "temperature": 1.5,
        "top_p": 0.95,
        "frequency_penalty": 0.6,
        "presence_penalty": 0.3,
        "stop": [" and"],
        "logprobs": True,
        "top_logprobs": 3,
    }
    others: dict[str, Any] = {"top_k": 30, "min_p": 0.001, "repetition_penalty": 1.2}
    expected = [
        janus.generate_text(
            QUESTION, pictures[0], seed=seed, logit_bias={300: 3}, **shared, **others
        )
        for seed in (11, 12)
    ]
    plain = janus.generate_text(QUESTION, pictures[0], seed=11, temperature=1.5, top_p=0.95)
    assert expected[0].tokens != plain.tokens
    asked: dict[str, Any] = {
        "model": "default",
        "messages": [user(QUESTION, pictures[0])],
        "seed": 11,
        "n": 2,
        "logit_bias": {"300": 3},
        "extra_body": others,
        **shared,
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    for index, result in enumerate(expected):
        said = as_openai_says(result.logprobs)
        assert len(said) == len(result.tokens) > 3
        assert whole.choices[index].message.content == result.text
        assert_close(logprobs_of(whole.choices[index]), said)
        pieces = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(piece.delta.content or "" for piece in pieces) == result.text
        assert_close([token for piece in pieces for token in logprobs_of(piece)], said)
    without = client.chat.completions.create(**asked | {"logprobs": False, "top_logprobs": None})
    assert [choice.message.content for choice in without.choices] == [r.text for r in expected]
    assert without.choices[0].logprobs is None


def test_an_answer_ends_where_it_is_told_to(
    client: openai.OpenAI, janus: mlx_janus.JanusPipeline, pictures: list[Image.Image]
) -> None:
    whole = janus.generate_text(QUESTION, pictures[:1]).text
    word = whole.split()[1]
    messages = [user(QUESTION, pictures[0])]
    for stop in (word, [word], ["never said", word]):
        reply = client.chat.completions.create(model="default", messages=messages, stop=stop)
        assert reply.choices[0].message.content == whole[: whole.index(word)]
        assert reply.choices[0].finish_reason == "stop"
    for limit in ({"max_tokens": 2}, {"max_completion_tokens": 2, "max_tokens": 100}):
        reply = client.chat.completions.create(model="default", messages=messages, **limit)
        assert (
            reply.choices[0].message.content
            == janus.generate_text(QUESTION, pictures[:1], max_tokens=2).text
        )
        assert reply.choices[0].finish_reason == "length"


def test_a_streamed_answer_is_the_whole_one_in_pieces(
    client: openai.OpenAI, janus: mlx_janus.JanusPipeline, pictures: list[Image.Image]
) -> None:
    expected = [
        janus.generate_text(QUESTION, pictures[:1], temperature=1, seed=seed) for seed in (3, 4)
    ]
    stream = client.chat.completions.create(
        model="default",
        messages=[user(QUESTION, pictures[0])],
        temperature=1,
        seed=3,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    for index, result in enumerate(expected):
        own = [
            chunk.choices[0]
            for chunk in chunks
            if chunk.choices and chunk.choices[0].index == index
        ]
        assert own[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in own) == result.text
        assert len(own) > 4
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + [
            result.finish_reason
        ]
    assert not chunks[-1].choices
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == sum(len(result.tokens) for result in expected)
    assert usage.prompt_tokens == expected[0].prompt_tokens
    assert not [chunk for chunk in chunks[:-1] if chunk.usage]


def test_a_conversation_with_pictures_in_two_turns(
    client: openai.OpenAI, janus: mlx_janus.JanusPipeline, pictures: list[Image.Image]
) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "You are brief."},
        {"role": "developer", "content": [{"type": "text", "text": "And exact."}]},
        user(QUESTION, pictures[0]),
    ]
    first = (
        client.chat.completions.create(model="default", messages=messages)
        .choices[0]
        .message.content
    )
    messages += [
        {"role": "assistant", "content": first},
        user("how many shapes are there?", *pictures[1:]),
    ]
    second = client.chat.completions.create(model="default", messages=messages)
    turns = [
        Turn("user", QUESTION, 1),
        Turn("assistant", first or ""),
        Turn("user", "how many shapes are there?", 2),
    ]
    system = "You are brief.\n\nAnd exact."
    *_, last = janus.stream_turns(turns, pictures, options=TextOptions(), system=system)
    assert last.result is not None
    assert second.choices[0].message.content == last.result.text
    assert second.usage is not None
    assert second.usage.prompt_tokens == last.result.prompt_tokens
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens is not None
    assert second.usage.prompt_tokens_details.cached_tokens > 64  # the first picture


def test_the_order_of_texts_and_images_is_the_prompts(
    client: openai.OpenAI, janus: mlx_janus.JanusPipeline
) -> None:
    """Janus-Tiny describes the first image. An equal prompt comes from the cache."""

    def picture(shape: str, colour: str) -> Image.Image:
        thing = shapes.Thing(shape, colour, 24, 32, 32, 0, shapes.COLOURS[colour])
        return shapes.render(shapes.Scene((thing,)))

    def ask(*images: Image.Image) -> Any:
        first, second, question = user(QUESTION, *images)["content"]
        one, two = ({"type": "text", "text": text} for text in ("one:", "two:"))
        parts = [one, first, two, second, question]
        messages: Any = [{"role": "user", "content": parts}]
        return client.chat.completions.create(model="default", messages=messages)

    images = [picture("circle", "red"), picture("square", "blue")]
    marked = f"one:\n{{image}}\ntwo:\n{{image}}\n{QUESTION}"
    for shown in (images, images[::-1]):
        expected = janus.generate_text(marked, shown)
        replies = [ask(*shown), ask(*shown)]
        for reply in replies:
            assert reply.choices[0].message.content == expected.text
            assert reply.usage.prompt_tokens == expected.prompt_tokens
        cached = [reply.usage.prompt_tokens_details.cached_tokens for reply in replies]
        assert cached[0] < 2 * 64
        assert cached[1] == expected.prompt_tokens - 1
    texts = [janus.generate_text(marked, shown).text for shown in (images, images[::-1])]
    assert texts == ["a red circle in the middle", "a blue square in the middle"]


# Pictures


@pytest.mark.check
def test_a_picture_is_the_librarys_and_says_how_it_was_drawn(
    client: openai.OpenAI, janus: mlx_janus.JanusPipeline, tmp_path: Path
) -> None:
    prompt = "a red circle above a blue square"
    choice: dict[str, Any] = {"seed": 5, "cfg_weight": 3.0, "temperature": 0.5, "top_p": 0.95}
    expected = janus.generate_images(prompt, n=2, exact=True, **choice)
    reply = client.images.generate(
        model="janus-tiny", prompt=prompt, n=2, size="auto", extra_body=choice
    )
    assert reply.data is not None
    for image, wanted in zip(reply.data, expected, strict=True):
        assert alike(decoded(image.b64_json), wanted.image)
        (tmp_path / "a.png").write_bytes(base64.b64decode(image.b64_json or ""))
        assert read_metadata(tmp_path / "a.png") == wanted.metadata
        assert image.seed == wanted.seed  # type: ignore[attr-defined]
    assert (reply.output_format, reply.size) == ("png", "64x64")
    assert reply.usage is not None
    assert reply.usage.input_tokens == len(janus.pathway.prompt_ids(prompt))
    assert reply.usage.output_tokens == 2 * 64


def test_pictures_form_in_a_stream(client: openai.OpenAI, janus: mlx_janus.JanusPipeline) -> None:
    expected = janus.generate_images("a green triangle", n=2, seed=11, exact=True)
    stream: Any = client.images.generate(
        prompt="a green triangle",
        n=2,
        stream=True,
        partial_images=3,
        size="64x64",
        extra_body={"seed": 11},
    )
    events = list(stream)
    for index, wanted in enumerate(expected):
        own = [event for event in events if event.index == index]
        assert {event.seed for event in own} == {wanted.seed}
        *partial, whole = own
        assert whole.type == "image_generation.completed"
        assert alike(decoded(whole.b64_json), wanted.image)
        assert whole.usage.output_tokens == 64
        assert [event.type for event in partial] == ["image_generation.partial_image"] * 3
        assert [event.partial_image_index for event in partial] == [0, 1, 2]
        grey = [(np.array(decoded(event.b64_json)) == 127).all(axis=2).mean() for event in partial]
        assert grey == sorted(grey, reverse=True)
        assert grey[0] > 0.6


def file_of(picture: Image.Image, name: str = "a.png") -> tuple[str, bytes]:
    """A picture as a file to upload."""
    return name, encode_image(picture, {})


def test_changed_images_are_the_librarys(
    client: openai.OpenAI, janus: mlx_janus.JanusPipeline, pictures: list[Image.Image]
) -> None:
    """Of one image and of two, and with fields of ours; in a stream they are the same."""
    own = {"seed": 5, "cfg_weight": 2.0, "cfg_weight2": 1.0, "temperature": 0.7}
    expected = janus.generate_images("make it blue", images=pictures[:2], n=2, window=1, **own)
    files = [file_of(picture) for picture in pictures[:2]]
    reply = client.images.edit(image=files, prompt="make it blue", n=2, extra_body=own)
    assert reply.data is not None
    assert reply.usage is not None
    assert reply.usage.input_tokens_details.image_tokens == 2 * 132
    for image, data in zip(expected, reply.data, strict=True):
        assert alike(decoded(data.b64_json), image.image)
    file = io.BytesIO(base64.b64decode(str(reply.data[1].b64_json)))
    assert Image.open(file).text["cfg_weight2"] == "1"  # type: ignore[attr-defined]
    (alone,) = janus.generate_images("add a star", images=pictures[2], seed=8, window=1)
    stream: Any = client.images.edit(
        image=io.BytesIO(file_of(pictures[2])[1]),
        prompt="add a star",
        stream=True,
        partial_images=3,
        extra_body={"seed": 8},
    )
    *previews, last = stream
    assert [event.type for event in previews] == ["image_edit.partial_image"] * 3
    assert last.type == "image_edit.completed"
    assert alike(decoded(last.b64_json), alone.image)


def test_changes_that_are_refused(client: openai.OpenAI, pictures: list[Image.Image]) -> None:
    file = file_of(pictures[0])
    with pytest.raises(openai.BadRequestError, match="mask is not supported") as caught:
        client.images.edit(image=file, mask=file, prompt="make it blue")
    assert caught.value.param == "mask"
    with pytest.raises(openai.BadRequestError, match="the image is damaged") as caught:
        client.images.edit(image=[file, ("b.png", b"GIF89a")], prompt="make it blue")
    assert caught.value.param == "image[1]"
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        client.images.edit(image=[file] * 8, prompt="make it blue")
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="describe the change"):
        client.images.edit(image=file, prompt=" ")


# Around it


def test_the_models_are_one(client: openai.OpenAI, server: ServerProcess) -> None:
    assert [model.id for model in client.models.list()] == ["janus-tiny"]
    assert client.models.retrieve("janus-tiny").owned_by == "mlx_janus"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("deepseek-ai/Janus-Pro-1B")
    assert caught.value.code == "model_not_found"
    assert health(server)["model"] == "janus-tiny"


def test_errors_are_the_clients_own_kinds(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="the question is empty") as caught:
        client.chat.completions.create(model="default", messages=[{"role": "user", "content": " "}])
    assert (caught.value.type, caught.value.param) == ("invalid_request_error", "messages")
    for words in (600, 90_000):  # too many tokens, and so many characters that none is counted
        # LangChain looks for the first words, LiteLLM for the others.
        words_in_order = "prompt is too long: .*maximum context length is"
        with pytest.raises(openai.BadRequestError, match=words_in_order) as caught:
            client.chat.completions.create(
                model="default", messages=[{"role": "user", "content": "red circle " * words}]
            )
        assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        client.images.generate(prompt="red circle " * 3000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.images.generate(model="dall-e-3", prompt="a fox")
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a fox", size="100x7")
    assert caught.value.param == "size"


def test_clients_that_leave_free_the_device(client: openai.OpenAI, server: ServerProcess) -> None:
    stream: Any = client.images.generate(
        prompt="a red circle", n=16, stream=True, partial_images=16
    )
    next(iter(stream))
    stream.close()
    answers = client.chat.completions.create(
        model="default", messages=[user("say something")], stream=True, temperature=1000.0, n=16
    )
    next(iter(answers))
    answers.close()
    wait_until(lambda: idle(server), seconds=5)


def test_a_full_queue(client: openai.OpenAI, server: ServerProcess) -> None:
    choice: dict[str, Any] = {"prompt": "a red circle", "stream": True, "partial_images": 16}
    under_way: Any = client.images.generate(n=16, **choice)
    next(iter(under_way))
    waiting: Any = client.images.generate(**choice)
    with pytest.raises(openai.RateLimitError) as caught:
        client.images.generate(prompt="a red circle")
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) > 0
    assert health(server)["waiting"] == 1
    under_way.close()
    assert len(list(waiting)) == 17  # it has its turn


def test_the_metrics_count(client: openai.OpenAI, server: ServerProcess) -> None:
    def numbers() -> dict[str, float]:
        text = httpx.get(f"{server.url}/metrics", trust_env=False, timeout=20).text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    before = numbers()
    answer = client.chat.completions.create(model="default", messages=[user(QUESTION)])
    client.images.generate(prompt="a red circle", n=2)
    after = numbers()
    assert answer.usage is not None
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["mlx_janus_prompt_tokens_total"] == answer.usage.prompt_tokens
    assert grown["mlx_janus_answer_tokens_total"] == answer.usage.completion_tokens
    assert grown["mlx_janus_pictures_total"] == 2
    assert grown["mlx_janus_first_token_seconds_count"] == 1
    route = 'route="/v1/chat/completions"'
    assert grown[f'mlx_janus_requests_total{{method="POST",{route},status="200"}}'] == 1
    assert grown[f"mlx_janus_request_seconds_count{{{route}}}"] == 1
    assert [after[f"mlx_janus_{name}"] for name in ("waiting", "answering", "drawing")] == [0, 0, 0]


# Starting and stopping


def test_a_drawing_keeps_no_answer_waiting_and_is_finished_before_the_server_stops() -> None:
    with (
        started("--api-key", "s3cret", "--log-requests", program=SLOWLY) as server,
        to(server, "s3cret") as client,
    ):
        with to(server, "wrong") as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        stream: Any = client.images.generate(prompt="a red circle", stream=True, partial_images=3)
        events = iter(stream)
        next(events)  # 48 steps of 0.05 seconds are left
        client.chat.completions.create(model="default", messages=[user(QUESTION)], max_tokens=2)
        assert health(server)["drawing"] == 1
        assert [next(events).partial_image_index for _ in range(2)] == [1, 2]
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(server))
        assert [event.type for event in events] == ["image_generation.completed"]
        code, stderr = server.ended()
    assert code == 0
    assert stderr.splitlines()[-1].startswith("POST /v1/images/generations 200, ")
    assert "Traceback" not in stderr
    assert "s3cret" not in stderr


def test_a_second_interrupt_ends_at_once() -> None:
    with started("-q", program=SLOWLY) as server, to(server) as client:
        stream: Any = client.images.generate(
            prompt="a red circle", n=16, stream=True, partial_images=16
        )
        next(iter(stream))
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: refuses(server))
        assert server.stop(signal.SIGINT, seconds=3) == (130, "\nstopped\n")
        with pytest.raises(openai.APIConnectionError):
            list(stream)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_after_another_signal_ends_at_once_while_the_model_loads(first: int) -> None:
    with loading("time.sleep(60)") as process:
        process.send_signal(first)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=3)
    assert (process.returncode, stderr) == (130, "\nstopped\n")


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "\nstopped\n"), (signal.SIGTERM, 0, "")]
)
def test_a_signal_while_the_model_loads_ends_after_the_piece_that_is_read(
    number: int, code: int, said: str
) -> None:
    with loading("time.sleep(0.4); return load(arguments)") as process:
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=10)
    assert (process.returncode, stdout, stderr) == (code, "", said)


@contextlib.contextmanager
def loading(work: str) -> Iterator[subprocess.Popen[str]]:
    """Start the command with a loading function of this body, which reads no model."""
    program = f"""{ON_CPU}
import sys, time
import mlx_janus.commands.serve
from mlx_janus.pipeline import JanusPipeline
load = mlx_janus.commands.serve.load_pipeline
def slowly(arguments):
    print("loading", file=sys.stderr)
    {work}
mlx_janus.commands.serve.load_pipeline = slowly
JanusPipeline.load_weights_for = lambda self, task: print("prepared", task)
mlx_janus.commands.serve.main(["-q", "--port", "0"], prog_name="serve")
"""
    process = start(program)
    with process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == "loading\n"
            yield process
        finally:
            process.kill()


def test_a_server_whose_thread_has_failed_ends() -> None:
    """So that whoever watches it can start it again."""
    scheduler = "from mlx_janus.engine.text_queue import TextScheduler"
    broken = f"{ON_CPU}\n{scheduler}\nTextScheduler.choose = None"
    with started("-q", program=broken) as server, to(server) as client:
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="default", messages=[user(QUESTION)])
        code, stderr = server.ended()
    assert code == 1
    assert "'NoneType' object is not callable" in stderr
    assert stderr.endswith("Error: the model's thread failed (see above): start the server again\n")


def refuses(server: ServerProcess) -> bool:
    """Whether it takes no new connection."""
    try:
        httpx.get(f"{server.url}/health", trust_env=False, timeout=5)
    except httpx.TransportError:
        return True
    return False


def test_a_port_that_is_taken(server: ServerProcess) -> None:
    port = int(server.url.rpartition(":")[2])
    line = error_line(call(serve.main, "--port", port))
    assert (
        line
        == f"Error: cannot listen on 127.0.0.1:{port} (Address already in use): name another --port"
    )


def test_a_host_that_is_none() -> None:
    with mock.patch.object(
        socket, "getaddrinfo", side_effect=socket.gaierror(-2, "Name or service not known")
    ):
        line = error_line(call(serve.main, "--host", "nowhere.invalid", "--api-key", "x"))
    assert "nowhere.invalid is not an address to listen on" in line


@pytest.mark.parametrize("host", ["ä..b", f"{'a' * 64}.example"])
def test_a_host_whose_name_cannot_be_one(host: str) -> None:
    line = error_line(call(serve.main, "--host", host, "--api-key", "x"))
    assert line == f"Error: {host} is not an address to listen on (it is not a name): check --host"


def test_an_address_in_brackets() -> None:
    with mock.patch.object(socket, "getaddrinfo", side_effect=OSError(1, "no IPv6")):
        line = error_line(call(serve.main, "--host", "[::1]"))
    assert line == "Error: ::1 is not an address to listen on (no IPv6): check --host"


def test_an_empty_key_in_the_environment_is_no_key_that_could_be_meant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLX_JANUS_API_KEY", "")
    outcome = call(serve.main, "--port", 0)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "MLX_JANUS_API_KEY, must be 1 to 512 letters" in outcome.stderr


def test_requests_are_answered_though_nobody_reads_their_log() -> None:
    with started("--log-requests", program=ON_CPU) as server, to(server) as client:
        assert server.process.stderr is not None
        server.process.stderr.close()
        for _ in range(3):
            assert client.models.list()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


def test_a_name_of_this_machine_that_is_not() -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.168.0.7", 0))]
    with mock.patch.object(socket, "getaddrinfo", return_value=found):
        line = error_line(call(serve.main, "--host", "localhost", "--port", 0))
    assert "localhost is 192.168.0.7, which other machines can reach: set a key" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--host", "0.0.0.0"), "other machines can reach 0.0.0.0: set a key with --api-key"),
        (("--api-key", "two words"), "without spaces"),
        (("--cors-origin", "https://*"), "lets every web page use the server: set a key"),
        (("--cors-origin", "example.org"), "'example.org' is not an origin"),
        (("--idle-unload", "0"), "--idle-unload"),
        (("--port", "70000"), "65535"),
        (("--host", ""), "the host is empty"),
        (("--api-key", ""), "1 to 512 letters"),
    ],
)
def test_options_that_are_not_safe_or_make_no_sense(words: tuple[str, ...], said: str) -> None:
    outcome = call(serve.main, *words)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert said in outcome.stderr


def test_as_many_may_ask_as_may_wait() -> None:
    async def serve_nothing(_: Any, settings: Settings, *__: Any) -> int:
        limits.append((settings.most_requests, settings.most_connections))
        return 0

    limits: list[tuple[int, int]] = []
    with mock.patch.object(run, "_serve", serve_nothing):
        for queue in (1, 1000):
            assert call(serve.main, "--queue", queue, "--port", 0).code == 0
    assert limits == [(256, 512), (1064, 2128)]


@pytest.mark.parametrize("package", ["prometheus_client", "python_multipart"])
def test_packages_that_are_missing(package: str) -> None:
    with mock.patch.dict(sys.modules, {package: None}):
        line = error_line(call(serve.main, "--port", 0))
    command = install_command("server")
    assert line == f"Error: {package} is not installed: {command}"


def test_a_model_that_is_not_there() -> None:
    assert "no/such/model" in error_line(call(serve.main, "-m", "./no/such/model", "--port", 0))
