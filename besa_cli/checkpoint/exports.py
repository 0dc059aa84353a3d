"""The manifest of an export, `export.json`: its format, its source, and every file with its digest."""

from pathlib import Path
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from besa_cli.checkpoint import manifests
from besa_cli.checkpoint.manifests import EXPORT, Count, Counts, Digest, Positive, StageHistory
from besa_cli.errors import BesaError, reading
from besa_cli.system import disk, records
from besa_cli.system.records import strict

_REMEDY = "fetch the export again, or make it again with --restart"
_FETCH = "fetch the file again, or make the export again with --restart"


@strict
class File(TypedDict):
    """One file of an export."""

    bytes: Count
    sha256: Digest


@strict
class ExportOptions(TypedDict):
    """The options of an export; all but `format` belong to one format each."""

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
    digest: NotRequired[Digest]
    stage: NotRequired[str]


@strict
class Sizes(TypedDict):
    """Bytes of the linears and of all weights, as stored and as dense bf16."""

    linears: Count
    linears_dense: Positive
    weights: Count
    weights_dense: Positive
    rounded_to_zero: Count


class ExportRecord(TypedDict):
    """The fields of `export.json`, but for the files."""

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


@strict
class Manifest(ExportRecord):
    """`export.json`."""

    files: dict[str, File]


def read(directory: Path) -> Manifest:
    """Read the manifest of a finished export and validate each field.

    Raises
    ------
    BesaError
        The manifest is missing, of another format, or damaged (the field is named).
    """
    manifests.read_export(directory)  # refuses other formats
    return records.read(Manifest, directory / EXPORT, _REMEDY)


def refuse_changed(directory: Path, files: dict[str, File], *, digests: bool = True) -> None:
    """Compare files of an export with their entries in its manifest.

    Parameters
    ----------
    directory : Path
        The export.
    files : dict
        File name → entry of the manifest, for the files to compare.
    digests : bool
        Compare sizes and digests; else only sizes.

    Raises
    ------
    BesaError
        A file is missing or differs (named), or its name leads out of the directory.
    """
    for name, entry in files.items():
        path = directory / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BesaError(f"{directory / EXPORT} names {name}, which is not in the export", _REMEDY)
        difference = _difference(path, entry, digests=digests)
        if difference:
            raise BesaError(f"{path} is damaged or missing: {difference}", _FETCH)


def _difference(path: Path, entry: File, *, digests: bool) -> str:
    """Describe how a file differs from its entry in the manifest; empty if it does not."""
    if not path.exists():
        return f"{EXPORT} lists it"
    disk.require_regular(path)
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"it has {size} bytes, {EXPORT} says {entry['bytes']}"
    return f"its SHA-256 is not the one in {EXPORT}" if digests and digest(path) != entry["sha256"] else ""


def digest(path: Path) -> str:
    """Return the SHA-256 of a regular file.

    Raises
    ------
    BesaError
        The file cannot be read.
    """
    disk.require_regular(path)
    with reading(path, _FETCH):
        return disk.sha256_file(path)
