"""The index of a sparse checkpoint: the file of each part, and each file's digest; every entry is validated."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Len
from typing_extensions import TypedDict

from besa_cli.checkpoint import weights, zstd
from besa_cli.checkpoint.sparse_format import INDEX
from besa_cli.errors import BesaError, reading
from besa_cli.system import disk, records

_FILE = re.compile(r"sparse-\d{5,}-of-\d{5,}\.safetensors(?:\.zst)?", re.ASCII)
_FETCH = "fetch the file again, or make the export again"


class _Metadata(TypedDict):
    total_size: Annotated[int, Ge(0)]
    sha256: dict[str, Annotated[str, Len(64, 64)]]


class _SparseIndex(TypedDict):
    metadata: _Metadata
    weight_map: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Index:
    """The files of weights of a sparse checkpoint.

    Attributes
    ----------
    directory : Path
    digests : mapping
        Name of a file in `directory` → its SHA-256 in hexadecimal.
    names : mapping
        File → the names of the tensors in it.
    total : int
        Bytes of all tensors as stored, decompressed.
    """

    directory: Path
    digests: Mapping[str, str]
    names: Mapping[str, frozenset[str]]
    total: int

    @property
    def digest(self) -> str:
        """Digest of all files of weights, from their digests."""
        return hashlib.sha256(json.dumps(sorted(self.digests.items())).encode()).hexdigest()

    def check(self, file: str) -> Path:
        """Compare a file with its digest and return its path.

        Raises
        ------
        BesaError
            The file is missing, not a regular file, longer than all tensors together, or has another digest.
        """
        path = self.directory / file
        if not path.exists():
            raise BesaError(f"{path} is missing", _FETCH)
        disk.require_regular(path)
        with reading(path, _FETCH):
            size = path.stat().st_size
            if size > self.total + zstd.LONGEST_HEADER:
                raise BesaError(f"{path} is damaged: it has {size} bytes, {INDEX} has {self.total} in all", _FETCH)
            digest = disk.sha256_file(path)
        if digest != self.digests.get(file):
            raise BesaError(f"{path} is damaged: its SHA-256 is not the one in {INDEX}", _FETCH)
        return path

    def expand(self, path: Path, directory: Path) -> Path:
        """Decompress a file into a directory and return the new file.

        Raises
        ------
        BesaError
            The file is damaged, or holds more bytes than the index has in all.
        """
        size = zstd.declared_size(path)
        if size > self.total + zstd.LONGEST_HEADER:
            raise BesaError(f"{path} is damaged: it holds {size} bytes, {INDEX} has {self.total} in all", _FETCH)
        return zstd.expand(path, directory, size)

    def require_names(self, path: Path, file: str) -> None:
        """Compare the names of the tensors in an uncompressed file with those that the index lists for `file`.

        Raises
        ------
        BesaError
            The names differ; one of them is given.
        """
        differing = set(weights.tensor_sizes(path)) ^ self.names.get(file, frozenset())
        if differing:
            raise BesaError(f"{self.directory / file} and {INDEX} differ about {min(differing)}", _FETCH)


def is_sparse(directory: Path) -> bool:
    """Return whether a directory is a sparse checkpoint, judged by its files."""
    return (directory / INDEX).exists()


def read(directory: Path) -> Index:
    """Read the index of a sparse checkpoint.

    Raises
    ------
    BesaError
        The index cannot be read, or it names a file outside the directory, one without a digest, or one twice.
    """
    path = directory / INDEX
    disk.read_json(path, unique=True)  # refuses duplicate names
    index = records.read(_SparseIndex, path, _FETCH)
    digests, table = index["metadata"]["sha256"], index["weight_map"]
    for file in (*digests, *table.values()):
        if not _FILE.fullmatch(file):
            raise BesaError(f"{path} names a file {file!r}, which is not a file of a sparse checkpoint", _FETCH)
        if file not in digests:
            raise BesaError(f"{path} has no SHA-256 for {file}", _FETCH)
    plain = [file.removesuffix(zstd.SUFFIX) for file in digests]
    twice = {file for file in plain if plain.count(file) > 1}
    if twice or not plain:
        raise BesaError(f"{path} names {min(twice) + ' twice' if twice else 'no file'}", _FETCH)
    names: dict[str, set[str]] = defaultdict(set)
    for name, file in table.items():
        names[file].add(name)
    return Index(
        directory=directory,
        digests=digests,
        names={file: frozenset(tensors) for file, tensors in names.items()},
        total=index["metadata"]["total_size"],
    )
