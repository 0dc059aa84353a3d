"""Contenders of a model: its dense checkpoint, its sparse export, and its GGUF exports where llama.cpp is installed."""

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from besa_cli.bench import gguf_files
from besa_cli.bench.contenders import Contender, LlamaBench, Process, Runner
from besa_cli.checkpoint import exports, manifests, sparse_index
from besa_cli.checkpoint.manifests import EXPORT
from besa_cli.checkpoint.runs import Run
from besa_cli.decoder import architecture
from besa_cli.errors import BesaError
from besa_cli.evaluation.zeroshot import fit
from besa_cli.system import memory

SPARSE = "sparse"
_LLAMA_BENCH, _LLAMA_CPP = "llama-bench", "llama_cpp"
_ROOM = 1.2  # factor on the bytes of weights that leaves room for the rest of each process


@dataclass(frozen=True, kw_only=True)
class Entries:
    """Files of a model that are measured beside each other.

    Attributes
    ----------
    dense : Path
        Directory that transformers loads as a dense model; a sparse export is expanded.
    sparse : Path, optional
        Directory of the sparse export.
    gguf : sequence of Path
        GGUF files.
    """

    dense: Path
    sparse: Path | None
    gguf: Sequence[Path] = ()


def of_directory(directory: Path) -> Entries:
    """Return the files of a model that is not a run's: a sparse export runs packed and expanded."""
    return Entries(dense=directory, sparse=directory if sparse_index.is_sparse(directory) else None)


def of_stage(run: Run, stage: Path) -> Entries:
    """Return the files of a run's stage: itself, and the exports that were made from it as it is now."""
    digest = manifests.read_stage(stage)["digest"]
    found = [path.parent for path in sorted(run.exports.glob(f"*/{EXPORT}"))]
    made = {path: exports.read(path) for path in found if not path.name.startswith(".")}
    current = {
        path: manifest["options"]["format"] for path, manifest in made.items() if manifest["source"]["digest"] == digest
    }
    sparse = [path for path, format_ in current.items() if format_ == SPARSE]
    gguf = [file for path, format_ in current.items() if format_ == "gguf" for file in sorted(path.glob("*.gguf"))]
    return Entries(dense=stage, sparse=sparse[0] if sparse else None, gguf=gguf)


def llama_cpp() -> str | None:
    """Return what runs GGUF files here: the package `llama_cpp`, or the path of `llama-bench`; None without either."""
    return _LLAMA_CPP if importlib.util.find_spec(_LLAMA_CPP) else shutil.which(_LLAMA_BENCH)


def contenders(entries: Entries, dtype: str, longest: int) -> list[Contender]:
    """Return the contenders in the order of the tables."""
    made = [Contender(name=f"dense {dtype}", program="transformers", path=str(entries.dense), dtype=dtype)]
    if entries.sparse:
        made.append(Contender(name=SPARSE, program="transformers", path=str(entries.sparse), packed=True, dtype=dtype))
    return made + [
        Contender(name=f"llama.cpp {path.parent.name}", program="llama_cpp", path=str(path), longest=longest)
        for path in (entries.gguf if llama_cpp() else ())
    ]


def require_memory(entries: Entries, dtype: torch.dtype) -> None:
    """Check that all ways to run the model fit into memory together.

    Raises
    ------
    BesaError
        They do not.
    """
    files = [*(entries.sparse.glob("sparse-*") if entries.sparse else ()), *(entries.gguf if llama_cpp() else ())]
    needed = int(_ROOM * (fit.weights(entries.dense, dtype) + sum(path.stat().st_size for path in files)))
    free = memory.available(torch.device("cpu"))
    if needed > free:
        raise BesaError(
            f"the ways to run {entries.dense} take {needed / 1e9:.1f} GB together, {free / 1e9:.1f} GB are free",
            "close other programs, or measure a smaller model",
        )


def start(contender: Contender) -> Runner:
    """Load a contender in a process of its own."""
    program = llama_cpp()
    if contender.program == "llama_cpp" and program not in (None, _LLAMA_CPP):
        read = gguf_files.weights_read(Path(contender.path))
        return LlamaBench(contender, str(program), torch.get_num_threads(), read)
    return Process(contender)


def maximum_length(entries: Entries) -> int | None:
    """Return the longest sequence that the model supports; None if its configuration does not say."""
    return architecture.maximum_length(architecture.config_of(entries.dense))
