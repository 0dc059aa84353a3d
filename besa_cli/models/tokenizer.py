"""A model's own tokenizer, as its files say it."""

import hashlib
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from besa_cli.errors import BesaError, reading
from besa_cli.models import Model
from besa_cli.models.config_json import code_refused
from besa_cli.system.disk import read_json, require_regular, sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_VOCABULARIES = ("merges.txt", "spiece.model", "tokenizer.json", "tokenizer.model", "vocab.txt")
_WRITTEN, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_AGAIN = "fetch the model's files again"
_PROTOBUF = b"\n"  # the first byte of a sentencepiece model
_DECIDING = ("normalizer", "pre_tokenizer", "decoder")  # of a tokenizer beside its vocabulary


def tokenizer_of(model: Model, notify: Callable[[str], None] = lambda _: None) -> "PreTrainedTokenizerBase":
    """The model's own tokenizer; no code that the model brings along runs.

    Where transformers builds it from a class that splits text otherwise than ``tokenizer.json`` says, the file counts.

    Parameters
    ----------
    model : Model
    notify : callable
        Takes a one-line note where the file counts.

    Raises
    ------
    BesaError
        The model's directory has none, or one that cannot be read or needs code of its own.
    """
    from transformers import AutoTokenizer

    directory = model.directory
    if not any((directory / name).is_file() for name in _VOCABULARIES):
        raise BesaError(
            f"{directory} has no tokenizer (none of {', '.join(_VOCABULARIES)})",
            "copy the tokenizer's files beside config.json, or give token ids: --data FILE.jsonl with 'input_ids'",
        )
    settings = _settings(directory)
    _require_sentencepiece(directory)
    try:
        with reading(f"the tokenizer in {directory}", _AGAIN):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
    except BesaError as error:
        if settings.get("auto_map") and "custom code" in error.message:
            raise code_refused(directory / _SETTINGS, settings["auto_map"]) from error
        raise
    if (directory / _WRITTEN).is_file() and _follow(tokenizer, directory / _WRITTEN):
        notify(
            f"{directory / _SETTINGS} names {settings.get('tokenizer_class')}, of which transformers makes another "
            f"tokenizer than {_WRITTEN} describes: {_WRITTEN} is followed"
        )
    return tokenizer


def _settings(directory: Path) -> dict[str, Any]:
    """What ``tokenizer_config.json`` says, after the tokenizer's files were found to be files that can be read."""
    for name in _FILES:
        if (directory / name).exists():
            require_regular(directory / name)
            if name.endswith(".json"):
                read_json(directory / name)  # the tokenizers library says what is wrong without the file's name
    settings = read_json(directory / _SETTINGS) if (directory / _SETTINGS).exists() else {}
    named = settings.get("tokenizer_class")
    if named is not None and not isinstance(named, str):
        raise BesaError(f"{directory / _SETTINGS} says tokenizer_class: {str(named)[:80]}, which is not a name", _AGAIN)
    return settings


def _require_sentencepiece(directory: Path) -> None:
    """Refuse a sentencepiece model alone where nothing here can read it: transformers would ask for something else."""
    if (directory / _WRITTEN).is_file():
        return
    for name in ("tokenizer.model", "spiece.model"):
        path = directory / name
        lacking = [package for package in ("sentencepiece", "google.protobuf") if not _is_installed(package)]
        if lacking and path.is_file() and _begins(path, _PROTOBUF):
            raise BesaError(
                f"{path} needs the package {lacking[0]}, which is not installed",
                "pip install sentencepiece protobuf, or save the tokenizer as tokenizer.json",
            )


def _begins(path: Path, start: bytes) -> bool:
    with reading(path, _AGAIN), path.open("rb") as file:
        return file.read(len(start)) == start


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _follow(tokenizer: Any, path: Path) -> bool:
    """Let a tokenizer split text as ``tokenizer.json`` says; whether it did otherwise before.

    Whether a text begins with a space is left as transformers chooses it: ``tokenizer_config.json`` may say so.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if type(tokenizer) is PreTrainedTokenizerFast:  # which reads the file as it is
        return False
    made = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(made, Tokenizer):
        return False
    told = read_json(path)
    with reading(path, _AGAIN):
        if _splits_alike(made, Tokenizer.from_str(json.dumps(_without_vocabulary(told)))):
            return False
        written = Tokenizer.from_file(str(path))
    for part in _DECIDING:
        setattr(made, part, getattr(written, part))
    if made.get_vocab(with_added_tokens=False) == written.get_vocab(with_added_tokens=False):
        made.model = written.model
    return True


def _without_vocabulary(told: dict[str, Any]) -> dict[str, Any]:
    """What describes a tokenizer that splits text in the same way, and is made in no time; old files stay whole."""
    model = dict(told["model"])
    if "type" not in model:
        return told
    if model["type"] == "Unigram":
        model |= {"vocab": model["vocab"][:1], "unk_id": None}
    else:
        model["vocab"] = {}
    if "merges" in model:
        model["merges"] = []
    return {**told, "model": model, "added_tokens": [], "post_processor": None}


def _splits_alike(made: Any, written: Any) -> bool:
    """Whether two tokenizers split text in the same way, but for their vocabularies and a first space."""
    told = json.loads(written.to_str())
    for part in ("normalizer", "pre_tokenizer"):
        own = getattr(made, part)
        if _plain(None if own is None else json.loads(own.__getstate__())) != _plain(told[part]):
            return False
    model = told["model"]
    options = {name: value for name, value in model.items() if name not in ("type", "vocab", "merges", "unk_id")}
    return type(made.model).__name__ == model["type"] and all(
        (getattr(made.model, name, value) or None) == (value or None) for name, value in options.items()
    )


def _plain(part: Any) -> Any:
    if isinstance(part, dict):
        return {name: _plain(value) for name, value in part.items() if name not in ("add_prefix_space", "trim_offsets")}
    return [_plain(value) for value in part] if isinstance(part, list) else part


def tokenizer_digest(directory: Path) -> str:
    """SHA-256 over the names and bytes of a checkpoint's tokenizer files, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(_FILES):
        if (directory / name).is_file():
            digest.update(f"{name} {sha256_file(directory / name)}\n".encode())
    return digest.hexdigest()
