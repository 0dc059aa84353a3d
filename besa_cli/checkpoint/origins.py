"""Origins of a stage: the model that it was made from, and the dense model at the beginning."""

from pathlib import Path

from besa_cli import models
from besa_cli.checkpoint import manifests
from besa_cli.checkpoint.manifests import MANIFEST, Origin
from besa_cli.system.notes import Notify


def locate(origin: Origin, notify: Notify) -> Path:
    """Return the directory of the model that a stage was made from; one that is gone is fetched again.

    Raises
    ------
    BesaError
        It cannot be had.
    """
    directory = Path(origin["directory"])
    if directory.is_dir():
        return directory
    name = origin["name"].partition("@")[0] if origin["revision"] else origin["name"]
    pinned = f"{name}@{origin['revision']}" if origin["revision"] else name
    return models.resolve(pinned, notify=notify).directory


def dense_origin(manifest: manifests.StageManifest, run: Path) -> Origin:
    """Return the dense model that a stage's history begins with, as far as the stages in between are on disk.

    `run` is the directory of the stage's run, which may have been moved since.
    """
    parent = _parent(manifest["model"], run)
    return dense_origin(manifests.read_stage(parent), parent.parent) if _is_stage(parent) else manifest["model"]


def _parent(origin: Origin, run: Path) -> Path:
    """Return the directory of the model that a stage of a run was made from, also if the run was moved since."""
    if "stage" in origin:
        beside = run / origin["stage"]
        if manifests.is_complete(beside) and manifests.read_stage(beside)["digest"] == origin["digest"]:
            return beside
    return Path(origin["directory"])


def _is_stage(directory: Path) -> bool:
    return (directory / MANIFEST).exists()


def dense(stage: Path, notify: Notify) -> tuple[Path, manifests.Digest]:
    """Return the directory and the digest of the dense model that a stage's history begins with.

    Raises
    ------
    BesaError
        It, or a stage in between, cannot be had.
    """
    origin = manifests.read_stage(stage)["model"]
    directory = _parent(origin, stage.parent)
    if not directory.is_dir():
        directory = locate(origin, notify)
    return dense(directory, notify) if _is_stage(directory) else (directory, origin["digest"])
