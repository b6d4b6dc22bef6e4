"""The shape of the package in numbers: ``python benchmarks/house.py [FOLDER ...]``.

Of each package folder (this clone's by default; another checkout's to compare): files on top, circles of imports with
those for type checking counted, functions over 50 lines, and functions of a cyclomatic complexity over 15, by name.
Only the source is read; nothing is imported.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

PACKAGE = Path(__file__).resolve().parent.parent / "mlx_janus"
LONG = 50  # lines
COMPLEX = 15  # paths
_BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp, ast.match_case)


@dataclass(frozen=True)
class Function:
    """A function, with its length in lines and its cyclomatic complexity."""

    name: str
    lines: int
    complexity: int


def modules(package: Path) -> dict[str, ast.Module]:
    """Parse every module of a package, by its dotted name."""
    trees = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def imports(trees: dict[str, ast.Module], packages: set[str]) -> dict[str, set[str]]:
    """Return the modules of the same package that each module imports, wherever in the file.

    An import of a name from a package counts as one of the package's module of that name, if there is one.
    """
    found: dict[str, set[str]] = {}
    for name, tree in trees.items():
        here = name if name in packages else name.rpartition(".")[0]
        found[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names if alias.name in trees}
            elif isinstance(node, ast.ImportFrom):
                found[name] |= set(_targets(node, here, trees))
        found[name].discard(name)
    return found


def _targets(node: ast.ImportFrom, here: str, trees: dict[str, ast.Module]) -> Iterator[str]:
    parents = here.split(".")[: len(here.split(".")) - node.level + 1] if node.level else []
    base = ".".join([*parents, *([node.module] if node.module else [])])
    for alias in node.names:
        target = f"{base}.{alias.name}"
        if target in trees:
            yield target
        elif base in trees:
            yield base


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that reach each other by imports (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in order:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], order[target])
        if low[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return groups


def functions(trees: dict[str, ast.Module]) -> list[Function]:
    """Return every function of the package, methods and inner functions included."""
    found = []
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                found.append(Function(f"{module}.{node.name}", lines, complexity(node)))
    return found


def complexity(function: ast.AST) -> int:
    """Count the paths through a function: one, and one more for each branch, loop, ``and``, ``or`` and filter."""
    paths = 1
    for node in ast.walk(function):
        if isinstance(node, _BRANCHES):
            paths += 1
        elif isinstance(node, ast.BoolOp):
            paths += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            paths += 1 + len(node.ifs)
    return paths


def report(package: Path) -> list[str]:
    """Return the figures of a package as lines."""
    trees = modules(package)
    packages = {name for name in trees if (package.parent / Path(*name.split("."))).is_dir()}
    rings = circles(imports(trees, packages - {package.name}) | {package.name: set()})
    all_functions = functions(trees)
    long = sorted((f for f in all_functions if f.lines > LONG), key=lambda f: -f.lines)
    knotted = sorted(
        (f for f in all_functions if f.complexity > COMPLEX), key=lambda f: -f.complexity
    )
    return [
        f"{len(trees)} modules, {len(all_functions)} functions",
        f"files on top: {len(list(package.glob('*.py')))}",
        f"import circles: {len(rings)}",
        *(f"  {', '.join(ring)}" for ring in rings),
        f"functions over {LONG} lines: {len(long)}",
        *(f"  {f.lines} {f.name}" for f in long),
        f"functions of complexity over {COMPLEX}: {len(knotted)}",
        *(f"  {f.complexity} {f.name}" for f in knotted),
    ]


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folders: tuple[Path, ...]) -> None:
    """Print the shape of each package folder, of this clone's package by default."""
    sys.setrecursionlimit(10_000)
    for folder in folders or (PACKAGE,):
        click.echo(f"{folder}:")
        for line in report(folder.resolve()):
            click.echo(f"  {line}")


if __name__ == "__main__":
    main()
