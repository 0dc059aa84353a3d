"""Stored continuations of a prompt: what `besa eval sample` shows, for reports."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from besa_cli.checkpoint import manifests
from besa_cli.checkpoint.manifests import Digest, Positive
from besa_cli.evaluation import result_files
from besa_cli.system import lock, records
from besa_cli.system.disk import Json

KIND = "continuation"  # of a result file
PREFIX = "sample"  # of its name


@records.strict
@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Greedy continuation of a prompt by one model.

    Attributes
    ----------
    model_digest : str
        Content digest of the model.
    prompt : str
    tokens : int
        Tokens asked for; the text may end before.
    dtype : str
        Dtype that it was computed in.
    text : str
        Continuation without the prompt.
    """

    model_digest: Digest
    prompt: str
    tokens: Positive
    dtype: str
    text: str


def save(result: Continuation, directory: Path, model: Json) -> Path:
    """Write a continuation with its model to a run's directory of results, and return the file.

    The same prompt with the same settings gives the same name.
    """
    asked = {name: value for name, value in asdict(result).items() if name != "text"}
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    file = directory / f"{PREFIX}-{result.model_digest[:8]}-{key}.json"
    with lock.hold_results(directory.parent):
        result_files.save(result, file, KIND, model, manifests.versions())
    return file
