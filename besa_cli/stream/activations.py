"""Where hidden states of the calibration samples lie between blocks: in memory, or in files that are mapped into it."""

import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from besa_cli.errors import BesaError


class ActivationStore:
    """Makes the tensors that hold one number for every calibration token and channel; always on the CPU.

    Parameters
    ----------
    directory : Path, optional
        Keep them in files there. The files have no names: they are gone with the process, however it ends.
        Without it they are kept in memory.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()  # a mapping lives as long as its tensor

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape whose values are not set.

        Raises
        ------
        BesaError
            The disk has no room for it.
        """
        if self._directory is None:
            return torch.empty(*shape, dtype=dtype)
        size = torch.Size(shape).numel() * dtype.itemsize
        with tempfile.TemporaryFile(dir=self._directory) as file:
            try:
                _reserve(file.fileno(), size)
            except OSError as error:
                reason = error.strerror or error
                raise BesaError(
                    f"{self._directory} has no room for {size / 1e6:.0f} MB of hidden states: {reason}",
                    "free disk space, or give a higher --max-memory",
                ) from error
            mapped = mmap.mmap(file.fileno(), size)
        self._maps.add(mapped)
        return torch.frombuffer(mapped, dtype=dtype).view(*shape)

    def release(self) -> None:
        """Let the system take back the memory of what was read and written; the files keep it."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)


def _reserve(file: int, size: int) -> None:
    """Make a file this long, its room on the disk taken now where the system can do that."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)
