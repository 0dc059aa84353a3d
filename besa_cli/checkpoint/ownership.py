"""Ownership of directories: besa replaces or removes a directory only if it wrote all files in it.

A directory is besa's if its manifest says so. In it, besa owns the manifest, the files that the manifest lists or whose
names follow from it (shards, their reports and codes, the index, the timing), and partial files that a killed process
left. A directory with any other file, or with a file that is being read, is refused, naming the file.
"""

import filecmp
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from besa_cli.checkpoint import manifests
from besa_cli.checkpoint.manifests import EXPORT, MANIFEST
from besa_cli.checkpoint.stages import DRAFT, HELD_OUT, PROGRESS, RATES, SENSITIVITY, TIMING, TUNING
from besa_cli.errors import BesaError
from besa_cli.models.headers import INDEX
from besa_cli.system.disk import Json

Manifest = TypeVar("Manifest")

_CALIBRATION = ("tokens.safetensors",)
_PROGRESS = re.compile(rf"{TUNING}/\d{{8}}/{re.escape(PROGRESS)}")
_STATES = (HELD_OUT, f"{DRAFT}/{HELD_OUT}", f"{DRAFT}/{RATES}", SENSITIVITY)  # of an unfinished stage
_SENSITIVITY = re.compile(r"sensitivity-[0-9a-f]{16}\.safetensors")
_SHARD = re.compile(
    r"(?:codes/|draft/|tuning/\d{8}/)?model-(\d{5,})-of-(\d{5,})\.safetensors|(?:draft/)?model-(\d{5,})-of-(\d{5,})\.json"
)
_WEIGHTS = re.compile(r"(?:model|sparse)-\d{5,}-of-\d{5,}\.safetensors(?:\.zst)?|model-[A-Z0-9_]+\.gguf")
_SMALL = re.compile(
    r"(?:[a-z]+_)*config\.json|tokenizer\.(?:json|model)(?:\.v\d+)?|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(?:json|txt)|merges\.txt|chat_template\.(?:jinja|json)|additional_chat_templates/[^/]+\.jinja"
    r"|[^/]+\.(?:model|tiktoken|spm)|(?i:LICENSE)[^/]*"
)
_EXPORTED = ("README.md", "sparse.safetensors.index.json", INDEX, "model.safetensors")
_PARTIAL = re.compile(r"\.(.+)\.\d+\.partial")  # see `disk.publish`
_AWAY = "move it away, or name another run directory with --run"


@dataclass(frozen=True, kw_only=True)
class _Owned:
    """The files in one directory that besa wrote.

    Attributes
    ----------
    listed : frozenset of str
        Names that the manifest lists, relative to the directory, with ``/``.
    shards : int
        Number of files of weights of a stage; 0 if the directory is not a stage.
    origin : Path or None
        The directory that a stage's small files were copied from.
    unfinished : bool
        An interrupted export or import, which has no list yet.
    samples : bool
        A calibration set, beside which the sensitivity of channels is kept.
    """

    listed: frozenset[str] = frozenset()
    shards: int = 0
    origin: Path | None = None
    unfinished: bool = False
    samples: bool = False

    def has(self, directory: Path, name: str) -> bool:
        """Return True if besa wrote the file of this name."""
        folder, _, last = name.rpartition("/")
        partial = _PARTIAL.fullmatch(last)
        name = f"{folder}/{partial[1]}".lstrip("/") if partial else name
        return (
            name in self.listed
            or self._is_shard(name)
            or (bool(self.shards) and _PROGRESS.fullmatch(name) is not None)
            or (bool(self.shards) and (_SMALL.fullmatch(name) is not None or self._is_copy(directory, name)))
            or (self.samples and _SENSITIVITY.fullmatch(name) is not None)
            or (self.unfinished and self._may_be_exported(name))
        )

    def _is_shard(self, name: str) -> bool:
        match = _SHARD.fullmatch(name)
        if match is None:
            return False
        number, total = (int(part) for part in match.groups() if part is not None)
        return total == self.shards and 1 <= number <= total

    def _is_copy(self, directory: Path, name: str) -> bool:
        """Return True if the file is a copy of one in `origin`, so that nothing is lost by removing it."""
        if self.origin is None:
            return False
        copy, original = directory / name, self.origin / name
        try:
            return not copy.samefile(original) and filecmp.cmp(copy, original, shallow=False)
        except (OSError, ValueError):
            return False

    @staticmethod
    def _may_be_exported(name: str) -> bool:
        plain = name.removeprefix("stage/")
        known = (MANIFEST, EXPORT, TIMING, *_EXPORTED)
        return plain in known or any(pattern.fullmatch(plain) for pattern in (_SMALL, _SHARD, _WEIGHTS))


_MANIFEST_ONLY = _Owned(listed=frozenset({MANIFEST, EXPORT}))  # without a manifest: a partial one may be besa's


