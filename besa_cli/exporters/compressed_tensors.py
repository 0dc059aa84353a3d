"""`compressed-tensors`: the codes of a quantized stage in the format pack-quantized, for transformers and vLLM.

Weights have 4 or 8 bits on a symmetric grid, activations are not quantized (W4A16). Codes q + 2^(bits − 1) are packed
into words of 32 bits, the first code in the lowest bits. Scales are stored in fp32: their products with the codes are
then rounded once, to the model's dtype, as in the stage.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import torch
from torch import Tensor, nn

from besa_cli.checkpoint import copying
from besa_cli.decoder import architecture, tensor_names
from besa_cli.errors import BesaError
from besa_cli.exporters.source import Piece, StageSource
from besa_cli.models.headers import INDEX
from besa_cli.ops import affine, packing
from besa_cli.ops.affine import Quantized
from besa_cli.system import disk
from besa_cli.system.disk import JsonObject

_BITS = (4, 8)
_WORD = 4  # bytes
_REMEDY = "quantize with --bits 4 --symmetric, or export as sparse"


@dataclass(frozen=True, kw_only=True)
class CompressedTensorsOptions:
    """Options of a compressed-tensors export: none."""


Options = CompressedTensorsOptions


def pieces(source: StageSource, options: CompressedTensorsOptions) -> int:
    """Return the number of pieces that `write` yields.

    Raises
    ------
    BesaError
        The format does not support the grid of the stage.
    """
    if source.grid is None:
        raise BesaError(f"{source.directory} is not quantized", "quantize it first with: besa quantize")
    if not source.grid["symmetric"] or source.grid["bits"] not in _BITS:
        kind = "symmetric" if source.grid["symmetric"] else "asymmetric"
        raise BesaError(
            f"{source.directory} has {source.grid['bits']} bits on {kind} grids; pack-quantized is written only for 4 "
            "and 8 bits on symmetric grids",
            _REMEDY,
        )
    _unquantized(source)
    return len(source.weights.shards())


def group_size(source: StageSource) -> int | None:
    """Return the columns that share a scale in all linears; None if each row has one scale.

    transformers supports only one group size, which must divide the columns of every linear: if the stage's does not, a
    smaller one is used and scales are repeated.
    """
    size = source.grid["group_size"] if source.grid else None
    columns = [source.shape(name)[1] for name in source.linears]
    if size is None or size >= max(columns):
        return None
    return gcd(*(cols if cols <= size else gcd(size, cols) for cols in columns))


def write(source: StageSource, target: Path, options: CompressedTensorsOptions) -> Iterator[Piece]:
    """Write the export to the directory; a piece is a file of weights, one per block."""
    copying.copy_small_files(source.directory, target)
    disk.write_json(target / "config.json", {**source.config, "quantization_config": _configuration(source)})
    table: dict[str, str] = {}
    total = 0
    for path, names in source.weights.shards().items():
        coded, tensors, linear_bytes = source.coded(names), source.weights.read(names), 0
        for name, quantized in coded.items():
            parts = packed(quantized, group_size(source) or quantized.codes.shape[1])
            linear_bytes += sum(part.nbytes for part in parts.values())
            tensors |= {f"{name}_{part}": tensor for part, tensor in parts.items()}
            del tensors[name]
        disk.publish(target / path.name, lambda file, tensors=tensors: disk.save_tensors(file, tensors))  # type: ignore[misc]
        table |= dict.fromkeys(tensors, path.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        linear_bytes += sum(tensors[name].nbytes for name in names if name in source.linears and name not in coded)
        yield Piece(linear_bytes=linear_bytes)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
    disk.write_json(target / INDEX, index)


def packed(quantized: Quantized, width: int) -> dict[str, Tensor]:
    """Return a weight's `packed` codes (rows, words), `scale` (rows, groups of `width` columns) and `shape`."""
    rows, cols = quantized.codes.shape
    data = packing.pack_codes(quantized.codes, quantized.grid.bits)
    words = torch.zeros(rows, -(-data.shape[1] // _WORD) * _WORD, dtype=torch.uint8)
    words[:, : data.shape[1]] = data
    scales = affine.per_column(quantized.scales, quantized.grid, cols)[:, ::width]
    return {
        "packed": words.view(torch.int32),
        "scale": scales.float().contiguous(),
        "shape": torch.tensor([rows, cols], dtype=torch.int64),
    }


def _configuration(source: StageSource) -> JsonObject:
    size, bits = group_size(source), source.grid["bits"] if source.grid else 0
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if size is None else "group",
        "group_size": size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": _unquantized(source),
    }


def _unquantized(source: StageSource) -> list[str]:
    """List the linears that are not quantized (head, routers), by their names in the model.

    Raises
    ------
    BesaError
        Some are quantized that are no `nn.Linear` of the model: loaders of the format know no others.
    """
    model = architecture.skeleton(architecture.config_of(source.directory), torch.bfloat16)
    names = tensor_names.Names(model, source.weights.names)
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    stored = {name: names.origin(f"{name}.weight").tensor for name in linears}
    others = sorted(source.linears - set(stored.values()))
    if others:
        raise BesaError(
            f"{others[0]} in {source.directory} is no nn.Linear of {type(model).__name__}, as pack-quantized needs",
            "export it as sparse",
        )
    return [name for name in linears if stored[name] not in source.linears]


def loading(options: CompressedTensorsOptions) -> str:
    """Return instructions for loading the export, in Markdown."""
    return """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig  # pip install compressed-tensors

model = AutoModelForCausalLM.from_pretrained("DIRECTORY", quantization_config=CompressedTensorsConfig(dequantize=True))
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```

transformers makes dense weights of the codes; other programs that read compressed-tensors may compute with the codes.
Zeros are stored: the format has no sparse form.
"""
