"""``mlx-janus mcp`` in processes of its own: the protocol on stdout, everything else on stderr."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_janus

# isort: split
import pytest

from mlx_janus.commands import mcp
from mlx_janus.errors import JanusError
from mlx_janus.mcp.tools import ASK, EDIT, GENERATE
from tests.support.golden import FIXTURES
from tests.support.mcp_client import Connection, Notification, command, error_text
from tests.support.programs import ROOT, call, error_line

PICTURE = str(FIXTURES / "picture.png")
PRINTING = """
import os, sys
from mlx_janus.commands import mcp
from mlx_janus.errors import JanusError
load = mcp.load_pipeline
def load_loudly(arguments):
    print("junk of Python"); os.write(1, b"junk of C\\n"); sys.stdout.flush()
    return load(arguments)
mcp.load_pipeline = load_loudly
mcp.main(prog_name="mcp")
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stderr of the process that the tests share."""
    return tmp_path_factory.mktemp("mcp") / "stderr"


@pytest.fixture(scope="module")
def server(log: Path) -> Iterator[Connection]:
    """The newest protocol; the other process gets the handshake."""
    with command(log) as connection:
        yield connection


@pytest.mark.check
def test_the_tools_over_stdio(server: Connection, log: Path) -> None:
    listed = server.do(server.client.list_tools()).tools
    assert [tool.name for tool in listed] == [GENERATE, ASK, EDIT]
    assert all(tool.annotations and tool.annotations.read_only_hint for tool in listed)
    told: list[Notification] = []
    drawn = server.call(GENERATE, told, prompt="a red circle", seed=3)
    image, line = drawn.content
    assert image.type == "image"
    assert image.mime_type == "image/png"
    assert line.type == "text"
    assert line.text == "One image of 64 x 64 pixels, seed 3."
    assert told[-1] == (64, 64, "drawing")
    (answer,) = server.call(ASK, image=image.data, question="what is in the picture?").content
    assert answer.type == "text"
    assert "red circle" in answer.text
    assert not server.call(EDIT, images=[PICTURE], prompt="a blue circle").is_error
    server.cancel_a_call(GENERATE, prompt="a red circle", n=4)
    assert not server.call(GENERATE, prompt="a star").is_error
    assert "does not exist" in error_text(server.call(ASK, image="/no/file", question="?"))
    note, ready, untrained = log.read_text(encoding="utf-8").splitlines()
    assert note.startswith("No model is named: this is Janus-Tiny")
    assert ready == "janus-tiny is ready"
    assert untrained.startswith("janus-tiny was not trained to change images")


def test_only_the_protocol_is_on_stdout_and_sigterm_ends_it() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTING, "-q"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def send(method: str, **message: Any) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps({"jsonrpc": "2.0", "method": method, **message}) + "\n")
        process.stdin.flush()

    with process:
        try:
            client = {"protocolVersion": "2025-06-18", "capabilities": {}}
            send("initialize", id=1, params=client | {"clientInfo": {"name": "x", "version": "1"}})
            found = json.loads(process.stdout.readline())
            info = found["result"]["serverInfo"]
            assert (info["name"], info["version"]) == ("mlx-janus", mlx_janus.__version__)
            assert "tools" in found["result"]["capabilities"]
            send("notifications/initialized")
            arguments = {"prompt": "a star", "seed": 1}
            send("tools/call", id=2, params={"name": GENERATE, "arguments": arguments})
            found = json.loads(process.stdout.readline())
            assert (found["id"], found["result"]["isError"]) == (2, False)
            assert found["result"]["content"][1]["text"] == "One image of 64 x 64 pixels, seed 1."
            begun = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 143
            assert time.monotonic() - begun < 10
            assert process.stdout.read() == ""
            assert process.stderr is not None
            assert process.stderr.read() == "junk of Python\njunk of C\n"
        finally:
            process.kill()


def test_without_the_package_one_line_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec = importlib.util.find_spec
    missing = "mlx_janus.mcp.package.find_spec"
    monkeypatch.setattr(missing, lambda name: None if name == "mcp_types" else find_spec(name))
    line = error_line(call(mcp.main))
    assert line.startswith("Error: mcp, version 2 or later, is not installed: ")
    assert "[mcp]" in line


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = error_line(call(mcp.main, "-o", tmp_path / "file" / "images"))
    assert "cannot be made" in line
    assert "--output-dir" in line


def test_a_bug_is_an_internal_error_whose_traceback_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert mcp._explain(ValueError("secret")) == "internal error: ValueError"
    assert "ValueError: secret" in caplog.text
    assert mcp._explain(JanusError("pass bits=4")) == "pass --bits 4"
