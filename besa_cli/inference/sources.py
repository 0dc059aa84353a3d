"""Names of models that can be run: all that `besa_cli.models` resolves, and the exports of a run."""

import os
from dataclasses import dataclass
from pathlib import Path

from besa_cli import models
from besa_cli.checkpoint import exports, sparse_format, sparse_index
from besa_cli.checkpoint.manifests import EXPORT
from besa_cli.checkpoint.stages import STAGES
from besa_cli.errors import BesaError
from besa_cli.system import disk
from besa_cli.system.notes import Notify

_WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model on this machine.

    Attributes
    ----------
    directory : Path
        A Hugging Face checkpoint, or a sparse export.
    packed_digest : str, optional
        Digest of the weights of a sparse export, which runs packed; None for a dense checkpoint.
    """

    directory: Path
    packed_digest: str | None


def names_sparse_export(name: str) -> bool:
    """Return whether a name is the directory of a sparse export, judged by its files."""
    path = _path(name)
    if not path.is_dir():
        return False
    if sparse_index.is_sparse(path):
        return True
    if not (path / "config.json").exists():
        return False
    quantization = disk.read_json(path / "config.json").get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == sparse_format.METHOD


def resolve(name: str, notify: Notify) -> Source:
    """Find, fetch or convert the model that a name names; an export is judged by its files.

    Raises
    ------
    BesaError
        `besa_cli.models.resolve` refuses it, or the files of an export are damaged.
    """
    path = _path(name)
    if names_sparse_export(name):
        return Source(directory=path.absolute(), packed_digest=sparse_index.read(path).digest)
    if any((path / stage).is_dir() for stage in STAGES) and not (path / "config.json").exists():
        raise BesaError(f"{name} is a run directory, not a model", f"name it with --run {name}, without --model")
    if path.is_dir() and (path / EXPORT).exists():
        name = str(_dense_export(path))
    return Source(directory=models.resolve(name, notify=notify).directory, packed_digest=None)


def _dense_export(path: Path) -> Path:
    """Return what holds the model of another export, its directory or its one GGUF file, after checking its weights."""
    manifest = exports.read(path)
    weights = {file: entry for file, entry in manifest["files"].items() if file.endswith(_WEIGHTS)}
    exports.refuse_changed(path, weights)
    files = [path / file for file in weights if file.endswith(".gguf")]
    if len(files) > 1:
        raise BesaError(f"{path} holds {len(files)} GGUF files", "name one of them")
    return files[0] if files else path


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name))  # noqa: PTH111  (Path.expanduser fails for unknown users)
