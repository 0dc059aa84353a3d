"""Model resolution: turn the name of a model into a complete local Hugging Face checkpoint directory.

| name                                     | module   |
|------------------------------------------|----------|
| the demo model                           | demo.py  |
| a directory                              | local.py |
| a GGUF file                              | gguf/    |
| ``org/name`` or ``org/name@revision``    | hub.py   |

A model that has to be converted is converted once, into the user's cache (cache.py).
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from besa_cli.errors import BesaError, unknown
from besa_cli.models import demo, hub, local
from besa_cli.models.files import CheckConfig
from besa_cli.models.gguf import convert
from besa_cli.system.disk import require_regular
from besa_cli.system.notes import Notify

DEMO = demo.NAME

_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model on this machine.

    Parameters
    ----------
    name : str
        Name as given by the user.
    kind : {"demo", "hub", "local", "gguf"}
        Source of the model.
    directory : Path
        A complete Hugging Face checkpoint: ``config.json``, one or more ``*.safetensors`` (with their index), and the
        tokenizer files that the source has.
    revision : str or None
        The commit, for a model from the hub.
    """

    name: str
    kind: Literal["demo", "hub", "local", "gguf"]
    directory: Path
    revision: str | None


def resolve(name: str, *, notify: Notify, check_config: CheckConfig = lambda _: None) -> Model:
    """Find, fetch or convert the model that `name` names.

    Parameters
    ----------
    name : str
        The demo model's name, a directory, a GGUF file, or a hub name (``org/name``, ``org/name@revision``).
        An existing path takes precedence over a hub name.
    notify : callable
        Called with one-line notes, for instance that a download has begun.
    check_config : callable, optional
        Called with the directory of ``config.json`` before any weight is fetched or read, to refuse a model by it. A
        GGUF file and the demo model are of types that need no such check.

    Raises
    ------
    BesaError
        The model is missing, unreachable, damaged or of an unsupported kind.
    """
    try:
        return _resolve(name, notify, check_config)
    except OSError as error:
        place = error.filename or name
        raise BesaError(
            f"cannot read {place}: {error.strerror or error}", "check the path and its permissions"
        ) from error


def _resolve(name: str, notify: Notify, check_config: CheckConfig) -> Model:
    if name == DEMO:
        return Model(name=name, kind="demo", directory=demo.directory(notify=notify), revision=None)
    path = Path(os.path.expanduser(name))  # noqa: PTH111  (Path.expanduser fails for unknown users)
    if path.is_dir():
        found = local.directory(path, notify=notify, check_config=check_config)
        return Model(name=name, kind="local", directory=found, revision=None)
    if path.exists():
        require_regular(path)
        return Model(name=name, kind="gguf", directory=convert.directory(path, notify=notify), revision=None)
    if name.startswith((".", "/", "~")) or path.suffix == ".gguf":
        raise BesaError(
            f"no model at {path.absolute()}", "name a checkpoint directory, a GGUF file or a hub name (org/name)"
        )
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise unknown("model", name, [DEMO, "org/name on the hub", "a directory", "a GGUF file"])
    directory, revision = hub.directory(match["repo"], match["revision"], notify=notify, check_config=check_config)
    local.check(directory)
    return Model(name=name, kind="hub", directory=directory, revision=revision)
