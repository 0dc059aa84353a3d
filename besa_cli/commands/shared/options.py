"""The options that several verbs share, each with its help text written once."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from besa_cli.commands.shared import config_file
from besa_cli.errors import BesaError, UsageError
from besa_cli.models import DEMO

DEFAULT_MODEL = DEMO
DEFAULT_RUN = Path("besa-run")

_MODEL = f"A hub name, a local directory, a GGUF file, or the demo model ({DEMO})"


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

ModelOption = Annotated[str, typer.Option("--model", metavar="MODEL", callback=named, help=f"{_MODEL}.")]
OtherModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        callback=named,
        help=f"{_MODEL}.",
        show_default="the newest stage of the run directory",
    ),
]
RunOption = Annotated[
    Path,
    typer.Option(
        "--run",
        metavar="DIR",
        envvar="BESA_RUN",
        callback=directories,
        help="The run directory: where a run keeps all it makes.",
    ),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute; auto takes a GPU if there is one.")]
DtypeOption = Annotated[
    Dtype,
    typer.Option("--dtype", help="What to compute in; auto is bfloat16 where the machine multiplies it fast."),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="Memory that the process is to stay within, e.g. 4GB; hidden states go to files if need be.",
        show_default="none",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of every random choice.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
RestartOption = Annotated[
    bool, typer.Option("--restart", help="Begin anew; what was there is replaced when the new is finished.")
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Only check everything, and say what memory, disk and time it would take; writes nothing."
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.yaml",
        is_eager=True,
        callback=config_file.apply,
        help="Options of this command from a YAML file (name: value); typed ones win.",
    ),
]

DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="NAME|FILE",
        help="Calibration text: c4, wikitext2, ptb, bundled, a .txt, .jsonl, .jsonl.gz or .parquet file. Repeatable.",
        show_default="c4",
    ),
]
SamplesOption = Annotated[
    int | None,
    typer.Option("--samples", max=MOST, metavar="N", help="Number of calibration samples.", show_default="128"),
]
SeqlenOption = Annotated[
    int | None,
    typer.Option(
        "--seqlen",
        metavar="N",
        help="Tokens of each sample.",
        show_default="2048, or the model's maximum if less",
    ),
]
PackOption = Annotated[
    bool | None,
    typer.Option(
        "--pack/--no-pack",
        help="Join short documents to full samples, or draw each sample from one document that is long enough.",
        show_default="packed where the data's documents are short",
    ),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        envvar="BESA_DATA",
        callback=expanded,
        help="Where local copies of data sets and tasks are looked for first (see docs/data.md, docs/tasks.md).",
    ),
]


CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration", metavar="DIR", callback=directories, help="Use the calibration set in this directory."
    ),
]
DampingOption = Annotated[
    float | None,
    typer.Option(
        "--damping", min=0.0, help="SparseGPT, GPTQ: share of the mean Hessian diagonal added.", show_default="0.01"
    ),
]
GroupOption = Annotated[
    str | None,
    typer.Option(
        "--group-size",
        metavar="N|channel",
        help="Columns that share a scale; channel: a whole row.",
        show_default="128",
    ),
]
SymmetricOption = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--asymmetric",
        help="Whether the grid's middle is 0 everywhere, or each group has a zero point.",
        show_default="symmetric",
    ),
]


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
