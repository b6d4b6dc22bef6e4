"""The docs say what is so: the commands' page is theirs, the library's page runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from programs import ROOT, run


def test_the_page_of_the_commands_is_not_stale() -> None:
    spec = importlib.util.spec_from_file_location("write_cli", ROOT / "docs" / "write_cli.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stale = "run `python docs/write_cli.py`"
    assert module.page() == (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), stale


def test_the_page_of_the_library_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    (tmp_path / "page.py").write_text("\n".join(blocks))
    done = run("page.py", cwd=tmp_path)
    assert done.code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("a red circle 1 ")
    assert lines[5].startswith("red stop ")
    assert "blue" in lines
    assert re.search(r"^\d+ of \d+ tokens were read before$", done.stdout, re.MULTILINE)
    assert {"circle.png", "talk.json"} <= {path.name for path in tmp_path.iterdir()}
    assert lines[-1] == "(1, 64, 1024) (1, 64, 426)"
