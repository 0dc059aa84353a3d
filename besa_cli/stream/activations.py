"""Storage of the calibration samples' hidden states between blocks: in memory or in memory-mapped files."""

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
    """Allocator of CPU tensors that hold one value per calibration token and channel.

    Parameters
    ----------
    directory : Path, optional
        Keep the tensors in unnamed temporary files in this directory, which the system deletes when the process ends.
        By default they are kept in memory.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()  # a mapping lives as long as its tensor

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Allocate an uninitialized tensor.

        Raises
        ------
        BesaError
            The disk is too full for the tensor.
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
        """Let the system reclaim the memory of mapped pages; their content stays in the files."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)


def _reserve(file: int, size: int) -> None:
    """Set the length of a file to `size` bytes, allocating the disk space now where the system supports it."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)
