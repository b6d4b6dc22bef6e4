"""docs/mcp.md: its settings start the command, and its numbers are the tools' own."""

from __future__ import annotations

import json
import re
from typing import Any

from mlx_janus.commands import mcp
from mlx_janus.mcp import calls, tools
from mlx_janus.mcp.tools import AskArguments, EditArguments, GenerateArguments
from tests.support.programs import ROOT

PAGE = (ROOT / "docs" / "mcp.md").read_text(encoding="utf-8")


def settings() -> list[dict[str, Any]]:
    """The entries of Janus in the settings of programs."""
    blocks = re.findall(r"^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    entries = []
    for block in blocks:
        found = json.loads(block if block.startswith("{") else f"{{{block}}}")
        while "command" not in found and "url" not in found:
            (found,) = found.values()
        entries.append(found)
    return entries


def test_the_settings_start_the_command() -> None:
    commands = [entry for entry in settings() if "command" in entry]
    assert len(commands) == 5  # uv's and four programs'
    for entry in commands:
        arguments = entry["args"][entry["args"].index("mcp") + 1 :]
        with mcp.main.make_context("mcp", arguments) as context:
            assert context.params["model"] == "janus-pro-1b"


def test_the_arguments_are_the_tools_own() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE, re.MULTILINE)
    schemas = {
        tools.GENERATE: GenerateArguments,
        tools.ASK: AskArguments,
        tools.EDIT: EditArguments,
    }
    assert [name for name, _ in rows] == list(schemas)
    shared = set(GenerateArguments.model_fields)
    for name, text in rows:
        named = set(re.findall(r"`(\w+)`", text)) - {tools.GENERATE}
        if name == tools.EDIT:
            named |= shared
        assert named == set(schemas[name].model_fields)
    assert f"`n` (1 to {tools.MAX_IMAGES})" in PAGE
    assert f"`max_tokens` (1 to {tools.MAX_TOKENS}, default 512)" in PAGE
    assert calls._MAX_RESULT == 1_000_000
