"""Count the idioms that CONTRIBUTING.md rules out: ``python docs/check_voice.py [--list] [PATH ...]``.

Read are docstrings, comments and help texts of the package, and the pages in plain Markdown. The exit code is 1 if more
than ``LIMIT`` idioms stand in 1,000 words.
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
    "docs/library.md",
    "docs/cli.md",
    "docs/server.md",
)

IDIOMS = {
    '"what" as a noun': r"\b(?:what(?:ever)?|whatever) (?:is|are|was|were|has|have|had|can|may|must|it|they|he|she|a|an|the|there|one|this|that|comes?|goes|follows|stands|lies|makes|takes|gives|needs|fits?)\b(?![^.\n]*\?)",
    "passive of people": r"\b(?:is|are|was|were|be) (?:told|asked|said|shown|taken|had|meant|given)\b",
    "goes, comes, stands, lies, bears": r"\b(?:goes|comes|stands|lies|bears)\b",
    'fragment with "of"': r"(?:(?<=\n)|(?<=\A)|(?<=[.:] )|(?<=# ))of (?:the|a|an|its|each|all|one|those|these)\b",
    "anew, alike, alone, yet": r"\b(?:anew|alike|yet)\b|\balone\b(?! (?:and|or|in|with))",
    "amid, beside, besides, meanwhile": r"\b(?:amid|beside|meanwhile)\b",
    "so many, so much, as many": r"\b(?:so (?:many|much)|as many)\b(?! as\b)",
    "but for, no more": r"\b(?:all but|but for|is no [a-z]+:)",
}


@dataclass(frozen=True)
class Text:
    """A piece of prose and its place."""

    place: str
    words: str


def prose(path: Path) -> Iterator[Text]:
    """Yield the prose of a file: all of a page without its code, or a module's docstrings, comments and help texts."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        without_code = re.sub(r"^```.*?^```$|`[^`\n]*`", "", source, flags=re.MULTILINE | re.DOTALL)
        for number, line in enumerate(without_code.splitlines(), 1):
            yield Text(f"{path}:{number}", line)
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield Text(f"{path}:{getattr(node, 'lineno', 1)}", text)
        elif isinstance(node, ast.keyword) and node.arg in ("help", "description", "short_help"):
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                yield Text(f"{path}:{node.value.lineno}", node.value.value)
        elif (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield Text(f"{path}:{node.lineno}", node.value.value)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if (
            token.type == tokenize.COMMENT
            and "type: ignore" not in token.string
            and "noqa" not in token.string
        ):
            yield Text(f"{path}:{token.start[0]}", token.string)


def idioms(text: Text) -> Iterator[tuple[str, str]]:
    """Yield the kind of each idiom in a text, and the words around it."""
    for kind, pattern in IDIOMS.items():
        for found in re.finditer(pattern, text.words, flags=re.IGNORECASE):
            around = text.words[max(found.start() - 30, 0) : found.end() + 30]
            yield kind, " ".join(around.split())


def files(paths: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files of some paths, relative to the clone."""
    for name in paths:
        path = ROOT / name
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


@click.command()
@click.argument("paths", nargs=-1)
@click.option("--list", "as_list", is_flag=True, help="Print each idiom with its place.")
def main(paths: tuple[str, ...], as_list: bool) -> None:
    """Count idioms in 1,000 words of prose, in the package and its pages by default."""
    words = 0
    counts = dict.fromkeys(IDIOMS, 0)
    for path in files(paths or PATHS):
        seen: set[str] = set()
        for text in prose(path):
            if text.words in seen:
                continue  # a docstring is an expression too
            seen.add(text.words)
            words += len(text.words.split())
            for kind, around in idioms(text):
                counts[kind] += 1
                if as_list:
                    click.echo(f"{Path(text.place).relative_to(ROOT)}  {kind}: {around}")
    total = sum(counts.values())
    rate = 1000 * total / max(words, 1)
    for kind, count in counts.items():
        click.echo(f"{1000 * count / max(words, 1):5.2f}  {kind}")
    click.echo(f"{rate:5.2f}  idioms in 1,000 words, of {words} words; at most {LIMIT:g}")
    sys.exit(rate > LIMIT)


if __name__ == "__main__":
    main()
