"""Opening of a sparse export: its manifests, indices and files are validated before any weight is expanded."""

import re
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Len
from typing_extensions import TypedDict

from besa_cli.checkpoint import exports, sparse_index, stages, zstd
from besa_cli.checkpoint.manifests import EXPORT, MANIFEST
from besa_cli.checkpoint.sparse_format import INDEX
from besa_cli.errors import BesaError, reading
from besa_cli.exporters.source import STAGE_FILES, private
from besa_cli.exporters.sparse import shard_name
from besa_cli.models import headers
from besa_cli.system import disk, records, redaction

_REMEDY = "fetch the export again, or make it again"
_SMALL = re.compile(
    r"(?!\.|model-)[^/\0]+\.(?:json|txt|model|jinja|tiktoken|spm)|(?i:LICENSE)[^/\0]*"
    r"|additional_chat_templates/(?!\.)[^/\0]+\.jinja"
)


class _IndexMetadata(TypedDict):
    total_size: Annotated[int, Ge(0)]


class _ExportIndex(TypedDict):
    """The stage's own index."""

    metadata: _IndexMetadata
    weight_map: Annotated[dict[str, str], Len(1)]


class Opened:
    """A sparse export whose small files have been validated; its weights are verified later, one file at a time.

    Parameters
    ----------
    directory : Path
        The export.

    Attributes
    ----------
    manifest : mapping
        The manifest of the exported stage.
    index : Index
        The export's files of weights.
    names : mapping
        Shard of the stage → the names of its tensors.
    total : int
        Bytes of the stage's tensors.
    files : mapping
        Name of a shard of the stage → name of the export's file that holds it.

    Raises
    ------
    BesaError
        The directory is not a sparse export, or a file is missing, damaged or contradicts another one (named).
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self._stage = directory, directory / STAGE_FILES
        if not (directory / INDEX).is_file() or not (self._stage / MANIFEST).is_file():
            raise BesaError(
                f"{directory} is not a complete sparse export: it lacks {INDEX} or {STAGE_FILES}/{MANIFEST}",
                "name a directory that `besa export --format sparse` made",
            )
        self._listed = self._read_list()
        self.manifest = stages.require_finished(self._stage)
        self._require_same_stage()
        self.index = sparse_index.read(directory)
        self.names, self.total = self._read_index()
        self.files = self._match_shards()

    @property
    def blocks(self) -> int:
        """Number of blocks of the stage."""
        return int(self.manifest["blocks"])

    def _read_list(self) -> dict[str, exports.File] | None:
        """Return the stage's small files listed in `export.json`, after comparing them; None without `export.json`."""
        if not (self.directory / EXPORT).exists():
            return None
        self._export = exports.read(self.directory)
        files: dict[str, exports.File] = self._export["files"]
        small = {name: entry for name, entry in files.items() if name.startswith(f"{STAGE_FILES}/")}
        exports.refuse_changed(self.directory, small)
        return small

    def _require_same_stage(self) -> None:
        """Check that `export.json` and the stage's own manifest describe the same stage."""
        if self._listed is None:
            return
        source, counts = self._export["source"], self._export["counts"]
        pairs = {
            "format": (self._export["options"]["format"], "sparse"),
            "stage": (source["stage"], self.manifest["stage"]),
            "digest": (source["digest"], self.manifest["digest"]),
            **{name: (counts[name], self.manifest["counts"][name]) for name in ("weights", "pruned", "zeros")},
        }
        for name, (exported, staged) in pairs.items():
            if exported != staged:
                raise BesaError(
                    f"{self.directory / EXPORT} and {STAGE_FILES}/{MANIFEST} in it differ: {name} {exported} and "
                    f"{staged}",
                    _REMEDY,
                )

    def _read_index(self) -> tuple[dict[str, frozenset[str]], int]:
        """Read the stage's index; returns the names of the tensors in each shard, and the bytes of all tensors."""
        path = self._stage / headers.INDEX
        disk.read_json(path, unique=True)  # refuses duplicate names
        index = records.read(_ExportIndex, path, _REMEDY)
        expected = [self.stage(self._stage).shard(index).name for index in range(-1, self.blocks)]
        names: dict[str, set[str]] = {shard: set() for shard in expected}
        for tensor, shard in index["weight_map"].items():
            if shard not in names:
                raise BesaError(f"{path} names {shard!r}, which a stage of {self.blocks} blocks does not have", _REMEDY)
            names[shard].add(tensor)
        return {shard: frozenset(tensors) for shard, tensors in names.items()}, index["metadata"]["total_size"]

    def _match_shards(self) -> dict[str, str]:
        files = {file.removesuffix(zstd.SUFFIX): file for file in self.index.digests}
        shards = {shard_name(shard): shard for shard in self.names}
        differing = set(shards) ^ set(files)
        if differing:
            raise BesaError(
                f"{self.directory / INDEX} and the stage's own index differ about {min(differing)}",
                "make the export again",
            )
        return {shard: files[name] for name, shard in shards.items()}

    def stage(self, directory: Path) -> stages.Stage:
        """Return the stage in another directory."""
        return stages.Stage(directory, self.blocks)

    def small_files(self) -> dict[str, bytes]:
        """Read the stage's files other than weights, by name; files that are not listed are left out.

        They hold no paths of the machine that made the export, unless the export is still on that machine.

        Raises
        ------
        BesaError
            A file is missing or cannot be read.
        """
        for path in self._stage.rglob("*"):
            if path.exists() and not path.is_dir():
                disk.require_regular(path)
        names = self._listed_names() if self._listed is not None else self._names_on_disk()
        contents = {name: self._read(self._stage / name) for name in names if self._belongs_to_stage(name)}
        for name in self._required():
            if name not in contents:
                raise BesaError(f"{self._stage / name} is missing, or {EXPORT} does not list it", _REMEDY)
        return {name: self._unredacted(name, content) for name, content in contents.items()}

    def _listed_names(self) -> list[str]:
        return [name.removeprefix(f"{STAGE_FILES}/") for name in self._listed or ()]

    def _names_on_disk(self) -> list[str]:
        """List the stage's regular files without links, for an export without `export.json`."""
        return [
            path.relative_to(self._stage).as_posix()
            for path in sorted(self._stage.rglob("*"))
            if path.is_file() and not path.is_symlink()
        ]

    def _required(self) -> list[str]:
        stage = self.stage(self._stage)
        reports = [stage.shard(index).with_suffix(".json").name for index in range(self.blocks)]
        return [MANIFEST, headers.INDEX, *reports]

    def _belongs_to_stage(self, name: str) -> bool:
        small = _SMALL.fullmatch(name) is not None and not name.endswith(".index.json") and name != EXPORT
        return small or name in self._required()

    def _read(self, path: Path) -> bytes:
        disk.require_regular(path)
        if path.stat().st_size > disk.LARGEST_JSON:
            raise BesaError(f"{path} has more than {disk.LARGEST_JSON} bytes", _REMEDY)
        with reading(path, _REMEDY):
            return path.read_bytes()

    def _unredacted(self, name: str, content: bytes) -> bytes:
        """Return the file as it was before the export removed paths, if that is still kept beside the export."""
        path = private(self.directory) / name
        if not path.is_file() or path.is_symlink():
            return content
        original = self._read(path)
        same = redaction.content(name, disk.parse_json(original, path)) == disk.parse_json(content, self._stage / name)
        return original if same else content
