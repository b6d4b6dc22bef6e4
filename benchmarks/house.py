"""The shape of a package in numbers: ``python benchmarks/house.py [FOLDER ...]``.

Each FOLDER is a package, by default this clone's. The script prints the files at the top, the
import circles (imports for type checking count), the functions over 50 lines and those of
cyclomatic complexity over 15 by name, the density of the code, and the words of the README. It
reads only the source and imports nothing of the package.
"""

from __future__ import annotations

import ast
import io
import random
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

PACKAGE = Path(__file__).resolve().parent.parent / "mlx_janus"
LONG = 50  # lines
COMPLEX = 15  # paths
_SHORTEST = 5  # lines of a function that is worth reading
_BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp, ast.match_case)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True)
class Function:
    """A function, with its length in lines and its cyclomatic complexity."""

    name: str
    lines: int
    complexity: int


@dataclass
class Density:
    """Counts that show how much a line of code does. Code lines have code, not only prose."""

    lines: int = 0
    tokens: int = 0
    parallel: int = 0
    comprehensions: int = 0
    deep_comprehensions: int = 0

    def per_thousand(self, count: int) -> float:
        """Return a count per 1,000 code lines."""
        return 1000 * count / max(self.lines, 1)


def sources(package: Path) -> dict[str, str]:
    """Read every module of a package, by its dotted name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path.read_text(encoding="utf-8")
    return found


def imports(trees: dict[str, ast.Module], packages: set[str]) -> dict[str, set[str]]:
    """Return the modules of the same package that each module imports, anywhere in the file.

    An import of a name from a package counts as an import of the package's module of that name, if
    there is one.
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
    """Yield the modules of ``trees`` that an import such as ``from .a import b`` imports.

    Args:
        node: the import.
        here: the package of the module that has the import. Each dot after the first leads to the
            parent of a package.
        trees: the modules by name.
    """
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
        """Visit a module and those that it reaches; append each group that is complete."""
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
    """Count the paths through a function.

    One, and one more for each branch, loop, ``and``, ``or`` and filter.
    """
    paths = 1
    for node in ast.walk(function):
        if isinstance(node, _BRANCHES):
            paths += 1
        elif isinstance(node, ast.BoolOp):
            paths += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            paths += 1 + len(node.ifs)
    return paths


def density(codes: dict[str, str], trees: dict[str, ast.Module]) -> Density:
    """Measure how dense the code is, without docstrings, comments and blank lines."""
    total = Density()
    for name, code in codes.items():
        prose = _prose_lines(trees[name])
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type not in _NO_CODE and token.start[0] not in prose:
                total.tokens += 1
                lines.update(range(token.start[0], token.end[0] + 1))
        total.lines += len(lines)
        for node in ast.walk(trees[name]):
            total.parallel += _is_parallel(node)
            if isinstance(node, _COMPREHENSIONS):
                total.comprehensions += 1
                total.deep_comprehensions += len(node.generators) > 2
    return total


def _prose_lines(tree: ast.Module) -> set[int]:
    """Return the lines of docstrings and other bare strings."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        if isinstance(node.value.value, str):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def _is_parallel(node: ast.AST) -> bool:
    """Return whether a node is an assignment like ``a, b = x, y``; a swap counts too."""
    if not isinstance(node, ast.Assign):
        return False
    return isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def report(package: Path) -> list[str]:
    """Return the figures of a package as lines."""
    codes = sources(package)
    trees = {name: ast.parse(code) for name, code in codes.items()}
    packages = {name for name in trees if (package.parent / Path(*name.split("."))).is_dir()}
    # The imports of the top package itself do not count: every module imports it implicitly.
    rings = circles(imports(trees, packages - {package.name}) | {package.name: set()})
    all_functions = functions(trees)
    by_length = sorted(all_functions, key=lambda f: -f.lines)
    by_complexity = sorted(all_functions, key=lambda f: -f.complexity)
    long = [f"  {f.lines} {f.name}" for f in by_length if f.lines > LONG]
    knotted = [f"  {f.complexity} {f.name}" for f in by_complexity if f.complexity > COMPLEX]
    return [
        f"{len(trees)} modules, {len(all_functions)} functions",
        f"files at the top: {len(list(package.glob('*.py')))}",
        f"import circles: {len(rings)}",
        *(f"  {', '.join(ring)}" for ring in rings),
        f"functions over {LONG} lines: {len(long)}",
        *long,
        f"functions of complexity over {COMPLEX}: {len(knotted)}",
        *knotted,
        *_density_lines(density(codes, trees)),
        *_readme_lines(package.parent / "README.md"),
    ]


def _density_lines(found: Density) -> Iterator[str]:
    """Yield the lines of a report about the density of the code."""
    yield f"code lines: {found.lines}"
    yield f"tokens a code line: {found.tokens / max(found.lines, 1):.2f}"
    yield f"parallel assignments in 1,000 code lines: {found.per_thousand(found.parallel):.1f}"
    yield f"comprehensions in 1,000 code lines: {found.per_thousand(found.comprehensions):.1f}"
    yield f"comprehensions with three or more for: {found.deep_comprehensions}"


def _readme_lines(readme: Path) -> Iterator[str]:
    if readme.is_file():
        yield f"words of the README: {len(readme.read_text(encoding='utf-8').split())}"


def sample(package: Path, count: int, seed: int) -> Iterator[str]:
    """Yield random functions of 5 lines or more, to be read aloud.

    A reader of the file has seen more than the function. So each comes with its module's first
    line, and a method with the head and docstring of its class too.
    """
    texts = []
    for module, source in sources(package).items():
        tree = ast.parse(source)
        heading = f"# {module}: {_first_line(tree)}"
        for node, owner in _functions_with_class(tree):
            text = ast.get_source_segment(source, node, padded=True) or ""
            if len(text.splitlines()) < _SHORTEST:
                continue
            head = _class_head(owner, source) if owner else ""
            texts.append(f"{heading}\n{head}{text}")
    yield from random.Random(seed).sample(texts, count)


def _functions_with_class(
    tree: ast.AST,
    owner: ast.ClassDef | None = None,
) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, ast.ClassDef | None]]:
    """Yield the functions inside a node, each with the class whose method it is, if any."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, owner
            yield from _functions_with_class(node)  # nested functions
        elif isinstance(node, ast.ClassDef):
            yield from _functions_with_class(node, node)
        else:
            yield from _functions_with_class(node, owner)


def _first_line(node: ast.Module) -> str:
    """Return the first line of a module's docstring."""
    docstring = ast.get_docstring(node) or ""
    return docstring.partition("\n")[0]


def _class_head(node: ast.ClassDef, source: str) -> str:
    """Return a class's source from its ``class`` line to the end of its docstring and fields."""
    lines = source.splitlines()
    end = node.lineno
    for child in node.body:
        is_docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        if not is_docstring and not isinstance(child, ast.AnnAssign | ast.Assign):
            break
        end = child.end_lineno or end
    head = "\n".join(lines[node.lineno - 1 : end])
    return f"{head}\n    ...\n"


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--sample", "count", type=int, help="Print the source of N random functions.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random functions.")
def main(folders: tuple[Path, ...], count: int | None, seed: int) -> None:
    """Print the shape of each package folder, by default of this clone's package."""
    sys.setrecursionlimit(10_000)
    for folder in folders or (PACKAGE,):
        if count is not None:
            click.echo("\n\n".join(sample(folder.resolve(), count, seed)))
            continue
        click.echo(f"{folder}:")
        for line in report(folder.resolve()):
            click.echo(f"  {line}")


if __name__ == "__main__":
    main()
