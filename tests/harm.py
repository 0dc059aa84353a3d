"""What can happen to a program and its files: at random in `tests/faults.py`, by name in `tests/test_faults.py`."""

import errno
import importlib
import json
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from besa_cli import disk


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
    time.time = lambda: numbers.uniform(0, 4.1e9)  # type: ignore[assignment]
    time.gmtime = lambda seconds=None: real(numbers.uniform(0, 4.1e9))  # type: ignore[assignment,misc]


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
    """What can be damaged: (kind, file) pairs of a run directory and of a model beside it."""
    shards = [path for place in (run, model) if place for path in sorted(place.rglob("*.safetensors"))]
    manifests = sorted(run.rglob("besa.json"))
    return [
        *[(kind, path) for path in shards for kind in ("cut short", "bit flipped")],
        *[(kind, path) for path in manifests for kind in ("cut short", "newer format")],
    ]


def warm_up() -> None:
    """Import what commands import, so that their forks do not."""
    for name in ("jobs", "pruning", "quantizing", "perplexity", "results", "preparation", "lock", "datahub", "texts"):
        importlib.import_module(f"besa_cli.{name}")
    importlib.import_module("transformers.models.llama.modeling_llama")
    importlib.import_module("prodigyopt")
