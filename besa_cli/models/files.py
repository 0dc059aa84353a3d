"""The files of a checkpoint directory: which there are, and whether they are whole."""

import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from besa_cli.errors import BesaError
from besa_cli.models import headers
from besa_cli.models.headers import INDEX, SINGLE
from besa_cli.system.disk import read_json

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
    "*quant*_config.json",
)
FOLDERS = ("additional_chat_templates",)  # of side files, one deep
_MARKS = {  # side files that say of weights what config.json does not, and by which keys
    "hf_quant_config.json": ("quant_algo", "quant_method"),
    "quantize_config.json": ("bits", "quant_method"),
    "quant_config.json": ("w_bit", "bits", "quant_method"),
    "quantization_config.json": ("bits", "quant_method", "quant_algo"),
}


def refuse_quantized(config: dict[str, Any], name: str) -> None:
    """Raise if a model's ``config.json`` says that its weights are not dense floats."""
    for key in ("quantization_config", "compression_config", "sparsity_config"):
        found = config.get(key)
        if found:
            method = found.get("quant_method", key) if isinstance(found, dict) else key
            raise BesaError(f"{name} is already compressed ({method})", "name the dense model that it was made from")


def refuse_marked(directory: Path) -> None:
    """Raise if a file beside ``config.json`` says that the weights are not dense floats."""
    for name, keys in _MARKS.items():
        if (directory / name).exists():
            told = read_json(directory / name)
            within = told.get("quantization")
            said = {**told, **(within if isinstance(within, dict) else {})}
            method = next((said[key] for key in keys if said.get(key)), None)
            if method is not None:
                raise BesaError(
                    f"{directory} is already compressed ({name}: {method})",
                    "name the dense model that it was made from",
                )


def side_files(names: Iterable[str]) -> list[str]:
    """The names of a model's config and tokenizer files among `names`, sorted.

    Parameters
    ----------
    names : iterable of str
        Relative to the model's directory; of those in its folders, only additional chat templates count.
    """
    return sorted({name for name in names if _is_side_file(*name.rpartition("/")[::2])})


def _is_side_file(folder: str, name: str) -> bool:
    if folder:
        return folder in FOLDERS and name.endswith(".jinja")
    return any(fnmatch(name, pattern) for pattern in _SIDE_FILES)


def listed(directory: Path) -> list[str]:
    """The side files that a directory holds, relative to it, sorted; not necessarily ordinary files."""
    places = [directory, *(directory / folder for folder in FOLDERS if (directory / folder).is_dir())]
    entries = [entry for place in places for entry in place.iterdir() if entry.exists() and not entry.is_dir()]
    return side_files(entry.relative_to(directory).as_posix() for entry in entries)


def weight_files(path: Path) -> list[Path] | None:
    """The safetensors files of a checkpoint directory, or None if it has none.

    Raises
    ------
    BesaError
        The index names a shard that is not there.
    """
    if os.path.lexists(path / SINGLE):
        return [path / SINGLE]
    if not os.path.lexists(path / INDEX):
        return None
    files = [path / name for name in shards(path / INDEX)]
    missing = [file.name for file in files if not os.path.lexists(file)]
    if missing:
        many = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BesaError(f"{path} lacks {missing[0]}{many}, named in {INDEX}", "copy or fetch the directory again")
    return files


def shards(index: Path) -> list[str]:
    """The file names in a checkpoint's index, sorted, each once.

    Raises
    ------
    BesaError
        The index cannot be read, or names a file that is not one of its directory.
    """
    return sorted(set(headers.weight_map(index).values()))


def check_whole(path: Path) -> None:
    """Raise unless a safetensors file is exactly what its header says."""
    headers.entries(path)
