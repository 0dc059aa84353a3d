"""Options that several commands share, and the checks of their values."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from besa_cli.commands.shared import config_file, panels
from besa_cli.errors import BesaError, UsageError
from besa_cli.models import DEMO

DEFAULT_MODEL = DEMO
DEFAULT_RUN = Path("besa-run")

MOST = panels.MOST


def expand_home(value: Path | list[Path] | None) -> Path | list[Path] | None:
    """Replace a leading ``~`` of paths by the home directory; callback of options that are paths.

    Shells do not expand it after ``=`` and in variables. A ``~`` of an unknown user stays.
    """
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))  # noqa: PTH111  (Path.expanduser fails without a home)
    return value and [Path(os.path.expanduser(path)) for path in value]  # noqa: PTH111


def expand_utf8(value: Path | list[Path] | None) -> Path | list[Path] | None:
    """Do the same and require UTF-8; callback of options that are directories of weights.

    Raises
    ------
    UsageError
        A path is not UTF-8; the safetensors library cannot open files there.
    """
    expanded = expand_home(value)
    for path in expanded if isinstance(expanded, list) else [expanded]:
        require_utf8(None if path is None else str(path))
    return expanded


def require_utf8(value: str | None) -> str | None:
    """Require that a name is UTF-8; callback of options that name a model.

    Raises
    ------
    UsageError
        The name is not UTF-8.
    """
    shown = os.fsencode(value or "").decode("utf-8", "backslashreplace")
    if value and shown != value:
        raise UsageError(f"'{shown}' is not UTF-8: weights cannot be read or written there", "rename it")
    return value


Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
StoredDtype = Literal["float32", "bfloat16", "float16"]
GgufType = Literal["F16", "BF16", "Q8_0", "Q4_0"]
Compression = Literal["zstd"]

_MODEL = f"Hub name, local directory, GGUF file, or {DEMO} (the demo model)."

ModelOption = Annotated[str, panels.DATA("--model", _MODEL, metavar="MODEL", callback=require_utf8)]
OtherModelOption = Annotated[
    str | None,
    panels.DATA("--model", _MODEL, "the newest stage of the run directory", metavar="MODEL", callback=require_utf8),
]
AnyModelOption = Annotated[
    str | None,
    panels.DATA(
        "--model",
        f"Hub name, local directory, export, GGUF file, or {DEMO} (the demo model).",
        "the newest stage of the run directory",
        metavar="MODEL",
        callback=require_utf8,
    ),
]
DataDirOption = Annotated[
    Path | None,
    panels.DATA(
        "--data-dir",
        "Directory with local copies of data sets and tasks, searched first (see docs/data.md, docs/tasks.md).",
        metavar="DIR",
        envvar="BESA_DATA",
        callback=expand_home,
    ),
]
SeedOption = Annotated[int, panels.DATA("--seed", "Seed of every random choice.", min=0, metavar="N")]
DeviceOption = Annotated[
    Device, panels.COMPUTE("--device", "Device to compute on; auto: a GPU if there is one, else the CPU.")
]
DtypeOption = Annotated[
    Dtype,
    panels.COMPUTE("--dtype", "Type of numbers to compute in; auto: bfloat16 where the machine multiplies it fast."),
]
RunOption = Annotated[
    Path,
    panels.RUN(
        "--run", "Directory that holds everything a run makes.", metavar="DIR", envvar="BESA_RUN", callback=expand_utf8
    ),
]
RestartOption = Annotated[
    bool, panels.RUN("--restart", "Start over; what exists already is replaced once the new one is complete.")
]
DryRunOption = Annotated[
    bool, panels.RUN("--dry-run", "Run all checks and forecast memory, disk and time, but write nothing.")
]
ConfigOption = Annotated[
    Path | None,
    panels.RUN(
        "--config",
        "YAML file with options of this command (name: value); typed options win.",
        metavar="FILE.yaml",
        is_eager=True,
        callback=config_file.apply,
    ),
]
JsonOption = Annotated[bool, panels.OUTPUT("--json", "Print one JSON object instead of text.")]


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?", re.IGNORECASE)


def require_run(run: Path) -> None:
    """Require that a run directory exists, before a lock creates it.

    Raises
    ------
    BesaError
        The directory does not exist.
    """
    if not run.is_dir():
        raise BesaError(f"there is no run directory {run}", f"make one: besa prune --run {run}")


def size_of(text: str | None, option: str = "--max-memory") -> int | None:
    """Parse ``4GB``, ``512 MiB`` or ``1.5g`` into bytes.

    Raises
    ------
    UsageError
        It is not a size, or not below 2^63 bytes.
    """
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise UsageError(f"{option} '{text}' is not a size", "4GB and 512MiB are sizes")
    power = "KMGT".index(match[2].upper()) + 1
    size = float(match[1]) * (1024 if match[3] else 1000) ** power
    if size >= 1 << 63:
        raise UsageError(f"{option} '{text}' is too large", "give less than 2^63 bytes (9 million TB)")
    return int(size)
