"""Several ranks of one command line, forked from one process that has imported everything: each starts at once."""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in the list of its names

_PRELOADED = [
    "besa_cli.app",
    "besa_cli.jobs.stage",
    "besa_cli.calibration.prepare",
    "besa_cli.pruners.besa",
    "besa_cli.pruners.magnitude",
    "besa_cli.pruners.sparsegpt",
    "besa_cli.jobs.prune",
    "besa_cli.system.ranks",
    "transformers.models.llama.modeling_llama",
]


_PATIENCE = 600  # seconds, far more than anything here takes


@dataclass(frozen=True)
class Rank:
    """One rank of a command, and the files that hold what it said."""

    process: BaseProcess
    out: Path
    err: Path

    @property
    def said(self) -> str:
        return self.err.read_text()

    def code(self) -> int | None:
        """The exit code; minus the signal that killed it; None where it does not end."""
        self.process.join(_PATIENCE)
        return self.process.exitcode


def _rank(words: Sequence[str], environment: Mapping[str, str], out: Path, err: Path, place: Path) -> None:
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    os.chdir(place)
    from besa_cli.app import main

    sys.exit(main(list(words)))


@contextmanager
def crew(place: Path, size: int, *words: object, others: Sequence[object] | None = None) -> Iterator[list[Rank]]:
    """Start `size` ranks of a command line as torchrun does, and end those that are left.

    `others` are the words of all ranks but the first, where they differ.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    ranks = []
    for rank in range(size):
        own = [str(word) for word in (words if rank == 0 or others is None else others)]
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        files = place / f"rank-{rank}.out", place / f"rank-{rank}.err"
        process = context.Process(target=_rank, args=(own, environment, *files, place))
        process.start()
        ranks.append(Rank(process, *files))
    try:
        yield ranks
    finally:
        for each in ranks:
            each.process.kill()
            each.process.join()


def wait_for(path: Path, ranks: Sequence[Rank]) -> None:
    """Until a file is there; fails where all ranks have ended without it."""
    end = time.monotonic() + _PATIENCE
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        assert any(rank.process.is_alive() for rank in ranks), "\n".join(rank.said for rank in ranks)
        time.sleep(0.01)
