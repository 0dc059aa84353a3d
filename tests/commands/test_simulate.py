"""`besa simulate`: every mask of a checkpoint is counted as it is, and what is printed and kept is what was found."""

import csv
import io
import json
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import tiny_models
from torch import Tensor

import besa_cli
from besa_cli import sim
from besa_cli.checkpoint import weights
from besa_cli.checkpoint.runs import Run
from besa_cli.jobs.stage import StageJob

Besa = Callable[..., Any]  # conftest.Outcome

ROLES = {
    "llama": ["q", "k", "v", "o", "gate", "up", "down"],
    "phi3": ["qkv", "o", "gate_up", "down"],
    "opt": ["q", "k", "v", "o", "up", "down"],
    "gpt_neox": ["qkv", "o", "up", "down"],
}
FLOWS = [word for name in sim.DATAFLOWS for word in ("--dataflow", name)]


def prune(directory: Path, change: Callable[[str, Tensor], None]) -> None:
    """What another program might do: change the matrices inside the blocks of a checkpoint in one file."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and any(part.isdigit() for part in name.split(".")):
            change(name, tensor)
    save_file(tensors, file, metadata={"format": "pt"})


def zero_half(name: str, tensor: Tensor) -> None:
    generator = torch.Generator().manual_seed(len(name))
    columns = torch.rand(tensor.shape[1], generator=generator)
    tensor[torch.rand(tensor.shape, generator=generator) < columns] = 0


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny pruned checkpoint of a family in bf16, made once."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = tiny_models.checkpoint(tmp_path_factory.mktemp(family), family, dtype=torch.bfloat16)
            prune(made[family], zero_half)
        return made[family]

    return of


@pytest.fixture
def stage(workplace: Path) -> Path:
    """The finished stage of the default run directory."""
    model = tiny_models.local(tiny_models.checkpoint(workplace / "source"))
    tiny_models.run(
        StageJob(
            Run(Path("besa-run")),
            model,
            tiny_models.calibration_set(tiny_models.tokens()),
            tiny_models.request("wanda"),
        )
    )
    return Path("besa-run/pruned")


def simulated(besa: Besa, *words: object) -> dict[str, Any]:
    outcome = besa("simulate", *words, "--json")
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


@pytest.mark.parametrize("family", ROLES)
def test_every_linear_is_counted_whatever_it_is_called(family: str, besa: Besa, sources: Callable[[str], Path]) -> None:
    found = simulated(besa, "--model", sources(family), *FLOWS)
    stored = tiny_models.weights(sources(family))
    blocks = tiny_models.blocks_of(family)
    names = tiny_models.linear_names(tiny_models.built(tiny_models.config(family)), blocks)
    named = [f"{blocks}.{each['block']}.{each['name']}.weight" for each in found["linears"]]
    assert sorted(named) == sorted(name for block in names for name in block)
    for each in found["linears"]:
        weight = stored[f"{blocks}.{each['block']}.{each['name']}.weight"].float()
        assert (each["rows"], each["cols"]) == tuple(weight.shape)
        assert each["kept"] == int((weight != 0).sum())
        assert each["empty_columns"] == sum(bool((column == 0).all()) for column in weight.T)
        assert each["empty_rows"] == sum(bool((row == 0).all()) for row in weight)
        assert list(each["costs"]) == list(sim.DATAFLOWS)
        assert each["costs"]["dense"]["cycles"] == -(-weight.numel() // 4096)
    assert list(found["mean"]["vitcod"]) == [*ROLES[family], "all"]


def test_means_are_sums_within_a_block_averaged_over_blocks(besa: Besa, sources: Callable[[str], Path]) -> None:
    found = simulated(besa, "--model", sources("llama"), *FLOWS, "--accelerator", "vitcod")
    for flow in sim.DATAFLOWS:
        sums: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0, 0])
        for each in found["linears"]:
            cost = each["costs"][flow]
            for label in (each["label"], "all"):
                new = (cost["dense_cycles"], cost["cycles"], each["kept"], each["rows"] * each["cols"])
                sums[label] = [one + other for one, other in zip(sums[label], new, strict=True)]
        for label, (dense, cycles, kept, total) in sums.items():
            mean = found["mean"][flow][label]
            assert mean["dense_cycles"] == pytest.approx(dense / 2)
            assert mean["cycles"] == pytest.approx(cycles / 2)
            assert mean["speedup"] == pytest.approx(dense / cycles)
            assert mean["sparsity"] == pytest.approx(1 - kept / total)
            assert mean["utilisation"] == pytest.approx(kept / (cycles * 512))


def test_the_newest_stage_is_taken_and_the_result_kept(besa: Besa, stage: Path) -> None:
    outcome = besa("simulate", "--func", "down")
    assert outcome.code == 0
    assert "down" in outcome.out
    (file,) = (stage.parent / "simulate").iterdir()
    kept = json.loads(file.read_text())
    printed = simulated(besa, "--func", "down")
    assert list((stage.parent / "simulate").iterdir()) == [file]  # the same simulation has the same name
    assert {name: kept[name] for name in printed if name not in ("model", "directory")} == {
        name: value for name, value in printed.items() if name not in ("model", "directory")
    }
    manifest = json.loads((stage / "besa.json").read_text())
    assert kept["model_digest"] == manifest["digest"]
    assert sum(each["rows"] * each["cols"] - each["kept"] for each in kept["linears"]) == sum(
        linear["zeros"]
        for report in stage.glob("model-0000[23]*.json")
        for linear in json.loads(report.read_text())["linears"]
        if "down" in linear["name"]
    )
    simulated(besa, "--func", "down", "--batch", 3)
    assert len(list((stage.parent / "simulate").iterdir())) == 2
    assert "besa-run/simulate: 2 results" in besa("show").out


def test_every_field_of_the_file_is_in_the_specification(besa: Besa, stage: Path) -> None:
    page = (Path(besa_cli.__file__).parents[1] / "docs" / "checkpoint.md").read_text(encoding="utf-8")
    said = set(re.findall(r"`([^`]+)`", page.split("## Simulation results")[1].split("## Resume")[0]))
    shard = stage / "model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.down_proj.weight"][:, 5] = 0  # a dead neuron
    save_file(tensors, shard, metadata={"format": "pt"})
    manifest = json.loads((stage / "besa.json").read_text())
    manifest["digest"] = weights.check(weights.Weights(stage))
    (stage / "besa.json").write_text(json.dumps(manifest))
    assert besa("simulate", *FLOWS).code == 0
    (file,) = (stage.parent / "simulate").iterdir()
    kept = json.loads(file.read_text())
    linear = kept["linears"][0]
    parts = [kept, kept["settings"], kept["mean"]["vitcod"]["all"], kept["dead_neurons"], linear]
    parts += [*kept["dead_neurons"]["places"], *linear["costs"].values()]
    for part in parts:
        assert set(part) <= said, set(part) - said
    assert kept["dead_neurons"]["dead"] == 1


def test_a_model_that_is_not_of_the_run_is_printed_only_unless_a_run_is_named(
    besa: Besa, stage: Path, sources: Callable[[str], Path]
) -> None:
    simulated(besa, "--model", sources("llama"))
    assert not (stage.parent / "simulate").exists()
    simulated(besa, "--model", sources("llama"), "--run", "besa-run")
    assert len(list((stage.parent / "simulate").iterdir())) == 1


def test_csv_has_a_line_for_every_block_linear_and_dataflow(besa: Besa, sources: Callable[[str], Path]) -> None:
    words = ("--model", sources("llama"), *FLOWS)
    lines = list(csv.DictReader(io.StringIO(besa("simulate", *words, "--csv").out)))
    found = simulated(besa, *words)
    assert len(lines) == 2 * 7 * 4
    expected = {
        (str(each["block"]), each["name"], flow): (cost["cycles"], cost["dense_cycles"], cost.get("bound", ""))
        for each in found["linears"]
        for flow, cost in each["costs"].items()
    }
    assert {
        (line["block"], line["name"], line["dataflow"]): (int(line["cycles"]), int(line["dense_cycles"]), line["bound"])
        for line in lines
    } == expected


def test_the_table_is_laid_out_as_the_papers(besa: Besa, sources: Callable[[str], Path]) -> None:
    lines = besa("simulate", "--model", sources("llama"), *FLOWS).out.splitlines()
    assert lines[0].startswith("64 x 64 array of the BESA paper")
    assert lines[1].split() == ["dataflow", "mean", "over", "blocks", "q", "k", "v", "o", "gate", "up", "down", "all"]
    dense = [line.split() for line in lines if line.startswith("vitcod ") and "dense cycles" in line]
    assert len(dense) == 1
    assert dense[0][3:] == ["1.00"] * 7 + ["7.00"]
    assert lines[-2].startswith("dead neurons: ")


def test_one_linear_has_a_line_for_every_block_and_its_mean(besa: Besa, sources: Callable[[str], Path]) -> None:
    out = besa("simulate", "--model", sources("llama"), "--func", "down", "--dataflow", "vitcod").out
    body = [line.split() for line in out.splitlines() if line.split()[1:3] == ["down", "vitcod"]]
    assert [row[0] for row in body] == ["0", "1"]
    assert "mean over blocks" in out
    assert "mean over blocks" not in besa("simulate", "--model", sources("llama"), "--func", "sparsity").out
    whole = besa("simulate", "--model", sources("llama"), "--by-block").out
    assert sum(line.split()[2:3] == ["vitcod"] for line in whole.splitlines()) == 14


def test_func_chooses_linears_by_role_group_or_name(besa: Besa, sources: Callable[[str], Path]) -> None:
    for family, func, names in (
        ("llama", "attn", {"q", "k", "v", "o"}),
        ("llama", "mlp", {"gate", "up", "down"}),
        ("phi3", "qkv", {"qkv"}),
        ("opt", "fc1", {"up"}),
        ("opt", "up", {"up"}),
        ("llama", "mlp.down_proj", {"down"}),
        ("gpt_neox", "model", {"qkv", "o", "up", "down"}),
    ):
        outcome = besa("simulate", "--model", sources(family), "--func", func, "--json")
        assert {each["label"] for each in json.loads(outcome.out)["linears"]} == names, func


def test_linears_without_a_role_are_simulated_under_their_own_names(besa: Besa, workplace: Path) -> None:
    (workplace / "config.json").write_text('{"model_type": "strange"}')
    tensors = {f"net.{index}.mixer.in_proj.weight": torch.eye(5, 7) for index in range(3)}
    tensors |= {f"net.{index}.experts.{expert}.w.weight": torch.ones(2, 3) for index in range(3) for expert in (0, 1)}
    tensors |= {f"net.{index}.norm.weight": torch.ones(7) for index in range(3)}
    save_file(tensors, workplace / "model.safetensors")
    found = simulated(besa, "--model", workplace)
    assert list(found["mean"]["vitcod"]) == ["experts.*.w", "mixer.in_proj", "all"]
    assert found["mean"]["vitcod"]["experts.*.w"]["linears"] == 6
    assert found["mean"]["vitcod"]["experts.*.w"]["dense_cycles"] == 2  # one cycle each, two a block
    assert found["dead_neurons"] is None
    assert {each["name"] for each in simulated(besa, "--model", workplace, "--func", "mixer.in_proj")["linears"]} == {
        "mixer.in_proj"
    }


def test_conv1d_weights_are_turned(besa: Besa, workplace: Path) -> None:
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_inner=20, vocab_size=32, n_positions=16)
    tiny_models.built(config).save_pretrained(workplace / "gpt2")
    shapes = {each["label"]: (each["rows"], each["cols"]) for each in simulated(besa, "--model", "gpt2")["linears"]}
    assert shapes == {"qkv": (24, 8), "o": (8, 8), "up": (20, 8), "down": (8, 20)}


DEAD = {  # family: the linears of one MLP, and what is made zero so that so many neurons are dead
    "llama": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "phi3": ("mlp.gate_up_proj", "mlp.down_proj"),
    "opt": ("fc1", "fc2"),
    "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
}


@pytest.mark.parametrize("family", DEAD)
def test_dead_neurons_are_those_that_the_output_does_not_need(family: str, besa: Besa, workplace: Path) -> None:
    """Neurons 0 and 3 have no column of down, 1 no row of up (or gate); the last only counts where it has no bias."""
    model = tiny_models.checkpoint(workplace / "m", family)
    *above, down = DEAD[family]
    file = model / "model.safetensors"
    tensors = load_file(file)
    prefix = f"{tiny_models.blocks_of(family)}.1."
    tensors[f"{prefix}{down}.weight"][:, [0, 3]] = 0
    tensors[f"{prefix}{above[0]}.weight"][1] = 0
    biased = f"{prefix}{above[0]}.bias" in tensors
    save_file(tensors, file, metadata={"format": "pt"})
    dead = [0, 3] if biased else [0, 1, 3]
    found = simulated(besa, "--model", "m", *FLOWS)["dead_neurons"]
    neurons = tensors[f"{prefix}{down}.weight"].shape[1]
    assert (found["dead"], found["neurons"], found["mlps"]) == (len(dead), 2 * neurons, 2)
    assert [place["block"] for place in found["places"]] == [1]
    kept = 0
    rows = tiny_models.tokens(2, 9)
    before = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(rows).logits
    for name in above:
        weight = tensors[f"{prefix}{name}.weight"]
        for start in range(0, len(weight), neurons):
            kept += int((weight[start : start + neurons][dead] != 0).sum())
            weight[start : start + neurons][dead] = 0
    kept += int((tensors[f"{prefix}{down}.weight"][:, dead] != 0).sum())
    tensors[f"{prefix}{down}.weight"][:, dead] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    after = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(rows).logits
    assert torch.equal(before, after)  # what goes with them is not needed
    assert found["kept"] == kept
    size = sum(tensors[f"{prefix}{name}.weight"].numel() for name in (*above, down))
    assert found["weights"] == size * len(dead) // neurons


def test_removing_dead_neurons_saves_the_cycles_of_the_smaller_linears(besa: Besa, workplace: Path) -> None:
    model = tiny_models.checkpoint(workplace / "m")
    small = tiny_models.checkpoint(workplace / "small")
    dead = torch.arange(54) % 3 == 0

    def kill(name: str, tensor: Tensor) -> None:
        if "down" in name:
            tensor[:, dead] = 0

    prune(model, kill)
    file = small / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if "mlp" in name]:
        tensors[name] = (tensors[name][:, ~dead] if "down" in name else tensors[name][~dead]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    flows = ("--func", "mlp", *FLOWS)
    whole, left = simulated(besa, "--model", "m", *flows), simulated(besa, "--model", "small", *flows)
    for flow in sim.DATAFLOWS:
        cycles = [sum(each["costs"][flow]["cycles"] for each in one["linears"]) for one in (whole, left)]
        assert whole["dead_neurons"]["cycles"][flow] == cycles[0] - cycles[1]
    assert whole["dead_neurons"]["dead"] == 36
    out = besa("simulate", "--model", "m").out
    assert "dead neurons: 36 of 108 (33.33 %), in 2 of 2 MLPs" in out


@pytest.mark.parametrize(("name", "begins"), [("p.png", b"\x89PNG"), ("p.svg", b"<?xml")])
def test_a_picture_is_drawn_on_request(name: str, begins: bytes, besa: Besa, sources: Callable[[str], Path]) -> None:
    pytest.importorskip("matplotlib")
    outcome = besa("simulate", "--model", sources("llama"), *FLOWS, "--plot", name)
    assert (outcome.code, outcome.err.splitlines()[-1]) == (0, f"drawn: {name}")
    assert Path(name).read_bytes().startswith(begins)
    assert [path.name for path in Path.cwd().iterdir()] == [name]


def test_a_picture_shows_what_was_found(sources: Callable[[str], Path]) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from besa_cli.sim import accelerator
    from besa_cli.sim.cost import SimulationSettings
    from besa_cli.simulation import plots, run

    request = run.SimulationRequest(
        func="model",
        dataflows=("vitcod",),
        accelerator=accelerator.load("besa"),
        settings=SimulationSettings(threshold=0.4),
    )
    found = list(run.blocks(sources("llama"), request, lambda name: True))
    axes = Figure().subplots()
    plots.draw_blocks(axes, found, request, "speedup")
    lines = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()}
    assert lines["down"] == [
        linear.costs["vitcod"].speedup for block in found for linear in block.linears if linear.label == "down"
    ]
    axes = Figure().subplots()
    linear = found[0].linears[0]
    plots.draw_columns(axes, linear, request)
    denser = sum(count > 0.4 * linear.workload.rows for count in linear.workload.kept_by_column.tolist())
    legend = axes.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[:2] == [f"{denser} denser", f"{linear.workload.cols - denser} sparser"]
    axes = Figure().subplots()
    plots.draw_means(axes, found, request)
    assert (axes.get_yscale(), axes.get_ylim()[0]) == ("linear", 0)


def test_without_matplotlib_the_remedy_is_named_before_any_work(
    besa: Besa, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = besa("simulate", "--model", "nowhere/at/all", "--plot", "p.png")
    assert outcome.code == 1
    assert outcome.err.splitlines() == [
        "error: --plot needs matplotlib, which is not installed",
        "hint: pip install 'besa-cli[plot]'",
    ]


def test_what_cannot_be_simulated_is_one_line_with_a_remedy(
    besa: Besa, stage: Path, sources: Callable[[str], Path], workplace: Path
) -> None:
    shutil.copytree(sources("llama"), workplace / "m")
    shutil.copytree(sources("llama"), workplace / "half")
    (workplace / "half" / "model.safetensors").write_bytes(b"\0" * 40)
    for words, code, message in (
        (("--func", "dwn"), 2, "unknown linear 'dwn' in besa-run/pruned"),
        (("--func", "qkv"), 2, "unknown linear 'qkv' in besa-run/pruned"),
        (("--dataflow", "vitcdo"), 2, "unknown dataflow 'vitcdo'"),
        (("--accelerator", "tpu"), 2, "unknown accelerator 'tpu'"),
        (("--threshold", "50"), 2, "--threshold 50.0 is not a share of the rows"),
        (("--batch", "0"), 2, "--batch 0 is not a number of inputs"),
        (("--word-bits", "99"), 2, "--word-bits 99 is not a width of a weight"),
        (("--csv", "--json"), 2, "--csv and --json exclude each other"),
        (("--plot", "p.bmp"), 2, "--plot p.bmp is not a picture file"),
        (("--plot", "gone/p.png"), 1, "cannot write gone/p.png: the directory gone does not exist"),
        (("--model", "half"), 1, f"{workplace}/half/model.safetensors is"),
        (("--run", "empty"), 1, "empty has no stage"),
    ):
        outcome = besa("simulate", *words)
        assert (outcome.code, outcome.out) == (code, ""), words
        assert outcome.err.startswith(f"error: {message}"), (words, outcome.err)
        assert len(outcome.err.splitlines()) == 2, words
