"""Write docs/tree.md and ARCHITECTURE's short tree: ``python docs/write_tree.py``.

Both have the first sentence of each module's docstring. The tests fail if either is stale.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mlx_janus"
TARGET = ROOT / "docs" / "tree.md"
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
START = "<!-- tree -->"
END = "<!-- /tree -->"
_WIDTH = 28  # characters of the column of names


def first_sentence(path: Path) -> str:
    """Return the first sentence of a module's or package's docstring, without the full stop."""
    file = path / "__init__.py" if path.is_dir() else path
    text = " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split())
    sentence = re.split(r"(?<=[.?!])\s", text, maxsplit=1)[0]
    return sentence.removesuffix(".").replace("``", "`")


def folders(folder: Path) -> list[Path]:
    """Return the packages in a folder."""
    return sorted(path for path in folder.iterdir() if (path / "__init__.py").is_file())


def short_tree() -> list[str]:
    """Return the lines of the short tree: each folder, then the files at the top."""
    lines = ["```", "mlx_janus/"]
    for path in folders(PACKAGE):
        lines.append(_line(f"  {path.name}/", first_sentence(path)))
    lines.append(_line("  assets/tiny/", "Janus-Tiny, converted"))
    for path in sorted(PACKAGE.glob("*.py")):
        lines.append(_line(f"  {path.name}", first_sentence(path)))
    return [*lines, "```"]


def whole_tree() -> Iterator[str]:
    """Yield the lines of docs/tree.md: every module, with the first sentence of its docstring."""
    yield "# Every module\n"
    yield (
        "Written by `python docs/write_tree.py` from the docstrings. "
        "ARCHITECTURE.md explains how the modules work together.\n"
    )
    yield from _table("mlx_janus/", PACKAGE)
    for folder in sorted(
        path.parent for path in PACKAGE.rglob("*/__init__.py") if path.parent != PACKAGE
    ):
        yield from _table(f"{folder.relative_to(ROOT).as_posix()}/", folder)


def _table(title: str, folder: Path) -> Iterator[str]:
    """Yield the lines of a package's section: its title, its sentence, and a table of its modules.

    A package without modules has no table.
    """
    yield f"## {title}\n"
    yield f"{first_sentence(folder)}.\n"
    files = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    if not files:
        return
    yield "| file | |\n|---|---|"
    yield "\n".join(f"| `{path.name}` | {first_sentence(path)} |" for path in files) + "\n"


def _line(name: str, about: str) -> str:
    return f"{name:{_WIDTH}}{about}"


def with_tree(page: str) -> str:
    """Return a page with the current short tree between its marks."""
    before, rest = page.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n" + "\n".join(short_tree()) + f"\n{END}{after}"


if __name__ == "__main__":
    TARGET.write_text("\n".join(whole_tree()), encoding="utf-8")
    ARCHITECTURE.write_text(with_tree(ARCHITECTURE.read_text(encoding="utf-8")), encoding="utf-8")
