"""Count what the layout and the wording of the package are judged by.

    python -m benchmarks.checks.counts            # of this checkout
    python -m benchmarks.checks.counts ../other   # of another one

Nothing is imported: every number is counted in the text of the files.
"""

import argparse
import ast
import functools
import re
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PACKAGE = "besa_cli"
_DOCUMENTED = (PACKAGE, "benchmarks", "tests")
_QUESTION = re.compile(r"(What|Where|How|Whether|Which|Those)\b")


def counts(root: Path) -> dict[str, int]:
    """Name → count, of the checkout in `root`."""
    package = root / PACKAGE
    trees = {path: _tree(path) for path in sorted(package.rglob("*.py"))}
    rooms = {path: path.relative_to(package).parts[0].removesuffix(".py") for path in trees}
    classes = Counter(node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return {
        "modules at the top level": len(list(package.glob("*.py"))),
        "rooms (modules and packages at the top level)": len(set(rooms.values())),
        "import arrows between rooms": len(set(_arrows(trees, rooms))),
        "class names that are given more than once": sum(number > 1 for number in classes.values()),
        "lines with `Any` outside imports": sum(_lines(path, "Any") for path in trees),
        "files with the identifier `sparsity`": sum(_lines(path, "sparsity") > 0 for path in trees),
        "bytes of README.md": (root / "README.md").stat().st_size,
        **{f"docstrings in {folder}/ with a question word first": _questions(root / folder) for folder in _DOCUMENTED},
    }


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _arrows(trees: Mapping[Path, ast.Module], rooms: Mapping[Path, str]) -> Iterator[tuple[str, str]]:
    """(importing room, imported room) for every import between two rooms, those for type checkers included."""
    known = set(rooms.values())
    for path, tree in trees.items():
        for name in (name for node in ast.walk(tree) for name in _imported(node)):
            words = name.split(".")
            if words[0] == PACKAGE and words[-1] != PACKAGE and words[1] in known - {rooms[path]}:
                yield rooms[path], words[1]


def _imported(node: ast.AST) -> list[str]:
    """Full names that an import statement imports: `from besa_cli import disk` is `besa_cli.disk`."""
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{name.name}" for name in node.names]
    return []


def _lines(path: Path, identifier: str) -> int:
    """Lines of a file that use an identifier: a name, an attribute or a keyword, not in imports, texts or comments."""
    nodes = [node for node in ast.walk(_tree(path)) if isinstance(node, ast.Import | ast.ImportFrom)]
    imports = {line for node in nodes for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    with path.open("rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    named = {token.start[0] for token in tokens if token.type == tokenize.NAME and token.string == identifier}
    return len(named - imports)


def _questions(folder: Path) -> int:
    """Docstrings below a folder, of modules, classes and functions, that begin with a question word."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for path in folder.rglob("*.py") for node in ast.walk(_tree(path)) if isinstance(node, kinds)]
    return sum(bool(_QUESTION.match(ast.get_docstring(node) or "")) for node in nodes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line for every count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=Path(__file__).parents[2], help="a checkout")
    for name, number in counts(parser.parse_args(arguments).root).items():
        print(f"{number:>7,}  {name}")


if __name__ == "__main__":
    main()
