"""Preflight checks: foreign directories, modified stages, weights beyond fp16 scales, free disk space."""

from collections.abc import Mapping
from pathlib import Path

from besa_cli.checkpoint import manifests, ownership
from besa_cli.checkpoint.stages import Stage
from besa_cli.errors import BesaError
from besa_cli.ops import affine
from besa_cli.ops.affine import Grid
from besa_cli.system import disk


def refuse_foreign(directory: Path, model: Path) -> None:
    """Refuse to write a stage to a directory that holds other files, or to the model's own directory.

    Raises
    ------
    BesaError
        The directory holds files but no manifest, or it is the model's.
    """
    if model.resolve() == directory.resolve():
        raise BesaError(
            f"{directory} is both the model and the directory to write to", "name another run directory with --run"
        )
    if not (directory / manifests.MANIFEST).exists():
        ownership.refuse_to_replace(directory)


def refuse_damaged(directory: Path, digest: str) -> None:
    """Refuse a finished stage whose tensors differ from those that were written.

    Parameters
    ----------
    directory : Path
        A model; nothing is compared if it is not a finished stage.
    digest : str
        The digest of its present tensors.

    Raises
    ------
    BesaError
        The digests differ, or a shard, a report or a file of codes is missing or belongs to another block.
    """
    if not (directory / manifests.MANIFEST).exists():
        return
    manifest = manifests.read_stage(directory)
    if manifest["status"] != "complete":
        return
    written = manifest["digest"]
    if written != digest:
        raise BesaError(
            f"{directory} is damaged or was changed since it was made: digest {written[:12]} then, {digest[:12]} now",
            f"restore its files, make it again with --restart, or give --model {directory} to use it unchecked",
        )
    Stage(directory, manifest["blocks"]).require_whole()


def refuse_incomplete(directory: Path) -> None:
    """Refuse a stage that lacks one of the small files that were copied to it.

    Raises
    ------
    BesaError
        A file is missing (named).
    """
    for name in manifests.read_stage(directory).get("files", ["config.json"]):  # old stages have no list
        if not (directory / name).is_file():
            raise BesaError(f"{directory} lacks {name}", "restore the file, or make the stage again with --restart")


def refuse_beyond_fp16(extremes: Mapping[str, tuple[float, float]], grid: Grid) -> None:
    """Refuse weights whose scales overflow fp16 for any division into groups.

    Parameters
    ----------
    extremes : mapping
        Linear → its smallest and largest weight.
    grid : Grid

    Raises
    ------
    BesaError
        A scale overflows; the linear is named.
    """
    for name, (low, high) in extremes.items():
        width = max(-low, high) * (2 if grid.symmetric else 1)
        if width / grid.top > affine.LARGEST:
            raise BesaError(
                f"{name} has weights as large as {max(-low, high):.3g}: their scale on {grid} exceeds fp16",
                "check the weights, which may be damaged, or give more bits",
            )


def require_space(directory: Path, needed: int) -> None:
    """Refuse to start if the disk has too little free space.

    Parameters
    ----------
    directory : Path
        The directory to write to; it need not exist.
    needed : int
        Bytes to be written.

    Raises
    ------
    BesaError
        The disk has fewer bytes free.
    """
    free = disk.free(directory)
    if free < needed:
        raise BesaError(
            f"{directory} needs {needed / 1e6:.0f} MB, its disk has {free / 1e6:.0f} MB free",
            "free disk space, or name a directory on another disk with --run",
        )
