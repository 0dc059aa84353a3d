"""Exports of every architecture: what stock transformers makes of them, the way back, and what stops half-way."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome
from safetensors.torch import load_file, save_file
from support import exported, tiny_models, written
from transformers import AutoModelForCausalLM, PreTrainedModel

import besa_cli.hf  # noqa: F401 - lets transformers load sparse checkpoints
from besa_cli import exporters
from besa_cli.checkpoint.runs import Run
from besa_cli.errors import BesaError
from besa_cli.jobs import import_
from besa_cli.jobs.export import ExportJob
from besa_cli.system.disk import sha256_file

FAMILIES = [*((family, False) for family in tiny_models.FAMILIES), ("llama", True), ("gemma2", True)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Run directories with a stage and a sparse export, made once."""
    made: dict[tuple[str, bool], Run] = {}

    def run(family: str = "llama", tied: bool = False) -> Run:
        if (family, tied) not in made:
            place = tmp_path_factory.mktemp(family)
            made[family, tied] = exported.stage(place, family, tied=tied, awkward=family in ("llama", "qwen2"))
        return made[family, tied]

    return run


def loaded(directory: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory)
    return model


def bits(state: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        name: (tensor.dtype, bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()))
        for name, tensor in state.items()
    }


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
@pytest.mark.parametrize("name", ["hf", "sparse"])
def test_transformers_loads_the_very_bits_of_the_stage(
    name: str, family: str, tied: bool, runs: Callable[..., Run]
) -> None:
    run = runs(family, tied)
    directory = run.exports / name
    directory = directory if directory.exists() else exported.export(run, name)
    stage, model = loaded(run.stage("pruned")), loaded(directory)
    assert bits(model.state_dict()) == bits(stage.state_dict())
    tokens = tiny_models.tokens()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, stage(tokens).logits)


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_import_gives_back_the_same_files(family: str, tied: bool, runs: Callable[..., Run], tmp_path: Path) -> None:
    run = runs(family, tied)
    directory = run.exports / "sparse"
    directory = directory if directory.exists() else exported.export(run, "sparse")
    job = import_.ImportJob(directory, Run(tmp_path / "back"))
    assert len(list(job.shards())) == job.number_of_shards
    assert tiny_models.files(job.directory) == tiny_models.files(run.stage("pruned"))


def test_a_sparse_model_is_saved_as_an_ordinary_one(runs: Callable[..., Run], tmp_path: Path) -> None:
    model = loaded(exported.export(exported.copy_of(runs(), tmp_path / "run"), "sparse"))
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert not {"quantization_config", "transformers_weights"} & config.keys()
    assert bits(loaded(tmp_path / "saved").state_dict()) == bits(model.state_dict())


def test_without_the_import_loading_fails_and_says_what_to_do(runs: Callable[..., Run], tmp_path: Path) -> None:
    directory = exported.export(exported.copy_of(runs(), tmp_path / "run"), "sparse")
    program = (
        "import sys, transformers\n"
        "for kind in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):\n"
        "    try: kind.from_pretrained(sys.argv[1])\n"
        "    except (OSError, ValueError) as error: print(error)\n"
        "    else: print('loaded')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, directory], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("import-besa_cli.hf-to-load-this" in line and str(directory) in line for line in lines)


def test_many_small_files_are_one_model(runs: Callable[..., Run], tmp_path: Path) -> None:
    directory = exported.export(exported.copy_of(runs(), tmp_path / "run"), "hf", shard_size=12_000)
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    assert bits(loaded(directory).state_dict()) == bits(loaded(tmp_path / "run" / "pruned").state_dict())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dense_exports_in_another_dtype(dtype: str, runs: Callable[..., Run], tmp_path: Path) -> None:
    run = exported.copy_of(runs("qwen2"), tmp_path / "run")
    directory = exported.export(run, "hf", dtype=dtype)
    assert directory.name == f"hf-{dtype}"
    model, stage = loaded(directory), loaded(run.stage("pruned")).state_dict()
    lost = 0
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, stage[name].to(tensor.dtype))
        lost += int(((tensor == 0) & (stage[name] != 0)).sum())
    assert json.loads((directory / "export.json").read_text())["sizes"]["rounded_to_zero"] == lost


