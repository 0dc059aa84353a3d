"""Faults of a program and its files: at random in `interruptions.py`, by name in `test_interruptions.py`."""

import contextlib
import errno
import gc
import importlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from besa_cli.system import disk


def full_disk(number: int) -> None:
    """From the `number`-th file on, every write in this process ends half-way with ENOSPC."""
    left = [number]

    def meet(path: Path, *, written: bool) -> None:
        left[0] -= written
        if left[0] > 0:
            return
        if path.exists():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    for name in ("save_tensors", "_write_text"):
        write = getattr(disk, name)

        def limited(path: Path, value: Any, write: Callable[[Path, Any], None] = write) -> None:
            write(path, value)
            meet(path, written=True)

        setattr(disk, name, limited)


def jumping_clock(seed: int) -> None:
    """The wall clock of this process gives another time between 1970 and 2100 whenever it is asked."""
    numbers = random.Random(seed)
    real = time.gmtime
    time.time = lambda: numbers.uniform(0, 4.1e9)
    time.gmtime = lambda seconds=None: real(numbers.uniform(0, 4.1e9))


def cut_short(path: Path) -> None:
    """The last part of a file is missing."""
    content = path.read_bytes()
    path.write_bytes(content[: random.randint(0, max(len(content) - 1, 0))])


def flip_a_bit(path: Path) -> None:
    """One bit of a tensor is another."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[random.randrange(start, len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def newer_format(path: Path) -> None:
    """A manifest that a later version of besa wrote."""
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": manifest["format"] + 1}))


KINDS: Mapping[str, Callable[[Path], None]] = {
    "cut short": cut_short,
    "bit flipped": flip_a_bit,
    "newer format": newer_format,
}


def targets(run: Path, model: Path | None) -> list[tuple[str, Path]]:
    """What can be damaged: (kind, file) pairs of a run directory and of a model beside it; nothing unfinished."""
    files = [path for place in (run, model) if place for path in sorted(place.rglob("*")) if not _hidden(path, place)]
    shards = [path for path in files if path.suffix in (".safetensors", ".streams")]
    records = [path for path in files if path.suffix in (".json", ".windows") and path.is_relative_to(run)]
    return [
        *[(kind, path) for path in shards for kind in ("cut short", "bit flipped")],
        *[("cut short", path) for path in records],
        *[("newer format", path) for path in records if path.name == "besa.json"],
    ]


def _hidden(path: Path, place: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(place).parts)


def own_mounts() -> None:
    """Begin this program anew where it may mount a filesystem that nobody else sees (Linux); root or not."""
    if os.environ.get("BESA_FAULTS_MOUNTS") or not shutil.which("unshare"):
        return
    os.environ["BESA_FAULTS_MOUNTS"] = "own"
    become = ["--map-root-user"] if os.geteuid() else []
    if subprocess.run(["unshare", *become, "--mount", "true"], capture_output=True).returncode == 0:
        os.execvp("unshare", ["unshare", *become, "--mount", sys.executable, *sys.argv])


class Disk:
    """A small filesystem in memory that can be made full at any moment.

    Parameters
    ----------
    place : Path
        Where it is mounted.
    size : int
        Bytes.

    Raises
    ------
    OSError, subprocess.CalledProcessError
        It cannot be mounted; see `own_mounts`.
    """

    def __init__(self, place: Path, size: int) -> None:
        place.mkdir(parents=True)
        options = ["-t", "tmpfs", "-o", f"size={size}"]
        subprocess.run(["mount", *options, "besa-faults", str(place)], check=True, capture_output=True)
        self.place, self._filler = place, place / "filler"

    def fill(self, leave: int) -> None:
        """Take all room but `leave` bytes."""
        with self._filler.open("wb") as file:
            while (free := shutil.disk_usage(self.place).free - leave) > 0:
                try:
                    os.posix_fallocate(file.fileno(), 0, file.seek(0, os.SEEK_END) + free)
                    return
                except OSError:  # somebody took some of it meanwhile
                    continue

    def free(self) -> None:
        """Give the room back."""
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it, also while somebody still looks at it."""
        subprocess.run(["umount", "--lazy", str(self.place)], check=True, capture_output=True)


_WARM = (
    "app",
    "calibration.prepare",
    "commands.run",
    "evaluation.perplexity",
    "evaluation.results",
    "evaluation.texts",
    "exporters.compressed_tensors",
    "exporters.gguf",
    "exporters.hf",
    "exporters.sparse",
    "jobs",
    "jobs.export",
    "jobs.import_",
    "jobs.model_card",
    "jobs.prune",
    "jobs.quantize",
    "pruners.besa",
    "pruners.sparsegpt",
    "quantizers.clip",
    "quantizers.gptq",
    "simulation.record",
    "simulation.run",
    "system.lock",
    "text.hub_files",
)


def settle_fork() -> None:
    """Give torch its threads again, first thing in a fork: several threads that ask for them at once would fail."""
    torch.set_num_threads(torch.get_num_threads())


def warm_up() -> None:
    """Import what commands import, so that their forks do not; what parses a command line is imported by doing it."""
    for name in _WARM:
        importlib.import_module(f"besa_cli.{name}")
    with contextlib.redirect_stderr(io.StringIO()):
        importlib.import_module("besa_cli.app").main(["show", os.devnull])
    importlib.import_module("transformers.models.llama.modeling_llama")
    importlib.import_module("prodigyopt")
    gc.collect()
    gc.freeze()  # or every fork would copy what its first collection looks at
