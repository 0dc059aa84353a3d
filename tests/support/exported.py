"""Finished stages of tiny models to export, made once and copied."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support import tiny_models, written

from besa_cli import exporters
from besa_cli.checkpoint.runs import Run
from besa_cli.jobs.export import ExportJob
from besa_cli.jobs.stage import StageJob as Pruning


def stage(
    place: Path,
    family: str = "llama",
    *,
    tied: bool = False,
    blocks: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    awkward: bool = False,
) -> Run:
    """A run directory with a pruned stage; an `awkward` one has an empty and a full row, a −0.0 and a dense linear."""
    source = tiny_models.checkpoint(place / "dense", family, tied=tied, blocks=blocks, dtype=dtype)
    if awkward:
        _make_awkward(source / "model.safetensors")
    tiny_models.add_tokenizer(source)
    run = Run(place / "run")
    tiny_models.run(
        Pruning(
            run,
            tiny_models.local(source),
            tiny_models.calibration_set(tiny_models.tokens()),
            tiny_models.request("magnitude"),
        )
    )
    if awkward:
        _refill(run)
    return run


def _make_awkward(file: Path) -> None:
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("up_proj.weight"):
            tensor[0] = 0.0
    save_file(tensors, file, metadata={"format": "pt"})


def _refill(run: Run) -> None:
    """Give the stage, by hand, a full row, a negative zero and a linear without zeros."""
    directory = run.stage("pruned")
    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("up_proj.weight"):
                tensor[1] = 0.5
                tensor[2, 3] = -0.0
            elif name.endswith("0.self_attn.k_proj.weight"):
                tensor[:] = 0.25
        save_file(tensors, file, metadata={"format": "pt"})
    written.settle(directory)


def export(run: Run, name: str, **options: object) -> Path:
    """The directory of a finished export."""
    job = ExportJob(run, exporters.load(name, options))
    list(job.pieces())
    job.finish()
    return job.directory


def copy_of(run: Run, place: Path) -> Run:
    """The same run directory elsewhere, without its exports."""
    shutil.copytree(run.path, place, ignore=shutil.ignore_patterns("export"))
    return Run(place)
