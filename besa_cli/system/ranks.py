"""Ranks: the processes that work on one model together, and their communication (torch.distributed)."""

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

_JOINING = timedelta(seconds=90)  # until all ranks must have started
_TIMEOUT = timedelta(hours=24)  # a lost rank is noticed at once; this bounds a download by the first one


class Lost(BesaError):
    """Loss of another rank."""

    def __init__(self, size: int) -> None:
        super().__init__(
            f"one of the {size} ranks is lost, so the others end too",
            "all finished work is kept; run the same command again, with any number of ranks, to resume",
        )


class Ranks:
    """The ranks of one command; with a single rank, the collective methods return their input.

    All ranks must call the communicating methods, in the same order.

    Parameters
    ----------
    info : RankInfo
        This process's rank and the number of ranks.

    Attributes
    ----------
    rank, size : int
    """

    def __init__(self, info: RankInfo | None = None) -> None:
        info = info or RankInfo()
        self.rank, self.size = info.rank, info.size
        self._store: Any = None  # torch does not export the type
        if self.size > 1:
            self._join(info)

    def _join(self, info: RankInfo) -> None:
        devices = torch.cuda.device_count()
        if devices:
            torch.cuda.set_device(info.local_rank % devices)
        backend = "cpu:gloo,cuda:nccl" if devices >= info.local_size else "gloo"  # nccl needs a GPU for each rank
        with self._rendezvous_errors():
            self._store, _, _ = next(rendezvous("env://", timeout=_JOINING))
            self._store.set(f"besa/here/{self.rank}", "")
            self._store.wait([f"besa/here/{rank}" for rank in range(self.size)], _JOINING)
        with self._connection_errors():
            dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.size, timeout=_TIMEOUT)

    def shutdown(self, code: int) -> None:
        """Leave the process group after success; after a failure, end the process at once with its exit code.

        An orderly end could wait for ranks that are lost, or take half a minute on a busy machine.
        """
        if code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """True for the first rank, which writes and reports."""
        return self.rank == 0

    def first_to_fail(self) -> bool:
        """Return True for the first rank that calls this, so that one of several failing ranks reports the error."""
        if self._store is None:
            return True
        try:
            return int(self._store.add("besa/failed", 1)) == 1
        except RuntimeError:  # the process that keeps the store is lost
            return self.is_main

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the context on the first rank before any other rank runs it, e.g. to fetch files for all."""
        if not self.is_main:
            self._barrier()
        yield
        if self.is_main:
            self._barrier()

    def _barrier(self) -> None:
        self.all_reduce_list_([torch.zeros(1)])

    def all_reduce_list_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks; shapes and dtypes must be equal on all ranks."""
        if self.size > 1:
            with self._connection_errors():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all ranks, and return it; shape and dtype must be equal on all ranks."""
        self.all_reduce_list_([tensor])
        return tensor

    def all_reduce_float(self, value: float) -> float:
        """Return the sum of a number over all ranks."""
        if self.size == 1:
            return value
        buffer = torch.tensor([value], dtype=torch.float64)
        self.all_reduce_list_([buffer])
        return float(buffer)

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of the first rank; shapes and dtypes must be equal on all ranks."""
        if self.size > 1:
            with self._connection_errors():
                for tensor in tensors:
                    dist.broadcast(tensor.view(-1).view(torch.uint8), 0)

    def broadcast_json(self, value: object) -> Any:
        """Return the first rank's value, plain JSON, on every rank; the values of the others are ignored."""
        if self.size == 1:
            return value
        text = bytearray(json.dumps(value if self.is_main else None).encode())
        length = torch.tensor([len(text)])
        self.broadcast_([length])
        buffer = (
            torch.frombuffer(text, dtype=torch.uint8) if self.is_main else torch.empty(int(length), dtype=torch.uint8)
        )
        self.broadcast_([buffer])
        return json.loads(bytes(buffer.tolist()))

    def broadcast_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the first rank's tensors, by name, on every rank; the tensors of the others are ignored."""
        if self.size == 1:
            return dict(tensors)
        own_layouts = {
            name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()
        }
        layouts: dict[str, tuple[str, list[int]]] = self.broadcast_json(own_layouts)
        if self.is_main:
            received = {name: tensors[name].contiguous() for name in layouts}
        else:
            received = {
                name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in layouts.items()
            }
        self.broadcast_([tensor for tensor in received.values() if tensor.numel()])
        return received

    def require_equal(self, facts: Mapping[str, object]) -> None:
        """Refuse a rank whose options or files differ from those of the first rank.

        Raises
        ------
        UsageError
            A value of this rank differs.
        """
        for name, value in self.broadcast_json(dict(facts)).items():
            if facts.get(name) != value:
                raise UsageError(
                    f"rank {self.rank} of {self.size} has {name} {facts.get(name)}, rank 0 has {value}",
                    "give every rank the same options, model and libraries",
                )

    def exchange(
        self, outgoing: Sequence[tuple[int, int, Tensor]], incoming: Sequence[tuple[int, int, Tensor]]
    ) -> None:
        """Send tensors to other ranks and receive tensors from them.

        Parameters
        ----------
        outgoing, incoming : sequences of (tag, other rank, Tensor on the CPU)
            A sent tensor is copied into the incoming one of the same tag, shape and dtype at the other rank.
        """
        with self._connection_errors():
            works = [dist.isend(tensor, rank, tag=tag) for tag, rank, tensor in outgoing]
            works += [dist.irecv(tensor, rank, tag=tag) for tag, rank, tensor in incoming]
            for work in works:
                if work is not None:
                    work.wait()

    @contextlib.contextmanager
    def _rendezvous_errors(self) -> Iterator[None]:
        """Translate a failed rendezvous into a one-line error."""
        began = time.monotonic()
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            timed_out = time.monotonic() - began >= _JOINING.total_seconds()
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            reason = f"timeout after {_JOINING.total_seconds():.0f} s" if timed_out else reason_of(error)
            raise BesaError(
                f"rank {self.rank} of {self.size} did not meet all others at {address}: {reason}",
                "start all ranks together with torchrun, or unset WORLD_SIZE to run alone",
            ) from error

    @contextlib.contextmanager
    def _connection_errors(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # raised by gloo and nccl when a connection ends
            raise Lost(self.size) from error
