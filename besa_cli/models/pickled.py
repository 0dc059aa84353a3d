"""Old checkpoints (``pytorch_model*.bin``): read without running code in them, converted once to safetensors."""

import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from math import prod
from pathlib import Path
from pickle import UnpicklingError  # only to catch it: nothing is ever unpickled but by torch with weights_only
from typing import TYPE_CHECKING, Any

from besa_cli.disk import read_json, save_tensors, write_json
from besa_cli.errors import BesaError
from besa_cli.models import cache, files

if TYPE_CHECKING:
    import torch

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


def directory(path: Path, side_files: list[str], *, notify: Callable[[str], None]) -> Path:
    """The conversion of a checkpoint directory that holds ``pytorch_model*.bin`` alone.

    Parameters
    ----------
    path : Path
        The directory.
    side_files : list of str
        The names of the config and tokenizer files that go with it.
    notify : callable
        Takes one-line notes.

    Raises
    ------
    BesaError
        There are no weights, a shard is missing, or a file is damaged or holds more than tensors.
    """
    pickles = _pickles(path)
    sources = [*pickles, *(path / name for name in side_files)]
    identity = "\n".join(f"{file.name} {cache.digest(file)}" for file in sources)

    def make(target: Path) -> None:
        notify(f"converting {path} from pickles to safetensors (once)")
        _convert(pickles, target)
        for name in side_files:
            if name != "config.json":
                (target / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path / name, target / name)
        _write_config(path / "config.json", target)

    return cache.made_once(f"models/bin-{sha256(identity.encode()).hexdigest()[:16]}", make, notify=notify)


def _pickles(path: Path) -> list[Path]:
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if not (path / INDEX).is_file():
        raise BesaError(
            f"{path} holds no weights: neither {files.SINGLE} nor {files.INDEX} nor {SINGLE}",
            "name a complete Hugging Face checkpoint directory",
        )
    pickles = [path / name for name in files.shards(path / INDEX)]
    missing = [file.name for file in pickles if not file.is_file()]
    if missing:
        raise BesaError(f"{path} lacks {missing[0]}, named in {INDEX}", "copy or fetch the directory again")
    return pickles


def _convert(pickles: list[Path], target: Path) -> None:
    """Write one safetensors shard for each pickled one; one shard at a time is in memory."""

    weight_map: dict[str, str] = {}
    size = 0
    for number, file in enumerate(pickles, 1):
        name = files.SINGLE if len(pickles) == 1 else f"model-{number:05}-of-{len(pickles):05}.safetensors"
        tensors = _load(file)
        save_tensors(target / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(pickles) > 1:
        write_json(
            target / files.INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        )


def _load(file: Path) -> "dict[str, torch.Tensor]":
    import torch

    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UnpicklingError as error:
        raise BesaError(
            f"{file} holds more than tensors and is not opened, because it could run code",
            "ask for the model in the safetensors format",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise BesaError(f"{file} is cut off or damaged", "copy or fetch it again") from error
    tensors = {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise BesaError(f"{file} holds no tensors by name", "ask for the model in the safetensors format")
    seen: set[int] = set()
    for name, tensor in sorted(tensors.items()):
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor.detach().clone() if shared else tensor.detach().contiguous()
    return tensors


def _write_config(source: Path, target: Path) -> None:
    """Copy ``config.json``, with the dtype that most of the weights really have."""
    import safetensors

    sizes: Counter[str] = Counter()
    for file in sorted(target.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118
                part = reader.get_slice(name)
                sizes[part.get_dtype()] += prod(part.get_shape())
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    real = [(count, names[kind]) for kind, count in sizes.items() if kind in names]
    config = {key: value for key, value in read_json(source).items() if key not in ("torch_dtype", "dtype")}
    write_json(target / "config.json", config | ({"dtype": max(real)[1]} if real else {}))
