"""The language of docstrings: a verb or a noun first, the subject named."""

import ast
from pathlib import Path

import besa_cli

PACKAGE = Path(besa_cli.__file__).parent
NOT_FIRST = {"How", "It", "See", "That", "Those", "What", "Where", "Whether", "Which", "Who", "Whose"}


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                words = (ast.get_docstring(node) or "").split(maxsplit=1)
                if words and words[0].strip(",:;") in NOT_FIRST:
                    found.append(f"{path.relative_to(PACKAGE)}: {' '.join(words)[:60]}")
    assert found == []


def test_no_class_name_is_used_twice() -> None:
    places: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}
