import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from support import exported
from support.written import stage_manifest
from torch import Tensor

from besa_cli import models
from besa_cli.checkpoint import inspection
from besa_cli.checkpoint.reports import BlockReport, LinearReport
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import Stage
from besa_cli.system import disk

Besa = Callable[..., Any]  # conftest.Outcome

SHAPES = {"self_attn.q_proj": (4, 6), "mlp.down_proj": (6, 5)}
PRUNED = {(0, "self_attn.q_proj"): 9, (0, "mlp.down_proj"): 18, (1, "self_attn.q_proj"): 15, (1, "mlp.down_proj"): 12}
EXTRA = 2  # zeros in each linear that no mask made
OPTIONS = {
    "model": "some/model",
    "method": "besa",
    "sparsity": 0.5,
    "batch_size": 1,
    "penalty": None,
    "device": "auto",
    "dtype": "auto",
    "data": ["c4", "my file.txt"],
    "pack": False,
}


def matrix(rows: int, cols: int, zeros: int) -> Tensor:
    flat = torch.arange(1.0, rows * cols + 1)
    flat[torch.randperm(rows * cols, generator=torch.Generator().manual_seed(0))[:zeros]] = 0
    return flat.view(rows, cols)


def block_tensors(index: int) -> dict[str, Tensor]:
    name = f"model.layers.{index}"
    linears = {
        f"{name}.{linear}.weight": matrix(*shape, PRUNED[index, linear] + EXTRA) for linear, shape in SHAPES.items()
    }
    return {**linears, f"{name}.input_layernorm.weight": torch.zeros(6), f"{name}.mlp.gate.weight": torch.zeros(2, 6)}


def report(index: int) -> BlockReport:
    linears = tuple(
        LinearReport(name=name, rows=rows, cols=cols, pruned=PRUNED[index, name], zeros=PRUNED[index, name] + EXTRA)
        for name, (rows, cols) in SHAPES.items()
    )
    return BlockReport(index=index, blocks=2, linears=linears, error_before=0.5, error_after=0.25)


@pytest.fixture
def source(workplace: Path) -> Path:
    """A dense checkpoint in one file, with an embedding that is full of zeros."""
    directory = workplace / "source"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    tensors = {"model.embed_tokens.weight": torch.zeros(10, 6), **block_tensors(0), **block_tensors(1)}
    save_file(tensors, directory / "model.safetensors")
    return directory


def stage(run: Path, source: Path, *, blocks: int = 2) -> Path:
    """A stage of a run, of which so many of the two blocks are finished."""
    made = Stage(Run(run).stage("pruned"), 2)
    manifest = stage_manifest(options=OPTIONS)
    made.begin(manifest, source)
    made.write_rest({"model.embed_tokens.weight": torch.zeros(10, 6)})
    for index in range(blocks):
        made.write(report(index), block_tensors(index), {})
    if blocks == 2:
        made.finish()
    return made.directory


def counted(directory: Path) -> dict[tuple[int, str], int]:
    return {
        (block.index, linear.name): linear.zeros for block in inspection.blocks(directory) for linear in block.linears
    }


def test_zeros_are_counted_in_the_tensors_of_stages_and_of_plain_checkpoints(workplace: Path, source: Path) -> None:
    expected = {key: pruned + EXTRA for key, pruned in PRUNED.items()}
    assert counted(stage(workplace / "run", source)) == expected
    assert counted(source) == expected


@pytest.mark.parametrize("prefix", ["", "transformer.h.", "model.decoder.layers."])
def test_blocks_are_found_whatever_their_list_is_called(workplace: Path, prefix: str) -> None:
    (workplace / "config.json").write_text("{}")
    save_file(
        {
            f"{prefix}{index}.mlp.experts.{expert}.up.weight": matrix(3, 2, index)
            for index in (0, 10, 2)
            for expert in (0, 1)
        }
        | {"vision.layers.0.fc.weight": torch.zeros(1, 2)},
        workplace / "model.safetensors",
    )
    assert [block.index for block in inspection.blocks(workplace)] == [0, 2, 10]
    assert counted(workplace)[10, "mlp.experts.1.up"] == matrix(3, 2, 10).eq(0).sum()


