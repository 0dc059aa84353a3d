"""A model's own tokenizer, as its files define it."""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from besa_cli.errors import BesaError, reading
from besa_cli.models import Model
from besa_cli.models.config_json import custom_code_error
from besa_cli.system.disk import JsonObject, read_json, require_regular, sha256_file
from besa_cli.system.notes import Notify

if TYPE_CHECKING:
    from tokenizers import Tokenizer
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
_DEFINITION, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_FETCH_AGAIN = "fetch the model's files again"
_PROTOBUF = b"\n"  # the first byte of a sentencepiece model
_DECIDING = ("normalizer", "pre_tokenizer", "decoder")  # parts that decide the tokenization beside the vocabulary


def tokenizer_of(model: Model, notify: Notify = lambda _: None) -> "PreTrainedTokenizerBase":
    """Load the model's own tokenizer, without running any code from the model.

    If transformers builds it from a class that splits text differently from ``tokenizer.json``, follow the file.

    Parameters
    ----------
    model : Model
    notify : callable
        Called with a one-line note if the file is followed.

    Raises
    ------
    BesaError
        The model's directory has no tokenizer, or it cannot be read or needs custom code.
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
        with reading(f"the tokenizer in {directory}", _FETCH_AGAIN):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
    except BesaError as error:
        if settings.get("auto_map") and "custom code" in error.message:
            raise custom_code_error(directory / _SETTINGS, settings["auto_map"]) from error
        raise
    if (directory / _DEFINITION).is_file() and _follow_file(tokenizer, directory / _DEFINITION):
        notify(
            f"transformers builds {settings.get('tokenizer_class')}, named in {directory / _SETTINGS}, with another "
            f"word splitting than {_DEFINITION} describes: {_DEFINITION} is followed"
        )
    return tokenizer


def _settings(directory: Path) -> JsonObject:
    """Read ``tokenizer_config.json``, after checking that all tokenizer files are readable."""
    for name in _FILES:
        if (directory / name).exists():
            require_regular(directory / name)
            if name.endswith(".json"):
                read_json(directory / name)  # the tokenizers library does not name the file in its errors
    settings = read_json(directory / _SETTINGS) if (directory / _SETTINGS).exists() else {}
    class_name = settings.get("tokenizer_class")
    if class_name is not None and not isinstance(class_name, str):
        raise BesaError(
            f"{directory / _SETTINGS} has the tokenizer_class {str(class_name)[:80]}, which is not a name", _FETCH_AGAIN
        )
    return settings


def _require_sentencepiece(directory: Path) -> None:
    """Refuse a sentencepiece model without a tokenizer.json if the packages that read it are missing.

    Without this check transformers would ask for an unrelated package.
    """
    if (directory / _DEFINITION).is_file():
        return
    for name in ("tokenizer.model", "spiece.model"):
        path = directory / name
        missing = [package for package in ("sentencepiece", "google.protobuf") if not _is_installed(package)]
        if missing and path.is_file() and _starts_with(path, _PROTOBUF):
            raise BesaError(
                f"{path} needs the package {missing[0]}, which is not installed",
                "pip install sentencepiece protobuf, or save the tokenizer as tokenizer.json",
            )


def _starts_with(path: Path, start: bytes) -> bool:
    with reading(path, _FETCH_AGAIN), path.open("rb") as file:
        return file.read(len(start)) == start


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _follow_file(tokenizer: object, path: Path) -> bool:
    """Make a tokenizer split text as ``tokenizer.json`` defines; return whether it did otherwise before.

    A space before the text is left as transformers chooses it: ``tokenizer_config.json`` may ask for it.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if type(tokenizer) is PreTrainedTokenizerFast:  # this class reads the file unchanged
        return False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return False
    definition = read_json(path)
    with reading(path, _FETCH_AGAIN):
        if _splits_alike(backend, Tokenizer.from_str(json.dumps(_without_vocabulary(definition)))):
            return False
        from_file = Tokenizer.from_file(str(path))
    for part in _DECIDING:
        setattr(backend, part, getattr(from_file, part))
    if backend.get_vocab(with_added_tokens=False) == from_file.get_vocab(with_added_tokens=False):
        backend.model = from_file.model
    return True


def _without_vocabulary(definition: JsonObject) -> JsonObject:
    """Strip the vocabulary from a tokenizer's definition, so that a tokenizer with the same word splitting is built
    quickly.

    An old file, without the type of its model, is returned unchanged.
    """
    model = dict(definition["model"])
    if "type" not in model:
        return definition
    if model["type"] == "Unigram":
        model |= {"vocab": model["vocab"][:1], "unk_id": None}
    else:
        model["vocab"] = {}
    if "merges" in model:
        model["merges"] = []
    return {**definition, "model": model, "added_tokens": [], "post_processor": None}


def _splits_alike(tokenizer: "Tokenizer", other: "Tokenizer") -> bool:
    """Check that two tokenizers split text in the same way, apart from their vocabularies and a first space."""
    definition = json.loads(other.to_str())
    for part in ("normalizer", "pre_tokenizer"):
        component = getattr(tokenizer, part)
        if _without_spaces(None if component is None else json.loads(component.__getstate__())) != _without_spaces(
            definition[part]
        ):
            return False
    model = definition["model"]
    options = {name: value for name, value in model.items() if name not in ("type", "vocab", "merges", "unk_id")}
    return type(tokenizer.model).__name__ == model["type"] and all(
        (getattr(tokenizer.model, name, value) or None) == (value or None) for name, value in options.items()
    )


def _without_spaces(part: object) -> object:
    if isinstance(part, dict):
        return {
            name: _without_spaces(value)
            for name, value in part.items()
            if name not in ("add_prefix_space", "trim_offsets")
        }
    return [_without_spaces(value) for value in part] if isinstance(part, list) else part


def tokenizer_digest(directory: Path) -> str:
    """Compute the SHA-256 over the names and bytes of a checkpoint's tokenizer files, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(_FILES):
        if (directory / name).is_file():
            digest.update(f"{name} {sha256_file(directory / name)}\n".encode())
    return digest.hexdigest()
