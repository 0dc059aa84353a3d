"""The manifest of an export, `export.json`: what it is, what it was made from, and every file with its digest."""

from pathlib import Path
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from besa_cli.checkpoint import manifests
from besa_cli.checkpoint.manifests import EXPORT, Count, Counts, Digest, Positive, StageHistory
from besa_cli.errors import BesaError, reading
from besa_cli.system import disk, records
from besa_cli.system.records import strict

_REMEDY = "fetch the export again, or export it anew with --restart"


@strict
class File(TypedDict):
    """One file of an export."""

    bytes: Count
    sha256: Digest


@strict
class ExportOptions(TypedDict):
    """What was asked for; each format has options of its own beside it."""

    format: str
    dtype: NotRequired[str | None]
    shard_size: NotRequired[Positive]
    type: NotRequired[str]
    compress: NotRequired[str | None]


@strict
class ExportSource(TypedDict):
    """The stage that was exported."""

    stage: str
    digest: Digest


@strict
class ExportModel(TypedDict):
    """The model that the stage was made from."""

    name: str
    kind: str
    revision: str | None


@strict
class Sizes(TypedDict):
    """Bytes of what is stored, and as dense bf16."""

    linears: Count
    linears_dense: Positive
    weights: Count
    weights_dense: Positive
    rounded_to_zero: Count


@strict
class Manifest(TypedDict):
    """`export.json`."""

    format: Positive
    command: Literal["export"]
    options: ExportOptions
    source: ExportSource
    model: ExportModel
    versions: dict[str, str]
    status: Literal["complete"]
    counts: Counts
    sizes: Sizes
    history: list[StageHistory]
    files: dict[str, File]


def read(directory: Path) -> dict[str, Any]:
    """The manifest of a finished export, each field of the kind that it has to be.

    Raises
    ------
    BesaError
        There is none, it is of another format, or it is damaged (the field is named).
    """
    manifests.read(directory, EXPORT)  # of this format
    return {**records.read(Manifest, directory / EXPORT, _REMEDY)}


def refuse_changed(directory: Path, files: dict[str, File], *, digests: bool = True) -> None:
    """Compare files of an export with what its manifest says of them.

    Parameters
    ----------
    directory : Path
        The export's.
    files : dict
        Those to look at.
    digests : bool
        Read them whole; else only their sizes are compared.

    Raises
    ------
    BesaError
        A file is missing or another (named), or its name leads out of the directory.
    """
    for name, told in files.items():
        path = directory / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BesaError(f"{directory / EXPORT} names {name}, which is not in the export", _REMEDY)
        reason = _reason(path, told, digests=digests)
        if reason:
            raise BesaError(f"{path} is damaged or missing: {reason}", _FETCH)


def _reason(path: Path, told: File, *, digests: bool) -> str:
    """How a file differs from what is told of it; empty where it does not."""
    if not path.exists():
        return f"{EXPORT} lists it"
    disk.require_regular(path)
    size = path.stat().st_size
    if size != told["bytes"]:
        return f"it has {size} bytes, {EXPORT} says {told['bytes']}"
    return f"its SHA-256 is not the one in {EXPORT}" if digests and digest(path) != told["sha256"] else ""


_FETCH = "fetch the file again, or export it anew with --restart"


def digest(path: Path) -> str:
    """The SHA-256 of an ordinary file.

    Raises
    ------
    BesaError
        It cannot be read.
    """
    disk.require_regular(path)
    with reading(path, _FETCH):
        return disk.sha256_file(path)
