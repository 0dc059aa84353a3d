"""Writer of GGUF files: types, tensors and the order in which they are written.

GGUF has no sparse type: zeros are stored. Matrices are stored in the requested type, other tensors in fp32; a matrix
whose columns do not divide into blocks of that type is stored in bf16. Q4_0 is for stages on a symmetric 4-bit grid,
whose codes it stores exactly; embeddings and head are then Q8_0.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGUFWriter, LlamaFileType, quant_shape_to_byte_shape, quants
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from besa_cli.exporters.gguf import llama, quantized_blocks, vocabulary
from besa_cli.exporters.source import Piece, StageSource, narrowed
from besa_cli.ops.affine import Quantized

_DTYPES = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}  # other types are computed from fp32


@dataclass(frozen=True, kw_only=True)
class GgufOptions:
    """Options of a GGUF export.

    Attributes
    ----------
    type : str
        Type of the stored matrices.
    """

    type: Literal["F16", "BF16", "Q8_0", "Q4_0"] = "BF16"


Options = GgufOptions


def pieces(source: StageSource, options: GgufOptions) -> int:
    """Check that the model can be written, and return the number of pieces that `write` yields.

    Raises
    ------
    BesaError
        The model or its tokenizer cannot be written as GGUF.
    """
    llama.check(source)
    if Kind[options.type] is Kind.Q4_0:
        quantized_blocks.check(source)
    vocabulary.read(source.directory, int(source.config["vocab_size"]))
    return len(source.weights.shards())


def file_name(options: GgufOptions) -> str:
    """Return the name of the GGUF file."""
    return f"model-{options.type}.gguf"


def write(source: StageSource, target: Path, options: GgufOptions) -> Iterator[Piece]:
    """Write the export to the directory; a piece is a block, or the tensors outside the blocks."""
    with contextlib.closing(GGUFWriter(target / file_name(options), llama.ARCHITECTURE)) as writer:
        llama.add_metadata(writer, source)
        writer.add_file_type(LlamaFileType[f"MOSTLY_{options.type}"])
        vocabulary.read(source.directory, int(source.config["vocab_size"])).add_to(writer, source.directory)
        factors = llama.rope_factors(source)
        if factors is not None:
            writer.add_tensor_info(llama.ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        for name in source.names:
            shape, kind = source.shape(name), stored_as(source, name, options)
            size = int(np.prod(quant_shape_to_byte_shape(shape, kind)))
            writer.add_tensor_info(llama.tensor_name(source, name), shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for names in source.weights.shards().values():  # the order of `source.names`
            linear_bytes = rounded = 0
            coded = source.coded(names) if quantized_blocks.carries(source, Kind[options.type]) else {}
            for name in names:
                tensor = llama.arranged(source, name, source.read(name))
                kind = stored_as(source, name, options)
                if name in coded and kind is Kind[options.type]:
                    data: npt.NDArray[np.generic] = quantized_blocks.blocks(arranged(source, name, coded[name]))
                else:
                    data = encoded(name, tensor, kind)
                writer.write_tensor_data(data)
                if name in source.linears:
                    linear_bytes += data.nbytes
                    rounded += int(((tensor != 0) & (decoded(data, kind) == 0)).sum())
            yield Piece(linear_bytes=linear_bytes, rounded_to_zero=rounded)


def stored_as(source: StageSource, name: str, options: GgufOptions) -> Kind:
    """Return the type in which a tensor is stored."""
    shape, kind = source.shape(name), Kind[options.type]
    if len(shape) < 2:
        return Kind.F32
    if kind is Kind.Q4_0 and name not in source.linears:
        kind = Kind.Q8_0
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else Kind.BF16


def arranged(source: StageSource, name: str, quantized: Quantized) -> Quantized:
    """Return codes and scales with their rows in llama.cpp's order."""
    codes, scales = (llama.arranged(source, name, part) for part in (quantized.codes, quantized.scales))
    return replace(quantized, codes=codes, scales=scales)


def encoded(name: str, tensor: Tensor, kind: Kind) -> "npt.NDArray[np.generic]":
    """Encode a tensor in the bytes of a type.

    Raises
    ------
    BesaError
        A value is too large for the type.
    """
    narrowed(name, tensor, _DTYPES.get(kind, torch.float32))
    values = tensor.float().contiguous().numpy()
    return np.ascontiguousarray(quants.quantize(values, kind))


def decoded(data: "npt.NDArray[np.generic]", kind: Kind) -> Tensor:
    """Decode the bytes of a type to the values that a reader computes, in fp32."""
    return torch.from_numpy(np.ascontiguousarray(quants.dequantize(data, kind)))


def loading(options: GgufOptions) -> str:
    """Return instructions for loading the export, in Markdown."""
    return f"""\
```sh
llama-cli -m {file_name(options)} -p "The capital of France is"
```

Any program built on llama.cpp loads it. GGUF has no sparse type: pruned weights are stored as zeros, so it is as large
as a dense model in the same type.
"""
