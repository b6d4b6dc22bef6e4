"""docs/server.md: its examples in curl, Python and JavaScript, run against Janus-Tiny."""

from __future__ import annotations

import inspect
import json
import os
import plistlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import mlx_janus

# isort: split
import pytest
from PIL import Image

from benchmarks.clients.catalog import CLIENTS
from mlx_janus.commands import serve
from mlx_janus.processing.saved_images import read_metadata
from mlx_janus.server import connections as listening
from mlx_janus.server.schema import ChatRequest, ImageRequest
from mlx_janus.server.settings import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.programs import ROOT
from tests.support.serving import CHAT, DRAW, HELLO, refusal, served, started, to

PAGE = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8080"
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node runs JavaScript")


def blocks(language: str, text: str = PAGE) -> list[str]:
    """The examples in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def marked(name: str) -> str:
    """The example below a mark."""
    found = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server."""
    with started("--quiet") as running:
        yield running.url


def run(command: list[str], text: str, server: str, folder: Path) -> str:
    """Return the output of a program from the page, with this server's address in it."""
    environment = os.environ | {"no_proxy": "127.0.0.1"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        input=text.replace(ADDRESS, server),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


@pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "curl", "jq", "python3"))), reason="curl and jq are needed"
)
def test_the_examples_in_curl(server: str, tmp_path: Path) -> None:
    examples = [block for block in blocks("bash") if f" {ADDRESS}" in block and "curl -s" in block]
    first, again, plain, asked, streamed, drawn = [
        run(["bash", "-euo", "pipefail"], block, server, tmp_path) for block in examples
    ]
    assert (first, again) == ("", "")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "shapes.png").read_bytes()
    assert read_metadata(tmp_path / "shapes.png")["prompt"] == "a red circle above a blue square"
    text = json.loads(plain)["choices"][0]["message"]["content"]
    assert asked == "red\n"
    *events, usage, end = [line.removeprefix("data: ") for line in streamed.splitlines() if line]
    assert "".join(
        json.loads(event)["choices"][0]["delta"].get("content", "") for event in events
    ).startswith(text)
    assert (
        json.loads(usage)["usage"]["prompt_tokens"] == json.loads(plain)["usage"]["prompt_tokens"]
    )
    assert end == "[DONE]"
    kinds = [line.removeprefix("event: image_generation.") for line in drawn.splitlines()]
    assert (kinds.count("partial_image"), kinds.count("completed")) == (6, 2)


def test_the_examples_in_python(server: str, tmp_path: Path) -> None:
    lines = run([sys.executable, "-"], "\n".join(blocks("python")), server, tmp_path).splitlines()
    assert lines[:3] == ["drawn with seed 1", "drawn with seed 2", "red stop"]
    read, total = map(int, re.fullmatch(r"two (\d+) of (\d+)", lines[3]).groups())  # type: ignore[union-attr]
    assert 0 < read < total
    assert re.fullmatch(r".*red circle.* \(\d+ tokens\)", lines[4])
    names = {f"star-{index}-step-{step}.png" for index in (0, 1) for step in (0, 1)} | {
        "star-0.png",
        "star-1.png",
    }
    assert {line.split()[0] for line in lines[5:-1]} == names
    assert {path.name for path in tmp_path.iterdir()} == names | {"shapes-1.png", "shapes-2.png"}
    with Image.open(tmp_path / "star-0-step-0.png") as partial:
        assert partial.size == (64, 64)
    expected = (
        "400 size size must be 'auto', the model's own '64x64' or one of OpenAI's, "
        "such as '1024x1024', got '100x100'"
    )
    assert lines[-1] == expected


def test_the_readmes_example_in_python(server: str, tmp_path: Path) -> None:
    (example,) = [
        block
        for block in blocks("python", (ROOT / "README.md").read_text(encoding="utf-8"))
        if ADDRESS in block
    ]
    assert run([sys.executable, "-"], example, server, tmp_path).strip()


@needs_node
def test_the_example_in_javascript_with_fetch(server: str, tmp_path: Path) -> None:
    (example,) = [block for block in blocks("javascript") if "fetch(" in block]
    assert run(["node", "--input-type=module", "-"], example, server, tmp_path).strip()


