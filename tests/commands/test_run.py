"""`besa run`: every section is a command, and the paper's files say what the paper's authors typed."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import typer
import yaml
from support import tiny_models
from typer.main import get_command

from besa_cli.app import app
from besa_cli.commands.shared import config_file

EXAMPLES = Path(__file__).parents[2] / "examples"
PAPER = sorted(EXAMPLES.glob("paper/*.yaml"))

# The d_coef that the released program's scripts give, model by model: one sparsity a row, one a linear.
AUTHORS = {
    "huggyllama/llama-7b": ("5", "50"),
    "huggyllama/llama-13b": ("5", "0.5"),
    "huggyllama/llama-30b": ("10", "0.05"),
    "huggyllama/llama-65b": ("50", "0.5"),
    "meta-llama/Llama-2-7b-hf": ("5", "0.05"),
    "meta-llama/Llama-2-13b-hf": ("5", "0.05"),
    "meta-llama/Llama-2-70b-hf": ("50", "0.5"),
}

Besa = Callable[..., Any]  # conftest.Outcome


def parsed(file: Path, name: str) -> dict[str, Any]:
    """The values that a command gets from a file."""
    group = get_command(app)
    root = group.make_context("besa", ["show"])
    command = config_file.command(cast("typer.Context", root), name, "")  # a context of click's has all that it needs
    values: dict[str, Any] = command.make_context(name, ["--config", str(file)], parent=root).params
    return values


@pytest.fixture
def place(workplace: Path) -> Path:
    """A tiny model with a tokenizer, a text, and no network."""
    tiny_models.add_tokenizer(tiny_models.checkpoint(workplace / "m"))
    (workplace / "text.txt").write_text(" ".join(f"w{number % 60}" for number in range(4000)), encoding="utf-8")
    return workplace


def experiment(run: str, method: str, **changes: Any) -> str:
    sections = {
        "run": run,
        "prune": {"model": "m", "method": method, "data": "text.txt", "samples": 2, "seqlen": 8, "pack": True},
        "eval ppl": {"datasets": ["text.txt"], "seqlen": 8, "limit": 2},
    }
    return yaml.safe_dump(sections | changes, sort_keys=False)


def test_sections_run_in_turn_and_end_in_one_table(place: Path, besa: Besa) -> None:
    Path("e.yaml").write_text(experiment("r", "wanda"), encoding="utf-8")
    outcome = besa("run", "e.yaml", "--json")
    assert outcome.code == 0, outcome.err
    rows = {row["method"]: list(row["figures"].values()) for row in json.loads(outcome.out)["rows"]}
    results = [json.loads(path.read_text()) for path in place.glob("r/eval/*.json")]
    named = {result["model"]["name"].split()[0]: result for result in results}
    measured = {
        name: [result[figure] for figure in ("perplexity", "kl", "same_token") if result[figure] is not None]
        for name, result in named.items()
    }
    assert {name.split()[0]: figures for name, figures in rows.items()} == measured
    assert list(measured) != []
    before = {path: path.stat().st_mtime_ns for path in place.glob("r/*/*.safetensors")}

    again = besa("run", "e.yaml", "--json")
    assert again.out == outcome.out
    assert "finished already" in again.err
    assert before == {path: path.stat().st_mtime_ns for path in place.glob("r/*/*.safetensors")}


def test_a_command_that_fails_ends_the_run_with_its_code(workplace: Path, besa: Besa) -> None:
    Path("e.yaml").write_text("run: r\nprune:\n  model: nowhere\neval ppl: {}\n", encoding="utf-8")
    outcome = besa("run", "e.yaml")
    assert outcome.code == 2
    assert "unknown model 'nowhere'" in outcome.err
    assert "eval ppl" not in outcome.err


def test_a_file_that_only_prunes_is_done_when_it_has_pruned(place: Path, besa: Besa) -> None:
    text = yaml.safe_load(experiment("r", "magnitude"))
    del text["eval ppl"]
    Path("e.yaml").write_text(yaml.safe_dump(text), encoding="utf-8")
    outcome = besa("run", "e.yaml", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out) == {"columns": [], "rows": [], "notes": []}
    assert (place / "r" / "pruned" / "besa.json").exists()


def test_modules_beside_an_experiment_are_not_imported(place: Path, besa: Besa) -> None:
    """As `python -m besa_cli`, which puts the current directory on the path, as `besa`, and by `besa run`."""

    def plant(module: str) -> None:
        marker = place / f"{module}-ran"
        (place / f"{module}.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise ImportError('not this one')\n")

    Path("e.yaml").write_text("run: r\nprune:\n  model: nowhere\n", encoding="utf-8")
    for module in ("random", "yaml", "torch", "typer", "sitecustomize"):
        plant(module)
    words = [sys.executable, "-m", "besa_cli", "prune", "--config", "e.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "unknown model 'nowhere'" in done.stderr
    plant("besa_cli")  # python itself would find this one before any line of ours, with -m
    assert "unknown model 'nowhere'" in besa("run", "e.yaml").err
    assert list(place.glob("*-ran")) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run: r\n", "has no sections"),
        ("run: r\nprune: {}\nexport:\n  push-to: org/name\n", "'push-to' stands in e.yaml, line 4"),
        ("run: r\nprun:\n  seed: 1\n", "unknown command 'prun' in e.yaml, line 2"),
        ("run: r\neval:\n  limit: 1\n", "'eval' in e.yaml, line 2 is a group of commands"),
        ("run: r\nprune:\n  sparsty: 1\n", "unknown option 'sparsty' in e.yaml, line 3"),
        ("run: r\nlimt: 2\nprune: {}\n", "unknown option 'limt' in e.yaml, line 2"),
        ("model: m\nprune: {}\neval ppl: {}\n", "'model' stands outside the sections in e.yaml, line 1"),
        ("prune:\n  run: a\neval ppl:\n  run: b\n", "e.yaml names several run directories (prune: a, eval ppl: b)"),
        ("prune: {}\nprune: {}\n", "section 'prune' is given twice in e.yaml, line 2"),
        ("prune:\n  samples: many\n", "--samples"),
        ("eval compare: {}\n", "'eval compare' in e.yaml, line 1 cannot be part of an experiment"),
        ("- prune\n", "e.yaml, line 1: not a mapping"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_before_any_work(
    text: str, said: str, workplace: Path, besa: Besa
) -> None:
    Path("good.yaml").write_text("run: good\nprune:\n  model: nowhere\n", encoding="utf-8")
    Path("e.yaml").write_text(text, encoding="utf-8")
    outcome = besa("run", "good.yaml", "e.yaml")
    assert outcome.code == 2
    assert said in outcome.err
    assert "besa prune --config" not in outcome.err
    assert sorted(path.name for path in workplace.iterdir()) == ["e.yaml", "good.yaml"]


def test_two_files_do_not_share_a_run_directory(workplace: Path, besa: Besa) -> None:
    for name in ("a.yaml", "b.yaml"):
        Path(name).write_text("prune:\n  model: nowhere\n", encoding="utf-8")
    outcome = besa("run", "a.yaml", "b.yaml")
    assert outcome.code == 2
    assert "a.yaml and b.yaml both work on besa-run" in outcome.err


def test_a_command_takes_its_own_section_and_what_is_above_them(workplace: Path) -> None:
    file = workplace / "e.yaml"
    file.write_text(
        "run: r\ndevice: cpu\nsamples: 4\nprune:\n  epochs: 3\neval ppl:\n  limit: 7\n  datasets: ptb\n",
        encoding="utf-8",
    )
    prune, ppl = parsed(file, "prune"), parsed(file, "eval ppl")
    assert (prune["run"], prune["device"], prune["samples"], prune["epochs"]) == (Path("r"), "cpu", 4, 3)
    assert (ppl["run"], ppl["device"], ppl["limit"], ppl["datasets"]) == (Path("r"), "cpu", 7, ["ptb"])


def test_the_paper_has_a_file_for_every_model_and_granularity() -> None:
    found = {}
    for file in PAPER:
        prune = parsed(file, "prune")
        found[prune["model"], prune["granularity"]] = str(yaml.safe_load(file.read_text())["prune"]["d-coef"])
        assert (prune["preset"], prune["sparsity"], prune["samples"], prune["seqlen"]) == ("authors", 0.5, 128, 2048)
        assert prune["data"] == ["c4"]
        assert str(prune["run"]) == file.stem
        assert parsed(file, "eval ppl")["datasets"] == ["wikitext2", "ptb", "c4"]
        assert len(parsed(file, "eval tasks")["names"]) == 6
    assert found == {
        (model, granularity): value
        for model, values in AUTHORS.items()
        for granularity, value in zip(("row", "layer"), values, strict=True)
    }


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda file: file.name)
def test_every_example_can_be_meant(file: Path) -> None:
    _, sections = config_file.read(file)
    assert {parsed(file, name)["run"] for name in sections} == {parsed(file, "prune")["run"]}
