"""What is refused before any work: writing over what is not ours, what was changed or fits no grid, a full disk."""

from collections.abc import Mapping
from pathlib import Path

from besa_cli.checkpoint import manifests, ownership
from besa_cli.checkpoint.stages import Stage
from besa_cli.errors import BesaError
from besa_cli.ops import affine
from besa_cli.ops.affine import Grid
from besa_cli.system import disk


def refuse_foreign(directory: Path, model: Path) -> None:
    """Refuse to write a stage over what is not a stage of besa, or over the very model that is read.

    Raises
    ------
    BesaError
        The directory holds files but no manifest, or it is the model's.
    """
    if model.resolve() == directory.resolve():
        raise BesaError(f"{directory} is both the model to prune and the place to write to", "name another --run")
    if not (directory / manifests.MANIFEST).exists():
        ownership.refuse_to_replace(directory)


def refuse_damaged(directory: Path, found: str) -> None:
    """Refuse a finished stage whose tensors are not those that were written.

    Parameters
    ----------
    directory : Path
        A model; what is no stage has no digest to compare with.
    found : str
        The digest of what lies there now.

    Raises
    ------
    BesaError
        The digests differ, or a shard, a report or a file of codes is missing or that of another block.
    """
    if not (directory / manifests.MANIFEST).exists():
        return
    manifest = manifests.read(directory)
    if manifest["status"] != "complete":
        return
    written = manifest["digest"]
    if written != found:
        raise BesaError(
            f"{directory} is damaged or was changed since it was made: digest {written[:12]} then, {found[:12]} now",
            f"restore its files, make it anew with --restart, or name it with --model {directory} to take it as it is",
        )
    Stage(directory, manifest["blocks"]).require_whole()


def refuse_incomplete(directory: Path) -> None:
    """Refuse to call a stage finished that lacks one of the small files that were copied into it.

    Raises
    ------
    BesaError
        The file is named.
    """
    for name in manifests.read(directory).get("files", ["config.json"]):  # older stages do not say
        if not (directory / name).is_file():
            raise BesaError(f"{directory} lacks {name}", "restore the file, or make the stage anew with --restart")


def refuse_beyond_fp16(extremes: Mapping[str, tuple[float, float]], grid: Grid) -> None:
    """Refuse weights whose scales would surely be no fp16 numbers, wherever the groups lie.

    Parameters
    ----------
    extremes : mapping
        The least and the greatest weight of each linear.
    grid : Grid

    Raises
    ------
    BesaError
        There are such weights.
    """
    for name, (low, high) in extremes.items():
        reach = max(-low, high) * (2 if grid.symmetric else 1)
        if reach / grid.top > affine.LARGEST:
            raise BesaError(
                f"{name} has weights as large as {max(-low, high):.3g}: their scale on {grid} is beyond fp16",
                "this model cannot be quantized so; is one of its weights damaged?",
            )


def require_space(directory: Path, needed: int) -> None:
    """Refuse early what the disk cannot hold.

    Parameters
    ----------
    directory : Path
        Where it is to be written; it may not exist yet.
    needed : int
        Bytes.
    """
    free = disk.free(directory)
    if free < needed:
        raise BesaError(
            f"{directory} needs {needed / 1e6:.0f} MB, its disk has {free / 1e6:.0f} MB free",
            "free disk space, or name a directory on another disk with --run",
        )
