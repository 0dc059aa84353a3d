"""`hf`: an ordinary Hugging Face checkpoint in which every pruned weight is an exact zero."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from besa_cli.checkpoint import copying
from besa_cli.errors import require_counts
from besa_cli.exporters import shards
from besa_cli.exporters.source import Piece, StageSource, narrowed
from besa_cli.system import disk
from besa_cli.system.compute import DTYPES


@dataclass(frozen=True, kw_only=True)
class HfOptions:
    """Options of a dense export.

    Attributes
    ----------
    dtype : str, optional
        Dtype of the stored weights; that of the stage by default.
    shard_size : int
        Largest size of a file in bytes.
    """

    dtype: str | None = None
    shard_size: int = 5_000_000_000

    def __post_init__(self) -> None:
        require_counts(shard_size=self.shard_size)


Options = HfOptions


_PIECES = 20  # steps of the progress bar


def pieces(source: StageSource, options: HfOptions) -> int:
    """Return the number of pieces that `write` yields."""
    return min(_PIECES, len(source.names))


def write(source: StageSource, target: Path, options: HfOptions) -> Iterator[Piece]:
    """Write the export to the directory; a piece is one of `pieces` equal parts of the tensors."""
    wanted = None if options.dtype is None else DTYPES[options.dtype]

    def dtype(name: str) -> torch.dtype:
        stored = shards.DTYPES[source.dtype(name)]
        return wanted if wanted is not None and stored.is_floating_point else stored

    size = rounded = 0

    def read(name: str) -> Tensor:
        nonlocal size, rounded
        tensor = source.read(name)
        stored = narrowed(name, tensor, dtype(name))
        if name in source.linears:
            size += stored.nbytes
            rounded += int(((tensor != 0) & (stored == 0)).sum())
        return stored

    copying.copy_small_files(source.directory, target)
    if wanted is not None:
        disk.write_json(target / "config.json", with_dtype(source.config, wanted))
    layout = {name: (dtype(name), source.shape(name)) for name in source.names}
    number = pieces(source, options)
    for done, _ in enumerate(shards.write_all(target, layout, options.shard_size, read), 1):
        if done * number // len(layout) > (done - 1) * number // len(layout):
            yield Piece(linear_bytes=size, rounded_to_zero=rounded)
            size = rounded = 0


def with_dtype(config: dict[str, object], dtype: torch.dtype) -> dict[str, object]:
    """Return a copy of the configuration with another dtype, under the key that it uses."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: str(dtype).removeprefix("torch.")}


def loading(options: HfOptions) -> str:
    """Return instructions for loading the export, in Markdown."""
    return """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```

Any program that reads Hugging Face checkpoints loads it. Pruned weights are stored as zeros: it is neither smaller nor
faster than the dense model.
"""
