"""Writer of safetensors files that holds one tensor in memory at a time.

(The safetensors library's own writer needs all tensors of a file at once.)
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from besa_cli.models.headers import INDEX, SINGLE
from besa_cli.system import disk

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor."""
    return int(torch.Size(shape).numel()) * dtype.itemsize


def split(layout: Layout, limit: int) -> list[list[str]]:
    """Divide the names, in order, into files of at most `limit` bytes; a larger tensor gets its own file."""
    files: list[list[str]] = [[]]
    size = 0
    for name, (dtype, shape) in layout.items():
        if files[-1] and size + nbytes(dtype, shape) > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += nbytes(dtype, shape)
    return files


def write(path: Path, layout: Layout, read: Callable[[str], Tensor]) -> Iterator[str]:
    """Write one file; yields the name of each tensor after writing it.

    Parameters
    ----------
    path : Path
    layout : mapping
        Name → dtype and shape of every tensor.
    read : callable
        Name → tensor; called once for each tensor, in the order of writing.
    """
    names = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))  # aligns every tensor
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape = layout[name]
        start, end = end, end + nbytes(dtype, shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = read(name)
            if (tensor.dtype, tuple(tensor.shape)) != layout[name]:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, but its layout is {layout[name]}")
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            yield name
        file.flush()
        os.fsync(file.fileno())


def write_all(directory: Path, layout: Layout, limit: int, read: Callable[[str], Tensor]) -> Iterator[str]:
    """Write a checkpoint as files of at most `limit` bytes, with an index if there are several."""
    files = split(layout, limit)
    if len(files) == 1:
        yield from write(directory / SINGLE, layout, read)
        return
    table: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        yield from write(directory / file, {name: layout[name] for name in names}, read)
        table |= dict.fromkeys(names, file)
    total = sum(nbytes(*layout[name]) for name in layout)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
    disk.write_json(directory / INDEX, index)