def test_a_stage_is_shown_with_its_command_and_every_linear(besa: Besa, source: Path) -> None:
    directory = stage(Path("besa-run"), source)
    outcome = besa("show", directory)
    lines = outcome.out.splitlines()
    assert outcome.code == 0
    assert lines[0] == f"{directory}: pruned stage of some/model, complete"
    assert lines[1] == (
        "  made by: besa prune --model some/model --method besa --sparsity 0.5 --batch-size 1 "
        "--device cpu --dtype float32 --data c4 --data 'my file.txt' --no-pack"
    )
    assert lines[2].split() == ["block", "q", "down", "all", "error", "before", "error", "after"]
    assert lines[4].split() == ["0", "45.83", "66.67", "57.41", "5.00e-01", "2.50e-01"]
    assert lines[6].split() == ["all", "58.33", "56.67", "57.41", "-", "-"]
    assert lines[7] == "62 of 108 weights are zero (57.41 %)"
    assert lines[8] == "54 were pruned (50.00 %)"


def test_measured_budgets_are_shown_by_the_lowest_and_the_highest_block(besa: Besa, source: Path) -> None:
    directory = stage(Path("besa-run"), source)
    made = Stage(directory, 2)
    effects = [[0.1, 0.2], [0.1, 0.2]]
    made.record_budgets({"pruned": [27, 13], "weights": [54, 54], "sparsities": [0.4, 0.6], "effects": effects})
    lines = besa("show", directory).out.splitlines()
    assert lines[2] == "  budget of the blocks: 24.1 % (block 1) to 50.0 % (block 0)"
    assert json.loads(besa("show", directory, "--json").out)["manifest"]["block_budgets"]["pruned"] == [27, 13]


def test_json_holds_every_linear_with_zeros_and_pruned(besa: Besa, source: Path) -> None:
    facts = json.loads(besa("show", stage(Path("besa-run"), source), "--json").out)
    assert facts["kind"] == "stage"
    assert facts["total"] == {"weights": 108, "zeros": 62, "pruned": 54}
    first = facts["blocks"][0]["linears"][0]
    assert first == {"name": "self_attn.q_proj", "rows": 4, "cols": 6, "zeros": 11, "pruned": 9, "sparsity": 11 / 24}
    assert facts["manifest"]["options"] == OPTIONS


def test_the_run_directory_is_the_default_and_shows_all_its_parts(besa: Besa, source: Path) -> None:
    run = Run(Path("besa-run"))
    stage(run.path, source)
    disk.write_json(run.evaluations / "wikitext2.json", {"perplexity": 12.5})
    outcome = besa("show")
    assert outcome.out.startswith("besa-run: run directory\n")
    assert "pruned stage of some/model, complete" in outcome.out
    assert "wikitext2.json" in outcome.out
    facts = json.loads(besa("show", "--json").out)
    assert facts["evaluations"] == {"wikitext2.json": {"perplexity": 12.5}}
    assert [each["directory"] for each in facts["stages"]] == [str(run.stage("pruned"))]


def test_an_unfinished_stage_says_how_far_it_is_and_how_to_go_on(besa: Besa, source: Path) -> None:
    directory = stage(Path("runs/one"), source, blocks=1)
    out = besa("show", directory).out
    assert "unfinished" in out
    assert "1 of 2 blocks are done; to resume: besa prune --model some/model" in out
    assert "--run runs/one" in out
    assert "27 were pruned (50.00 %)" in out


def test_a_tensor_that_lost_its_zeros_is_reported(besa: Besa, source: Path) -> None:
    directory = stage(Path("besa-run"), source)
    shard = Stage(directory, 2).shard(1)
    save_file({name: torch.ones_like(tensor) for name, tensor in block_tensors(1).items()}, shard)
    outcome = besa("show", directory)
    assert "warning: the reports name more pruned weights than there are zeros" in outcome.err


@pytest.mark.parametrize("index", [-1, 0, 1])
def test_a_finished_stage_that_lost_a_shard_is_refused_by_its_name(index: int, besa: Besa, source: Path) -> None:
    directory = stage(Path("besa-run"), source)
    shard = Stage(directory, 2).shard(index)
    shard.unlink()
    for command in ("show", "simulate"):
        outcome = besa(command, *([directory] if command == "show" else ["--model", directory]))
        assert outcome.code == 1
        assert shard.name in outcome.err
        assert outcome.err.count("error: ") == 1


