"""Count the idioms that CONTRIBUTING.md rules out: ``python docs/check_voice.py``.

``--list`` prints each idiom with its place, and paths limit the check to them. The check reads the
docstrings, comments and help texts of Python files, and Markdown pages without their code. The
exit code is 1 if there are more than ``LIMIT`` idioms in 1,000 words.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 2.0  # idioms in 1,000 words
PATHS = (
    "mlx_janus",
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/cli.md",
    "docs/commands.md",
    "docs/lab-notes.md",
    "docs/library.md",
    "docs/mcp.md",
    "docs/models.md",
    "docs/reference.md",
    "docs/safety.md",
    "docs/server.md",
    "docs/tiny.md",
    "docs/troubleshooting.md",
)

_VERBS = (
    "is|are|was|were|has|have|had|can|may|must|comes?|goes|follows|stands|lies|makes|takes|gives"
    "|needs|fits?"
)
_SUBJECTS = "it|they|he|she|a|an|the|there|one|this|that"
IDIOMS = {
    '"what" as a noun': rf"\b(?:what(?:ever)?) (?:{_VERBS}|{_SUBJECTS})\b(?![^.\n]*\?)",
    "passive of people": (
        r"\b(?:is|are|was|were|be) (?:told|asked|said|shown|taken|had|meant|given)\b"
    ),
    "goes, comes, stands, lies, bears": r"\b(?:goes|comes|stands|lies|bears)\b",
    'fragment with "of"': (
        r"(?:(?<=\n)|(?<=\A)|(?<=[.:] )|(?<=# ))"  # at the start of a line, a sentence or a comment
        r"of (?:the|a|an|its|each|all|one|those|these)\b"
    ),
    "anew, alike, alone, yet": r"\b(?:anew|alike|yet)\b|\balone\b(?! (?:and|or|in|with))",
    "amid, beside, besides, meanwhile": r"\b(?:amid|beside|meanwhile)\b",
    "so many, so much, as many": r"\b(?:so (?:many|much)|as many)\b(?! as\b)",
    "but for, no more": r"\b(?:all but|but for|is no [a-z]+:)",
}
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", flags=re.MULTILINE | re.DOTALL)
_HELP = ("help", "description", "short_help")  # keyword arguments that users read


@dataclass(frozen=True)
class Text:
    """A piece of prose and its place."""

    place: str
    words: str


def prose(path: Path) -> Iterator[Text]:
    """Yield the prose of a Markdown page, or of a Python file."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        # Code becomes empty lines, so that the numbers of the other lines stay the same.
        without_code = _CODE.sub(lambda code: "\n" * code[0].count("\n"), source)
        for number, line in enumerate(without_code.splitlines(), 1):
            yield Text(f"{path}:{number}", line)
        return
    for node in ast.walk(ast.parse(source)):
        if text := _prose_of(node):
            yield Text(f"{path}:{getattr(node, 'lineno', 1)}", text)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_prose = "type: ignore" not in token.string and "noqa" not in token.string
        if token.type == tokenize.COMMENT and is_prose:
            yield Text(f"{path}:{token.start[0]}", token.string)


def _prose_of(node: ast.AST) -> str | None:
    """Return the docstring, help text or bare string of a node; None: it has none."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return ast.get_docstring(node)
    is_help = isinstance(node, ast.keyword) and node.arg in _HELP
    if is_help or isinstance(node, ast.Expr):
        value = node.value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return value.value
    return None


def idioms(text: Text) -> Iterator[tuple[str, str]]:
    """Yield the kind of each idiom in a text, and the words around it."""
    for kind, pattern in IDIOMS.items():
        for found in re.finditer(pattern, text.words, flags=re.IGNORECASE):
            around = text.words[max(found.start() - 30, 0) : found.end() + 30]
            yield kind, " ".join(around.split())


def files(paths: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files at some paths, which are relative to the clone.

    A folder stands for all Python files in it.
    """
    for name in paths:
        path = ROOT / name
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


def texts(paths: tuple[str, ...]) -> Iterator[Text]:
    """Yield the prose of all files, each text once in a file."""
    for path in files(paths):
        seen: set[str] = set()
        for text in prose(path):
            if text.words not in seen:  # a docstring is also an expression
                seen.add(text.words)
                yield text


@click.command()
@click.argument("paths", nargs=-1)
@click.option("--list", "as_list", is_flag=True, help="Print each idiom with its place.")
def main(paths: tuple[str, ...], as_list: bool) -> None:
    """Count idioms in 1,000 words of prose, by default in the package and its pages."""
    words = 0
    counts = dict.fromkeys(IDIOMS, 0)
    for text in texts(paths or PATHS):
        words += len(text.words.split())
        for kind, around in idioms(text):
            counts[kind] += 1
            if as_list:
                click.echo(f"{Path(text.place).relative_to(ROOT)}  {kind}: {around}")
    for kind, count in counts.items():
        click.echo(f"{1000 * count / max(words, 1):5.2f}  {kind}")
    rate = 1000 * sum(counts.values()) / max(words, 1)
    click.echo(f"{rate:5.2f}  idioms in 1,000 words, of {words} words; at most {LIMIT:g}")
    sys.exit(rate > LIMIT)


if __name__ == "__main__":
    main()