def test_what_a_dtype_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    run = exported.stage(tmp_path, dtype=torch.float32)
    shard = run.stage("pruned") / "model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(tensors, shard, metadata={"format": "pt"})
    written.settle(shard.parent)
    job = ExportJob(run, exporters.load("hf", {"dtype": "float16"}))
    with pytest.raises(BesaError, match=r"layers\.0\.mlp\.up_proj\.weight holds 1e\+06, too large for float16"):
        list(job.pieces())
    assert not job.directory.exists()


def spoil(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "a bit":
        content[-1] ^= 1
    elif how == "the last byte":
        del content[-1]
    elif how == "the header":
        content[0] ^= 255
    if how == "all":
        file.unlink()
    else:
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["a bit", "the last byte", "the header", "all"])
def test_a_damaged_file_is_refused_with_its_name(how: str, runs: Callable[..., Run], tmp_path: Path) -> None:
    directory = exported.export(exported.copy_of(runs(), tmp_path / "run"), "sparse")
    file = directory / "sparse-00002-of-00003.safetensors"
    spoil(file, how)
    job = import_.ImportJob(directory, Run(tmp_path / "back"))
    with pytest.raises(BesaError, match=r"sparse-00002-of-00003\.safetensors"):
        list(job.shards())
    assert not (tmp_path / "back" / "pruned").exists()
    with pytest.raises((BesaError, OSError), match=r"sparse-00002-of-00003\.safetensors"):
        loaded(directory)


@pytest.mark.parametrize("file", ["sparse.safetensors.index.json", "stage/besa.json"])
def test_half_an_export_is_not_imported(file: str, runs: Callable[..., Run], tmp_path: Path) -> None:
    directory = exported.export(exported.copy_of(runs(), tmp_path / "run"), "sparse")
    (directory / file).unlink()
    with pytest.raises(BesaError, match=f"lacks .*{Path(file).name}"):
        import_.ImportJob(directory, Run(tmp_path / "back"))


@pytest.mark.parametrize("how", ["a bit", "the last byte", "all"])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json", "model-00002-of-00003.json"])
def test_a_small_file_that_is_not_what_was_exported_is_refused(
    name: str, how: str, runs: Callable[..., Run], tmp_path: Path
) -> None:
    directory = exported.export(exported.copy_of(runs(), tmp_path / "run"), "sparse")
    spoil(directory / "stage" / name, how)
    with pytest.raises(BesaError, match=rf"stage.{name} is damaged or missing"):
        import_.ImportJob(directory, Run(tmp_path / "back"))
    assert not (tmp_path / "back").exists()


def test_files_of_another_stage_do_not_pass_for_this_one(runs: Callable[..., Run], tmp_path: Path) -> None:
    directory = exported.export(exported.copy_of(runs(), tmp_path / "run"), "sparse")
    (directory / "export.json").unlink()  # it knows them all
    manifest = directory / "stage" / "besa.json"
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**told, "digest": told["digest"][::-1]}))
    job = import_.ImportJob(directory, Run(tmp_path / "back"))
    with pytest.raises(BesaError, match="does not give its stage back"):
        list(job.shards())
    assert not (tmp_path / "back" / "pruned").exists()


@pytest.mark.parametrize("name", ["hf", "sparse"])
def test_interrupted_nothing_looks_finished(name: str, runs: Callable[..., Run], tmp_path: Path) -> None:
    run = exported.copy_of(runs("llama", True), tmp_path / "run")
    job = ExportJob(run, exporters.load(name))
    pieces = job.pieces()
    next(pieces)
    pieces.close()
    assert not job.directory.exists()
    assert not [path for path in run.exports.glob("*") if not path.name.startswith(".")]
    directory = exported.export(run, name)  # and the same again begins anew
    expected = exported.export(exported.copy_of(runs("llama", True), tmp_path / "other"), name)
    assert tiny_models.files(directory) == tiny_models.files(expected)


def test_the_command_line(besa: Callable[..., Outcome], workplace: Path, runs: Callable[..., Run]) -> None:
    exported.copy_of(runs(), workplace / "besa-run")
    done = besa("export", "--format", "sparse", "--json")
    assert done.code == 0
    facts = json.loads(done.out)
    assert facts["directory"] == "besa-run/export/sparse"
    again = besa("export", "--format", "sparse")
    assert again.code == 0
    assert "finished already" in again.err
    assert besa("show", "besa-run/export/sparse").out.startswith("besa-run/export/sparse: sparse export of the pruned")
    assert "sparse export of the pruned stage" in besa("show").out
    assert besa("import", "besa-run/export/sparse", "--run", "back").code == 0
    assert tiny_models.files(workplace / "back" / "pruned") == tiny_models.files(workplace / "besa-run" / "pruned")
    twice = besa("import", "besa-run/export/sparse", "--run", "back")
    assert twice.code == 0
    assert "is that stage already" in twice.err


