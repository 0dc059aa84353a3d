"""The files of a checkpoint directory: side files, weight files, and checks that they are complete."""

import os
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

from besa_cli.errors import BesaError
from besa_cli.models import headers
from besa_cli.models.headers import INDEX, SINGLE
from besa_cli.system.disk import Json, read_json

CheckConfig = Callable[[Path], None]  # takes a directory with config.json, and refuses the model by raising

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
    "*processor_config.json",
    "*quant*_config.json",
)
FOLDERS = ("additional_chat_templates",)  # of side files, one deep
_QUANTIZATION_FILES = {  # side files that declare quantized weights, and the keys that do
    "hf_quant_config.json": ("quant_algo", "quant_method"),
    "quantize_config.json": ("bits", "quant_method"),
    "quant_config.json": ("w_bit", "bits", "quant_method"),
    "quantization_config.json": ("bits", "quant_method", "quant_algo"),
}


def refuse_quantized(config: Json, name: str) -> None:
    """Raise a `BesaError` if a model's ``config.json`` declares quantized, compressed or sparse weights."""
    for key in ("quantization_config", "compression_config", "sparsity_config"):
        settings = config.get(key)
        if settings:
            method = settings.get("quant_method", key) if isinstance(settings, dict) else key
            raise BesaError(f"{name} is already compressed ({method})", "name the original dense model")


def refuse_quantization_files(directory: Path) -> None:
    """Raise a `BesaError` if a file beside ``config.json`` declares quantized weights."""
    for name, keys in _QUANTIZATION_FILES.items():
        if (directory / name).exists():
            fields = read_json(directory / name)
            nested = fields.get("quantization")
            merged = {**fields, **(nested if isinstance(nested, dict) else {})}
            method = next((merged[key] for key in keys if merged.get(key)), None)
            if method is not None:
                raise BesaError(
                    f"{directory} is already compressed ({name}: {method})",
                    "name the original dense model",
                )


def side_files(names: Iterable[str]) -> list[str]:
    """Select the config and tokenizer files of a model from `names`, sorted.

    Parameters
    ----------
    names : iterable of str
        Paths relative to the model's directory; in its folders, only additional chat templates count.
    """
    return sorted({name for name in names if _is_side_file(*name.rpartition("/")[::2])})


def _is_side_file(folder: str, name: str) -> bool:
    if folder:
        return folder in FOLDERS and name.endswith(".jinja")
    return any(fnmatch(name, pattern) for pattern in _SIDE_FILES)


def list_side_files(directory: Path) -> list[str]:
    """List the side files in a directory, relative to it, sorted; not necessarily ordinary files."""
    places = [directory, *(directory / folder for folder in FOLDERS if (directory / folder).is_dir())]
    entries = [entry for place in places for entry in place.iterdir() if entry.exists() and not entry.is_dir()]
    return side_files(entry.relative_to(directory).as_posix() for entry in entries)


def weight_files(path: Path) -> list[Path] | None:
    """Return the safetensors files of a checkpoint directory, or None if it has none.

    Raises
    ------
    BesaError
        The index names a missing shard.
    """
    if os.path.lexists(path / SINGLE):
        return [path / SINGLE]
    if not os.path.lexists(path / INDEX):
        return None
    files = [path / name for name in shards(path / INDEX)]
    missing = [file.name for file in files if not os.path.lexists(file)]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BesaError(f"{path} lacks {missing[0]}{others}, named in {INDEX}", "copy or fetch the directory again")
    return files


def shards(index: Path) -> list[str]:
    """Return the distinct file names in a checkpoint's index, sorted.

    Raises
    ------
    BesaError
        The index cannot be read, or names a file outside its directory.
    """
    return sorted(set(headers.weight_map(index).values()))


def check_whole(path: Path) -> None:
    """Raise a `BesaError` unless a safetensors file is exactly as long as its header declares."""
    headers.entries(path)
