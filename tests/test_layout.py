"""The shape of the package: who may import whom, and what starting the program must not load."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import pytest

import besa_cli
from besa_cli.exporters import EXPORTERS
from besa_cli.pruners import PRUNERS
from besa_cli.quantizers import QUANTIZERS
from besa_cli.stream.method import MethodOptions

PACKAGE = Path(besa_cli.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# The floors of the package, from the lowest: each imports only from floors below its own; a package's own files may
# import each other.
LAYERS = (
    {"choices", "errors"},
    {"ops", "system"},
    {"models", "sim"},
    {"text"},
    {"checkpoint"},
    {"decoder", "runtime", "simulation"},
    {"calibration", "exporters", "hf", "stream"},
    {"inference"},
    {"evaluation", "fitting", "pruners", "quantizers"},
    {"bench", "jobs"},
    {"console"},
    {"report"},
    {"commands"},
    {"app"},
    {"__main__"},
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
HEAVY = (
    "datasets",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "lm_eval",
    "matplotlib",
    "numpy",
    "psutil",
    "pyarrow",
    "pydantic",
    "rich",
    "safetensors",
    "torch",
    "transformers",
)


def part_of(path: Path) -> str:
    """The module, or the folder, right below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, in full: `from besa_cli import errors` is `besa_cli.errors`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    own = part_of(path)
    if own == "__init__":
        assert not list(imported(path))
        return
    assert own in RANK, f"{own} has no place in LAYERS"
    for name in imported(path):
        words = name.split(".")
        if words[0] != "besa_cli" or words[1] in (own, "__version__"):
            continue
        assert RANK[words[1]] < RANK[own], f"{own} must not import {name}"


def test_every_place_in_the_layers_is_taken() -> None:
    assert set(RANK) == {part_of(path) for path in MODULES} - {"__init__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_console_draws_and_nobody_brings_a_second_click(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported(path)}
    assert "click" not in roots
    if part_of(path) != "console":
        assert "rich" not in roots


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys, time; start = time.perf_counter(); from besa_cli.app import main; code = main(['--help']);"
        f"seconds = time.perf_counter() - start; loaded = sorted(set({HEAVY}) & set(sys.modules));"
        "print(f'{code} {loaded} {seconds:.3f} s')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    code_and_loaded, _, seconds = done.stdout.splitlines()[-1].rpartition("] ")
    print(f"besa --help took {seconds}")  # noqa: T201 - shown by pytest -rP; a limit would fail on a busy machine
    assert code_and_loaded == "0 ["
    assert "Usage: besa" in done.stdout


METHODS = {"pruners": PRUNERS, "quantizers": QUANTIZERS}


@pytest.mark.parametrize("folder", METHODS)
def test_methods_offered_are_the_files_and_folders_there_are(folder: str) -> None:
    there = {path.stem for path in (PACKAGE / folder).iterdir()} - {"__init__", "__pycache__"}
    assert there == set(METHODS[folder])


@pytest.mark.parametrize(("folder", "name"), [(folder, name) for folder, names in METHODS.items() for name in names])
def test_a_method_is_options_and_a_function(folder: str, name: str) -> None:
    module = importlib.import_module(f"besa_cli.{folder}.{name}")
    options: type[MethodOptions] = module.Options
    assert is_dataclass(options)
    assert issubclass(options, MethodOptions)
    assert options().memory_use().state > 0
    assert callable(module.prune if folder == "pruners" else module.quantize)
    assert METHODS[folder][name]


def test_formats_offered_have_a_file_that_writes_them() -> None:
    for name in EXPORTERS:
        module = importlib.import_module(f"besa_cli.exporters.{name.replace('-', '_')}")
        assert is_dataclass(module.Options)
        assert callable(module.write)
