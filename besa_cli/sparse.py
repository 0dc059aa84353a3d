"""How a sparse checkpoint stores a pruned weight: a mask of bits and the values that are left, back to back.

`docs/export.md` specifies the format.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from besa_cli.errors import BesaError
from besa_cli.ops import bitmask, packing

METHOD = "besa"  # the quant_method of config.json
FORMAT = 1
INDEX = "sparse.safetensors.index.json"
NEEDS_IMPORT = "import-besa_cli.hf-to-load-this.safetensors.index.json"  # no such file: see hf.py
WEIGHT, MASK, VALUES, SHAPE = "weight", "weight_mask", "weight_values", "weight_shape"
CODES, SCALE, ZERO, GRID = "weight_codes", "weight_scale", "weight_zero", "weight_grid"  # of quantized weights
PARTS = (MASK, VALUES, SHAPE, CODES, SCALE, ZERO, GRID)
_NEEDED = (MASK, VALUES, SHAPE)


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A quantized weight: codes on a grid.

    Attributes
    ----------
    codes : Tensor of shape (rows, cols), uint8
        0 … 2^bits − 1.
    scales : Tensor of shape (rows, groups), fp16
    zeros : Tensor of shape (rows, groups), uint8, or None
        The zero points; None where they are 2^(bits − 1) everywhere (a symmetric grid).
    bits : int
    width : int
        Columns in a group; the last group of a row may be shorter.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    width: int

    def zero_points(self) -> Tensor:
        """The code that stands for zero, for each weight: shape (rows, cols), uint8."""
        if self.zeros is None:
            return torch.full_like(self.codes, 1 << (self.bits - 1))
        return packing.spread(self.zeros, self.width, self.codes.shape[1])

    def weights(self) -> Tensor:
        """The weights that the codes stand for, in fp32."""
        scales = packing.spread(self.scales, self.width, self.codes.shape[1])
        return packing.weights(self.codes, scales, self.zero_points())


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


def encoded_codes(name: str, tensor: Tensor, coded: Coded) -> dict[str, Tensor]:
    """A quantized weight as its mask, the codes that do not stand for zero, and its grid; by name.

    Parameters
    ----------
    name : str
        The weight's name in the checkpoint.
    tensor : Tensor
        What the codes stand for, in the checkpoint's dtype, of shape (rows, cols).
    coded : Coded

    Raises
    ------
    BesaError
        The codes stand for other weights than `tensor` holds.
    """
    found = coded.weights().to(tensor.dtype)
    if not torch.equal(found, tensor):
        raise BesaError(f"{name} is not what its codes stand for", "make the stage anew with --restart")
    mask = coded.codes != coded.zero_points()
    parts = {
        MASK: bitmask.packed(mask),
        VALUES: torch.empty(0, dtype=tensor.dtype),  # for its dtype
        SHAPE: torch.tensor(tensor.shape, dtype=torch.int64),
        CODES: packing.packed(coded.codes[mask].unsqueeze(0), coded.bits)[0],
        SCALE: coded.scales,
        GRID: torch.tensor([coded.bits, coded.width], dtype=torch.int64),
    }
    if coded.zeros is not None:
        parts[ZERO] = coded.zeros
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
            coded = _coded(own, f"{prefix}.{WEIGHT} in {place}")
            found |= {f"{prefix}.codes": coded.codes, f"{prefix}.scales": coded.scales}
            if coded.zeros is not None:
                found[f"{prefix}.zeros"] = coded.zeros
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
        return _coded(parts, place).weights().to(parts[VALUES].dtype)
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


def _coded(parts: Mapping[str, Tensor], place: str) -> Coded:
    """The codes whose parts these are; every code that is not stored stands for zero."""
    mask = _mask(parts, place)
    missing = [part for part in (SCALE, GRID) if part not in parts]
    if missing:
        raise _damaged(place, f"{missing[0]} is missing")
    grid, scales, zeros, data = parts[GRID], parts[SCALE], parts.get(ZERO), parts[CODES]
    if grid.shape != (2,) or not 1 <= int(grid[0]) <= 8 or int(grid[1]) < 1:
        raise _damaged(place, f"{GRID} is not bits and columns")
    bits, width = grid.tolist()
    rows, cols = mask.shape
    groups = (rows, -(-cols // width))
    if tuple(scales.shape) != groups or (zeros is not None and tuple(zeros.shape) != groups):
        raise _damaged(place, f"{SCALE} has not a number for each of {groups[0]} x {groups[1]} groups")
    count = int(mask.sum())
    if tuple(data.shape) != (-(-count * bits // 8),):
        raise _damaged(place, f"{MASK} has {count} bits set, but {CODES} has {len(data)} bytes")
    empty = Coded(codes=torch.zeros(rows, cols, dtype=torch.uint8), scales=scales, zeros=zeros, bits=bits, width=width)
    found = empty.zero_points().clone()
    found[mask] = packing.unpacked(data.unsqueeze(0), bits, count)[0]
    return Coded(codes=found, scales=scales, zeros=zeros, bits=bits, width=width)


def _damaged(place: str, reason: str) -> BesaError:
    return BesaError(f"{place} is damaged: {reason}", "fetch the checkpoint again, or export it anew")
