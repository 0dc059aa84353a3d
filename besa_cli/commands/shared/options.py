"""The options that several verbs share, each with its help text written once."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from besa_cli.commands.shared import config_file, help
from besa_cli.errors import BesaError, UsageError
from besa_cli.models import DEMO

DEFAULT_MODEL = DEMO
DEFAULT_RUN = Path("besa-run")

MOST = 1_000_000  # of anything that is counted one by one: more cannot be meant, and would be worked on for years


def expanded(value: Path | list[Path] | None) -> Path | list[Path] | None:
    """Paths with the home directory for a leading ``~``, which shells leave as it is after ``=`` and in variables.

    The callback of every option that is a path. A ``~`` that stands for nobody's home stays.
    """
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))  # noqa: PTH111  (Path.expanduser fails without a home)
    return value and [Path(os.path.expanduser(each)) for each in value]  # noqa: PTH111


def directories(value: Path | list[Path] | None) -> Path | list[Path] | None:
    """The same for directories of weights, which cannot lie below a name that is not UTF-8: safetensors opens none.

    Raises
    ------
    UsageError
        One of them is not UTF-8.
    """
    found = expanded(value)
    for each in found if isinstance(found, list) else [found]:
        named(None if each is None else str(each))
    return found


def named(value: str | None) -> str | None:
    """Refuse a name that is not UTF-8; the callback of the options that name a model.

    Raises
    ------
    UsageError
        It is not.
    """
    shown = os.fsencode(value or "").decode("utf-8", "backslashreplace")
    if value and shown != value:
        raise UsageError(f"'{shown}' is not a name in UTF-8, and no weights can be read or written there", "rename it")
    return value


Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
StoredDtype = Literal["float32", "bfloat16", "float16"]
GgufType = Literal["F16", "BF16", "Q8_0", "Q4_0"]
Compression = Literal["zstd"]

_MODEL = f"Hub name, local directory, GGUF file, or {DEMO} (the demo model)."

ModelOption = Annotated[str, help.DATA("--model", _MODEL, metavar="MODEL", callback=named)]
OtherModelOption = Annotated[
    str | None,
    help.DATA("--model", _MODEL, "the newest stage of the run directory", metavar="MODEL", callback=named),
]
DataDirOption = Annotated[
    Path | None,
    help.DATA(
        "--data-dir",
        "Directory with local copies of data sets and tasks, searched first (see docs/data.md, docs/tasks.md).",
        metavar="DIR",
        envvar="BESA_DATA",
        callback=expanded,
    ),
]
SeedOption = Annotated[int, help.DATA("--seed", "Seed of every random choice.", min=0, metavar="N")]
DeviceOption = Annotated[
    Device, help.COMPUTE("--device", "Device to compute on; auto: a GPU if there is one, else the CPU.")
]
DtypeOption = Annotated[
    Dtype,
    help.COMPUTE("--dtype", "Type of numbers to compute in; auto: bfloat16 where the machine multiplies it fast."),
]
RunOption = Annotated[
    Path,
    help.RUN(
        "--run", "Directory that holds everything a run makes.", metavar="DIR", envvar="BESA_RUN", callback=directories
    ),
]
RestartOption = Annotated[
    bool, help.RUN("--restart", "Start over; what exists already is replaced once the new one is complete.")
]
DryRunOption = Annotated[
    bool, help.RUN("--dry-run", "Run all checks and forecast memory, disk and time, but write nothing.")
]
ConfigOption = Annotated[
    Path | None,
    help.RUN(
        "--config",
        "YAML file with options of this command (name: value); typed options win.",
        metavar="FILE.yaml",
        is_eager=True,
        callback=config_file.apply,
    ),
]
JsonOption = Annotated[bool, help.OUTPUT("--json", "Print one JSON object instead of text.")]


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?", re.IGNORECASE)


def require_run(run: Path) -> None:
    """Refuse a run directory that is not there, before a lock makes it.

    Raises
    ------
    BesaError
        There is no such directory.
    """
    if not run.is_dir():
        raise BesaError(f"there is no run directory {run}", f"make one: besa prune --run {run}")


def size_of(text: str | None, option: str = "--max-memory") -> int | None:
    """Bytes of ``4GB``, ``512 MiB`` or ``1.5g``.

    Raises
    ------
    UsageError
        It is not a size, or not below 2^63 bytes.
    """
    if text is None:
        return None
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise UsageError(f"{option} '{text}' is no size", "4GB and 512MiB are sizes")
    power = "KMGT".index(found[2].upper()) + 1
    size = float(found[1]) * (1024 if found[3] else 1000) ** power
    if size >= 1 << 63:
        raise UsageError(f"{option} '{text}' is too large", "give less than 2^63 bytes (9 million TB)")
    return int(size)
