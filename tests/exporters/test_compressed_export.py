"""`besa export --format sparse --compress zstd`: lossless, loaded as it is, refused where it is not whole."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome
from support import exported, quantized, tiny_models
from transformers import AutoModelForCausalLM

import besa_cli.hf  # noqa: F401 - lets transformers load sparse checkpoints
from besa_cli.checkpoint.runs import Run
from besa_cli.errors import BesaError
from besa_cli.jobs import import_

FILE = "sparse-00002-of-00003.safetensors.zst"


@pytest.fixture(scope="module", params=["llama", "llama, 4 bits", "opt"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run directories with a compressed export and a plain one."""
    family, _, bits = request.param.partition(", ")
    made = exported.stage(tmp_path_factory.mktemp(family), family, awkward=family == "llama" and not bits)
    if bits:
        quantized.stage(made, group=24)
    exported.export(made, "sparse")
    exported.export(made, "sparse", compress="zstd")
    return made


@pytest.fixture
def directory(run: Run, tmp_path: Path) -> Path:
    """A compressed export that may be harmed."""
    import shutil

    return Path(shutil.copytree(run.exports / "sparse-zstd", tmp_path / "export"))


def newest(run: Run) -> Path:
    found = run.newest()
    assert found is not None
    return found


def test_import_gives_back_the_same_files(run: Run, tmp_path: Path) -> None:
    job = import_.ImportJob(run.exports / "sparse-zstd", Run(tmp_path / "back"))
    assert len(list(job.shards())) == job.number_of_shards
    assert tiny_models.files(job.directory) == tiny_models.files(newest(run))


def test_transformers_loads_the_stage_and_nothing_is_left_behind(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(run.exports / "sparse-zstd")
    stage = AutoModelForCausalLM.from_pretrained(newest(run))
    assert model.dtype == stage.dtype
    assert model.state_dict().keys() == stage.state_dict().keys()
    assert all(torch.equal(tensor, stage.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert list(tmp_path.iterdir()) == []


def test_only_the_files_of_weights_differ_from_the_plain_export(run: Run) -> None:
    plain, small = (tiny_models.files(run.exports / name) for name in ("sparse", "sparse-zstd"))
    told = ("README.md", "export.json", "sparse.safetensors.index.json")
    shards = {name for name in plain if name.startswith("sparse-")}
    assert {f"{name}.zst" for name in shards} == small.keys() - plain.keys()
    assert {name for name in plain.keys() & small.keys() if plain[name] != small[name]} <= set(told)
    sizes = json.loads(small["export.json"])["sizes"]
    assert sizes["weights"] == sum(len(small[f"{name}.zst"]) for name in shards)
    assert sizes["linears"] == sizes["weights"] - len(small[f"{min(shards)}.zst"])  # all but what belongs to no block


@pytest.mark.parametrize("how", ["a bit", "the last byte", "all"])
def test_a_damaged_file_is_refused_with_its_name(how: str, directory: Path, tmp_path: Path) -> None:
    content = bytearray((directory / FILE).read_bytes())
    content[len(content) // 2] ^= 1 if how == "a bit" else 0
    (directory / FILE).unlink()
    if how != "all":
        (directory / FILE).write_bytes(content[:-1] if how == "the last byte" else content)
    job = import_.ImportJob(directory, Run(tmp_path / "back"))
    with pytest.raises(BesaError, match=FILE):
        list(job.shards())
    assert not (tmp_path / "back" / "pruned").exists()
    with pytest.raises((BesaError, OSError), match=FILE):
        AutoModelForCausalLM.from_pretrained(directory)


def test_without_our_import_it_does_not_load(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    assert not (directory / config["transformers_weights"]).exists()


def test_the_command_line(besa: Callable[..., Outcome], workplace: Path, run: Run) -> None:
    exported.copy_of(run, workplace / "besa-run")
    done = besa("export", "--format", "sparse", "--compress", "zstd", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["options"] == {"format": "sparse", "compress": "zstd"}
    assert besa("import", "besa-run/export/sparse-zstd", "--run", "back").code == 0
    stage = newest(run).name
    assert tiny_models.files(workplace / "back" / stage) == tiny_models.files(workplace / "besa-run" / stage)
    refused = besa("export", "--compress", "zstd")
    assert (refused.code, "--compress is not an option of --format hf" in refused.err) == (2, True)