@needs_node
def test_the_example_in_javascript_with_openais_package(server: str, tmp_path: Path) -> None:
    found = (
        subprocess.run(["npm", "root", "-g"], capture_output=True, text=True)
        if shutil.which("npm")
        else None
    )
    packages = Path(found.stdout.strip()) if found else Path("absent")
    if not (packages / "openai").is_dir():
        pytest.skip("npm install -g openai brings the package")
    (tmp_path / "node_modules").symlink_to(packages)
    (example,) = [block for block in blocks("javascript") if "fetch(" not in block]
    assert run(["node", "--input-type=module", "-"], example, server, tmp_path) == "red\n"
    assert read_metadata(tmp_path / "shapes.png")["seed"] == "1"


def test_the_routes_and_the_metrics_are_all_named(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with urlopen(f"{server}/openapi.json") as reply:
        routes = json.load(reply)["paths"]
    for route in routes:
        assert f"{route.replace('{name}', 'NAME')}`" in PAGE
    with urlopen(f"{server}/metrics") as reply:
        there = set(re.findall(r"^# TYPE (\w+)", reply.read().decode(), re.MULTILINE))
    named = set(re.findall(r"`(mlx_janus_\w+)`", PAGE))
    assert named == {name for name in there if not name.endswith("_created")}


@pytest.mark.parametrize(("name", "body"), [("chat", ChatRequest), ("images", ImageRequest)])
def test_the_fields_are_the_schemas_own(name: str, body: type[ChatRequest | ImageRequest]) -> None:
    described = body.model_json_schema()["properties"]
    refused = {
        field
        for field, schema in described.items()
        if schema.get("description", "").startswith("Not supported.")
    }
    table = fields(name)
    assert table["refused"] == refused
    assert table["supported"] == set(described) - refused
    assert not table["accepted, without effect"] & set(described)


def test_fields_without_effect_are_accepted_and_those_refused_are_named() -> None:
    engine = FakeEngine(mlx_janus.load().config)
    with served(engine) as url, to(url) as client:
        for name, path, body in (("chat", CHAT, HELLO), ("images", DRAW, {"prompt": "a fox"})):
            table = fields(name)
            ignored = dict.fromkeys(table["accepted, without effect"], "a value")
            assert client.post(path, json=body | ignored).status_code == 200
            for field in table["refused"]:
                error = refusal(client.post(path, json=body | {field: "a value"}), 400)
                assert error["param"] == field


def fields(name: str) -> dict[str, set[str]]:
    """The names in a table of fields, by row."""
    found = re.search(rf"<!-- fields of {name} -->\n(.*?)\n\n", PAGE, re.DOTALL)
    assert found
    _, _, *rows = [line.strip("| ").split(" | ") for line in found[1].splitlines()]
    return {kind: set(re.findall(r"`(\w+)`", names)) for kind, names in rows}


def test_the_versions_are_those_that_the_clients_are_run_with() -> None:
    section = PAGE.partition("\n## Clients\n")[2].partition("\n## Evaluation")[0]
    named = set(re.findall(r"([@\w/-]+) (\d+\.\d+(?:\.\d+)?)\b", section))
    pinned = {
        client.name: [
            tuple(re.sub(r"\[.*\]", "", package).replace("==", "@").rsplit("@", 1))
            for package in client.packages
        ]
        for client in CLIENTS
    }
    assert named <= {package for packages in pinned.values() for package in packages}
    assert {packages[0] for packages in pinned.values()} - named <= {("open-webui", "0.12.4")}


# What is not run


def test_the_settings_of_other_programs_are_well_formed() -> None:
    job = plistlib.loads(marked("launchd").encode())
    assert f"{job['Label']}.plist" in PAGE
    module = job["ProgramArguments"][1:]
    assert module[:3] == ["-m", "mlx_janus", "serve"]
    with serve.main.make_context(
        "serve", module[3:]
    ) as context:  # left, it takes back what --quiet did to logging
        assert context.params["model"] == "janus-pro-1b"
    model = json.loads(marked("vlmevalkit"))["model"]["janus-pro-1b"]
    assert model["api_base"] == f"{ADDRESS}/v1/chat/completions"


def test_the_numbers_are_the_servers_own() -> None:
    own = {name: option.default for name, option in inspect.signature(Settings).parameters.items()}
    for said in (
        f"http://{own['host']}:{own['port']}",
        f"is over {own['body_limit'] // 10**6} MB",
        f"took over {own['body_seconds']:g} seconds",
        f"An image may have {own['image_limit'] // 10**6} MB",
        f"a comment every {own['heartbeat_seconds']:g} seconds",
        f"gives the running ones {listening.GRACE:g} seconds",
    ):
        assert said in " ".join(PAGE.split()), said
