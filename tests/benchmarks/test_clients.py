"""The trials of clients are judged by their errors and by the server's replies."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from benchmarks.clients import run
from benchmarks.clients.catalog import CLIENTS, Client
from benchmarks.clients.environments import InstallError

SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(run.FOLDER)!r})
from pathlib import Path
from trials import trial, run

def refuse(status):
    with Path(os.environ["JANUS_LOG"]).open("a") as log:
        log.write(f"POST /v1/x {{status}}, 2 bytes in, 3 out, 0.001 s, req_1\\n")
    raise ValueError(f"status | {{status}}")

trial("good")(lambda: None)
@trial("good, async")
async def _():
    pass
trial("refused", lacks="edits")(lambda: refuse(404))
trial("not refused", lacks="edits")(lambda: refuse(200))
trial("crash", lacks="edits")(lambda: refuse(500))
trial("odd", theirs="it sends nothing")(lambda: 1 / 0)
trial("bad")(lambda: refuse(400))
run(lambda: print("cleaned up", file=sys.stderr))
"""


@pytest.fixture
def server(tmp_path: Path) -> run.Server:
    (tmp_path / "circle.png").write_bytes(b"")
    log = tmp_path / "server.log"
    log.write_text("POST /v1/images/generations 200, 2 bytes in, 3 out, 0.001 s, req_0\n")
    return run.Server("http://127.0.0.1:9", log)


@pytest.fixture(autouse=True)
def _nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "install", lambda client, cache: Path(sys.prefix))
    monkeypatch.setattr(run, "versions", lambda client, folder: "some 1.0")


def test_each_trial_works_or_fails_for_a_reason(tmp_path: Path, server: run.Server) -> None:
    script = tmp_path / "some.py"
    script.write_text(SCRIPT)
    client = Client("some", str(script), ("some==1.0",))
    outcome = run.run_client(client, server, tmp_path, tmp_path)
    assert outcome.works == ["good", "good, async"]
    assert outcome.expected == ["refused (not supported yet: edits)", "odd (it sends nothing)"]
    assert outcome.fails == [
        "not refused (it should be refused: ValueError: status | 200)",
        "crash (the server answers 500)",
        "bad (ValueError: status | 400)",
    ]
    assert "cleaned up" in (tmp_path / "some.log").read_text()
    table = io.StringIO()
    run.write_table([outcome], table)
    header, _, row = table.getvalue().splitlines()
    assert len(re.split(r"(?<!\\)\|", header)) == len(re.split(r"(?<!\\)\|", row))
    assert row.startswith("| some 1.0 | good; good, async | refused (not supported yet: edits); ")


def test_a_script_that_ends_early_fails(tmp_path: Path, server: run.Server) -> None:
    script = tmp_path / "some.py"
    script.write_text("import a_package_that_is_not_there")
    outcome = run.run_client(Client("some", str(script), ("some",)), server, tmp_path, tmp_path)
    (failure,) = outcome.fails
    assert "ended with 1" in failure
    assert "a_package_that_is_not_there" in failure


def test_clients_that_cannot_be_installed_are_not_run(
    tmp_path: Path, server: run.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def install(client: Client, cache: Path) -> Path:
        raise InstallError("pip failed: no space")

    monkeypatch.setattr(run, "install", install)
    outcome = run.run_client(CLIENTS[0], server, tmp_path, tmp_path)
    assert outcome.not_run == "pip failed: no space"
    monkeypatch.setattr(run.shutil, "which", lambda name: None)
    client = next(client for client in CLIENTS if client.needs_node)
    outcome = run.run_client(client, server, tmp_path, tmp_path)
    assert "Node.js" in outcome.not_run
    assert not outcome.fails


def test_every_client_has_a_script_and_fixed_versions() -> None:
    assert len({client.name for client in CLIENTS}) == len(CLIENTS)
    for client in CLIENTS:
        script = (run.FOLDER / client.script).read_text(encoding="utf-8")
        assert script.count("trial(") >= 2, client.name
        assert all(re.search(r".(==|@)\d", package) for package in client.packages), client.name
    scripts = {path.name for path in run.FOLDER.iterdir() if path.name.startswith(("py_", "js_"))}
    assert scripts == {client.script for client in CLIENTS}
