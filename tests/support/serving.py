"""Servers to test: the application in a thread before any engine, and the command in a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import httpx
import uvicorn.server

from mlx_janus.server.app import create_app
from mlx_janus.server.connections import uvicorn_config
from mlx_janus.server.settings import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.programs import environment

CHAT, DRAW = "/v1/chat/completions", "/v1/images/generations"
EDIT = "/v1/images/edits"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}


class _Hurried:
    """``asyncio`` for uvicorn's server, which asks ten times a second whether it is to end."""

    def __getattr__(self, name: str) -> object:
        return getattr(asyncio, name)

    @staticmethod
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.01))


@contextlib.contextmanager
def served(engine: Any, **settings: Any) -> Iterator[str]:
    """The application over an engine, in a thread; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    limits = Settings(**settings)
    config = uvicorn_config(create_app(engine, limits), limits)
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    with mock.patch.object(uvicorn.server, "asyncio", _Hurried()):
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            listener.close()


@contextlib.contextmanager
def started(
    *arguments: object, program: str = "", env: dict[str, str] | None = None
) -> Iterator[ServerProcess]:
    """``mlx-janus serve --port 0`` until it is ready; what still runs at the end is killed.

    Args:
        arguments: of the command.
        program: Python that is run before the command, in its process.
        env: further environment.
    """
    code = f"{program}\nfrom mlx_janus.commands.serve import main\nmain(prog_name='serve')"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--port", "0", *map(str, arguments)],
        env=environment(OPENBLAS_NUM_THREADS="1") | (env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            yield ServerProcess(process, process.stdout.readline().strip())
        finally:
            process.kill()


class ServerProcess:
    """A server that was started.

    Args:
        process: that it runs in.
        url: what it printed; "" if it ended before.
    """

    def __init__(self, process: subprocess.Popen[str], url: str):
        self.process, self.url = process, url

    def stop(self, number: int, seconds: float = 60) -> tuple[int, str]:
        """Send a signal; gives the exit code and all of stderr."""
        self.process.send_signal(number)
        return self.ended(seconds)

    def ended(self, seconds: float = 60) -> tuple[int, str]:
        """The exit code and all of stderr, when it has ended by itself."""
        _, stderr = self.process.communicate(timeout=seconds)
        return self.process.returncode, stderr


def to(url: str, **headers: str) -> httpx.Client:
    """A client that takes no proxy from the environment."""
    return httpx.Client(base_url=url, trust_env=False, headers=headers, timeout=20)


def connect(client: httpx.Client, request: str, body: bytes = b"") -> socket.socket:
    """Send a request, or a part of one, on a new connection whose receive buffer is small."""
    parts = urlsplit(str(client.base_url))
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    connection.settimeout(20)
    connection.connect((parts.hostname, parts.port))
    head = f"{request} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    connection.sendall(head.encode() + body)
    return connection


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> socket.socket:
    content = json.dumps(body).encode()
    return connect(
        client, f"POST {path}", b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
    )


def read_all(connection: socket.socket, pause: float = 0.0) -> bytes:
    """What comes, until the server ends the connection."""
    pieces = []
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 17, socket.MSG_WAITALL):
            pieces.append(piece)
            time.sleep(pause)
    return b"".join(pieces)


def refusal(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error object of a refusal, checked for its form."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert set(reply.json()) == {"error"}
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
    assert error["type"] == kinds.get(status, "invalid_request_error")
    return error


def still_works(client: httpx.Client, engine: FakeEngine) -> None:
    """Nothing is left under way, and the next request is answered."""
    wait_until(lambda: engine.open == 0)
    assert client.get("/health").json() == {
        "status": "ok",
        "model": "fake",
        "models": 1,
        "loaded": 1,
        "waiting": 0,
        "answering": 0,
        "drawing": 0,
    }
    engine.pause = 0
    reply = client.post(CHAT, json=HELLO)
    assert reply.json()["choices"][0]["message"]["content"] == "".join(engine.pieces)


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Come back when something is so; fail if it does not come to be."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.01)
