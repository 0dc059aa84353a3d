"""Old checkpoints (``pytorch_model*.bin``): read without running code in them, converted once to safetensors."""

import shutil
import zipfile
from collections import Counter
from hashlib import sha256
from math import prod
from pathlib import Path
from pickle import UnpicklingError  # only to catch it: torch alone unpickles, with weights_only
from typing import TYPE_CHECKING

from besa_cli.errors import BesaError, reading, reason_of
from besa_cli.models import cache, files, headers
from besa_cli.system.disk import read_json, save_tensors, write_json
from besa_cli.system.notes import Notify

if TYPE_CHECKING:
    import torch

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"

_LONGEST_NAME = 500


def directory(path: Path, side_files: list[str], *, notify: Notify) -> Path:
    """Convert a checkpoint directory that holds ``pytorch_model*.bin`` alone; return the conversion in the cache.

    Parameters
    ----------
    path : Path
        The directory.
    side_files : list of str
        Names of its config and tokenizer files.
    notify : callable
        Called with one-line notes.

    Raises
    ------
    BesaError
        There are no weights, a shard is missing, or a file is damaged or holds more than tensors.
    """
    pickles = weight_files(path)
    copied = [name for name in side_files if not (path / name).is_dir()]
    sources = [*pickles, *(path / name for name in copied)]
    identity = "\n".join(f"{file.name} {cache.digest(file)}" for file in sources)

    def make(target: Path) -> None:
        notify(f"converting {path} from pickles to safetensors (once)")
        _convert(pickles, target)
        for name in copied:
            if name != "config.json":
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path / name, target / name)
        _write_config(path / "config.json", target)

    return cache.get_or_make(f"models/bin-{sha256(identity.encode()).hexdigest()[:16]}", make, notify=notify)


def weight_files(path: Path) -> list[Path]:
    """Return the pickled files of a checkpoint directory.

    Raises
    ------
    BesaError
        There are no weights, or a shard is missing.
    """
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if not (path / INDEX).is_file():
        raise BesaError(
            f"{path} holds no weights: none of {headers.SINGLE}, {headers.INDEX}, {SINGLE} and {INDEX}",
            "name a complete Hugging Face checkpoint directory",
        )
    pickles = [path / name for name in files.shards(path / INDEX)]
    missing = [file.name for file in pickles if not file.is_file()]
    if missing:
        raise BesaError(f"{path} lacks {missing[0]}, named in {INDEX}", "copy or fetch the directory again")
    return pickles


def _convert(pickles: list[Path], target: Path) -> None:
    """Write one safetensors shard for each pickled one, with one shard at a time in memory."""

    weight_map: dict[str, str] = {}
    size = 0
    for number, file in enumerate(pickles, 1):
        name = headers.SINGLE if len(pickles) == 1 else f"model-{number:05}-of-{len(pickles):05}.safetensors"
        tensors = _load(file)
        duplicates = sorted(set(tensors) & set(weight_map))
        if duplicates:
            raise BesaError(f"{file} holds {duplicates[0]}, which another file beside it holds too", _REMEDY)
        save_tensors(target / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(pickles) > 1:
        write_json(
            target / headers.INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        )


_REMEDY = "copy or fetch it again"
_USE_SAFETENSORS = "use the model in the safetensors format"
_COPIES = 8  # most bytes of tensors per byte of the file: tied weights are stored once


def _load(file: Path) -> "dict[str, torch.Tensor]":
    """Load the tensors of one pickled file by name, dense and each with its own memory."""
    import torch

    content: object
    with reading(file, _REMEDY):
        is_zip = zipfile.is_zipfile(file)
    if is_zip:
        _refuse_bomb(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except UnpicklingError as error:
        raise BesaError(
            f"{file} holds more than tensors and is not opened, because it could run code", _USE_SAFETENSORS
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # torch's reader checks little, so it can raise anything
        raise BesaError(f"{file} is cut off or damaged: {reason_of(error)}", _REMEDY) from error
    items = content.items() if isinstance(content, dict) else ()
    tensors = {name: value.detach() for name, value in items if isinstance(value, torch.Tensor)}
    if not tensors:
        raise BesaError(f"{file} holds no tensors by name", _USE_SAFETENSORS)
    for name, tensor in tensors.items():
        _require_plain(file, name, tensor)
    if sum(tensor.nbytes for tensor in tensors.values()) > _COPIES * file.stat().st_size:
        raise BesaError(f"{file} holds tensors that take more than {_COPIES} times its bytes", _USE_SAFETENSORS)
    seen: set[int] = set()
    for name, tensor in sorted(tensors.items()):
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
    return tensors


def _refuse_bomb(file: Path) -> None:
    """Refuse an archive whose parts unpack to more bytes than it has: torch writes them uncompressed and apart."""
    with reading(file, _REMEDY), zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
    compressed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
    if compressed or sum(part.file_size for part in parts) > file.stat().st_size:
        raise BesaError(f"{file} is not an archive written by torch: its parts are compressed or overlap", _REMEDY)


def _require_plain(file: Path, name: object, tensor: "torch.Tensor") -> None:
    """Refuse a name or tensor that a checkpoint cannot hold: sparse, quantized, complex, expanded or without data."""
    import torch

    is_name = isinstance(name, str) and name.isprintable() and 0 < len(name) <= _LONGEST_NAME and name != "__metadata__"
    if not is_name:
        raise BesaError(f"{file} holds a tensor under {str(name)[:80]!r}, which is not a name", _USE_SAFETENSORS)
    is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not is_dense or tensor.dtype in (torch.complex32, torch.complex128):
        raise BesaError(f"{name} in {file} is not a dense tensor of plain numbers", _USE_SAFETENSORS)
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise BesaError(
            f"{name} in {file} has fewer values than its shape {tuple(tensor.shape)} requires", _USE_SAFETENSORS
        )


def _write_config(source: Path, target: Path) -> None:
    """Copy ``config.json``, with the dtype of most of the weights."""
    import safetensors

    sizes: Counter[str] = Counter()
    for file in sorted(target.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118
                part = reader.get_slice(name)
                sizes[part.get_dtype()] += prod(part.get_shape())
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    dtypes = [(count, names[kind]) for kind, count in sizes.items() if kind in names]
    config = {key: value for key, value in read_json(source).items() if key not in ("torch_dtype", "dtype")}
    write_json(target / "config.json", config | ({"dtype": max(dtypes)[1]} if dtypes else {}))