def test_sizes_are_those_of_the_files(runs: Callable[..., Run], tmp_path: Path) -> None:
    run = exported.copy_of(runs("qwen2"), tmp_path / "run")
    directory = exported.export(run, "sparse")
    manifest = json.loads((directory / "export.json").read_text())
    assert {name: (directory / name).stat().st_size for name in manifest["files"]} == {
        name: facts["bytes"] for name, facts in manifest["files"].items()
    }
    linears = manifest["sizes"]["linears"]
    stored = tiny_models.weights(directory)
    parts = [tensor.nbytes for name, tensor in stored.items() if "_proj.weight" in name]
    assert linears == sum(parts)
    assert manifest["sizes"]["linears_dense"] == 2 * manifest["counts"]["weights"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--format", "onnx"), 2, "unknown format 'onnx'"),
        (("--format", "sparse", "--dtype", "float16"), 2, "--dtype is not an option of --format sparse"),
        (("--format", "hf", "--type", "F16"), 2, "--type is not an option of --format hf"),
        (("--shard-size", "big"), 2, "--shard-size 'big' is not a size"),
        (("--shard-size", "9" * 400 + "GB"), 2, "9GB' is too large"),
        (("--run", "nowhere"), 1, "no run directory nowhere"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    arguments: tuple[str, ...], code: int, words: str, besa: Callable[..., Outcome], workplace: Path
) -> None:
    (workplace / "besa-run").mkdir()
    done = besa("export", *arguments)
    assert (done.code, words in done.err) == (code, True), done.err
    assert done.err.count("error:") == 1
    assert "Traceback" not in done.err
    assert not (workplace / "nowhere").exists()


def test_another_stage_or_other_options_need_restart(runs: Callable[..., Run], tmp_path: Path) -> None:
    run = exported.copy_of(runs(), tmp_path / "run")
    exported.export(run, "hf", shard_size=10_000)
    with pytest.raises(BesaError, match="shard_size 10000, now 5000000000"):
        ExportJob(run, exporters.load("hf"))
    job = ExportJob(run, exporters.load("hf"), restart=True)
    list(job.pieces())
    assert [path.name for path in job.directory.glob("*.safetensors")] == ["model.safetensors"]


def test_no_stage_nothing_to_export(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(BesaError, match="has no stage to export"):
        ExportJob(Run(tmp_path / "run"), exporters.load("hf"))


@pytest.mark.parametrize("name", ["hf", ".hf.partial"])
@pytest.mark.parametrize("restart", [False, True])
def test_a_directory_that_is_not_an_export_is_not_replaced(
    name: str, restart: bool, runs: Callable[..., Run], tmp_path: Path
) -> None:
    run = exported.copy_of(runs(), tmp_path / "run")
    (run.exports / name).mkdir(parents=True)
    (run.exports / name / "mine.txt").write_text("mine")
    with pytest.raises(BesaError, match="was not made by besa"):
        ExportJob(run, exporters.load("hf"), restart=restart)
    assert (run.exports / name / "mine.txt").read_text() == "mine"


def test_an_export_that_holds_another_file_is_not_replaced(runs: Callable[..., Run], tmp_path: Path) -> None:
    run = exported.copy_of(runs(), tmp_path / "run")
    directory = exported.export(run, "hf")
    (directory / "notes.md").write_text("mine")
    with pytest.raises(BesaError, match=r"notes\.md, which besa did not write"):
        ExportJob(run, exporters.load("hf"), restart=True)
    (directory / "notes.md").unlink()
    job = ExportJob(run, exporters.load("hf"), restart=True)
    list(job.pieces())
    assert job.finish()["status"] == "complete"


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_an_export_whose_files_were_changed_is_not_finished_already(
    how: str, runs: Callable[..., Run], tmp_path: Path
) -> None:
    run = exported.copy_of(runs(), tmp_path / "run")
    file = exported.export(run, "hf") / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink() if how == "gone" else file.write_bytes(content)
    with pytest.raises(BesaError, match=r"model\.safetensors is damaged or missing"):
        ExportJob(run, exporters.load("hf"))


RESULT = {"dataset": "x", "split": None, "windows": 1, "seqlen": 8, "dtype": "float32", "perplexity": 3.0}


@pytest.mark.parametrize(
    "change", [{"perplexity": None}, {"perplexity": float("nan")}, {"dataset": 3}, {"windows": -1}]
)
def test_a_damaged_perplexity_is_refused_before_any_work(
    change: dict[str, object], runs: Callable[..., Run], tmp_path: Path
) -> None:
    run = exported.copy_of(runs(), tmp_path / "run")
    digest = json.loads((run.stage("pruned") / "besa.json").read_text())["digest"]
    run.evaluations.mkdir()
    file = run.evaluations / "ppl-x.json"
    file.write_text(json.dumps({**RESULT, "model_digest": digest, **change}))
    with pytest.raises(BesaError, match=r"ppl-x\.json is not what besa wrote"):
        ExportJob(run, exporters.load("hf"))
    file.write_text(json.dumps({**RESULT, "model_digest": digest, "dataset": "/home/jane/a|b.txt"}))
    card = (exported.export(run, "hf") / "README.md").read_text()
    assert "| a\\|b.txt | - | 1 | 8 | float32 | 3.0000 | - | - |" in card
    assert "jane" not in card


@pytest.mark.parametrize(
    "change", [{"vocab_size": 60}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"intermediate_size": 8}]
)
def test_a_stage_whose_configuration_is_of_another_model_is_not_exported(
    change: dict[str, int], runs: Callable[..., Run], tmp_path: Path
) -> None:
    run = exported.copy_of(runs(), tmp_path / "run")
    file = run.stage("pruned") / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(BesaError, match=r"blocks|shape"):
        ExportJob(run, exporters.load("hf"))


@pytest.mark.parametrize("blocks", [1, 3, 1000])
def test_a_stage_with_another_number_of_blocks_than_shards_is_refused(
    blocks: int, runs: Callable[..., Run], tmp_path: Path
) -> None:
    run = exported.copy_of(runs(), tmp_path / "run")
    file = run.stage("pruned") / "besa.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "blocks": blocks}))
    with pytest.raises(BesaError, match=r"besa\.json|shard|missing"):
        ExportJob(run, exporters.load("hf"))


def loading_refused(directory: Path) -> str:
    with pytest.raises(BesaError) as caught:
        loaded(directory)
    return caught.value.message


CONFIGURED = {
    "a newer format": ("quantization_config", "format", 99),
    "a format of text": ("quantization_config", "format", "1"),
    "an index elsewhere": ("quantization_config", "index", "../x.safetensors.index.json"),
    "weights elsewhere": ("transformers_weights", None, "../x.safetensors"),
}


@pytest.mark.parametrize("what", CONFIGURED)
def test_transformers_refuses_a_configuration_that_leads_elsewhere(
    what: str, runs: Callable[..., Run], tmp_path: Path
) -> None:
    directory = exported.export(exported.copy_of(runs(), tmp_path / "run"), "sparse")
    outer, inner, value = CONFIGURED[what]
    config = json.loads((directory / "config.json").read_text())
    if inner is None:
        config[outer] = value
    else:
        config[outer][inner] = value
    (directory / "config.json").write_text(json.dumps(config))
    assert "the checkpoint" in loading_refused(directory)


@pytest.mark.parametrize("how", ["a mask", "no digests", "a tensor left out", "a pipe"])
def test_transformers_loads_no_damaged_sparse_checkpoint(how: str, runs: Callable[..., Run], tmp_path: Path) -> None:
    directory = exported.export(exported.copy_of(runs(), tmp_path / "run"), "sparse")
    file, index = directory / "sparse-00002-of-00003.safetensors", directory / "sparse.safetensors.index.json"
    told = json.loads(index.read_text())
    if how == "a mask":
        tensors = load_file(file)
        tensors["model.layers.0.mlp.up_proj.weight_mask"][3, 0] ^= 1
        save_file(tensors, file, metadata={"format": "pt"})
        told["metadata"]["sha256"][file.name] = sha256_file(file)
    elif how == "no digests":
        del told["metadata"]
    elif how == "a tensor left out":
        del told["weight_map"]["model.layers.0.mlp.up_proj.weight_mask"]
    else:
        file.unlink()
        os.mkfifo(file)
    index.write_text(json.dumps(told))
    message = loading_refused(directory)
    assert "up_proj" in message or file.name in message or index.name in message
