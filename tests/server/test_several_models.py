"""One server, several models: chosen by name, described truly, and never mixed up."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import signal
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

import mlx_janus
from mlx_janus.engine.pool import EnginePool, ModelSource
from mlx_janus.errors import CheckpointError, HubError, OutOfMemoryError
from mlx_janus.pipeline import JanusPipeline
from mlx_janus.server.app import create_app
from mlx_janus.server.settings import Settings
from mlx_janus.weights.names import TINY
from tests.support.engines import some_pictures, tiny
from tests.support.fake_engine import FakeEngine
from tests.support.serving import CHAT, DRAW, EDIT, HELLO, refusal, served, started, to, wait_until

Load = Callable[[], JanusPipeline]


def asked(
    work: Callable[[httpx.AsyncClient, EnginePool], Awaitable[Any]],
    sources: Sequence[ModelSource],
    *,
    limits: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """What ``work`` gives on a client of an application with these models."""

    async def main() -> Any:
        pool = EnginePool(sources, **limits or {})
        await pool.start()
        app: Any = create_app(pool, Settings(**settings))
        transport = httpx.ASGITransport(app)
        try:
            async with httpx.AsyncClient(
                transport=transport, base_url="http://127.0.0.1", timeout=100
            ) as client:
                return await asyncio.wait_for(work(client, pool), 200)
        finally:
            await pool.close(0)

    return asyncio.run(main())


def text_of(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


async def models_of(client: httpx.AsyncClient) -> dict[str, dict[str, Any]]:
    """The entries of the list, by name."""
    reply = await client.get("/v1/models")
    return {entry["id"]: entry for entry in reply.json()["data"]}


def failing(error: Exception) -> Load:
    def load() -> JanusPipeline:
        raise error

    return load


def test_requests_choose_a_model_by_any_of_its_names() -> None:
    sources = [
        ModelSource(tiny, "deepseek-ai/first", ("first",)),
        ModelSource(tiny, "second", ("models/second",)),
    ]
    by_name = {
        None: "served",
        "default": "served",
        "served": "served",
        "also": "served",
        "first": "served",
        "deepseek-ai/first": "served",
        "gpt-4o": "served",
        "second": "second",
        "models/second": "second",
    }

    async def work(client: httpx.AsyncClient, _: EnginePool) -> None:
        assert list(await models_of(client)) == ["served", "also", "second"]
        for name, replied in by_name.items():
            body = HELLO | {"max_tokens": 1} | ({} if name is None else {"model": name})
            assert (await client.post(CHAT, json=body)).json()["model"] == replied
            if name is not None:
                entry = (await client.get(f"/v1/models/{name}")).json()
                assert entry["root"] == replied
        body = HELLO | {"model": "third"}
        for reply in (await client.post(CHAT, json=body), await client.get("/v1/models/third")):
            error = refusal(reply, 404)
            assert (error["code"], error["param"]) == ("model_not_found", "model")
            assert "'third'" in error["message"]
            assert "/v1/models lists them" in error["message"]

    asked(work, sources, served_names=("served", "also"), model_aliases=("gpt-4o",))


def test_the_list_says_what_is_loaded_and_what_a_model_can_do() -> None:
    may_load = threading.Event()
    problems = [CheckpointError("it is cut")]

    def slow() -> JanusPipeline:
        assert may_load.wait(60)
        if problems:
            raise problems.pop()
        return tiny()

    async def work(client: httpx.AsyncClient, pool: EnginePool) -> None:
        first, second = (await models_of(client)).values()
        assert (first["state"], first["loaded"]) == ("loaded", True)
        assert first["capabilities"] == ["answers", "images", "edits"]
        assert first["defaults"]["answers"]["max_tokens"] == 512
        unknown = {"loaded": False, "capabilities": None, "defaults": None}
        assert second.items() >= (unknown | {"state": "unloaded"}).items()
        body = HELLO | {"model": "b", "max_tokens": 1}
        request = asyncio.create_task(client.post(CHAT, json=body))
        while not pool.models[1].wanted:
            await asyncio.sleep(0.01)
        assert (await models_of(client))["b"].items() >= (unknown | {"state": "loading"}).items()
        health = (await client.get("/health")).json()
        assert health.items() >= {"models": 2, "loaded": 1, "waiting": 1, "model": "a"}.items()
        may_load.set()
        refusal(await request, 500)
        assert (await models_of(client))["b"].items() >= (unknown | {"state": "failed"}).items()
        text_of(await client.post(CHAT, json=body))
        assert (await models_of(client))["b"]["loaded"]
        metrics = (await client.get("/metrics")).text
        assert "\nmlx_janus_models 2.0\n" in metrics
        assert "\nmlx_janus_models_loaded 2.0\n" in metrics
        assert "\nmlx_janus_waiting 0.0\n" in metrics
        async with pool._memory_lock:
            await pool._unload(pool.models[1])
        entry = (await client.get("/v1/models/b")).json()
        assert (entry["state"], entry["loaded"]) == ("unloaded", False)
        assert entry["defaults"] == first["defaults"]  # they are known now

    asked(work, [ModelSource(tiny, "a"), ModelSource(slow, "b")])


@pytest.mark.parametrize(
    ("error", "status", "code", "said"),
    [
        (
            OutOfMemoryError("secret", needed=14_800_000_000, free=3_000_000_000),
            503,
            "out_of_memory",
            "the model 'big' does not fit into memory: it needs 14.8 GB and 3.0 GB are free",
        ),
        (MemoryError("secret"), 503, "out_of_memory", "the model 'big' does not fit into memory"),
        (HubError("secret"), 503, "model_failed", "the model 'big' cannot be loaded"),
        (CheckpointError("secret"), 500, "model_failed", "the model 'big' cannot be loaded"),
        (ValueError("secret"), 500, "model_failed", "the model 'big' cannot be loaded"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_named(
    error: Exception, status: int, code: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(client: httpx.AsyncClient, _: EnginePool) -> list[httpx.Response]:
        bodies = {CHAT: HELLO, DRAW: {"prompt": "a star"}}
        replies = [
            await client.post(path, json=body | {"model": "big"}) for path, body in bodies.items()
        ]
        text_of(await client.post(CHAT, json=HELLO | {"max_tokens": 1}))  # the others go on
        return replies

    for reply in asked(work, [ModelSource(tiny, "a"), ModelSource(failing(error), "big")]):
        told = refusal(reply, status)
        assert told["message"].startswith(said)
        assert (told["code"], told["param"]) == (code, "model")
        assert "secret" not in reply.text
        assert ("Retry-After" in reply.headers) == (status == 503)
    assert len(caplog.messages) == 2
    assert all("big cannot be loaded: secret" in line for line in caplog.messages)


def test_32_requests_over_3_models_are_not_mixed_up(converted: dict[str, Path]) -> None:
    """Each is answered as the library alone answers it, with 2 models loaded at most."""

    def loader(path: str | Path) -> Load:
        return lambda: mlx_janus.load(path, dtype="float32")

    loads = {
        "tiny": loader("tiny"),
        "pro": loader(converted["deepseek-pro-bin"]),
        "first": loader(converted["deepseek-janus-safetensors"]),
    }
    picture = some_pictures()[0]
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    shown = {"type": "image_url", "image_url": {"url": url}}
    words = {"type": "text", "text": "what is it?"}
    answers = {}
    drawn = {}
    for name, load in loads.items():
        with load() as janus:
            for tokens in (3, 5):
                result = janus.generate_text("what is it?", picture, max_tokens=tokens)
                answers[name, tokens] = result.text
            image = janus.generate_images("a star", seed=4, exact=True)[0].image
            drawn[name] = image.tobytes()

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        name = list(loads)[number % 3]
        tokens = (3, 5)[number % 2]
        if number % 8 == 7:
            body = {"prompt": "a star", "seed": 4, "model": name}
            reply = await client.post(DRAW, json=body)
            data = base64.b64decode(reply.json()["data"][0]["b64_json"])
            with Image.open(io.BytesIO(data)) as image:
                assert image.tobytes() == drawn[name], name
            return
        message = {"role": "user", "content": [shown, words]}
        body = {"messages": [message], "max_tokens": tokens, "model": name}
        reply = await client.post(CHAT, json=body)
        assert (text_of(reply), reply.json()["model"]) == (answers[name, tokens], name)

    async def work(client: httpx.AsyncClient, pool: EnginePool) -> None:
        await asyncio.gather(*[ask(client, number) for number in range(32)])
        assert len(pool.loaded) == 2

    sources = [ModelSource(load, name) for name, load in loads.items()]
    asked(work, sources, limits={"max_loaded": 2})


def test_a_stream_goes_on_when_its_model_is_to_be_unloaded() -> None:
    """The request has ended for the route when the stream begins."""

    async def work(client: httpx.AsyncClient, pool: EnginePool) -> None:
        a, b = pool.models
        body = HELLO | {"max_tokens": 80, "temperature": 20, "seed": 1}
        whole = text_of(await client.post(CHAT, json=body))
        stream = asyncio.create_task(client.post(CHAT, json=body | {"stream": True}))
        while not pool.counts.answering:
            await asyncio.sleep(0.005)
        other = asyncio.create_task(client.post(CHAT, json=HELLO | {"model": "b"}))
        lines = (await stream).text.splitlines()
        pieces = [
            chunk["choices"][0]["delta"].get("content") or ""
            for chunk in map(_event, lines)
            if chunk is not None
        ]
        assert "".join(pieces) == whole
        assert "data: [DONE]" in lines
        text_of(await other)
        assert (a.state, b.state) == ("unloaded", "loaded")

    asked(work, [ModelSource(tiny, "a"), ModelSource(tiny, "b")], limits={"max_loaded": 1})


def test_a_model_stays_between_an_answer_and_the_image_that_it_asks_for() -> None:
    brace = mlx_janus.load("tiny").prompts.encode("{")[0]
    body = {
        "input": "a blue square",
        "tools": [{"type": "image_generation"}],
        "logit_bias": {str(brace): 100},  # the model calls the tool
        "stream": True,
    }

    async def work(client: httpx.AsyncClient, pool: EnginePool) -> None:
        stream = asyncio.create_task(client.post("/v1/responses", json=body))
        while not pool.counts.answering:
            await asyncio.sleep(0.005)
        other = asyncio.create_task(client.post(CHAT, json=HELLO | {"model": "b"}))
        *_, last = filter(None, map(_event, (await stream).text.splitlines()))
        assert last["type"] == "response.completed", last
        assert last["response"]["output"][0]["type"] == "image_generation_call"
        text_of(await other)

    asked(work, [ModelSource(tiny, "a"), ModelSource(tiny, "b")], limits={"max_loaded": 1})


def _event(line: str) -> dict[str, Any] | None:
    """The chunk of a line; None for others."""
    if not line.startswith("data: {"):
        return None
    chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
    return chunk


def test_a_client_that_leaves_does_not_wait_for_its_model() -> None:
    may_load = threading.Event()

    def slow() -> JanusPipeline:
        assert may_load.wait(60)
        return tiny()

    async def work(client: httpx.AsyncClient, pool: EnginePool) -> None:
        model = pool.models[1]
        app: Any = client._transport.app  # type: ignore[attr-defined]
        await asyncio.wait_for(_post_and_leave(app, HELLO | {"model": "b"}), 20)
        assert (model.state, model.wanted) == ("loading", 0)
        may_load.set()
        text_of(await client.post(CHAT, json=HELLO | {"model": "b", "max_tokens": 1}))

    asked(work, [ModelSource(tiny, "a"), ModelSource(slow, "b")])


async def _post_and_leave(app: Any, body: dict[str, Any]) -> None:
    """Send a request to an application, and close the connection when its body is read."""
    messages = [
        {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False},
        {"type": "http.disconnect"},
    ]
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(_: dict[str, Any]) -> None:
        pass

    await app(scope, receive, send)


def test_forms_choose_a_model_too() -> None:
    file = io.BytesIO()
    some_pictures()[0].save(file, "PNG")

    async def work(client: httpx.AsyncClient, pool: EnginePool) -> None:
        form = {"prompt": "make it blue", "model": "b", "seed": "1"}
        files = {"image": ("a.png", file.getvalue(), "image/png")}
        reply = await client.post(EDIT, data=form, files=files)
        assert reply.status_code == 200, reply.text
        assert [model.state for model in pool.models] == ["loaded", "loaded"]
        error = refusal(await client.post(EDIT, data=form | {"model": "c"}, files=files), 404)
        assert error["code"] == "model_not_found"

    asked(work, [ModelSource(tiny, "a"), ModelSource(tiny, "b")])


@pytest.mark.parametrize("own", [None, "", "Be brief."])
def test_the_servers_system_prompt_is_for_conversations_without_one(own: str | None) -> None:
    engine = FakeEngine(mlx_janus.load().config)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    system = {"role": "system", "content": "Speak French."}
    with served(engine, system=own) as url, to(url) as client:
        client.post(CHAT, json=HELLO).raise_for_status()
        client.post(CHAT, json={"messages": [system, *HELLO["messages"]]}).raise_for_status()
        client.post(CHAT, json=HELLO | {"tools": tools}).raise_for_status()
    plain, french, called = [request.system for request in engine.asked]  # type: ignore[union-attr]
    assert (plain, french) == (own, "Speak French.")
    start = engine.config.prompt.system if own is None else own
    assert called is not None
    assert called.startswith(f"{start}\n\nYou can call" if start else "You can call")


def test_the_command_serves_them_and_unloads_them_without_requests(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(TINY, copy)
    words = ("-m", "tiny", "-m", f"other={copy}", "--idle-unload", "0.02")
    with started(*words) as server, to(server.url) as client:

        def states() -> dict[str, str]:
            listed = client.get("/v1/models").json()["data"]
            return {entry["id"]: entry["state"] for entry in listed}

        assert set(states()) == {"janus-tiny", "other"}
        for name in ("other", "tiny"):
            reply = client.post(CHAT, json=HELLO | {"model": name, "max_tokens": 2})
            assert text_of(reply)
            wait_until(lambda: set(states().values()) == {"unloaded"})
        assert client.get("/health").json()["loaded"] == 0
        code, stderr = server.stop(signal.SIGTERM)
    assert code == 0
    assert "janus-tiny is ready" in stderr
    assert "1 further model is loaded when a request needs it" in stderr
    assert "Traceback" not in stderr
