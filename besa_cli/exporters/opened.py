"""A sparse export, opened: for which stage it is and what it has to hold, checked before any weight is expanded."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

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

_ANEW = "fetch the export again, or export it anew"
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
    """A sparse export whose small files are what they have to be; its weights are looked at one file at a time.

    Parameters
    ----------
    directory : Path
        The export.

    Attributes
    ----------
    manifest : mapping
        The stage's own.
    index : Index
        The export's files of weights.
    files : mapping
        Shard of the stage → the export's file that it is made of, both by name.

    Raises
    ------
    BesaError
        It is not a sparse export, or a file is missing, damaged or contradicts another one (named).
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self._stage = directory, directory / STAGE_FILES
        if not (directory / INDEX).is_file() or not (self._stage / MANIFEST).is_file():
            raise BesaError(
                f"{directory} is no whole sparse export: it lacks {INDEX} or {STAGE_FILES}/{MANIFEST}",
                "name a directory that `besa export --format sparse` made",
            )
        self._listed = self._read_list()
        self.manifest: Mapping[str, Any] = stages.require_finished(self._stage)
        self._require_same_stage()
        self.index = sparse_index.read(directory)
        self.names, self.total = self._read_index()
        self.files = self._pair()

    @property
    def blocks(self) -> int:
        """How many blocks the stage has."""
        return int(self.manifest["blocks"])

    def _read_list(self) -> dict[str, exports.File] | None:
        """The stage's small files by `export.json`, compared with it; None where there is no such file."""
        if not (self.directory / EXPORT).exists():
            return None
        self._export = exports.read(self.directory)
        files: dict[str, exports.File] = self._export["files"]
        small = {name: told for name, told in files.items() if name.startswith(f"{STAGE_FILES}/")}
        exports.refuse_changed(self.directory, small)
        return small

    def _require_same_stage(self) -> None:
        """`export.json` and the stage's own manifest tell of the same stage."""
        if self._listed is None:
            return
        told, counts = self._export["source"], self._export["counts"]
        same = {
            "format": (self._export["options"]["format"], "sparse"),
            "stage": (told["stage"], self.manifest["stage"]),
            "digest": (told["digest"], self.manifest["digest"]),
            **{name: (counts[name], self.manifest["counts"][name]) for name in ("weights", "pruned", "zeros")},
        }
        for name, (one, other) in same.items():
            if one != other:
                raise BesaError(
                    f"{self.directory / EXPORT} and {STAGE_FILES}/{MANIFEST} in it differ: {name} {one} and {other}",
                    _ANEW,
                )

    def _read_index(self) -> tuple[dict[str, frozenset[str]], int]:
        """The names of the tensors in each shard of the stage, and the bytes of all."""
        path = self._stage / headers.INDEX
        disk.read_json(path, unique=True)
        found = records.read(_ExportIndex, path, _ANEW)
        expected = [self.stage(self._stage).shard(index).name for index in range(-1, self.blocks)]
        names: dict[str, set[str]] = {shard: set() for shard in expected}
        for tensor, shard in found["weight_map"].items():
            if shard not in names:
                raise BesaError(f"{path} names {shard!r}, which a stage of {self.blocks} blocks does not have", _ANEW)
            names[shard].add(tensor)
        return {shard: frozenset(own) for shard, own in names.items()}, found["metadata"]["total_size"]

    def _pair(self) -> dict[str, str]:
        files = {file.removesuffix(zstd.SUFFIX): file for file in self.index.digests}
        shards = {shard_name(shard): shard for shard in self.names}
        odd = set(shards) ^ set(files)
        if odd:
            raise BesaError(
                f"{self.directory / INDEX} and the stage's own index differ about {min(odd)}", "export it anew"
            )
        return {shard: files[name] for name, shard in shards.items()}

    def stage(self, directory: Path) -> stages.Stage:
        """This stage in another directory."""
        return stages.Stage(directory, self.blocks)

    def small_files(self) -> dict[str, bytes]:
        """What the stage holds beside its weights, by name; files that no list names are left out.

        Paths of the machine that made the export are in none of them, but for an export that still lies there.

        Raises
        ------
        BesaError
            A file is missing or cannot be read.
        """
        for path in self._stage.rglob("*"):
            if path.exists() and not path.is_dir():
                disk.require_regular(path)
        there = self._listed_names() if self._listed is not None else self._known_names()
        found = {name: self._read(self._stage / name) for name in there if self._is_stages(name)}
        for needed in self._needed():
            if needed not in found:
                raise BesaError(f"{self._stage / needed} is missing, or {EXPORT} does not list it", _ANEW)
        return {name: self._private(name, content) for name, content in found.items()}

    def _listed_names(self) -> list[str]:
        return [name.removeprefix(f"{STAGE_FILES}/") for name in self._listed or ()]

    def _known_names(self) -> list[str]:
        """Without a list: ordinary files, and none that a link brings in."""
        return [
            path.relative_to(self._stage).as_posix()
            for path in sorted(self._stage.rglob("*"))
            if path.is_file() and not path.is_symlink()
        ]

    def _needed(self) -> list[str]:
        stage = self.stage(self._stage)
        reports = [stage.shard(index).with_suffix(".json").name for index in range(self.blocks)]
        return [MANIFEST, headers.INDEX, *reports]

    def _is_stages(self, name: str) -> bool:
        small = _SMALL.fullmatch(name) is not None and not name.endswith(".index.json") and name != EXPORT
        return small or name in self._needed()

    def _read(self, path: Path) -> bytes:
        disk.require_regular(path)
        if path.stat().st_size > disk.LARGEST_JSON:
            raise BesaError(f"{path} has more than {disk.LARGEST_JSON} bytes", _ANEW)
        with reading(path, _ANEW):
            return path.read_bytes()

    def _private(self, name: str, content: bytes) -> bytes:
        """The file as it was before the export took paths out of it, where it is still kept beside the export."""
        path = private(self.directory) / name
        if not path.is_file() or path.is_symlink():
            return content
        kept = self._read(path)
        same = redaction.content(name, disk.parse_json(kept, path)) == disk.parse_json(content, self._stage / name)
        return kept if same else content
