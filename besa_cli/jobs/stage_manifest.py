"""Where a job begins: the manifest of what is asked, and what is there already, compared with it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from besa_cli.calibration.calibration_set import CalibrationSet
from besa_cli.checkpoint import manifests, stages
from besa_cli.checkpoint.runs import Run
from besa_cli.errors import BesaError
from besa_cli.jobs.request import StageRequest
from besa_cli.models import Model
from besa_cli.ops import kernels
from besa_cli.system import compute

# Variables that choose how libraries compute; threads have variables of their own and are settled by the manifest.
_MATHEMATICS = ("ATEN_CPU", "MKL_CBWR", "MKL_ENABLE", "ONEDNN_", "DNNL_", "TORCH_ALLOW_TF32", "NVIDIA_TF32", "CUBLAS_")

_PASS_TOKENS = {"cpu": 1024, "cuda": 4096}  # in a pass without gradients: what more takes leaves a processor's cache


def new_manifest(
    run: Run, model: Model, digest: str, calibration_set: CalibrationSet, request: StageRequest, ranks: int = 1
) -> dict[str, Any]:
    """The manifest of what is asked, before anything of it is done; `digest` is the model's.

    Nothing in it depends on the number of `ranks`, as long as they have the same number of threads together.
    """
    device = compute.device(request.device)
    dtype = compute.dtype(request.dtype, device)
    seqlen = calibration_set.tokens.shape[1]
    parent = run.stage_at(model.directory)
    return {
        "format": manifests.FORMAT,
        "stage": request.stage,
        "command": request.command,
        "options": {"model": model.name, **request.to_manifest(), **_drawn(run, calibration_set, request)},
        "compute": {
            "device": device.type,
            "dtype": compute.name_of(dtype),
            "dtype_reason": compute.dtype_reason(request.dtype, device),
            "threads": torch.get_num_threads() * ranks,
            "batch": max(_PASS_TOKENS[device.type] // seqlen, 1),
            "kernels": kernels.name(device, dtype),
            "processor": _processor(device),
            "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_MATHEMATICS)},
        },
        "model": {
            "name": model.name,
            "kind": model.kind,
            "revision": model.revision,
            "directory": str(model.directory.resolve()),
            "digest": digest,
            **({"stage": parent} if parent else {}),
        },
        **request.quantization(),
        "calibration": {
            "tokens_digest": calibration_set.digest if request.uses_calibration else None,
            "sources": calibration_set.manifest["sources"],
        },
        "versions": manifests.versions(),
        "history": history(model.directory),
        "status": "new",
    }


def _drawn(run: Run, calibration_set: CalibrationSet, request: StageRequest) -> dict[str, Any]:
    """The options that say where the calibration samples come from; none where none are observed."""
    if not request.uses_calibration:
        return {}
    options = calibration_set.manifest["options"]
    if request.calibration is not None:
        return {"calibration": request.calibration}
    if options.get("seed") != request.seed:
        return {"calibration": str(run.calibration.resolve())}
    return {name: options[name] for name in ("data", "samples", "seqlen", "pack")}


def place(final: Path, beside: Path, new: dict[str, Any], *, restart: bool) -> tuple[Path, dict[str, Any]]:
    """The stage made or begun with what is asked, and its manifest; a new one where there is none.

    With `restart` only a stage that an interrupted ``--restart`` has begun counts.

    Parameters
    ----------
    final, beside : Path
        The stage's own place, and that of a new one which is to replace it.
    new : dict
        The manifest of what is asked.

    Raises
    ------
    BesaError
        A stage is there that was made with other options.
    """
    found = {place: manifests.read(place) for place in (final, beside) if (place / manifests.MANIFEST).exists()}
    there = {place: old for place, old in found.items() if old["status"] != "beginning"}
    different = {place: differences(old, new) for place, old in there.items()}
    for place, old in there.items():
        if not different[place] and (not restart or (old["status"] == "running" and "restart" in old)):
            return place, old
    if restart:
        return beside if manifests.is_complete(final) else final, {**new, "restart": True}
    for place, what in different.items():
        state = "a finished" if there[place]["status"] == "complete" else "an unfinished"
        raise BesaError(
            f"{place} holds {state} stage made with other options: {'; '.join(what)}",
            "give --run NAME to keep both, or --restart to replace it",
        )
    return final, new


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What would change the result, with both values; `auto` agrees with whatever it was resolved to."""
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
    for name in ("device", "dtype"):
        resolved = old["compute"][name]
        mine[name] = resolved
        asked[name] = resolved if asked[name] == "auto" else asked[name]
    names = list(dict.fromkeys([*mine, *asked]))
    return [
        f"{name} {_short(mine.get(name))} there, {_short(asked.get(name))} asked"
        for name in names
        if mine.get(name) != asked.get(name)
    ]


def _processor(device: torch.device) -> str:
    """What decides which of a library's kernels run: the instructions of a CPU, or the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def refuse_other_environment(place: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to go on with a stage where its other blocks would be computed otherwise.

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
            f"{place} was begun in another environment, in which its blocks would have other bytes: "
            f"{'; '.join(different)}",
            "go on in the same environment, or give --restart to begin again",
        )


def _environment(settings: Mapping[str, Any]) -> dict[str, Any]:
    known = {"processor": settings["processor"]} if "processor" in settings else {}
    return {"inner loops": settings["kernels"], **known, **settings.get("environment", {})}


def _short(value: object) -> str:
    text = "-" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def history(directory: Path) -> list[dict[str, Any]]:
    """The stages before, where the model is itself a stage."""
    if not (directory / manifests.MANIFEST).exists():
        return []
    parent = stages.finished(directory)
    own = {key: parent[key] for key in ("stage", "command", "options", "versions", "digest") if key in parent}
    return [*parent.get("history", []), own]
