"""How a sparse checkpoint stores a pruned weight: a mask of bits and the values that are left, back to back.

`docs/export.md` specifies the format.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from besa_cli.errors import BesaError
from besa_cli.ops import affine, bitmask, packing
from besa_cli.ops.affine import Grid, Quantized

METHOD = "besa"  # the quant_method of config.json
FORMAT = 1
INDEX = "sparse.safetensors.index.json"
NEEDS_IMPORT = "import-besa_cli.hf-to-load-this.safetensors.index.json"  # no such file: see hf.py
WEIGHT, MASK, VALUES, SHAPE = "weight", "weight_mask", "weight_values", "weight_shape"
CODES, SCALE, ZERO, GRID = "weight_codes", "weight_scale", "weight_zero", "weight_grid"  # of quantized weights
PARTS = (MASK, VALUES, SHAPE, CODES, SCALE, ZERO, GRID)
_NEEDED = (MASK, VALUES, SHAPE)


def encoded(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor in as few bytes as its zeros allow, by name: the three parts of a matrix, or the tensor itself.

    Parameters
    ----------
    name : str
        The tensor's name in the checkpoint.
    tensor : Tensor
        A matrix of shape (rows, cols) whose name ends in ``.weight`` may become parts; everything else stays.
    """
    prefix, _, last = name.rpartition(".")
    if last != WEIGHT or tensor.dim() != 2:
        return {name: tensor}
    mask = bitmask.stored(tensor)
    parts = {
        MASK: bitmask.packed(mask),
        VALUES: tensor[mask],
        SHAPE: torch.tensor(tensor.shape, dtype=torch.int64),
    }
    if sum(part.nbytes for part in parts.values()) >= tensor.nbytes:
        return {name: tensor}
    return {f"{prefix}.{part}": value for part, value in parts.items()}


def encoded_codes(name: str, tensor: Tensor, quantized: Quantized) -> dict[str, Tensor]:
    """A quantized weight as its mask, the codes that do not stand for zero, and its grid; by name.

    Parameters
    ----------
    name : str
        The weight's name in the checkpoint.
    tensor : Tensor
        What the codes stand for, in the checkpoint's dtype, of shape (rows, cols).
    quantized : Quantized

    Raises
    ------
    BesaError
        The codes stand for other weights than `tensor` holds.
    """
    found, grid, cols = affine.dequantize(quantized).to(tensor.dtype), quantized.grid, tensor.shape[1]
    if not torch.equal(found, tensor):
        raise BesaError(f"{name} is not what its codes stand for", "make the stage anew with --restart")
    mask = quantized.codes != affine.spread(quantized.zeros, grid, cols)
    parts = {
        MASK: bitmask.packed(mask),
        VALUES: torch.empty(0, dtype=tensor.dtype),  # for its dtype
        SHAPE: torch.tensor(tensor.shape, dtype=torch.int64),
        CODES: packing.packed(quantized.codes[mask].unsqueeze(0), grid.bits)[0],
        SCALE: quantized.scales,
        GRID: torch.tensor([grid.bits, grid.width(cols)], dtype=torch.int64),
    }
    if not grid.symmetric:
        parts[ZERO] = quantized.zeros
    prefix = name.rpartition(".")[0]
    return {f"{prefix}.{part}": value for part, value in parts.items()}


def codes(tensors: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """The codes, scales and zero points of one file, by the names that a quantized stage stores them under.

    Raises
    ------
    BesaError
        Parts are missing, or do not belong together.
    """
    found: dict[str, Tensor] = {}
    for name in tensors:
        prefix, _, last = name.rpartition(".")
        if last == CODES:
            own = {part: tensors[f"{prefix}.{part}"] for part in PARTS if f"{prefix}.{part}" in tensors}
            found |= affine.tensors(_quantized(own, f"{prefix}.{WEIGHT} in {place}"), prefix)
    return found


def decoded(tensors: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """The inverse of `encoded`, for all tensors of one file.

    Raises
    ------
    BesaError
        Parts are missing, or do not belong together; names the tensor and `place`, the file they are from.
    """
    found = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        if last == MASK:
            own = {part: tensors[f"{prefix}.{part}"] for part in PARTS if f"{prefix}.{part}" in tensors}
            found[f"{prefix}.{WEIGHT}"] = weight(own, f"{prefix}.{WEIGHT} in {place}")
        elif last not in PARTS:
            found[name] = tensor
        elif f"{prefix}.{MASK}" not in tensors:
            raise _damaged(f"{name} in {place}", f"there is no {MASK} with it")
    return found


def weight(parts: Mapping[str, Tensor], place: str) -> Tensor:
    """The matrix of shape (rows, cols) whose parts these are.

    Raises
    ------
    BesaError
        They do not belong together; `place` names the weight and its file.
    """
    if CODES in parts:
        return affine.dequantize(_quantized(parts, place)).to(parts[VALUES].dtype)
    mask = _mask(parts, place)
    values, count = parts[VALUES], int(mask.sum())
    if values.shape != (count,):
        raise _damaged(place, f"{MASK} has {count} bits set, but {VALUES} has the shape {list(values.shape)}")
    return bitmask.expanded(mask, values)


def _mask(parts: Mapping[str, Tensor], place: str) -> Tensor:
    missing = [part for part in _NEEDED if part not in parts]
    if missing:
        raise _damaged(place, f"{missing[0]} is missing")
    bits, shape = parts[MASK], parts[SHAPE]
    if shape.shape != (2,) or shape.dtype != torch.int64 or bool((shape < 0).any()):
        raise _damaged(place, f"{SHAPE} is not two sizes")
    rows, cols = shape.tolist()
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (rows, -(-cols // 8)):
        raise _damaged(place, f"{MASK} has not a bit for each of {rows} x {cols} weights")
    return bitmask.unpacked(bits, cols)


def _quantized(parts: Mapping[str, Tensor], place: str) -> Quantized:
    """The codes whose parts these are; every code that is not stored stands for zero."""
    mask = _mask(parts, place)
    missing = [part for part in (SCALE, GRID) if part not in parts]
    if missing:
        raise _damaged(place, f"{missing[0]} is missing")
    chosen, scales, data = parts[GRID], parts[SCALE], parts[CODES]
    if chosen.shape != (2,) or not 1 <= int(chosen[0]) <= 8 or int(chosen[1]) < 1:
        raise _damaged(place, f"{GRID} is not bits and columns")
    bits, width = chosen.tolist()
    grid = Grid(bits=bits, group_size=width, symmetric=ZERO not in parts)
    rows, cols = mask.shape
    groups = (rows, grid.groups(cols))
    zeros = parts.get(ZERO, torch.full(groups, grid.middle, dtype=torch.uint8))
    if tuple(scales.shape) != groups or tuple(zeros.shape) != groups:
        raise _damaged(place, f"{SCALE} has not a number for each of {groups[0]} x {groups[1]} groups")
    count = int(mask.sum())
    if tuple(data.shape) != (-(-count * bits // 8),):
        raise _damaged(place, f"{MASK} has {count} bits set, but {CODES} has {len(data)} bytes")
    codes = affine.spread(zeros, grid, cols).clone()
    codes[mask] = packing.unpacked(data.unsqueeze(0), bits, count)[0]
    return Quantized(codes=codes, scales=scales, zeros=zeros, grid=grid)


def _damaged(place: str, reason: str) -> BesaError:
    return BesaError(f"{place} is damaged: {reason}", "fetch the checkpoint again, or export it anew")