def refuse_to_replace(directory: Path, sources: Iterable[Path] = ()) -> None:
    """Refuse to replace a directory that besa did not make, that holds other files, or a file that is being read.

    Parameters
    ----------
    directory : Path
        The directory to be replaced or removed; it need not exist.
    sources : iterable of Path
        Files and directories that are being read: none of their files may be in `directory`, directly or by a link.

    Raises
    ------
    BesaError
        The directory must not be replaced; names the file.
    """
    if not directory.exists() and not directory.is_symlink():
        return
    if not directory.is_dir():
        raise BesaError(f"cannot make {directory}: a file is in its place", "name another directory with --run")
    for source in sources:
        _refuse_source(directory, source)
    stranger = next(iter(strangers(directory)), None)
    if stranger is None:
        return
    if not manifest_names(directory):
        raise BesaError(f"{directory} was not made by besa: it holds {stranger} and no {MANIFEST} or {EXPORT}", _AWAY)
    raise BesaError(f"{directory} is not replaced: it holds {stranger}, which besa did not write", _AWAY)


def manifest_names(directory: Path) -> list[str]:
    """List the manifests in a directory."""
    return [name for name in (MANIFEST, EXPORT) if (directory / name).exists()]


def strangers(directory: Path) -> list[str]:
    """List the files below a directory that besa did not write, sorted; without a manifest these are all files.

    Raises
    ------
    BesaError
        A manifest cannot be read.
    """
    owned = _owned(directory) or _MANIFEST_ONLY
    return sorted(name for name in _files(directory) if not owned.has(directory, name))


def remove(directory: Path) -> None:
    """Remove the files that besa wrote to a directory, and folders left empty; of a symbolic link only the link.

    Files that besa did not write are kept, and so are the folders around them.

    Raises
    ------
    BesaError
        A file cannot be removed.
    """
    try:
        if directory.is_symlink():
            directory.unlink()
            return
        owned = _owned(directory) or _MANIFEST_ONLY
        names = [name for name in _files(directory) if owned.has(directory, name)]
        last = [name for name in names if name in (MANIFEST, EXPORT)]  # they mark the directory as besa's until then
        for name in [*(name for name in names if name not in last), *last]:
            (directory / name).unlink(missing_ok=True)
        _remove_empty(directory)
    except OSError as error:
        raise BesaError(f"cannot remove {directory}: {error.strerror}", "remove it by hand") from error


def _remove_empty(directory: Path) -> None:
    for folder, _, _ in os.walk(directory, topdown=False):
        if not any(Path(folder).iterdir()):
            Path(folder).rmdir()


def _files(directory: Path) -> Iterator[str]:
    """Yield the names of everything below a directory except folders; links are not followed."""
    for parent, folders, files in os.walk(directory):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in (*files, *links):
            yield (Path(parent) / name).relative_to(directory).as_posix()


def _refuse_source(directory: Path, source: Path) -> None:
    home = directory.resolve()
    inside = source.rglob("*") if source.is_dir() else ()
    for path in (source, *inside):
        if path.resolve().is_relative_to(home):
            raise BesaError(
                f"{directory} is not replaced: {path}, which is being read, is in it",
                "name another run directory with --run",
            )


def _owned(directory: Path) -> _Owned | None:
    """Return the files of a directory that are besa's; None if no manifest says that besa made it."""
    name = next((name for name in (EXPORT, MANIFEST) if (directory / name).is_file()), None)
    if name is None:
        return None
    if name == EXPORT:
        return _of_export(_read(manifests.read_export, directory), directory)
    manifest = _read(manifests.read, directory)
    if manifest["stage"] == "calibration":
        return _Owned(listed=frozenset({MANIFEST, *_CALIBRATION}), samples=True)
    return _of_stage(manifest)


def _read(read: Callable[[Path], Manifest], directory: Path) -> Manifest:
    """Read a manifest; the error says that its directory is not replaced."""
    try:
        return read(directory)
    except BesaError as error:
        raise BesaError(f"{directory} is not replaced: {error.message}", _AWAY) from error


def _of_export(manifest: Json, directory: Path) -> _Owned:
    files = manifest.get("files", {})
    if manifest.get("command") != "export" or not isinstance(files, dict):
        raise BesaError(f"{directory / EXPORT} does not say what besa exported", _AWAY)
    return _Owned(listed=frozenset({EXPORT, *files}), unfinished=manifest.get("status") != "complete")


def _of_stage(manifest: manifests.StageManifest) -> _Owned:
    """Return the files of a stage by its manifest; `files`, missing in old stages, lists the small ones."""
    return _Owned(
        listed=frozenset({MANIFEST, TIMING, INDEX, *_STATES, *manifest.get("files", [])}),
        shards=manifest["blocks"] + 1,
        origin=Path(manifest["model"]["directory"]),
    )
