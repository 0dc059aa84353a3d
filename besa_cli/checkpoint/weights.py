"""The tensors of a safetensors checkpoint, read a few at a time: no file stays open or mapped between two reads."""

import copy
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from besa_cli.errors import BesaError
from besa_cli.models import headers
from besa_cli.models.headers import INDEX, SINGLE, entries
from besa_cli.system import compute

Found = TypeVar("Found")

_REMEDY = "fetch or copy the file again"
_FLOATS = ("BF16", "F16", "F32", "F64")


class Weights:
    """Where every tensor of a checkpoint directory lies; tensors are read on demand.

    Parameters
    ----------
    directory : Path
        Holds ``model.safetensors`` or shards with ``model.safetensors.index.json``.

    Raises
    ------
    BesaError
        A file is missing, cut short or not safetensors; a tensor is in two shards, or in none though the index has it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file: dict[str, Path] = {}
        self._entry: dict[str, headers.TensorEntry] = {}
        self._stamps: dict[Path, tuple[int, ...]] = {}
        table = listed(directory)
        for path in sorted({directory / name for name in table.values()} or {directory / SINGLE}):
            for name, entry in entries(path).items():
                if name in self._file:
                    raise BesaError(f"{self._file[name]} and {path.name} both hold the tensor {name}", _REMEDY)
                self._file[name], self._entry[name] = path, entry
            self._stamps[path] = _stamp(path)
        missing = sorted(set(table) - set(self._file))
        if missing:
            raise BesaError(f"{directory / table[missing[0]]} lacks the tensor {missing[0]}", _REMEDY)

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._file)

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def file(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self._file[name]

    def shards(self) -> dict[Path, list[str]]:
        """The checkpoint's files, sorted, each with the names of its tensors."""
        found: dict[Path, list[str]] = defaultdict(list)
        for name in self.names:
            found[self._file[name]].append(name)
        return dict(sorted(found.items()))

    def only(self, files: Iterable[Path]) -> "Weights":
        """The same checkpoint as if it had no other files."""
        found, wanted = copy.copy(self), set(files)
        found._file = {name: path for name, path in self._file.items() if path in wanted}
        return found

    def nbytes(self, names: Iterable[str]) -> int:
        """Bytes that these tensors take on disk."""
        offsets = (self._entry[name]["data_offsets"] for name in names)
        return sum(stop - start for start, stop in offsets)

    def refuse_change(self, other: "Weights") -> None:
        """Refuse files that were written after `other` looked at the same directory.

        Raises
        ------
        BesaError
            A file has changed.
        """
        for path, stamp in other._stamps.items():
            self._refuse(path, stamp)

    def _refuse(self, path: Path, stamp: tuple[int, ...]) -> None:
        if path.exists() and _stamp(path) != stamp:
            raise BesaError(
                f"{path} was written to while it was in use",
                "let nothing change a model that is read; put it back as it was, and run the same command again",
            )

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Read tensors into memory of their own; the files are closed again.

        Raises
        ------
        BesaError
            A file has changed or cannot be read.
        """
        found: dict[str, Tensor] = {}
        for path, wanted in self._by_file(names).items():
            found |= _opened(path, wanted, lambda file, name: file.get_tensor(name).clone())
        return {name: found[name] for name in names}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, as its file's header says."""
        return tuple(self._entry[name]["shape"])

    def kind(self, name: str) -> str:
        """The dtype of a tensor, as its file's header calls it, for instance ``BF16``."""
        return self._entry[name]["dtype"]

    def require_floats(self, names: Iterable[str]) -> None:
        """Refuse tensors that are not numbers of 16 bits or more.

        Raises
        ------
        BesaError
            There is one.
        """
        for name in names:
            if self.kind(name) not in _FLOATS:
                raise BesaError(
                    f"{name} in {self.directory} is stored as {self.kind(name)}: the model is already compressed",
                    "name the dense model that it was made from, or save this one in bfloat16",
                )

    def shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """The shapes of tensors, without reading them."""
        self._by_file(names)  # refuses files that have changed since
        return {name: self.shape(name) for name in names}

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers; a few rows at a time are in memory."""
        if self.shape(one) != self.shape(other):
            return False
        if not self.shape(one) or not self.nbytes([one]):
            found = self.read([one, other])
            return torch.equal(found[one], found[other])
        rows = self.shape(one)[0]
        step = max(rows * _PORTION // self.nbytes([one]), 1)
        return all(
            torch.equal(self._rows(one, start, start + step), self._rows(other, start, start + step))
            for start in range(0, rows, step)
        )

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a tensor, as fp32 or wider."""
        (path,) = self._by_file([name])
        found: Tensor = _opened(path, [name], lambda file, name: file.get_slice(name)[start:stop].clone())[name]
        return found if found.dtype.itemsize > 4 or not found.is_floating_point() else found.float()

    def _by_file(self, names: Sequence[str]) -> dict[Path, list[str]]:
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self._file[name]].append(name)
        for path in by_file:
            self._refuse(path, self._stamps[path])
        return by_file


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is written to or replaced."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def listed(directory: Path) -> dict[str, str]:
    """The file of every tensor by the checkpoint's index; empty where a single file holds all.

    Raises
    ------
    BesaError
        The index is damaged.
    """
    if (directory / SINGLE).exists() or not (directory / INDEX).exists():  # as transformers chooses
        return {}
    return headers.weight_map(directory / INDEX)


