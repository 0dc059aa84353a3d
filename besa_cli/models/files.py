"""The files of a checkpoint directory: which there are, and whether they are whole."""

import json
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from besa_cli.disk import read_json
from besa_cli.errors import BesaError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
)
_LONGEST_HEADER = 100_000_000


def refuse_quantized(config: dict[str, Any], name: str) -> None:
    """Raise if a model's ``config.json`` says that its weights are not dense floats."""
    for key in ("quantization_config", "compression_config", "sparsity_config"):
        found = config.get(key)
        if found:
            method = found.get("quant_method", key) if isinstance(found, dict) else key
            raise BesaError(f"{name} is already compressed ({method})", "name the dense model that it was made from")


def side_files(names: Iterable[str]) -> list[str]:
    """The names of a model's config and tokenizer files among `names`, sorted."""
    return sorted({name for name in names if any(fnmatch(name, pattern) for pattern in _SIDE_FILES)})


def weight_files(path: Path) -> list[Path] | None:
    """The safetensors files of a checkpoint directory, or None if it has none.

    Raises
    ------
    BesaError
        The index names a shard that is not there.
    """
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if not (path / INDEX).is_file():
        return None
    files = [path / name for name in shards(path / INDEX)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        many = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BesaError(f"{path} lacks {missing[0]}{many}, named in {INDEX}", "copy or fetch the directory again")
    return files


def shards(index: Path) -> list[str]:
    """The file names in a checkpoint's index, sorted, each once."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise BesaError(f"{index} has no weight_map", "copy or fetch the directory again")
    files = sorted({str(name) for name in names.values()})
    for name in files:
        if Path(name).name != name:
            raise BesaError(f"{index} names the file {name} outside its directory", "copy or fetch the directory again")
    return files


def check_whole(path: Path) -> None:
    """Raise unless a safetensors file is exactly as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= min(size, _LONGEST_HEADER) else b""
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BesaError(f"{path} is not a whole safetensors file ({size} bytes)", "copy or fetch it again") from error
    if size != expected:
        raise BesaError(f"{path} is cut off: {size} of {expected} bytes", "copy or fetch it again")
