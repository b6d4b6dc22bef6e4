"""Clients that leave, are slow, do not finish or do not read: nobody waits, nothing is kept."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import inspect
import itertools
import json
import re
import socket
import threading
import time
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import h11
import httpx
import pytest
import uvicorn
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from mlx_janus.server.connections import uvicorn_config, warn_of_failed_accepts
from mlx_janus.server.images import ImageReader
from mlx_janus.server.settings import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.serving import (
    CHAT,
    DRAW,
    HELLO,
    connect,
    post,
    read_all,
    refusal,
    served,
    still_works,
    to,
    wait_until,
)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO), (DRAW, {"prompt": "a fox"})])
def test_the_work_for_a_client_that_leaves_ends(
    client: httpx.Client, engine: FakeEngine, path: str, body: dict[str, Any], stream: bool
) -> None:
    engine.pause = 60
    with post(client, path, body | {"stream": stream}):
        wait_until(lambda: engine.open == 1)
    wait_until(lambda: engine.open == 0, seconds=5)
    still_works(client, engine)


@pytest.mark.parametrize("stream", [False, True])
def test_pictures_of_a_client_that_leaves_are_not_read(
    client: httpx.Client, engine: FakeEngine, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object) -> Image.Image:
        decoded.append(1)
        assert going_on.wait(20)
        return Image.new("RGB", (8, 8))

    decoded: list[int] = []
    going_on = threading.Event()
    monkeypatch.setattr(ImageReader, "_decode", decode)
    before = gone(client)
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}] * 4
    message = {"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}
    with post(client, CHAT, {"messages": [message], "stream": stream}):
        wait_until(lambda: decoded)
    time.sleep(0.1)
    going_on.set()
    wait_until(lambda: gone(client) == before + 1)
    assert (len(decoded), engine.asked) == (1, [])
    still_works(client, engine)


def gone(client: httpx.Client) -> float:
    """How many clients have left so far."""
    found = re.search(
        rf'requests_total\{{method="POST",route="{CHAT}",status="499"\}} (.*)',
        client.get("/metrics").text,
    )
    return float(found[1]) if found else 0.0


def test_a_client_that_does_not_read_keeps_nobody_waiting(
    client: httpx.Client, engine: FakeEngine
) -> None:
    engine.pieces = ("x" * 300_000,) * 30
    with post(client, CHAT, HELLO | {"stream": True}):
        wait_until(lambda: engine.open == 1)
        engine.pieces = ("A red", " circle")
        assert client.post(CHAT, json=HELLO).status_code == 200
    still_works(client, engine)


LONG = 30 * 100_000  # characters of an answer, far more than what lies between two programs


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_never_read_are_cut(
    client: httpx.Client, engine: FakeEngine, stream: bool
) -> None:
    engine.pieces = ("x" * 100_000,) * 30
    silent = [
        post(client, CHAT, HELLO | {"stream": stream}) for _ in range(8)
    ]  # as many as there may be
    wait_until(lambda: len(engine.asked) == 8)
    time.sleep(1.5)
    engine.pieces = ("A red", " circle")
    assert client.post(CHAT, json=HELLO).status_code == 200
    for connection in silent:
        with connection:
            assert len(read_all(connection)) < LONG
    still_works(client, engine)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_reads_slowly_gets_everything(
    client: httpx.Client, engine: FakeEngine, stream: bool
) -> None:
    engine.pieces = ("x" * 100_000,) * 30
    with post(client, CHAT, HELLO | {"stream": stream}) as connection:
        begun = time.monotonic()
        received = read_all(connection, pause=0.1)
        assert time.monotonic() - begun > 1.5  # three times as long as may pass without a byte
    assert received.count(b"x") >= LONG
    assert received.endswith(b"0\r\n\r\n" if stream else b"}")
    still_works(client, engine)


def test_a_body_that_does_not_come_is_waited_for_so_long(
    client: httpx.Client, engine: FakeEngine
) -> None:
    with connect(client, f"POST {CHAT}", b'Content-Length: 100\r\n\r\n{"messages"') as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
    still_works(client, engine)


def test_a_head_that_does_not_come_is_waited_for_so_long(
    client: httpx.Client, engine: FakeEngine
) -> None:
    with connect(client, "GET /health") as connection:
        time.sleep(0.3)
        connection.sendall(b"X-Slow: 1\r\n")  # which does not gain time
        begun = time.monotonic()
        assert connection.recv(100) == b""
        assert time.monotonic() - begun < 5
    still_works(client, engine)


def test_a_connection_is_kept_between_requests(client: httpx.Client, engine: FakeEngine) -> None:
    engine.pause = 0.3
    parts = urlsplit(str(client.base_url))
    with contextlib.closing(
        http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)
    ) as connection:
        connection.request("POST", CHAT, json.dumps(HELLO), {"Content-Type": "application/json"})
        assert connection.getresponse().read()  # took longer than a head may
        kept = connection.sock
        for _ in range(2):
            connection.request("GET", "/health")
            assert json.loads(connection.getresponse().read())["status"] == "ok"
            assert connection.sock is kept is not None


def test_the_longest_idle_connection_makes_room_for_a_new_one(engine: FakeEngine) -> None:
    """Connections on which nothing is asked lock nobody out."""
    with served(engine, most_connections=3) as url, to(url) as client:
        idle = [connect(client, "GET /health") for _ in range(3)]
        assert client.get("/health").status_code == 200
        oldest, *others = idle
        with contextlib.suppress(ConnectionResetError):
            assert oldest.recv(100) == b""
        for connection in others:
            connection.sendall(b"\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        for connection in idle:
            connection.close()


def test_a_connection_whose_request_is_answered_is_not_cut(engine: FakeEngine) -> None:
    engine.pause = 0.3
    with served(engine, most_connections=1) as url, to(url) as client, to(url) as second:
        with client.stream("POST", CHAT, json={**HELLO, "stream": True}) as reply:
            wait_until(lambda: engine.open == 1)
            with pytest.raises(httpx.TransportError):
                second.get("/health")
            assert "[DONE]" in "".join(reply.iter_text())
        wait_until(lambda: answers(second))


def answers(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/health").status_code == 200
    return False


def test_a_system_that_gives_no_more_connections_is_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(error: OSError) -> None:
        loop.call_exception_handler({"message": "no accept", "exception": error, "socket": None})

    loop = asyncio.new_event_loop()
    warn_of_failed_accepts(loop)
    for _ in range(9):
        fail(OSError(errno.EMFILE, "Too many open files"))
    assert caplog.messages == ["no connection can be accepted for now: Too many open files"]
    assert not caplog.records[0].exc_info
    fail(OSError(errno.EINVAL, "another"))
    assert caplog.messages[1:] == ["no accept\nsocket: None"]
    loop.close()


def test_connections_keep_to_what_the_system_allows() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with (
        mock.patch.object(resource, "setrlimit", side_effect=OSError),
        mock.patch.object(resource, "getrlimit", return_value=(1000, 4096)),
    ):
        assert (
            uvicorn_config(mock.Mock(), Settings(most_connections=5000)).http.max_connections
            == 1000 - 256
        )
        assert (
            uvicorn_config(mock.Mock(), Settings(most_connections=700)).http.max_connections == 700
        )
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


def test_uvicorn_has_the_private_parts_that_the_limits_need() -> None:
    methods = {
        H11Protocol: {
            "connection_made": ["transport"],
            "data_received": ["data"],
            "on_response_complete": [],
            "pause_writing": [],
            "resume_writing": [],
            "connection_lost": ["exc"],
            "send_400_response": ["msg"],
        },
        uvicorn.Server: {"startup": ["sockets"], "shutdown": ["sockets"], "capture_signals": []},
    }
    for owner, signatures in methods.items():
        for name, parameters in signatures.items():
            assert list(inspect.signature(getattr(owner, name)).parameters) == [
                "self",
                *parameters,
            ], name

    class Protocol(H11Protocol):
        def on_response_complete(self) -> None:
            completed.append(self)
            super().on_response_complete()

    completed: list[H11Protocol] = []

    async def run() -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})

        config = uvicorn.Config(
            app, http=Protocol, lifespan="off", log_config=None, server_header=False
        )
        assert uvicorn.Server(config).should_exit is False
        state = ServerState()
        protocol = Protocol(
            config=config, server_state=state, app_state={}, _loop=asyncio.get_running_loop()
        )
        transport = mock.Mock(spec=asyncio.Transport)
        transport.is_closing.return_value = False
        protocol.connection_made(transport)
        assert protocol.connections == state.connections == {protocol}
        assert protocol.loop is asyncio.get_running_loop()
        assert protocol.transport is transport
        assert isinstance(protocol.conn, h11.Connection)
        assert protocol.flow.write_paused is False
        protocol.pause_writing()
        assert protocol.flow.write_paused is True
        protocol.resume_writing()
        assert protocol.cycle is None
        protocol.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert protocol.cycle.response_complete is False
        await asyncio.gather(*state.tasks)
        assert protocol.cycle.response_complete is True
        assert completed == [protocol]
        protocol.connection_lost(None)

    asyncio.run(run())


def test_replies_are_sent_at_once(client: httpx.Client) -> None:
    """The system would hold a packet back for 40 ms, on every connection that is kept."""
    client.get("/health")
    seconds = []
    for _ in range(15):
        started = time.perf_counter()
        assert client.get("/health").status_code == 200
        seconds.append(time.perf_counter() - started)
    assert sorted(seconds)[len(seconds) // 4] < 0.02  # other programs may delay some


def test_every_event_of_a_stream_is_sent_at_once(client: httpx.Client, engine: FakeEngine) -> None:
    engine.pieces = ("word ",) * 12
    engine.pause = 0.015
    for _ in range(2):  # the first stream on a connection is not held back
        arrivals = []
        with client.stream("POST", CHAT, json=HELLO | {"stream": True}) as reply:
            for line in reply.iter_lines():
                if line:
                    arrivals.append(time.perf_counter())
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert sum(gap > 0.005 for gap in gaps) >= 9
    assert max(gaps[:12]) < 0.2


@pytest.mark.parametrize("protocol", [0, socket.IPPROTO_TCP])
def test_a_connection_has_no_delay_whatever_socket_listens(protocol: int) -> None:
    async def read_option() -> int:
        options = []

        class Protocol(uvicorn_config(mock.Mock(), Settings()).http):
            def connection_made(self, transport: Any) -> None:
                super().connection_made(transport)
                accepted = transport.get_extra_info("socket")
                options.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

        config = uvicorn.Config(mock.Mock(), http=Protocol, lifespan="off", log_config=None)
        config.load()
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol) as listener:
            listener.bind(("127.0.0.1", 0))
            loop = asyncio.get_running_loop()
            state = ServerState()
            server = await loop.create_server(
                lambda: Protocol(config=config, server_state=state, app_state={}), sock=listener
            )
            with socket.create_connection(listener.getsockname()):
                while not options:
                    await asyncio.sleep(0.01)
            server.close()
        return options[0]

    assert asyncio.run(read_option()) != 0


def test_half_a_body_and_a_client_that_is_gone(client: httpx.Client, engine: FakeEngine) -> None:
    connect(client, f"POST {CHAT}", b'Content-Length: 100\r\n\r\n{"messages"').close()
    wait_until(lambda: 'route="none",status="499"' in client.get("/metrics").text)
    assert not engine.asked
    still_works(client, engine)


def test_a_large_body_is_refused_before_it_is_sent(
    client: httpx.Client, engine: FakeEngine
) -> None:
    with connect(client, f"POST {CHAT}", b"Content-Length: 200001\r\n\r\n") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    still_works(client, engine)


def test_a_large_body_that_does_not_say_so_is_refused_while_it_comes(
    client: httpx.Client, engine: FakeEngine
) -> None:
    chunk = b"186a0\r\n" + b" " * 100_000 + b"\r\n"
    with connect(
        client, f"POST {CHAT}", b"Transfer-Encoding: chunked\r\n\r\n" + 2 * chunk + b"1\r\n"
    ) as connection:
        connection.sendall(b" \r\n1\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    still_works(client, engine)


def test_all_bodies_together_have_a_limit(client: httpx.Client, engine: FakeEngine) -> None:
    begun = b"Content-Length: 190000\r\n\r\n" + b" " * 180_000
    with (
        connect(client, f"POST {CHAT}", begun) as one,
        connect(client, f"POST {CHAT}", begun) as other,
    ):
        replies = [one.recv(100), other.recv(100)]
        assert sorted(reply[:12] for reply in replies) == [b"HTTP/1.1 408", b"HTTP/1.1 429"]
    still_works(client, engine)


def test_more_requests_at_once_than_may_be(client: httpx.Client, engine: FakeEngine) -> None:
    engine.pause = 60
    open_ones = [post(client, CHAT, HELLO) for _ in range(8)]
    wait_until(lambda: engine.open == 8)
    reply = client.post(CHAT, json=HELLO)
    refusal(reply, 429)
    assert int(reply.headers["retry-after"]) > 0
    assert client.get("/health").json()["answering"] == 8
    for connection in open_ones:
        connection.close()
    still_works(client, engine)


def test_health_says_when_nothing_is_taken_any_more(
    client: httpx.Client, engine: FakeEngine
) -> None:
    engine.stopping = True
    reply = client.get("/health")
    assert (reply.status_code, reply.json()["status"]) == (503, "stopping")
    engine.stopping = False
    still_works(client, engine)


def test_a_full_queue_says_when_to_come_again(client: httpx.Client, engine: FakeEngine) -> None:
    engine.room = 0
    for path, body in ((CHAT, HELLO), (DRAW, {"prompt": "a fox", "stream": True})):
        reply = client.post(path, json=body)
        assert refusal(reply, 429)["code"] == "rate_limit_exceeded"
        assert reply.headers["retry-after"] == "7"
    engine.room = 1
    still_works(client, engine)


def test_a_stream_that_waits_says_that_it_lives(client: httpx.Client, engine: FakeEngine) -> None:
    engine.pause = 0.5
    text = client.post(CHAT, json=HELLO | {"stream": True}).text
    assert text.count(": still at work\n\n") >= 4
    assert text.endswith("data: [DONE]\n\n")
    still_works(client, engine)