def header(path: Path) -> dict[str, int]:
    """Bytes of each tensor in one file; see `besa_cli.models.headers.entries`."""
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries(path).items()}


def read_file(path: Path, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
    """The tensors of one safetensors file whose names are wanted, in memory of their own; the file is closed again."""
    names = sorted(name for name in header(path) if wanted(name))
    return _opened(path, names, lambda file, name: file.get_tensor(name).clone())


def _opened(path: Path, names: Sequence[str], take: Callable[[Any, str], Found]) -> dict[str, Found]:
    """What `take` finds for each name in an open file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: take(file, name) for name in names}
    except (SafetensorError, OSError) as error:
        raise BesaError(f"cannot read {names[0]} from {path}: {error}", _REMEDY) from error


def check(weights: Weights, extremes: dict[str, tuple[float, float]] | None = None) -> str:
    """Read every tensor once: refuse NaN and infinity by name, and return the digest of the whole content.

    The digest does not depend on how tensors are spread over files: SHA-256 over name, dtype, shape and bytes of each
    tensor, in the order of the names.

    Parameters
    ----------
    weights : Weights
    extremes : dict, optional
        Filled with the least and the greatest number of every tensor that has any.

    Raises
    ------
    BesaError
        A tensor holds a NaN or an infinity.
    """
    digest = hashlib.sha256()
    for names in _portions(weights):
        for name, tensor in weights.read(names).items():
            found = _extremes(tensor)
            if not all(map(math.isfinite, found)):
                bad = int((~_known(tensor).isfinite()).sum())
                raise BesaError(
                    f"{name} in {weights.directory} holds {bad} values that are NaN or infinite",
                    "fetch the model again, or use another one: nothing can be made of these weights",
                )
            _add(digest, name, tensor)
            if extremes is not None and found:
                extremes[name] = found
        del tensor
        compute.give_back_memory()
    return digest.hexdigest()


_NO_SPECIAL = {torch.float4_e2m1fn_x2}  # every value is a number


def _extremes(tensor: Tensor) -> tuple[float, float] | tuple[()]:
    """The least and the greatest number; NaN if one is among them, which `isfinite` takes thirty times as long to say.

    Nothing of a tensor that holds no numbers of that kind.
    """
    if not tensor.is_floating_point() or not tensor.numel() or tensor.dtype in _NO_SPECIAL:
        return ()
    low, high = _known(tensor).aminmax()
    return float(low), float(high)


def _known(tensor: Tensor) -> Tensor:
    """The same numbers in a dtype that torch can compare."""
    return tensor if tensor.dtype.itemsize > 1 else tensor.float()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The digest of these tensors, as `check` gives it for a checkpoint that holds them and no others."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        _add(found, name, tensors[name])
    return found.hexdigest()


def _add(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


_PORTION = 16 << 20  # bytes of tensors in memory at a time


def _portions(weights: Weights) -> Iterator[list[str]]:
    portion: list[str] = []
    for name in weights.names:
        if portion and weights.nbytes([*portion, name]) > _PORTION:
            yield portion
            portion = []
        portion.append(name)
    if portion:
        yield portion
