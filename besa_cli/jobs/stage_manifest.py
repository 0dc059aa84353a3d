"""Manifests of requested stages, and their comparison with what the run directory already holds."""

import os
from pathlib import Path
from typing import cast

import torch

from besa_cli.calibration.calibration_set import CalibrationSet
from besa_cli.checkpoint import manifests, stages
from besa_cli.checkpoint.manifests import Compute, NewStageManifest, StageHistory, StageManifest
from besa_cli.checkpoint.runs import Run
from besa_cli.errors import BesaError
from besa_cli.jobs.request import Request
from besa_cli.models import Model
from besa_cli.ops import kernels
from besa_cli.system import compute
from besa_cli.system.disk import JsonObject

# Variables that choose how libraries compute; threads have variables of their own and are settled by the manifest.
_MATHEMATICS = ("ATEN_CPU", "MKL_CBWR", "MKL_ENABLE", "ONEDNN_", "DNNL_", "TORCH_ALLOW_TF32", "NVIDIA_TF32", "CUBLAS_")

_PASS_TOKENS = {"cpu": 1024, "cuda": 4096}  # in a pass without gradients: what more takes leaves a processor's cache


def new_manifest(
    run: Run, model: Model, digest: str, calibration_set: CalibrationSet, request: Request, ranks: int = 1
) -> NewStageManifest:
    """Return the manifest of a request, before any work; `digest` is that of the model's weights.

    It does not depend on the number of `ranks`, as long as their threads add up to the same number.
    """
    device = compute.device(request.device)
    dtype = compute.dtype(request.dtype, device)
    seqlen = calibration_set.tokens.shape[1]
    parent = run.stage_at(model.directory)
    options = {"model": model.name, **request.to_manifest(), **_drawn(run, calibration_set, request)}
    origin: manifests.Origin = {
        "name": model.name,
        "kind": model.kind,
        "revision": model.revision,
        "directory": str(model.directory.resolve()),
        "digest": digest,
    }
    if parent:
        origin["stage"] = parent
    return {
        "format": manifests.FORMAT,
        "stage": request.stage,
        "command": request.command,
        "options": cast("manifests.Options", options),
        "compute": {
            "device": cast("manifests.Device", device.type),
            "dtype": cast("manifests.Dtype", compute.name_of(dtype)),
            "dtype_reason": compute.dtype_reason(request.dtype, device),
            "threads": torch.get_num_threads() * ranks,
            "batch": max(_PASS_TOKENS[device.type] // seqlen, 1),
            "kernels": kernels.name(device, dtype),
            "processor": _processor(device),
            "environment": {
                name: os.environ[name]
                for name in sorted(os.environ)
                if name.startswith(_MATHEMATICS) and name != compute.PRIMITIVES
            },
        },
        "model": origin,
        **request.quantization(),
        "calibration": {
            "tokens_digest": calibration_set.digest if request.uses_calibration else None,
            "sources": calibration_set.manifest["sources"],
        },
        "versions": manifests.versions(),
        "history": history(model.directory),
        "status": "new",
    }


def _drawn(run: Run, calibration_set: CalibrationSet, request: Request) -> JsonObject:
    """Return the options that say where the calibration samples come from; empty if the method uses none."""
    if not request.uses_calibration:
        return {}
    options = calibration_set.manifest["options"]
    if request.calibration is not None:
        return {"calibration": request.calibration}
    if options.get("seed") != request.seed:
        return {"calibration": str(run.calibration.resolve())}
    return {name: options[name] for name in ("data", "samples", "seqlen", "pack")}


def find_or_plan(
    final: Path, beside: Path, new: NewStageManifest, *, restart: bool
) -> tuple[Path, StageManifest | NewStageManifest]:
    """Return the directory and manifest of the stage that was begun with the same options, or of a new one.

    With `restart`, only a stage that an interrupted ``--restart`` began is resumed.

    Parameters
    ----------
    final, beside : Path
        The stage's own place, and that of a new one which is to replace it.
    new : dict
        The manifest of what is asked.

    Raises
    ------
    BesaError
        A stage made with other options exists.
    """
    found = {place: manifests.read_stage(place) for place in (final, beside) if (place / manifests.MANIFEST).exists()}
    there = {place: old for place, old in found.items() if old["status"] != "beginning"}
    different = {place: differences(old, new) for place, old in there.items()}
    for place, old in there.items():
        if not different[place] and (not restart or (old["status"] == "running" and "restart" in old)):
            return place, old
    if restart:
        restarted = cast("NewStageManifest", {**new, "restart": True})
        return beside if manifests.is_complete(final) else final, restarted
    for place, what in different.items():
        state = "a finished" if there[place]["status"] == "complete" else "an unfinished"
        raise BesaError(
            f"{place} holds {state} stage made with other options: {'; '.join(what)}",
            "give --run NAME to keep both, or --restart to replace it",
        )
    return final, new


def differences(old: StageManifest, new: NewStageManifest) -> list[str]:
    """Return the options that would change the result, with both values; `auto` equals what it was resolved to."""
    mine, asked = (
        {
            "command": each["command"],
            **each["options"],
            "model": each["model"]["digest"],
            "calibration": each["calibration"]["tokens_digest"],
        }
        for each in (old, new)
    )
    if asked["calibration"] is None:  # no samples are observed; older stages name some all the same
        mine["calibration"] = None
    for name in ("data", "samples", "seqlen", "pack"):  # the tokens themselves are compared
        mine.pop(name, None)
        asked.pop(name, None)
    for key in ("device", "dtype"):
        resolved = old["compute"][key]
        mine[key] = resolved
        asked[key] = resolved if asked[key] == "auto" else asked[key]
    names = list(dict.fromkeys([*mine, *asked]))
    return [
        f"{name} {_short(mine.get(name))} there, {_short(asked.get(name))} asked"
        for name in names
        if mine.get(name) != asked.get(name)
    ]


def _processor(device: torch.device) -> str:
    """Return what decides which kernels of a library run: the instruction set of the CPU, or the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def refuse_other_environment(place: Path, old: StageManifest, new: NewStageManifest) -> None:
    """Refuse to resume a stage whose remaining blocks would be computed differently.

    Parameters
    ----------
    place : Path
        The stage.
    old, new : mapping
        Its manifest, and that of what is asked now.

    Raises
    ------
    BesaError
        Versions, inner loops, the processor or variables that choose how libraries compute differ; names both values.
    """
    there, here = ({**each["versions"], **_environment(each["compute"])} for each in (old, new))
    if "processor" not in there:  # a stage of before
        del here["processor"]
    different = [
        f"{name} {there.get(name, 'unset')} there, {here.get(name, 'unset')} here"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
    ]
    if different:
        raise BesaError(
            f"{place} was begun in another environment, where its blocks have other bytes: {'; '.join(different)}",
            "resume in the same environment, or start over with --restart",
        )


def _environment(settings: Compute) -> dict[str, str]:
    known = {"processor": settings["processor"]} if "processor" in settings else {}
    return {"inner loops": settings["kernels"], **known, **settings.get("environment", {})}


def _short(value: object) -> str:
    text = "-" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def history(directory: Path) -> list[StageHistory]:
    """Return the earlier stages, if the model is itself a stage."""
    if not (directory / manifests.MANIFEST).exists():
        return []
    parent = stages.require_finished(directory)
    own: StageHistory = {
        "stage": parent["stage"],
        "command": parent["command"],
        "options": parent["options"],
        "versions": parent["versions"],
        "digest": parent["digest"],
    }
    return [*parent["history"], own]
