"""The server as a function of a program of one's own: no command is needed to run it."""

from __future__ import annotations

import signal
import socket

import httpx
import pytest

import mlx_janus
from mlx_janus.errors import JanusError
from mlx_janus.server.run import run_server
from mlx_janus.server.settings import Settings
from tests.support.programs import INTERRUPTIBLE, finish, start

PROGRAM = f"""{INTERRUPTIBLE}
import mlx_janus, mlx.core, sys
from mlx_janus.server.run import run_server
from mlx_janus.server.settings import Settings
mlx.core.set_default_device(mlx.core.cpu)
def load():
    print("load")
    return mlx_janus.load("tiny")
print(run_server(
    Settings(host=sys.argv[1], port=0),
    load,
    prepare=lambda: print("prepare"),
    ready=lambda name, url: print(name, url, flush=True),
))
print([name for name in sys.modules if name.startswith("mlx_janus.commands")])
"""


@pytest.mark.parametrize(
    ("host", "number"), [("127.0.0.1", signal.SIGTERM), ("localhost", signal.SIGINT)]
)
def test_a_program_serves_until_a_signal_comes(host: str, number: signal.Signals) -> None:
    process = start(PROGRAM, host)
    assert process.stdout is not None
    lines = [process.stdout.readline().strip() for _ in range(3)]
    assert lines[:2] == ["prepare", "load"]
    name, url = lines[2].split()
    assert (name, url.rpartition(":")[0]) == ("janus-tiny", f"http://{host}")
    assert httpx.get(f"{url}/health", trust_env=False, timeout=20).json()["status"] == "ok"
    process.send_signal(number)
    done = finish(process)
    assert (done.code, done.stdout) == (0, f"{int(number)}\n[]\n")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [JanusError("no such model"), KeyboardInterrupt()])
def test_a_preparation_that_fails_or_is_stopped_ends_it_and_frees_the_port(
    error: BaseException,
) -> None:
    calls: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])

    def prepare() -> None:
        calls.append("prepare")
        with pytest.raises(OSError, match="in use"), socket.socket() as other:
            other.bind(("127.0.0.1", port))  # bound before minutes are spent on a model
        raise error

    def load() -> mlx_janus.JanusPipeline:
        raise AssertionError("it was not prepared")

    with pytest.raises(type(error)):
        run_server(Settings(port=port), load, prepare=prepare)
    assert calls == ["prepare"]
    socket.create_server(("127.0.0.1", port)).close()


def test_a_model_that_cannot_be_loaded_is_the_callers_error() -> None:
    def load() -> mlx_janus.JanusPipeline:
        raise JanusError("no such model")

    with pytest.raises(JanusError, match="no such model"):
        run_server(Settings(port=0), load)
