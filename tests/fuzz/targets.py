"""The fuzz targets: one function for each reader, which takes the bytes of an input.

A function returns, or raises a ``JanusError`` to refuse its input. Every other end is a failure:
another exception, even a panic of a Rust library, a wrong result (``AssertionError``), output on
stdout or stderr, and too much time or memory, which ``trial.py`` measures.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_janus
from mlx_janus.commands.jsonl import JsonLines
from mlx_janus.config import JanusConfig
from mlx_janus.errors import JanusError
from mlx_janus.inference.results import read_settings
from mlx_janus.processing import images
from mlx_janus.processing.saved_images import read_metadata
from mlx_janus.processing.tokenizer import PromptTokenizer, prepare_tokenizer, read_tokenizer
from mlx_janus.server.app import create_app
from mlx_janus.server.settings import Settings
from mlx_janus.weights.folder import open_converted, stamped_hashes
from mlx_janus.weights.names import TINY
from mlx_janus.weights.published import read_published
from mlx_janus.weights.safetensors_files import find_weights, read_index, read_safetensors_header
from mlx_janus.weights.torch_files import ChecksumReader, read_torch_file
from mlx_janus.weights.torch_pickle import DamagedError, RefusedError, interpret
from tests.support.fake_engine import FakeEngine
from tests.support.golden import FIXTURES, FOLDERS

from . import mutators, seeds

Read = Callable[[bytes], None]
_SMALL_IMAGE = 1 << 20  # pixels; the real limit would allow inputs that take seconds
_MANY_BYTES = 1 << 24  # of tensors that are read


@dataclass(frozen=True)
class Target:
    """A reader to fuzz.

    Args:
        prepare: returns the function that takes an input. Its argument is an empty folder.
        seeds: returns the seed corpus.
        mutate: changes an input.
        may_write: returns whether a library writes to stderr about an input, and no option of it
            prevents that.
    """

    prepare: Callable[[Path], Read]
    seeds: seeds.Seeds
    mutate: mutators.Mutate
    may_write: Callable[[bytes], bool] = lambda _: False


def _is_tiff(data: bytes) -> bool:
    """Return whether libtiff may read an input: it writes every fault to stderr."""
    return data[:2] in (b"II", b"MM")


def _config(folder: Path) -> Read:
    path = folder / "config.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        config = JanusConfig.load(path)
        config.dump(path)
        assert JanusConfig.load(path) == config

    return read


def _published(folder: Path) -> Read:
    for name in FOLDERS:
        (folder / name).mkdir()
        for path in (FIXTURES / name).glob("*.j*"):
            shutil.copy(path, folder / name)

    def read(data: bytes) -> None:
        head, _, content = data.partition(b"\n")
        name = head.decode(errors="replace")
        path = folder / name
        assert path in known, "the first line names a file of the fixtures"
        path.write_bytes(content)
        try:
            notes = read_published(path.parent).notes
        finally:
            shutil.copy(FIXTURES / name, path)
        assert not any("\n" in note for note in notes)

    known = {path for path in folder.glob("*/*.j*") if not path.name.endswith("index.json")}
    return read


def _index(folder: Path) -> Read:
    path = folder / "model.safetensors.index.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        files = set(read_index(path).values())
        assert all((folder / file).parent == folder for file in files)
        find_weights(folder)

    return read


def _safetensors(folder: Path) -> Read:
    path = folder / "model.safetensors"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        entries, _ = read_safetensors_header(path)
        for entry in entries.values():
            with suppress(JanusError):  # of a type that is not read
                assert entry.read().shape == entry.shape
        arrays, stamp = open_converted(folder)
        mx.eval(arrays)
        stamped_hashes(folder, stamp)

    return read


def _pickle(_: Path) -> Read:
    def read(data: bytes) -> None:
        try:
            interpret(data)
        except (RefusedError, DamagedError) as error:
            raise JanusError(str(error)) from None

    return read


def _torch_zip(folder: Path) -> Read:
    path = folder / "model.bin"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        tensors = read_torch_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 2 * len(data) < _MANY_BYTES
        for tensor in tensors.values():
            assert tensor.read().shape == tensor.shape
        ChecksumReader(path).update(data)

    return read


def _tokenizer(folder: Path) -> Read:
    path = folder / "tokenizer.json"
    prompt = JanusConfig.load(TINY / "config.json").prompt
    text = "What is the <|User|> red circle? 12,345 \u4e2d\u6587 \U0001f600\n\n"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        path.write_text(prepare_tokenizer(path, prompt, ("<extra>",)), encoding="utf-8")
        tokenizer = PromptTokenizer(read_tokenizer(path), prompt)
        ids = tokenizer.encode(text)
        detokenizer = tokenizer.detokenizer()
        streamed = "".join(map(detokenizer.add, ids)) + detokenizer.finish()
        assert streamed == tokenizer.decode(ids)
        tokenizer.spelling(ids[0] if ids else 0)

    return read


def _chat(folder: Path) -> Read:
    conversation = mlx_janus.load().conversation()
    path = folder / "chat.json"
    again = folder / "chat-again.json"
    for name in seeds.CHAT_PICTURES:
        seeds.PICTURE.save(folder / name)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        before = conversation.system, conversation.messages
        try:
            conversation.load(path)
        except JanusError:
            assert (conversation.system, conversation.messages) == before
            raise
        again.unlink(missing_ok=True)
        conversation.save(again)
        messages = conversation.messages
        conversation.load(again)
        assert [m.text for m in conversation.messages] == [m.text for m in messages]

    return read


def _chat_picture(folder: Path) -> Read:
    read_chat = _chat(folder)
    images.MAX_PIXELS = _SMALL_IMAGE
    chat = seeds.conversations()[0]

    def read(data: bytes) -> None:
        (folder / seeds.CHAT_PICTURES[0]).write_bytes(data)
        read_chat(chat)

    return read


def _image(folder: Path) -> Read:
    images.MAX_PIXELS = _SMALL_IMAGE
    path = folder / "image"

    def read(data: bytes) -> None:
        image = images.decode_image(data, "the image")
        assert image.mode == "RGB"
        assert image.width * image.height <= _SMALL_IMAGE
        path.write_bytes(data)
        read_metadata(path)
        read_settings(path)

    return read


def _json_lines(folder: Path) -> Read:
    path = folder / "captions.jsonl"
    lines = JsonLines(path, "captions", ("path", "prompt"))

    def read(data: bytes) -> None:
        path.write_bytes(data)
        try:
            records = lines.resume()
        except JanusError:
            assert path.read_bytes() == data, "a refused file stays as it is"
            raise
        assert lines.resume() == records
        with lines.append() as write:
            write({"path": "new", "prompt": "?"})
        assert [json.dumps(r) for r in lines.resume()[:-1]] == [json.dumps(r) for r in records]

    return read


def _http(_: Path) -> Read:
    engine = FakeEngine(JanusConfig.load(TINY / "config.json"))
    app: Any = create_app(engine, Settings(image_limit=100_000, body_limit=2_000_000))
    loop = asyncio.new_event_loop()
    images.MAX_PIXELS = _SMALL_IMAGE

    def read(data: bytes) -> None:
        head, _, body = data.partition(b"\n")
        path, kind, encoding = (*head.split(b" "), b"", b"")[:3]
        headers = [(b"host", b"localhost"), (b"content-type", b"application/" + kind)]
        headers += [(b"content-length", str(len(body)).encode())]
        headers += [(b"content-encoding", encoding)] if encoding else []
        reply = loop.run_until_complete(_ask(app, path.decode("latin-1"), headers, body))
        assert engine.open == 0
        engine.asked.clear()
        _check_reply(*reply)

    return read


async def _ask(app: Any, path: str, headers: Any, body: bytes) -> tuple[int, bytes, bytes]:
    """Send a request to an ASGI application; return status, content type and body of the reply."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    asked = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if asked:
            return asked.pop()
        await asyncio.Event().wait()  # the client stays until the task is cancelled
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    starts = [m for m in sent if m["type"] == "http.response.start"]
    assert len(starts) == 1, "one reply"
    assert not sent[-1].get("more_body"), "a whole reply"
    content_type = dict(starts[0]["headers"]).get(b"content-type", b"")
    return starts[0]["status"], content_type, b"".join(m.get("body", b"") for m in sent)


