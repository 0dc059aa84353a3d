"""The processes that work on one model together, and all that they say to each other (torch.distributed)."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from besa_cli.errors import BesaError, UsageError, reason_of
from besa_cli.system.torchrun import RankInfo

_JOINING = timedelta(seconds=90)  # for all ranks to have started
_TIMEOUT = timedelta(hours=24)  # a lost rank is noticed at once; this bounds a fetch by the first one


class Lost(BesaError):
    """Another rank is gone."""

    def __init__(self, size: int) -> None:
        super().__init__(
            f"one of the {size} ranks is gone, so the others end, too",
            "everything finished is kept; run the same command again, with any number of ranks, to go on",
        )


class Ranks:
    """The ranks of one command; alone, every method gives what one process would have without it.

    The methods that speak to others have to be called by all ranks, in the same order.

    Parameters
    ----------
    place : RankInfo
        Which of them this is.

    Attributes
    ----------
    rank, size : int
    """

    def __init__(self, place: RankInfo | None = None) -> None:
        place = place or RankInfo()
        self.rank, self.size = place.rank, place.size
        self._store: Any = None  # torch does not export the type
        if self.size > 1:
            self._join(place)

    def _join(self, place: RankInfo) -> None:
        devices = torch.cuda.device_count()
        if devices:
            torch.cuda.set_device(place.local_rank % devices)
        backend = "cpu:gloo,cuda:nccl" if devices >= place.local_size else "gloo"  # nccl wants a GPU for each rank
        with self._meeting():
            self._store, _, _ = next(rendezvous("env://", timeout=_JOINING))
            self._store.set(f"besa/here/{self.rank}", "")
            self._store.wait([f"besa/here/{rank}" for rank in range(self.size)], _JOINING)
        with self._reaching():
            dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.size, timeout=_TIMEOUT)

    def shutdown(self, code: int) -> None:
        """Take leave of the others when all is done; after a failure, end the process at once with its exit code.

        Ending in good order could wait for those that are gone, or take half a minute on a busy machine.
        """
        if code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def first_to_fail(self) -> bool:
        """Whether no other rank has asked this before: of several that fail, one says why."""
        if self._store is None:
            return True
        try:
            return int(self._store.add("besa/failed", 1)) == 1
        except RuntimeError:  # who keeps the store is gone
            return self.is_main

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Let the first rank do what is within before any other does: what it fetches, they find."""
        if not self.is_main:
            self._barrier()
        yield
        if self.is_main:
            self._barrier()

    def _barrier(self) -> None:
        self.all_reduce_list_([torch.zeros(1)])

    def all_reduce_list_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, of the same shape and dtype everywhere, by its sum over all ranks."""
        if self.size > 1:
            with self._reaching():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def all_reduce_(self, part: Tensor) -> Tensor:
        """The tensor, of the same shape and dtype everywhere, in its place the sum over all ranks."""
        self.all_reduce_list_([part])
        return part

    def all_reduce_float(self, value: float) -> float:
        """The sum of a number over all ranks."""
        if self.size == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64)
        self.all_reduce_list_([held])
        return float(held)

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, of the same shape and dtype everywhere, by the first rank's."""
        if self.size > 1:
            with self._reaching():
                for tensor in tensors:
                    dist.broadcast(tensor.view(-1).view(torch.uint8), 0)

    def broadcast_json(self, value: Any) -> Any:
        """The first rank's value, plain JSON, for everyone; what the others give does not count."""
        if self.size == 1:
            return value
        text = bytearray(json.dumps(value if self.is_main else None).encode())
        length = torch.tensor([len(text)])
        self.broadcast_([length])
        held = (
            torch.frombuffer(text, dtype=torch.uint8) if self.is_main else torch.empty(int(length), dtype=torch.uint8)
        )
        self.broadcast_([held])
        return json.loads(bytes(held.tolist()))

    def broadcast_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first rank's tensors, by name, for everyone; what the others give does not count."""
        if self.size == 1:
            return dict(tensors)
        kinds = {name: [str(each.dtype).removeprefix("torch."), list(each.shape)] for name, each in tensors.items()}
        told: dict[str, tuple[str, list[int]]] = self.broadcast_json(kinds)
        if self.is_main:
            held = {name: tensors[name].contiguous() for name in told}
        else:
            held = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in told.items()}
        self.broadcast_([each for each in held.values() if each.numel()])
        return held

    def require_equal(self, facts: Mapping[str, Any]) -> None:
        """Refuse ranks that were given other options, or found other files, than the first.

        Raises
        ------
        UsageError
            By the rank that differs.
        """
        for name, value in self.broadcast_json(dict(facts)).items():
            if facts.get(name) != value:
                raise UsageError(
                    f"rank {self.rank} of {self.size} has {name} {facts.get(name)}, rank 0 has {value}",
                    "give every rank the same options, model and libraries",
                )

    def exchange(self, sent: Sequence[tuple[int, int, Tensor]], taken: Sequence[tuple[int, int, Tensor]]) -> None:
        """Send tensors to other ranks and fill others with what comes.

        Parameters
        ----------
        sent, taken : sequences of (tag, other rank, Tensor on the CPU)
            A tensor fills the one of the same tag, shape and dtype at the other rank.
        """
        with self._reaching():
            works = [dist.isend(tensor, rank, tag=tag) for tag, rank, tensor in sent]
            works += [dist.irecv(tensor, rank, tag=tag) for tag, rank, tensor in taken]
            for work in works:
                if work is not None:
                    work.wait()

    @contextlib.contextmanager
    def _meeting(self) -> Iterator[None]:
        """Say in one line that the others did not come, or that there is no place to meet."""
        began = time.monotonic()
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            waited = time.monotonic() - began >= _JOINING.total_seconds()
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            why = f"{_JOINING.total_seconds():.0f} s are over" if waited else reason_of(error)
            raise BesaError(
                f"rank {self.rank} of {self.size} did not meet all others at {place}: {why}",
                "start all ranks together with torchrun, or unset WORLD_SIZE to run alone",
            ) from error

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what gloo and nccl raise where a connection ends
            raise Lost(self.size) from error
