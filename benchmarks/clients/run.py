"""Run clients of OpenAI's API against the server: ``python benchmarks/clients/run.py``.

Each client is installed into an environment of its own, which stays in a cache, and its script runs
there. The server is this clone's, with Janus-Tiny. The table says for each client which features
work, which the server does not support yet, and which fail. A client that needs Node.js is skipped
without it. The exit code is 1 if a trial fails that is not expected to.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a run as a bare script

from benchmarks.clients.catalog import CLIENTS, Client
from benchmarks.clients.environments import InstallError, install, versions

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parent.parent
ALIASES = ("gpt-4o", "gpt-4o-mini", "dall-e-2", "dall-e-3", "gpt-image-1")
_TIME_LIMIT = 600  # seconds for a client's script


@dataclass(frozen=True)
class Server:
    """A running server.

    Args:
        url: its address, without ``/v1``.
        log: the file with a line for each request.
    """

    url: str
    log: Path


@dataclass
class Outcome:
    """The outcome of one client's trials."""

    client: Client
    versions: str
    works: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)  # known failures, each with its reason
    fails: list[str] = field(default_factory=list)  # each with its error
    not_run: str = ""  # the reason


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """Start the server on a free port; its log goes into the folder."""
    command = [sys.executable, "-m", "mlx_janus", "serve", "--port", "0", "--log-requests"]
    for name in ALIASES:
        command += ["--model-alias", name]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    log = folder / "server.log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        ) as process,
    ):
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url:
                last_lines = log.read_text().splitlines()[-1:]
                raise click.ClickException(f"the server did not start: {last_lines}")
            yield Server(url, log)
        finally:
            process.terminate()


def draw_circle(server: Server, path: Path) -> None:
    """Generate the image that the clients ask about, and save it."""
    request = urllib.request.Request(
        f"{server.url}/v1/images/generations",
        json.dumps({"prompt": "a red circle", "seed": 1}).encode(),
        {"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request) as reply:
        path.write_bytes(base64.b64decode(json.load(reply)["data"][0]["b64_json"]))


def run_client(client: Client, server: Server, cache: Path, folder: Path) -> Outcome:
    """Install a client and run its trials.

    Args:
        client: the client.
        server: the server.
        cache: the folder of all environments.
        folder: a folder for the image and the results.
    """
    outcome = Outcome(client, ", ".join(client.packages))
    if client.needs_node and not (shutil.which("node") and shutil.which("npm")):
        outcome.not_run = "Node.js and npm are not installed"
        return outcome
    try:
        environment = install(client, cache)
    except InstallError as error:
        outcome.not_run = str(error)
        return outcome
    outcome.versions = versions(client, environment)
    results = folder / f"{client.name}.jsonl"
    ended = _run_script(client, server, environment, results)
    lines = results.read_text().splitlines() if results.exists() else []
    for line in lines:
        _judge(json.loads(line), outcome)
    if ended:
        outcome.fails.append(ended)
    return outcome


def _run_script(client: Client, server: Server, environment: Path, results: Path) -> str:
    """Run a client's script in its environment. Return how it failed, or ""."""
    program = environment / "bin" / "python"
    script = FOLDER / client.script
    command = [str(program), str(script)]
    if client.needs_node:
        # Node looks for packages beside the script, so the script runs from the environment.
        for path in (script, FOLDER / "trials.mjs"):
            shutil.copy(path, environment)
        command = ["node", str(environment / client.script)]
    variables = {
        "JANUS_URL": server.url,
        "JANUS_IMAGE": str(results.parent / "circle.png"),
        "JANUS_LOG": str(server.log),
        "JANUS_RESULTS": str(results),
        "OPENAI_API_KEY": "none",
        "OPENAI_BASE_URL": f"{server.url}/v1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # otherwise LiteLLM looks for it on the web
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(results.parent),  # clients keep settings and logs there
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    inherited = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command,
            cwd=results.parent,
            env=inherited | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIME_LIMIT,
        )
    except subprocess.TimeoutExpired:
        return f"the script took over {_TIME_LIMIT} seconds"
    (results.parent / f"{client.name}.log").write_text(done.stdout + done.stderr)
    last_lines = done.stderr.strip().splitlines()[-1:]
    return f"the script ended with {done.returncode}: {last_lines}" if done.returncode else ""


def _judge(trial: dict[str, Any], outcome: Outcome) -> None:
    """Add a trial to its client's outcome."""
    name, error, statuses = trial["name"], trial["error"], trial["statuses"]
    reason = f"not supported yet: {trial['lacks']}" if trial["lacks"] else trial["theirs"]
    broken = [status for status in statuses if status >= 500]
    if broken:
        outcome.fails.append(f"{name} (the server answers {broken[0]})")
    elif error is None:
        outcome.works.append(name)
    elif trial["lacks"] and not any(400 <= status < 500 for status in statuses):
        outcome.fails.append(f"{name} (it should be refused: {error})")
    elif reason:
        outcome.expected.append(f"{name} ({reason})")
    else:
        outcome.fails.append(f"{name} ({error})")


def write_table(outcomes: list[Outcome], output: TextIO) -> None:
    """Write the outcomes as a Markdown table."""
    print("| client | works | does not, and why | fails |\n|---|---|---|---|", file=output)
    for outcome in outcomes:
        works = "; ".join(outcome.works) or f"not run: {outcome.not_run}"
        cells = [outcome.versions, works, "; ".join(outcome.expected), "; ".join(outcome.fails)]
        row = " | ".join(cell.replace("|", "\\|") for cell in cells)
        print(f"| {row} |", file=output)


@click.command()
@click.option(
    "--only",
    "names",
    multiple=True,
    type=click.Choice([client.name for client in CLIENTS]),
    help="Run this client. May be repeated.",
)
@click.option(
    "--heavy", is_flag=True, help="Run promptfoo and Open WebUI too, which need 2 GB each."
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=FOLDER / ".venvs",
    help="Folder for the clients' environments.",
)
@click.option("--keep", is_flag=True, help="Keep the logs, and print their folder.")
@click.option("-o", "--output", type=click.File("w"), default="-", help="File for the table.")
@click.pass_context
def main(
    ctx: click.Context, names: tuple[str, ...], heavy: bool, cache: Path, keep: bool, output: TextIO
) -> None:
    """Run clients of OpenAI's API against the server, and print a table."""
    chosen = [
        client
        for client in CLIENTS
        if (client.name in names if names else heavy or not client.heavy)
    ]
    outcomes = []
    folder = Path(tempfile.mkdtemp(prefix="clients-"))
    with running_server(folder) as server:
        draw_circle(server, folder / "circle.png")
        for client in chosen:
            click.echo(f"{client.name} ...", err=True)
            outcomes.append(run_client(client, server, cache.resolve(), folder))
    write_table(outcomes, output)
    if keep:
        click.echo(f"The logs are in {folder}", err=True)
    else:
        shutil.rmtree(folder)
    ctx.exit(any(outcome.fails for outcome in outcomes))


if __name__ == "__main__":
    main()
