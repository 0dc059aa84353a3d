"""The documents say what the program does: commands parse, links lead somewhere, tables and examples are the code's."""

import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from support import tiny_models
from typer.main import get_command

import besa_cli
from besa_cli import pruners, sim
from besa_cli.app import app
from besa_cli.calibration import calibration_set, prepare
from besa_cli.checkpoint.runs import Run
from besa_cli.evaluation import texts
from besa_cli.evaluation.measurement import Perplexity
from besa_cli.jobs import quantize
from besa_cli.jobs.stage import StageJob
from besa_cli.pruners import wanda
from besa_cli.sim import accelerator
from besa_cli.text import corpora, documents

PACKAGE = Path(besa_cli.__file__).parent
ROOT = PACKAGE.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
LOG = sorted((ROOT / "dev" / "log").glob("*.md"))
PAGES = (*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md")), PACKAGE / "data" / "LICENSES.md")
LINKED = (*PAGES, *LOG, *sorted((ROOT / "benchmarks").glob("*.md")), ROOT / "examples" / "README.md")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)")


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fenced(page: Path, language: str) -> list[str]:
    """The code blocks of one language."""
    return [body for found, body in _FENCE.findall(text(page)) if found == language]


def table(page: Path, header: str) -> list[list[str]]:
    """The cells of the table whose first line begins with `header`."""
    rows = []
    for line in text(page).split(f"\n{header}")[1].splitlines()[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def quoted(part: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"`([^`]+)`", _FENCE.sub("", part))


def test_the_reference_of_the_command_line_is_current() -> None:
    command = ["typer", "besa_cli.app", "utils", "docs", "--name", "besa"]
    made = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    remedy = f"make it anew: python -m {shlex.join(command)} --output docs/cli.md"
    assert text(DOCS / "cli.md").strip() == made.stdout.strip(), remedy


def command_lines() -> Iterator[str]:
    """Every line with a `besa` command in the shell blocks of all pages."""
    for page in PAGES:
        for body in fenced(page, "sh"):
            yield from (line.partition("#")[0].strip() for line in body.splitlines() if line.startswith("besa "))


@pytest.mark.parametrize("line", sorted(set(command_lines())))
def test_every_command_line_in_the_documents_parses(line: str, workplace: Path) -> None:
    words = shlex.split(line)
    words = words[: words.index(">")] if ">" in words else words
    for word in words:
        if word.endswith(".yaml"):
            (workplace / word).parent.mkdir(parents=True, exist_ok=True)
            (workplace / word).write_text("")
    program = get_command(app)
    called: list[str] = []
    for name, leaf in leaves(program, "besa"):
        leaf.callback = lambda name=name, **_: called.append(name)
    program.main(args=words[1:], prog_name="besa", standalone_mode=False)
    assert len(called) == 1
    assert line.startswith(called[0])


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command that does something, by all its words."""
    for word, below in getattr(command, "commands", {}).items():
        yield from leaves(below, f"{name} {word}")
    if not hasattr(command, "commands"):
        yield name, command


def test_there_are_command_lines_for_every_command_in_the_documents() -> None:
    shown = "\n".join(command_lines())
    for name, _ in leaves(get_command(app), "besa"):
        assert name in shown, name


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_inside_the_repository_leads_somewhere(page: Path) -> None:
    for path, anchor in _LINK.findall(text(page)):
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name} links to {path}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", text(target), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{page.name} links to {path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_no_section_that_another_page_lacks(page: Path) -> None:
    for path, number in re.findall(r"\]\(([^)#\s]+)\), section (\d+)", text(page)):
        assert re.search(rf"^## {number}\. ", text(page.parent / path), re.MULTILINE), f"{page.name}: {path}, {number}"


@pytest.fixture
def code_map() -> ModuleType:
    """The script that writes docs/code-map.md."""
    spec = importlib.util.spec_from_file_location("code_map", ROOT / "dev" / "code_map.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_code_map_is_that_of_the_docstrings(code_map: ModuleType) -> None:
    assert text(DOCS / "code-map.md") == code_map.page(), "make it again: python dev/code_map.py"


def test_the_floors_of_the_code_map_hold_every_part_once_and_no_import_leads_up(code_map: ModuleType) -> None:
    rows = table(DOCS / "code-map.md", "| floor |")
    height = {part: int(level) for level, parts in rows for part in quoted(parts)}
    there = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if list(path.rglob("*.py")) or path.suffix == ".py"
    }
    assert sum(len(quoted(parts)) for _, parts in rows) == len(height)
    assert set(height) == there - {"__init__"}
    below = {"app": "commands", "commands": "jobs", "jobs": "stream", "stream": "ops", "pruners": "stream"}
    for own, lower in below.items():
        assert lower in code_map.imports()[own]
        assert height[lower] < height[own]


def test_the_code_map_has_every_file_once_and_says_what_every_module_is(code_map: ModuleType) -> None:
    linked = re.findall(r"^- \[(\S+)\]\(\.\./(\S+)\)(?:: (.+))?$", text(DOCS / "code-map.md"), re.MULTILINE)
    there = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so" and path.name != "__init__.py"
    }
    assert sorted(path for _, path, _ in linked) == sorted(there)
    for name, path, about in linked:
        assert name == Path(path).name
        if path.endswith((".py", ".cpp", ".h", ".toml")):
            assert about, f"{path} does not say what it is"
    assert code_map.summary(PACKAGE / "__main__.py") == "`python -m besa_cli` is the command `besa`."
    toml = text(PACKAGE / "sim" / "accelerators" / "vitcod.toml").splitlines()[0]
    assert code_map.summary(PACKAGE / "sim" / "accelerators" / "vitcod.toml").startswith(toml.removeprefix("# "))


def test_the_page_of_the_benchmarks_names_every_script_and_every_file_of_lines() -> None:
    folder = ROOT / "benchmarks"
    named = {Path(name).name for name in quoted(text(folder / "README.md"))}
    there = {path.name for path in folder.rglob("*") if path.suffix in (".py", ".jsonl") and path.name != "__init__.py"}
    assert there - named == set(), "not in benchmarks/README.md"
    written = {name for name in named if name.endswith((".py", ".jsonl"))}
    assert written - there == {"interruptions.py"}, "in benchmarks/README.md, but not there"


def test_the_readme_lists_the_methods_with_what_each_can_do() -> None:
    rows = {quoted(row[0])[0]: row for row in table(README, "| `--method` |")}
    assert list(rows) == list(pruners.PRUNERS)
    for name, row in rows.items():
        options = importlib.import_module(f"besa_cli.pruners.{name}").Options
        assert (row[-1] == "yes") == ("nm" in {field.name for field in fields(options)}), name


def test_the_readme_is_short() -> None:
    assert len(README.read_bytes()) <= 10_000


def test_the_pages_say_how_the_demo_is_limited() -> None:
    limits = dict(re.findall(r"^DEMO_(\w+) \?= (.*)$", text(ROOT / "Makefile"), re.MULTILINE))
    said = " ".join(text(DOCS / "usage.md").split())
    assert f"{limits['SAMPLES']} × {limits['SEQLEN']} tokens" in said
    assert f"first {limits['WINDOWS']} windows of WikiText-2" in said
    for page in (README, DOCS / "usage.md"):
        assert f"besa prune --data bundled --samples {limits['SAMPLES']} --seqlen {limits['SEQLEN']}" in text(page)
        assert f"besa eval ppl wikitext2 --limit {limits['WINDOWS']}" in text(page)


def test_the_variables_in_the_documents_are_those_that_the_program_reads() -> None:
    code = "\n".join(text(path) for path in PACKAGE.rglob("*.py"))
    named = {name for page in PAGES for name in re.findall(r"`(BESA_\w+)`", text(page))}
    read = set(re.findall(r'"(BESA_\w+)"', code))
    assert named == read
    assert read <= set(quoted(text(DOCS / "configuration.md")))


def test_the_citation_names_the_version_and_the_licence_of_the_program() -> None:
    cited = yaml.safe_load(text(ROOT / "CITATION.cff"))
    assert cited["version"] == besa_cli.__version__
    assert cited["license"] == tomllib.loads(text(ROOT / "pyproject.toml"))["project"]["license"]
    assert f"## {cited['version']} ({cited['date-released']})" in text(ROOT / "CHANGELOG.md")


def test_continuous_integration_runs_what_a_person_runs_on_every_python_that_is_promised() -> None:
    project = tomllib.loads(text(ROOT / "pyproject.toml"))["project"]
    job = yaml.safe_load(text(ROOT / ".github" / "workflows" / "ci.yml"))["jobs"]["checks"]
    assert job["steps"][-1] == {"run": ".ci/run"}
    promised = [name.rpartition(" ")[2] for name in project["classifiers"] if ":: Python :: 3" in name]
    assert job["strategy"]["matrix"]["python"] == promised
    assert project["requires-python"] == f">={promised[0]}"


def test_the_index_of_the_documents_has_every_page_once() -> None:
    for page, folder in ((DOCS / "README.md", ""), (README, "docs/")):
        linked = [path for path, _ in _LINK.findall(text(page).split("## Documents")[-1].split("## Dive")[0])]
        own = [
            path.removeprefix(folder) for path in linked if path.startswith(folder) and "/" not in path[len(folder) :]
        ]
        assert sorted(own) == sorted(path.name for path in DOCS.glob("*.md") if path.name != "README.md"), page


def test_functions_and_files_in_the_page_on_architecture_exist() -> None:
    named = set(quoted(text(DOCS / "architecture.md")))
    for name in {name for name in named if re.fullmatch(r"ops\.\w+\.\w+", name)}:
        module, _, member = name.rpartition(".")
        assert hasattr(importlib.import_module(f"besa_cli.{module}"), member), name
    for name in {name for name in named if re.fullmatch(r"\w+/(\w+/)*\w+\.py", name)}:
        assert (PACKAGE / name).exists() or (ROOT / name).exists(), name


def test_every_function_in_the_method_page_exists() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    named = [name for name in quoted(text(DOCS / "method.md")) if "." in name and name.split(".")[0] in parts]
    assert len(named) > 20
    for name in named:
        module, _, member = name.rpartition(".")
        assert hasattr(importlib.import_module(f"besa_cli.{module}"), member), name


def test_every_function_of_the_mathematics_is_in_the_method_page() -> None:
    named = quoted(text(DOCS / "method.md"))
    for path in sorted((PACKAGE / "ops").glob("*.py")):
        module = importlib.import_module(f"besa_cli.ops.{path.stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if not name.startswith("_") and function.__module__ == module.__name__:
                assert f"ops.{path.stem}.{name}" in named, f"docs/method.md lacks ops.{path.stem}.{name}"


def test_the_method_page_states_the_defaults_of_the_code() -> None:
    from besa_cli.pruners import besa

    rows = {quoted(row[0])[0]: row[0] for row in table(DOCS / "method.md", "| `--loss` |") if quoted(row[0])}
    assert "(default)" in rows[besa.Options.loss]
    assert f"`--target {besa.Options.target}` (default)" in text(DOCS / "method.md")
    assert f"`--candidates` = {besa.Options.candidates}" in text(DOCS / "method.md")
    assert f"`--lr` = {besa.Options().lr}" in text(DOCS / "method.md")


def test_the_data_page_lists_the_names_and_the_kinds_of_files() -> None:
    names = [quoted(row[0])[0] for row in table(DOCS / "data.md", "| name |")]
    assert sorted(names) == sorted(corpora.SOURCES)
    evaluated = [quoted(row[0]) for row in table(DOCS / "data.md", "| data set |")]
    assert [name for cell in evaluated for name in cell] == list(texts.EVALUATION_SETS)
    kinds = {kind for row in table(DOCS / "data.md", "| suffix |") for kind in quoted(row[0]) if kind.startswith(".")}
    assert kinds == set(documents.SUFFIXES)


def test_the_simulation_page_lists_the_dataflows_the_accelerators_and_the_defaults() -> None:
    page = text(DOCS / "simulate.md")
    assert set(re.findall(r"^\*\*`([\w-]+)`\*\*", page, re.MULTILINE)) == set(sim.DATAFLOWS)
    rows = [quoted(row[0])[0] for row in table(DOCS / "simulate.md", "| `--accelerator` |")]
    assert sorted(rows) == accelerator.names()
    files = {path.stem for path in (PACKAGE / "sim").glob("*.py")}
    assert {name.replace("-", "_") for name in sim.DATAFLOWS} <= files


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The method in docs/add-a-method.md, written to a file and added by its one line."""
    page = text(DOCS / "add-a-method.md")
    (line,) = re.findall(r'^    ("\w+": ".*"),$', page, re.MULTILINE)
    ((name, summary),) = json.loads(f"{{{line}}}").items()
    assert name not in pruners.PRUNERS
    file = tmp_path / f"{name}.py"
    (code,) = fenced(DOCS / "add-a-method.md", "python")
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"besa_cli.pruners.{name}", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(pruners.PRUNERS, name, summary)
    spec.loader.exec_module(module)
    return module


def test_the_example_of_a_method_says_what_it_holds(example: ModuleType) -> None:
    """Scores and masks, like Wanda's, whose it makes: the other tensors exist for one linear at a time."""
    assert example.Options().memory_use() == wanda.Options().memory_use()


def test_the_example_of_a_method_works(example: ModuleType, tmp_path: Path) -> None:
    source = tiny_models.checkpoint(tmp_path / "source")
    rows = tiny_models.calibration_set(tiny_models.tokens())
    for number, asked in enumerate((tiny_models.request("ria", sparsity=0.37), tiny_models.request("ria", nm=(2, 4)))):
        stage = Run(tmp_path / f"run-{number}")
        manifest = tiny_models.run(StageJob(stage, tiny_models.local(source), rows, asked))
        counts = manifest["counts"]
        if asked.target_sparsity is not None:
            assert counts["pruned"] == round(0.37 * counts["weights"])
        made, before = tiny_models.weights(stage.stage("pruned")), tiny_models.weights(source)
        names = [
            name
            for block in tiny_models.linear_names(tiny_models.built(tiny_models.config("llama")), "model.layers")
            for name in block
        ]
        assert sum(int((made[name] == 0).sum()) for name in names) == counts["pruned"]
        assert all(torch.equal(made[name][made[name] != 0], before[name][made[name] != 0]) for name in names)
    weight, norms = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([4.0, 9.0])
    by_hand = [[(1 / 3 + 1 / 4) * 2, (2 / 3 + 2 / 6) * 3], [(3 / 7 + 3 / 4) * 2, (4 / 7 + 4 / 6) * 3]]
    assert torch.allclose(example.relative_importance(weight, norms), torch.tensor(by_hand))


@pytest.fixture
def finished(tmp_path: Path) -> Run:
    """A run directory with a calibration set and a stage in it."""
    model = tiny_models.local(tiny_models.checkpoint(tmp_path / "source"))
    made = Run(tmp_path / "run")
    file = tiny_models.rows_file(tmp_path / "rows.jsonl", tiny_models.tokens())
    options = calibration_set.CalibrationOptions(data=(str(file),), samples=4, seqlen=16)
    rows = prepare.calibrate(model, options, made.calibration, None, lambda _: None)
    tiny_models.run(StageJob(made, model, rows, tiny_models.request("besa")))
    few = quantize.request(options={}, bits=3, group_size="16", symmetric=False, device="cpu", dtype="float32")
    tiny_models.run(StageJob(made, tiny_models.local(made.stage("pruned")), rows, few))
    return made


def test_every_field_on_the_disk_is_in_the_specification(finished: Run) -> None:
    page = text(DOCS / "checkpoint.md")
    stage_part, rest = page.split("## The calibration set")
    calibration_part, rest = rest.split("## Evaluation results")
    result_part, _ = rest.split("## Simulation results")
    said = set(quoted(stage_part))
    for stage in (finished.stage("pruned"), finished.stage("quantized")):
        manifest = json.loads(text(stage / "besa.json"))
        timing = json.loads(text(stage / "timing.jsonl").splitlines()[0])
        parts = [manifest[name] for name in ("compute", "model", "calibration", "counts")]
        parts.append(manifest.get("quantization", {}))
        for each in (manifest, timing, *parts):
            assert set(each) <= said, set(each) - said
        for path in stage.glob("model-*.json"):
            report = json.loads(text(path))
            assert set(report) | set(report["linears"][0]) <= said
    assert "quantization" in manifest
    drawn: Mapping[str, Any] = json.loads(text(finished.calibration / "besa.json"))
    for each in (drawn, drawn["options"], drawn["model"], drawn["sources"][0]):
        assert set(each) <= set(quoted(calibration_part)), set(each) - set(quoted(calibration_part))
    assert {field.name for field in fields(Perplexity)} <= set(quoted(result_part))


def test_every_file_of_a_stage_is_in_the_specification(finished: Run) -> None:
    page = text(DOCS / "checkpoint.md")
    for path in finished.path.rglob("*"):
        general = re.sub(
            r"model-(\d{5})-of-\d{5}", lambda found: f"model-{min(int(found[1]), 2):05d}-of-00031", path.name
        )
        general = re.sub(r"sensitivity-[0-9a-f]{16}", "sensitivity-…", general)
        if path.is_file() and path.name not in ("generation_config.json",):
            assert general in page, path.name
