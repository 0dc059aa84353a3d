"""Reading of a safetensors checkpoint, a few tensors at a time; no file stays open or mapped between reads."""

import copy
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from besa_cli.errors import BesaError
from besa_cli.models import cache, headers
from besa_cli.models.headers import INDEX, SINGLE, entries
from besa_cli.system import compute

Result = TypeVar("Result")

_REMEDY = "fetch or copy the file again"
_FLOATS = ("BF16", "F16", "F32", "F64")


class Weights:
    """The tensors of a checkpoint directory, located by name and read on demand.

    Parameters
    ----------
    directory : Path
        Directory with ``model.safetensors``, or with shards and ``model.safetensors.index.json``.

    Raises
    ------
    BesaError
        A file is missing, cut short or not safetensors; a tensor is in two shards, or in none although the index lists
        it.
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
        """Return the file that holds a tensor."""
        return self._file[name]

    def shards(self) -> dict[Path, list[str]]:
        """Map each file of the checkpoint, sorted, to the names of its tensors."""
        names: dict[Path, list[str]] = defaultdict(list)
        for name in self.names:
            names[self._file[name]].append(name)
        return dict(sorted(names.items()))

    def only(self, files: Iterable[Path]) -> "Weights":
        """Return a copy restricted to some of the checkpoint's files."""
        restricted, wanted = copy.copy(self), set(files)
        restricted._file = {name: path for name, path in self._file.items() if path in wanted}
        return restricted

    def nbytes(self, names: Iterable[str]) -> int:
        """Return the bytes of some tensors on disk."""
        offsets = (self._entry[name]["data_offsets"] for name in names)
        return sum(stop - start for start, stop in offsets)

    def refuse_change(self, other: "Weights") -> None:
        """Refuse files that were written after `other` opened the same directory.

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
                "restore the file, let nothing change a model in use, and run the same command again",
            )

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Read tensors into memory of their own and close the files.

        Raises
        ------
        BesaError
            A file has changed or cannot be read.
        """
        tensors: dict[str, Tensor] = {}
        for path, wanted in self._by_file(names).items():
            tensors |= _read(path, wanted, lambda file, name: file.get_tensor(name).clone())
        return {name: tensors[name] for name in names}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from its file's header."""
        return tuple(self._entry[name]["shape"])

    def dtype_name(self, name: str) -> str:
        """Return the dtype of a tensor by its name in the file's header, for instance ``BF16``."""
        return self._entry[name]["dtype"]

    def require_floats(self, names: Iterable[str]) -> None:
        """Refuse tensors that are not floating-point numbers of 16 bits or more.

        Raises
        ------
        BesaError
            A tensor has another dtype (named).
        """
        for name in names:
            if self.dtype_name(name) not in _FLOATS:
                raise BesaError(
                    f"{name} in {self.directory} is stored as {self.dtype_name(name)}: the model is already compressed",
                    "use the dense model that it was made from, or save this one in bfloat16",
                )

    def shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of tensors from the headers, after checking that the files have not changed."""
        self._by_file(names)
        return {name: self.shape(name) for name in names}

    def equal(self, first: str, second: str) -> bool:
        """Compare the values of two tensors, with a few rows at a time in memory."""
        if self.shape(first) != self.shape(second):
            return False
        if not self.shape(first) or not self.nbytes([first]):
            tensors = self.read([first, second])
            return torch.equal(tensors[first], tensors[second])
        rows = self.shape(first)[0]
        step = max(rows * _PORTION // self.nbytes([first]), 1)
        return all(
            torch.equal(self._rows(first, start, start + step), self._rows(second, start, start + step))
            for start in range(0, rows, step)
        )

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read some rows of a tensor, floating-point numbers as fp32 or wider."""
        (path,) = self._by_file([name])
        rows: Tensor = _read(path, [name], lambda file, name: file.get_slice(name)[start:stop].clone())[name]
        return rows if rows.dtype.itemsize > 4 or not rows.is_floating_point() else rows.float()

    def _by_file(self, names: Sequence[str]) -> dict[Path, list[str]]:
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self._file[name]].append(name)
        for path in by_file:
            self._refuse(path, self._stamps[path])
        return by_file


