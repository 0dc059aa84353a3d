"""The tensors of a safetensors checkpoint, read a few at a time: no file stays open or mapped between two reads."""

import copy
import hashlib
import json
import math
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from besa_cli import compute, disk
from besa_cli.errors import BesaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Found = TypeVar("Found")

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_REMEDY = "fetch or copy the file again"


class Weights:
    """Where every tensor of a checkpoint directory lies; tensors are read on demand.

    Parameters
    ----------
    directory : Path
        Holds ``model.safetensors`` or shards with ``model.safetensors.index.json``.

    Raises
    ------
    BesaError
        A file is missing, cut short or not safetensors; a tensor of the index is not in its shard.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file: dict[str, Path] = {}
        self._bytes: dict[str, int] = {}
        self._stamps: dict[Path, tuple[int, ...]] = {}
        table = listed(directory)
        for path in sorted({directory / name for name in table.values()} or {directory / SINGLE}):
            for name, size in header(path).items():
                self._file[name] = path
                self._bytes[name] = size
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
        return sum(self._bytes[name] for name in names)

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

    def shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """The shapes of tensors, without reading them."""
        found: dict[str, tuple[int, ...]] = {}
        for path, wanted in self._by_file(names).items():
            found |= _opened(path, wanted, lambda file, name: tuple(file.get_slice(name).get_shape()))
        return {name: found[name] for name in names}

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


class Names:
    """Which tensor of a checkpoint goes where in the model, by the rules of transformers' own loading.

    Some architectures were renamed since their checkpoints were written (GPT-NeoX calls its head ``embed_out`` on
    disk), and a base model alone is stored without the prefix that it has in the whole model.

    Parameters
    ----------
    model : PreTrainedModel
    stored : sequence of str
        The names in the checkpoint.
    """

    def __init__(self, model: "PreTrainedModel", stored: Sequence[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        own, base = set(model.state_dict()), f"{model.base_model_prefix}."
        renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
        renamed: dict[str, str] = {}
        for name in stored:
            renamed[name] = name
            for rule in renamings:
                renamed[name], _ = rule.rename_source_key(renamed[name])
        bare = not any(name.startswith(base) for name in renamed.values()) and any(
            base + name in own for name in renamed.values()
        )
        self._place = {name: base + new if bare and new not in own else new for name, new in renamed.items()}
        self._origin = {place: name for name, place in self._place.items() if place != name}
        self._origin |= {name: name for name, place in self._place.items() if place == name}

    def origin(self, name: str) -> str:
        """The checkpoint's name of the model's tensor `name`; `name` itself where the checkpoint lacks it."""
        return self._origin.get(name, name)

    def below(self, prefix: str) -> list[str]:
        """The checkpoint's names of all tensors whose name in the model begins with `prefix`, sorted."""
        return sorted(name for name, place in self._place.items() if place.startswith(prefix))


def listed(directory: Path) -> dict[str, str]:
    """The file of every tensor by the checkpoint's index; empty where a single file holds all.

    Raises
    ------
    BesaError
        The index is damaged.
    """
    if (directory / SINGLE).exists() or not (directory / INDEX).exists():  # as transformers chooses
        return {}
    table = disk.read_json(directory / INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise BesaError(f"{directory / INDEX} has no weight_map", _REMEDY)
    return {str(name): str(file) for name, file in table.items()}


def header(path: Path) -> dict[str, int]:
    """Bytes of each tensor in one file, after checking that the file is as long as its header says."""
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries(path).items()}


def entries(path: Path) -> dict[str, dict[str, Any]]:
    """What the header of one file says of each tensor (`dtype`, `shape`, `data_offsets`), checked against its length.

    Raises
    ------
    BesaError
        The file is missing, cut short or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= size - 8:
                raise BesaError(f"{path} is cut short or not a safetensors file ({size} bytes)", _REMEDY)
            found: dict[str, dict[str, Any]] = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise BesaError(f"{path} is missing", _REMEDY) from error
    except (OSError, ValueError) as error:
        raise BesaError(f"{path} is not a safetensors file: {error}", _REMEDY) from error
    found.pop("__metadata__", None)
    expected = 8 + length + sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in found.values())
    if size != expected:
        raise BesaError(f"{path} is cut short: {size} bytes where its header promises {expected}", _REMEDY)
    return found


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
