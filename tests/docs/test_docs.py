"""The docs say what is so: the commands' page is theirs, the library's page runs."""

from __future__ import annotations

import importlib.util
import re
import shutil
import tomllib
from pathlib import Path

import pytest

from tests.support.programs import ROOT, run


def test_the_page_of_the_commands_is_not_stale(tmp_path: Path) -> None:
    """Run it in a process of its own: click keeps what other tests made of a command's options."""
    for name in ("write_cli.py", "cli.md"):
        (tmp_path / "docs").mkdir(exist_ok=True)
        shutil.copy(ROOT / "docs" / name, tmp_path / "docs" / name)
    before = (tmp_path / "docs" / "cli.md").read_text(encoding="utf-8")
    done = run(tmp_path / "docs" / "write_cli.py", cwd=tmp_path)
    assert done.code == 0, done.stderr
    stale = "run `python docs/write_cli.py`"
    assert (tmp_path / "docs" / "cli.md").read_text(encoding="utf-8") == before, stale


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
    assert any(line.startswith("{'shape': ") for line in lines)
    assert re.search(r"^\d+ of \d+ tokens were read before$", done.stdout, re.MULTILINE)
    assert {"circle.png", "blue.png", "talk.json"} <= {path.name for path in tmp_path.iterdir()}
    assert lines[-1] == "(1, 64, 1024) (1, 64, 426)"


def test_the_trees_of_modules_are_not_stale() -> None:
    spec = importlib.util.spec_from_file_location("write_tree", ROOT / "docs" / "write_tree.py")
    assert spec is not None
    assert spec.loader is not None
    write_tree = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(write_tree)
    stale = "run `python docs/write_tree.py`"
    assert "\n".join(write_tree.whole_tree()) == write_tree.TARGET.read_text(encoding="utf-8"), (
        stale
    )
    architecture = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert write_tree.with_tree(architecture) == architecture, stale


def test_the_table_of_layers_is_the_contract_and_the_tree() -> None:
    """Each row of import-linter's contract is a row of ARCHITECTURE.md, and each module has one."""
    table = (
        (ROOT / "ARCHITECTURE.md")
        .read_text(encoding="utf-8")
        .split("| layer | holds |")[1]
        .split("\n\n")[0]
    )
    rows = [set(re.findall(r"`(\w+)`", line.split("|")[1])) for line in table.splitlines()[2:]]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]
    assert rows == [set(re.split(r"[ |:]+", row)) for row in contract["layers"]]
    assert contract["exhaustive"]
    package = ROOT / "mlx_janus"
    there = {path.stem for path in package.glob("*.py")} | {
        path.parent.name for path in package.glob("*/__init__.py")
    }
    assert set.union(*rows) == there - {"__init__"}