def _stamp(path: Path) -> tuple[int, ...]:
    """Return size, modification time and inode, which change when a file is written or replaced."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def listed(directory: Path) -> dict[str, str]:
    """Read the checkpoint's index: tensor → file; empty if a single file holds all tensors.

    Raises
    ------
    BesaError
        The index is damaged.
    """
    if (directory / SINGLE).exists() or not (directory / INDEX).exists():  # as transformers chooses
        return {}
    return headers.weight_map(directory / INDEX)


def tensor_sizes(path: Path) -> dict[str, int]:
    """Return the bytes of each tensor in one file, from its header."""
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries(path).items()}


def read_file(path: Path, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
    """Read the tensors of one safetensors file whose names are wanted into memory of their own."""
    names = sorted(name for name in tensor_sizes(path) if wanted(name))
    return _read(path, names, lambda file, name: file.get_tensor(name).clone())


def _read(path: Path, names: Sequence[str], get: Callable[[safe_open, str], Result]) -> dict[str, Result]:
    """Open a file and call `get(file, name)` for each name."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: get(file, name) for name in names}
    except (SafetensorError, OSError) as error:
        raise BesaError(f"cannot read {names[0]} from {path}: {error}", _REMEDY) from error


def check_source(weights: Weights, extremes: dict[str, tuple[float, float]] | None = None) -> str:
    """Call `check` on a model that a job reads, and compare its digest with that of its first use where it is cached.

    Raises
    ------
    BesaError
        A tensor holds a NaN or an infinity, or the cached files were damaged.
    """
    digest = check(weights, extremes)
    cache.confirm(weights.directory, digest)
    return digest


def check(weights: Weights, extremes: dict[str, tuple[float, float]] | None = None) -> str:
    """Read every tensor once, refuse NaN and infinity by name, and return the digest of all tensors.

    The digest does not depend on the division into files: SHA-256 over name, dtype, shape and bytes of each tensor, in
    the order of the names.

    Parameters
    ----------
    weights : Weights
    extremes : dict, optional
        Filled with the minimum and maximum of every floating-point tensor with values.

    Raises
    ------
    BesaError
        A tensor holds a NaN or an infinity.
    """
    digest = hashlib.sha256()
    for names in _portions(weights):
        for name, tensor in weights.read(names).items():
            low_high = _extremes(tensor)
            if not all(map(math.isfinite, low_high)):
                bad = int((~_comparable(tensor).isfinite()).sum())
                raise BesaError(
                    f"{name} in {weights.directory} holds {bad} values that are NaN or infinite",
                    "fetch the model again, or use another one: these weights cannot be used",
                )
            _add(digest, name, tensor)
            if extremes is not None and low_high:
                extremes[name] = low_high
        del tensor
        compute.give_back_memory()
    return digest.hexdigest()


_NO_SPECIAL = {torch.float4_e2m1fn_x2}  # dtypes without NaN and infinity


def _extremes(tensor: Tensor) -> tuple[float, float] | tuple[()]:
    """Return minimum and maximum, NaN if any value is NaN (30x faster than `isfinite`).

    Empty for a tensor without values, and for dtypes without NaN and infinity.
    """
    if not tensor.is_floating_point() or not tensor.numel() or tensor.dtype in _NO_SPECIAL:
        return ()
    low, high = _comparable(tensor).aminmax()
    return float(low), float(high)


def _comparable(tensor: Tensor) -> Tensor:
    """Return the values in a dtype that torch can compare."""
    return tensor if tensor.dtype.itemsize > 1 else tensor.float()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the digest that `check` computes for a checkpoint of exactly these tensors."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        _add(sha256, name, tensors[name])
    return sha256.hexdigest()


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
