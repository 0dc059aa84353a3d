"""`sparse`: one mask bit per weight and the remaining weights; `besa import` restores the stage byte for byte."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from besa_cli.checkpoint import copying, ownership, sparse_format, stages, zstd
from besa_cli.checkpoint.sparse_format import INDEX, METHOD, NEEDS_IMPORT
from besa_cli.errors import BesaError
from besa_cli.exporters.source import STAGE_FILES, Piece, StageSource
from besa_cli.system import disk


@dataclass(frozen=True, kw_only=True)
class SparseOptions:
    """Options of a sparse export.

    Attributes
    ----------
    compress : str, optional
        Compression of every file of weights, for downloads; none by default.
    """

    compress: Literal["zstd"] | None = None


Options = SparseOptions


def pieces(source: StageSource, options: SparseOptions) -> int:
    """Return the number of pieces that `write` yields.

    Raises
    ------
    BesaError
        The stage has codes of tensors that are not one matrix of shape (rows, cols), which the format cannot hold.
    """
    if source.grid is not None and source.rearranged:
        raise BesaError(
            f"{min(source.rearranged)} in {source.directory} is stored transposed or for all experts together: the "
            "sparse format cannot hold its codes",
            "export it as hf, or export the pruned stage",
        )
    return len(source.weights.shards())


def write(source: StageSource, target: Path, options: SparseOptions) -> Iterator[Piece]:
    """Write the export to the directory; a piece is a file of weights, one per block."""
    copying.copy_small_files(source.directory, target)
    quantization = {"quant_method": METHOD, "format": sparse_format.FORMAT, "index": INDEX}
    config = {**source.config, "quantization_config": quantization, "transformers_weights": NEEDS_IMPORT}
    disk.write_json(target / "config.json", config)
    copy_stage_files(source.directory, target / STAGE_FILES)
    table: dict[str, str] = {}
    digests, total = {}, 0
    for path, names in source.weights.shards().items():
        file = target / shard_name(path.name)
        tensors = source.weights.read(names)
        coded = source.coded(names)
        parts = {
            name: sparse_format.encoded_codes(name, tensors.pop(name), coded[name])
            if name in coded
            else sparse_format.encoded(name, tensors.pop(name))
            for name in names
            if name in source.linears
        }
        stored = tensors | {part: value for linear in parts.values() for part, value in linear.items()}
        disk.publish(file, lambda temporary, stored=stored: disk.save_tensors(temporary, stored))  # type: ignore[misc]
        linear_bytes = sum(value.nbytes for linear in parts.values() for value in linear.values())
        if options.compress:
            file = zstd.compress(file)
            linear_bytes = file.stat().st_size if parts else 0
        table |= dict.fromkeys(stored, file.name)
        digests[file.name] = disk.sha256_file(file)
        total += sum(tensor.nbytes for tensor in stored.values())
        yield Piece(linear_bytes=linear_bytes)
    metadata = {"total_size": total, "sha256": digests}
    disk.write_json(target / INDEX, {"metadata": metadata, "weight_map": dict(sorted(table.items()))})


def shard_name(stage_shard: str) -> str:
    """Return the name of the export's file for a stage's shard: ``model-…`` becomes ``sparse-…``."""
    return "sparse-" + stage_shard.removeprefix("model-")


def copy_stage_files(source: Path, target: Path) -> None:
    """Copy a stage's manifest, reports, configuration and tokenizer, without weights and timing.

    Files that besa did not write are not copied.
    """
    target.mkdir(parents=True)
    strangers = ownership.strangers(source)
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts) or path.name == stages.TIMING
        if path.is_file() and path.suffix != ".safetensors" and not hidden and name.as_posix() not in strangers:
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)


def loading(options: SparseOptions) -> str:
    """Return instructions for loading the export, in Markdown."""
    meanwhile = ", decompressed into the directory for temporary files" if options.compress else ""
    return f"""\
```python
import besa_cli.hf  # pip install besa-cli; without it loading fails

from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```

The weights are expanded while they are loaded{meanwhile}: smaller on disk, not in memory.
`besa import DIRECTORY --run RUN` gives back the very stage that it was made from: every weight, bit for bit.
"""