def _check_reply(status: int, content_type: bytes, body: bytes) -> None:
    """Check a reply: an answer, or a refusal with one error object.

    Raises:
        JanusError: it is a refusal.
    """
    if status == 200:
        assert content_type.startswith((b"application/json", b"text/event-stream"))
        if content_type.startswith(b"application/json"):
            json.loads(body)
        return
    assert 400 <= status < 500, f"status {status}"
    reply = json.loads(body)
    assert set(reply) == {"error"}
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in reply["error"]["message"]
    raise JanusError(f"{status} {reply['error']['message']}")


TARGETS = {
    "config": Target(_config, seeds.configs, mutators.mutate_json),
    "published": Target(
        _published, seeds.published_files, mutators.after_first_line(mutators.mutate_json)
    ),
    "index": Target(_index, seeds.indexes, mutators.mutate_json),
    "safetensors": Target(_safetensors, seeds.safetensors, mutators.mutate_safetensors),
    "pickle": Target(_pickle, seeds.pickles, mutators.mutate_pickle),
    "torch-zip": Target(_torch_zip, seeds.torch_zips, mutators.mutate_torch_zip),
    "tokenizer": Target(_tokenizer, seeds.tokenizers, mutators.mutate_json),
    "chat": Target(_chat, seeds.conversations, mutators.mutate_json),
    "chat-picture": Target(_chat_picture, seeds.pngs, mutators.mutate_png),
    "png": Target(_image, seeds.pngs, mutators.mutate_png),
    "image": Target(_image, seeds.images, mutators.mutate_image, _is_tiff),
    "json-lines": Target(_json_lines, seeds.json_lines, mutators.mutate_json_lines),
    "http": Target(_http, seeds.requests, mutators.mutate_request),
}
"""The targets by name."""