def test_zeros_that_are_not_those_of_the_report_are_named(besa: Besa, source: Path) -> None:
    directory = stage(Path("besa-run"), source)
    tensors = block_tensors(1)
    tensors["model.layers.1.self_attn.q_proj.weight"][0] = 0.0
    save_file(tensors, Stage(directory, 2).shard(1))
    outcome = besa("show", directory)
    assert "warning: self_attn.q_proj of block 1 has " in outcome.err


@pytest.mark.parametrize("how", ["gone", "shorter"])
def test_an_export_whose_file_is_not_as_listed_is_shown_with_a_warning(how: str, besa: Besa, workplace: Path) -> None:
    directory = exported.export(exported.stage(workplace), "hf")
    assert "warning" not in besa("show", directory).err
    file = directory / "model.safetensors"
    file.unlink() if how == "gone" else os.truncate(file, 10)
    outcome = besa("show", directory, "--json")
    assert "warning: " in outcome.err
    assert file.name in json.loads(outcome.out)["damage"]


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"format": 1}', '{"format": 99}', '{"format": 1, "command": "export"}']
)
@pytest.mark.parametrize("name", ["besa.json", "export.json"])
def test_a_manifest_of_nothing_is_one_line(name: str, content: str, besa: Besa, workplace: Path) -> None:
    (workplace / "x").mkdir()
    (workplace / "x" / name).write_text(content)
    for words in (("show", "x"), ("show", "x", "--config"), ("simulate", "--model", "x")):
        outcome = besa(*words)
        assert outcome.code == 1
        assert len(outcome.err.splitlines()) <= 2
        assert "x" in outcome.err


def test_odd_checkpoints_are_shown_or_refused_in_one_line(besa: Besa, workplace: Path) -> None:
    (workplace / "config.json").write_text('{"model_type": ["gpt2"]}')
    weights = {"layers.0.a.weight": torch.zeros(0, 3), "layers.1.a.weight": torch.ones(2, 3)}
    save_file(weights | {f"layers.{'9' * 5000}.a.weight": torch.ones(2, 3)}, workplace / "model.safetensors")
    outcome = besa("show", workplace)
    assert outcome.code == 0, outcome.err
    assert "0 of 6 weights are zero" in outcome.out


def test_a_name_that_is_too_long_is_one_line(besa: Besa, workplace: Path) -> None:
    outcome = besa("show", "x" * 5000)
    assert outcome.code == 1
    assert outcome.err.startswith("error: ")


def test_config_is_yaml_that_the_command_takes(besa: Besa, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage(Path("besa-run"), source)
    text = besa("show", "--config").out
    values = yaml.safe_load(text)
    assert values == {
        "model": "some/model",
        "method": "besa",
        "sparsity": 0.5,
        "batch-size": 1,
        "device": "cpu",
        "dtype": "float32",
        "data": ["c4", "my file.txt"],
        "pack": False,
    }
    Path("again.yaml").write_text(text)
    tried: list[str] = []
    monkeypatch.setattr(models, "resolve", lambda name, **_: tried.append(name))
    outcome = besa("prune", "--config", "again.yaml")
    assert "AttributeError: 'NoneType'" in outcome.err  # all options were taken; there is no model to go on with
    assert tried == ["some/model"]


def test_what_cannot_be_shown_is_one_line(besa: Besa, workplace: Path) -> None:
    (workplace / "file").write_text("x")
    (workplace / "empty").mkdir()
    (workplace / "bare").mkdir()
    (workplace / "bare" / "config.json").write_text("{}")
    for words, message in (
        (("nowhere",), "nowhere does not exist"),
        (("file",), "file is not a directory"),
        (("empty",), "empty holds nothing that besa knows"),
        (("bare",), "bare/model.safetensors is missing"),
        (("bare", "--config"), "bare was not made by besa"),
        ((), "besa-run does not exist"),
    ):
        outcome = besa("show", *words)
        assert (outcome.code, outcome.out if words != ("bare",) else "") == (1, "")
        assert outcome.err.startswith(f"error: {message}")
        assert len(outcome.err.splitlines()) == 2
