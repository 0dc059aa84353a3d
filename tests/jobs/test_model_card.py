"""The model card of an export: what the hub reads, results beside the dense model's, the commands to make it again."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import exported, tiny_models
from typer.main import get_command

from besa_cli.app import app
from besa_cli.checkpoint.runs import Run
from besa_cli.jobs import model_card, tune
from besa_cli.jobs.tune_job import TuneJob


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose stage was tuned, with results of the dense model, the pruned stage and the tuned one."""
    run = exported.stage(tmp_path_factory.mktemp("made"))
    job = TuneJob(
        run,
        tiny_models.local(run.stage("pruned")),
        tiny_models.calibration_set(tiny_models.tokens()),
        tune.request(device="cpu", dtype="float32"),
    )
    list(job.work())
    job.finish()
    pruned = json.loads((run.stage("pruned") / "besa.json").read_text())
    tuned = json.loads((run.stage("tuned") / "besa.json").read_text())
    run.evaluations.mkdir()
    for number, (digest, perplexity, kl, same) in enumerate(
        [
            (pruned["model"]["digest"], 3.0, None, None),
            (pruned["digest"], 5.0, 0.5, 0.25),
            (tuned["digest"], 4.0, 0.125, 0.5),
        ]
    ):
        facts = {"model_digest": digest, "perplexity": perplexity, "kl": kl, "same_token": same}
        write(run, f"ppl-{number}", {**PERPLEXITY, **facts})
        write(run, f"tasks-{number}", {**TASK, "model_digest": digest, "harness": harness(perplexity / 10)})
    return run


PERPLEXITY = {"dataset": "x", "split": None, "windows": 1, "windows_in_text": 2, "seqlen": 8, "dtype": "float32"}
TASK = {
    "task": "piqa", "split": None, "data": None, "num_fewshot": None, "limit": 4, "batch_size": "1", "device": "cpu",
    "dtype": "float32", "streamed": False, "tokenizer_digest": "t",
}  # fmt: skip


def harness(value: float) -> dict[str, Any]:
    return {
        "results": {"piqa": {"acc,none": value, "acc_stderr,none": 0.1, "alias": "piqa"}},
        "n-samples": {"piqa": {"original": 9, "effective": 4}},
    }


def write(run: Run, name: str, record: dict[str, Any]) -> None:
    (run.evaluations / f"{name}.json").write_text(json.dumps(record))


def card(run: Run) -> str:
    return (exported.export(run, "hf") / "README.md").read_text()


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---")[1])
    return found


def test_results_stand_beside_those_of_the_dense_model_also_of_a_tuned_stage(made: Run, tmp_path: Path) -> None:
    text = card(exported.copy_of(made, tmp_path / "run"))
    this = "this model, as the stage it was exported from"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    shown = {row[0]: row[1:] for row in rows if len(row) == 9 and row[0]}
    assert shown == {
        "dense": ["x", "-", "1 of 2", "8", "float32", "3.0000", "-", "-"],
        this: ["x", "-", "1 of 2", "8", "float32", "4.0000", "0.1250", "50.00 %"],
    }
    tasks = {row[0]: row[1:] for row in rows if len(row) == 6 and row[1] == "piqa"}
    assert tasks == {"dense": ["piqa", "acc", "4", "0.3000", "0.1000"], this: ["piqa", "acc", "4", "0.4000", "0.1000"]}


def test_the_commands_make_every_step_again(made: Run, tmp_path: Path) -> None:
    text = card(exported.copy_of(made, tmp_path / "run"))
    (block,) = re.findall(r"^```sh\n(.*?)^```$", text.split("## To make it again")[1], re.MULTILINE | re.DOTALL)
    lines = block.splitlines()
    assert [line.split()[1] for line in lines] == ["prune", "tune", "export"]
    assert "--method magnitude" in lines[0]
    assert "--model" not in lines[1]  # it takes the stage that the first makes
    program = get_command(app)
    called: list[str] = []
    for name, command in program.commands.items():  # type: ignore[attr-defined]
        command.callback = lambda name=name, **_: called.append(name)
    program.callback = None
    for line in lines:
        program.main(args=shlex.split(line)[1:], prog_name="besa", standalone_mode=False)
    assert called == ["prune", "tune", "export"]


@pytest.mark.parametrize(
    ("source", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags:\n- x\n---\n# A model", "apache-2.0"),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: 'mit\n  injected: yes'\n---\n", None),
        ("---\n: : :\n---\n", None),
        ("# A model\nlicense: mit", None),
        (None, None),
    ],
)
def test_the_licence_is_that_of_the_source(source: str | None, licence: str | None, tmp_path: Path) -> None:
    run = exported.stage(tmp_path)
    if source is not None:
        (tmp_path / "dense" / "README.md").write_text(source)
    found = front(card(run))
    assert found.get("license") == licence
    assert "injected" not in found
    assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "text-generation")
    assert found["tags"] == ["besa", "sparse", "pruned", "magnitude"]
    assert "base_model" not in found  # a directory of this machine


@pytest.mark.parametrize(
    ("kind", "name", "base_model", "licence"),
    [
        ("hub", "org/name@abc", "org/name", None),
        ("demo", "smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("gguf", "model.gguf", None, None),
    ],
)
def test_the_base_model_is_named_where_the_hub_has_it(
    kind: str, name: str, base_model: str | None, licence: str | None, made: Run
) -> None:
    manifest = json.loads((made.stage("pruned") / "besa.json").read_text())
    manifest["model"] |= {"kind": kind, "name": name, "directory": "nowhere"}
    assert model_card.origin(made, manifest) == model_card.CardOrigin(base_model=base_model, licence=licence)
